"""NVFP4: its scale rules against each other, against exhaustive search, and SOAR's iteration."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import NVFP4Tensor, fake_quantize, rel_mse
from mxfp4_rl.quant.nvfp4 import e4m3_code, e4m3_value
from mxfp4_rl.quant.passes import Rows
from mxfp4_rl.quant.soar import DSS_BETAS, optimise

P = QuantRecipe.parse


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block_errors(x, recipe):
    return (fake_quantize(x, recipe) - x).double().square().unflatten(-1, (-1, 16)).sum(-1)


def test_static_is_the_two_level_formula():
    x = randn(32, 64)
    q = quantize(x, P("nvfp4"))
    assert isinstance(q, NVFP4Tensor) and q.tensor_scale.item() == pytest.approx(x.abs().max().item() / 2688)
    assert q.codes.shape == (32, 32) and q.scales.shape == (32, 4) and q.nbytes == 32 * 36 + 4
    amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    assert torch.equal(q.scales.view(torch.float8_e4m3fn), (amax / 6 / q.tensor_scale).to(torch.float8_e4m3fn))
    assert e4m3_value(q.scales).max() == 448
    scale = (e4m3_value(q.scales) * q.tensor_scale).repeat_interleave(16, -1)
    assert ((q.dequantize() - x).abs() <= scale).all()


def test_e4m3_codes_are_the_format_s():
    codes = torch.arange(1, 127)
    assert torch.equal(e4m3_code(e4m3_value(codes)), codes.int())
    assert (e4m3_value(codes).diff() > 0).all()
    assert e4m3_code(torch.tensor([0.0, 1e-9, 449.0, 1e9])).tolist() == [1, 1, 126, 126]
    assert e4m3_value(torch.tensor([127])).isnan().all()


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=25, deadline=None)
def test_choices_are_never_worse_than_what_they_choose_from(seed, heavy):
    x = randn(8, 160, seed=seed)
    x = x**3 if heavy else x
    slack = 1 + 1e-5
    better_of = torch.minimum(block_errors(x, P("nvfp4+static4")), _six_at_256(x))
    assert (block_errors(x, P("nvfp4+four-over-six")) <= better_of * slack).all()
    assert (block_errors(x, P("nvfp4+search")) <= block_errors(x, P("nvfp4")) * slack).all()
    assert torch.equal(
        fake_quantize(x, QuantRecipe(format="nvfp4", scale_rule="search", search_window=(0, 0))), fake_quantize(x, P("nvfp4"))
    )


def _six_at_256(x):
    """Errors of the largest element at 6 with the tensor scale of four-over-six."""
    g = x.abs().max() / (6 * 256)
    blocks = x.unflatten(-1, (-1, 16))
    s = e4m3_value(e4m3_code(blocks.abs().amax(-1) / 6 / g)).unsqueeze(-1)
    from mxfp4_rl.quant.elements import round_e2m1

    return (round_e2m1(blocks * ((1 / g) / s)) * (s * g) - blocks).double().square().sum(-1)


def test_a_wide_window_finds_the_exhaustive_optimum():
    x = randn(64, 256)
    q = quantize(x, P("nvfp4"))
    best = torch.full((64, 16), torch.inf, dtype=torch.float64)
    blocks = x.unflatten(-1, (-1, 16))
    from mxfp4_rl.quant.elements import round_e2m1

    for code in range(1, 127):
        worth = e4m3_value(torch.tensor(code)) * q.tensor_scale
        best = torch.minimum(best, (round_e2m1(blocks / worth) * worth - blocks).double().square().sum(-1))
    searched = block_errors(x, QuantRecipe(format="nvfp4", scale_rule="search", search_window=(-8, 12)))
    assert (searched <= best * (1 + 1e-5)).all()
    # The window that the paper uses loses almost nothing.
    assert block_errors(x, P("nvfp4+search")).sum() <= 1.002 * best.sum()


@pytest.mark.parametrize(
    "recipe",
    [
        QuantRecipe(format="nvfp4", scale_rule="search"),
        P("nvfp4+four-over-six"),
        P("mxfp4+search"),
        QuantRecipe(scale_rule="search", search_window=(-3, 2)),
    ],
    ids=lambda recipe: recipe.describe(),
)
def test_weighed_errors_are_the_least_of_every_candidate_in_float64(recipe):
    x = randn(24, 128) * torch.logspace(-1, 1, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 8
    importance[64:96] = 0  # inputs that the text never used
    from mxfp4_rl.quant.elements import round_e2m1

    size = recipe.block_size
    weights = (importance / importance.max()).clamp(min=2.0**-40).double().unflatten(-1, (-1, size))
    blocks, q = x.unflatten(-1, (-1, size)), quantize(x, recipe, importance=importance)

    def error(x_hat):
        return (weights * (x_hat - blocks).double().square()).sum(-1)

    best = torch.full((24, 128 // size), torch.inf, dtype=torch.float64)
    plain = quantize(
        x, dataclasses.replace(recipe, scale_rule="static" if recipe.format == "nvfp4" else "rceil", search_window=None)
    )
    for offset in recipe.window if recipe.scale_rule == "search" else (None,):
        if recipe.format == "mxfp4":
            worth = torch.exp2(plain.scales.float() + offset - 127)
            found = [worth]
        elif offset is None:
            amax = blocks.abs().amax(-1)
            found = [e4m3_value(e4m3_code(amax / k / q.tensor_scale)) * q.tensor_scale for k in (6, 4)]
        else:
            found = [e4m3_value((plain.scales.int() + offset).clamp(1, 126)) * q.tensor_scale]
        for worth in found:
            worth = worth.unsqueeze(-1)
            best = torch.minimum(best, error(round_e2m1(blocks / worth) * worth))
    own = error(q.dequantize().unflatten(-1, (-1, size)))
    assert (own <= best * (1 + 1e-5)).all()
    assert own.sum() < error(quantize(x, recipe).dequantize().unflatten(-1, (-1, size))).sum()


@pytest.mark.parametrize(
    "text", ["nvfp4+search", "nvfp4+four-over-six", "mxfp4+search", "mxfp4+search+of+mbs", "mxfp4+search+tile"]
)
def test_one_importance_for_all_weighs_nothing(text):
    x = randn(40, 70)
    plain = quantize(x, P(text)).tensors()
    for importance in (torch.full((70,), 3.5), torch.zeros(70)):
        weighed = quantize(x, P(text), importance=importance).tensors()
        assert all(torch.equal(weighed[key], t) for key, t in plain.items())
    along = quantize(x.T.contiguous(), P(text), axis=0, importance=torch.arange(70.0))
    assert torch.equal(along.dequantize().T, quantize(x, P(text), importance=torch.arange(70.0)).dequantize())


def test_an_importance_that_cannot_be_is_refused():
    x = randn(4, 64)
    for text, why in (
        ("nvfp4", "its scale rule, static, does not choose"),
        ("nvfp4+soar", "its scale rule, soar"),
        ("mxfp4+search+mbs-dynamic", "macro-block factors"),
        ("mxfp4+search+hadamard64", "it rotates"),
    ):
        with pytest.raises(ValueError, match=why):
            quantize(x, P(text), importance=torch.ones(64))
    with pytest.raises(ValueError, match=r"torch.float32 \(32,\), not float32 \(64,\)"):
        quantize(x, P("nvfp4+search"), importance=torch.ones(32))
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="negative or not finite"):
            quantize(x, P("nvfp4+search"), importance=torch.full((64,), wrong))


@pytest.mark.parametrize("text", ["nvfp4", "nvfp4+static4", "nvfp4+four-over-six", "nvfp4+search", "nvfp4+soar"])
def test_extremes_stay_finite_and_a_broken_block_stays_alone(text):
    recipe = P(text)
    for scale in (3.4e38, 1e-44, 1e-30, 0.0):
        x = randn(4, 64).clamp(-1, 1) * scale
        assert fake_quantize(x, recipe).isfinite().all(), scale
    assert rel_mse(randn(16, 64) * 2.0**-90, recipe) == pytest.approx(rel_mse(randn(16, 64), recipe), rel=1e-6)
    x = randn(16, 64)
    broken = x.clone()
    broken[3, 20] = float("inf")
    zeroed = x.clone()
    zeroed[3, 16:32] = 0
    q = quantize(broken, recipe)
    assert q.scales[3, 1] == 127 and (q.scales == 127).sum() == 1
    out, expected = q.dequantize(), fake_quantize(zeroed, recipe)
    assert out[3, 16:32].isnan().all()
    out[3, 16:32] = 0
    assert torch.equal(out, expected)


# ---- SOAR ------------------------------------------------------------------------------------------------------------------


def soar(x, **options):
    rows = Rows(x, -1, P("nvfp4+soar"))
    return optimise(rows, rows.block_amax(), **options)


def test_soar_improves_round_by_round_and_stops_by_its_rule():
    x = randn(256, 512)
    for dss in (False, True):
        errors = soar(x, dss=dss).errors
        improvements = [1 - b / a for a, b in itertools.pairwise(errors)]
        assert len(errors) > 2 and all(i > 0 for i in improvements)
        assert all(i >= 1e-3 for i in improvements[:-1])
        assert improvements[-1] < 1e-3 or len(errors) == 16
    assert len(soar(x, max_rounds=2).errors) == 3
    static = (fake_quantize(x, P("nvfp4")) - x).double().square().sum().item()
    assert soar(x).errors[0] == pytest.approx(static, rel=1e-4)
    final = (fake_quantize(x, P("nvfp4+soar")) - x).double().square().sum().item()
    assert soar(x).errors[-1] == pytest.approx(final, rel=1e-4)


def test_one_round_is_the_two_least_squares_fits():
    """alpha fits x ~ alpha D Q over the tensor, then each D_i fits its block, rounded to E4M3."""
    x = randn(64, 256)
    start = quantize(x, P("nvfp4"))
    d = e4m3_value(start.scales).double()
    q = (start.dequantize().double() / start.tensor_scale).unflatten(-1, (-1, 16)) / d.unsqueeze(-1)
    dq = (q * d.unsqueeze(-1)).flatten(1)
    alpha = torch.linalg.lstsq(dq.reshape(-1, 1), x.double().reshape(-1, 1)).solution.item()
    blocks = x.double().unflatten(-1, (-1, 16))
    fits = (blocks * q).sum(-1) / (alpha * q.square().sum(-1))
    state = soar(x, dss=False, max_rounds=1)
    assert state.tensor_scale.item() == pytest.approx(alpha, rel=1e-6)
    assert (state.codes == e4m3_code(fits.float())).double().mean() > 0.999  # ties may fall either way


def test_dss_beats_no_block_under_the_squared_error():
    """For a stored scale, rounding at that scale is the best for each element: no beta but 1 can win (spec section 6)."""
    x = randn(512, 256)
    state = soar(x, betas=DSS_BETAS, max_rounds=1)
    assert state.codes.numel() >= 8192 and state.other_beta_won == 0
    assert state.errors[-1] == pytest.approx(soar(x, max_rounds=1).errors[-1], rel=1e-6)


def test_published_order_on_gaussian_data():
    x = randn(1024, 1024)
    base = rel_mse(x, P("nvfp4"))
    assert rel_mse(x, P("nvfp4+search")) / base - 1 == pytest.approx(-0.27, abs=0.005)
    assert rel_mse(x, P("nvfp4+four-over-six")) / base - 1 == pytest.approx(-0.165, abs=0.005)
    assert rel_mse(x, P("nvfp4+search")) < rel_mse(x, P("nvfp4+soar")) < rel_mse(x, P("nvfp4+four-over-six")) < base


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4+search"])
def test_a_tensor_scale_can_be_given(name):
    """The tensor's own scale gives the same bits; another one is used and stored; where there is none it is refused."""
    x = randn(8, 64)
    own = quantize(x, P(name))
    again = quantize(x, P(name), tensor_scale=own.tensor_scale.item())
    assert torch.equal(own.codes, again.codes) and torch.equal(own.scales, again.scales)
    other = quantize(x, P(name), tensor_scale=0.5)
    assert other.tensor_scale == 0.5 and (other.dequantize() - x).abs().max() < 1
    for wrong in ("mxfp4", "nvfp4+soar"):
        with pytest.raises(ValueError, match=r"tensor_scale=0\.5 is for nvfp4's rules but soar"):
            quantize(x, P(wrong), tensor_scale=0.5)
