"""The error's parts add up to it, are orthogonal where the theory says so, and give the paper's table."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl import QuantRecipe, RecipeError, decompose
from mxfp4_rl.quant import ErrorStats, error_stats, fake_quantize, partition, precision_sweep, scale_ratios
from tests.test_quant import RECIPES as ALL_RECIPES
from tests.test_quant import awkward

RECIPES = [r for r in ALL_RECIPES if not r.hadamard]
ids = [r.describe() for r in RECIPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_parts_sum_to_the_error_exactly(recipe, dtype):
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    error = fake_quantize(x, recipe, dtype=torch.float32).double() - x.double()
    assert torch.equal(decompose(x, recipe).total(), error)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.sampled_from(RECIPES), st.integers(-80, 80))
def test_parts_sum_to_the_error_exactly_for_any_draw(seed, length, recipe, shift):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, generator=g) ** 3 * 2.0**shift
    assert torch.equal(decompose(x, recipe).total(), fake_quantize(x, recipe).double() - x.double())


@pytest.mark.parametrize("rule", ["rceil", "ceil"])
@pytest.mark.parametrize("macro", [None, "static"])
def test_deadzone_is_orthogonal_where_the_scale_never_clips(rule, macro):
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    parts = decompose(x, QuantRecipe(scale_rule=rule, macro_block=macro))
    assert (parts.deadzone * parts.grid_noise == 0).all()
    assert (parts.deadzone * parts.scale_bias == 0).all()
    assert (parts.deadzone != 0).any()


@pytest.mark.parametrize("rule", ["floor", "even", "oas"])
def test_deadzone_is_not_orthogonal_where_the_scale_may_clip(rule):
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    parts = decompose(x, QuantRecipe(scale_rule=rule))
    assert (parts.deadzone * parts.scale_bias != 0).any()


def test_paper_table_shares_on_near_gaussian_weights():
    """Qwen2.5-3B: S 1.725, D .026, G .703, cos -.657; t(30) rows with log-uniform sigma reproduce it to .01."""
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(2048, 1024, generator=g)
    chi2 = torch.randn(30, 2048, 1024, generator=g).square_().sum(0)
    x = normal / (chi2 / 30).sqrt() * torch.exp2(torch.rand(2048, 1, generator=g))
    stats = error_stats(x)
    shares, metrics = stats.shares(), stats.metrics()
    assert shares["scale_bias"] == pytest.approx(1.72, abs=0.01)
    assert shares["deadzone"] == pytest.approx(0.022, abs=0.001)
    assert shares["grid_noise"] == pytest.approx(0.707, abs=0.01)
    assert metrics["cos_scale_grid"] == pytest.approx(-0.657, abs=0.005)
    assert metrics["delta_mean"] == pytest.approx(0.5, abs=0.01)
    s, d, gr, c = shares["scale_bias"], shares["deadzone"], shares["grid_noise"], metrics["cos_scale_grid"]
    assert s + d + gr + 2 * c * (s * gr) ** 0.5 == pytest.approx(1.0, abs=1e-9)


def test_corrections_show_as_a_fall_of_their_part():
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    plain = error_stats(x).metrics()
    mbs = error_stats(x, QuantRecipe(macro_block="static")).metrics()
    of = error_stats(x, QuantRecipe(fallback_alpha=0.5)).metrics()
    assert mbs["scale_bias"] < 0.75 * plain["scale_bias"] and mbs["rel_mse"] < plain["rel_mse"]
    assert of["fallback"] > 0 and plain["fallback"] == 0
    assert of["rel_mse"] == pytest.approx(plain["rel_mse"] / 4, rel=0.02)
    assert of["deadzone"] == plain["deadzone"]


def test_pooled_statistics_are_ratios_of_sums():
    a, b = torch.randn(64, 128), 10 * torch.randn(32, 128)
    pooled, joint = error_stats(a) + error_stats(b), error_stats(torch.cat((a, b)))
    for name, value in joint.metrics().items():
        assert pooled.metrics()[name] == pytest.approx(value, rel=1e-9)
    assert ErrorStats().metrics() == {} and error_stats(torch.zeros(4, 64)).metrics() == {}


def test_a_broken_block_does_not_poison_the_statistics():
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    broken = x.clone()
    broken[3, 70] = float("nan")
    clean = x.clone()
    clean[3, 64:96] = 0
    got, expected = error_stats(broken).metrics(), error_stats(clean).metrics()
    assert got["rel_mse"] == pytest.approx(expected["rel_mse"], rel=1e-12)
    assert decompose(broken).total()[3, 64:96].isnan().all()


@pytest.mark.parametrize("text", ["mxfp4", "mxfp4+tile", "mxfp4+of", "nvfp4"])
def test_a_broken_last_block_that_is_not_full(text):
    recipe = QuantRecipe.parse(text)
    x = torch.randn(64, 70, generator=torch.Generator().manual_seed(0))
    x[1, 69] = float("inf")
    rows = slice(0, recipe.tile_rows) if recipe.tile else slice(1, 2)
    start = 70 // recipe.block_size * recipe.block_size
    sound = torch.ones(64, 70, dtype=torch.bool)
    sound[rows, start:] = False
    stats = error_stats(x, recipe)
    assert stats.elements == sound.sum() and stats.broken == (~sound).sum()
    first = fake_quantize(x, dataclasses.replace(recipe, fallback_alpha=None), dtype=torch.float32)
    assert stats.zero_elements == ((first == 0) & sound).sum()
    error = (fake_quantize(x, recipe).double() - x)[sound].square().sum().item()
    assert stats.error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("measure", [decompose, partition, error_stats, scale_ratios])
def test_arguments_are_checked_like_the_quantiser_s(measure):
    with pytest.raises(IndexError, match=r"axis=-1 is out of range for a tensor of shape \(\)"):
        measure(torch.tensor(1.0), QuantRecipe())
    with pytest.raises(IndexError, match="axis=2"):
        measure(torch.zeros(4, 4), QuantRecipe(), 2)
    with pytest.raises(TypeError, match="int32"):
        measure(torch.zeros(4, dtype=torch.int32), QuantRecipe())


def test_measuring_a_stochastic_recipe_with_a_seed_leaves_the_generator_alone():
    x, recipe = torch.randn(4, 64), QuantRecipe(rounding="stochastic")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    error_stats(x, recipe, seed=1), scale_ratios(x, recipe, seed=1), decompose(x, recipe, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_awkward_values_stay_finite():
    x = awkward().clamp(-1e37, 1e37)
    for recipe in RECIPES:
        assert decompose(x, recipe).total().isfinite().all()


# ---- the split by the actual scale ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_partition_sums_to_the_error_on_disjoint_elements(recipe, dtype):
    x = (torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) ** 3).to(dtype)
    parts = partition(x, recipe)
    error = fake_quantize(x, recipe, dtype=torch.float32).double() - x.double()
    assert torch.equal(parts.total(), error)
    first = [parts.deadzone, parts.clipping, parts.grid_noise]
    assert (sum((part != 0).int() for part in first) <= 1).all()
    assert sum(error_stats(x, recipe).partition().values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_statistics_are_the_energies_of_the_parts(recipe):
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(33, 200, generator=torch.Generator().manual_seed(1)) ** 3).to(dtype)
        stats, parts, split = error_stats(x, recipe), decompose(x, recipe), partition(x, recipe)
        for name in ("scale_bias", "deadzone", "grid_noise", "fallback"):
            assert getattr(stats, name) == pytest.approx(getattr(parts, name).square().sum().item(), rel=1e-5, abs=1e-12), name
        assert stats.zeroed == pytest.approx(split.deadzone.square().sum().item(), rel=1e-5)
        assert stats.clipped == pytest.approx(split.clipping.square().sum().item(), rel=1e-5, abs=1e-12)
        assert stats.error == pytest.approx(parts.total().square().sum().item(), rel=1e-5)
        assert stats.cross == pytest.approx((parts.scale_bias * parts.grid_noise).sum().item(), rel=1e-4)
        assert stats.elements == x.numel() and stats.broken == 0
        first = fake_quantize(x, dataclasses.replace(recipe, fallback_alpha=None, fallback_fraction=None), dtype=torch.float32)
        assert stats.zero_elements == (first == 0).sum()
        assert stats.final_zeros == (fake_quantize(x, recipe, dtype=torch.float32) == 0).sum()
        dead_error = parts.total()[parts.deadzone != 0]
        assert stats.dead_error == pytest.approx(dead_error.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("shift", [-120, -60, 60, 100])
def test_statistics_of_tiny_and_huge_numbers(shift):
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, got = error_stats(x).metrics(), error_stats(x * 2.0**shift).metrics()
    assert got == pytest.approx(expected, rel=1e-5)
    sweep = precision_sweep(x * 2.0**shift)
    assert sweep[0] / sweep[None] == pytest.approx(precision_sweep(x)[0] / precision_sweep(x)[None], rel=1e-5)


@pytest.mark.parametrize(
    "rule, deadzone, grid, clipping",  # Student t with 12 degrees of freedom (spec 2.5 B)
    [("rceil", 0.089, 0.911, 0.0), ("floor", 0.039, 0.814, 0.147)],
)
def test_partition_shares_of_a_rule_that_clips_and_one_that_does_not(rule, deadzone, grid, clipping):
    torch.manual_seed(0)
    x = torch.distributions.StudentT(12.0).sample((2048, 1024))
    shares = error_stats(x, QuantRecipe(scale_rule=rule)).partition()
    assert shares["deadzone"] == pytest.approx(deadzone, abs=0.006)
    assert shares["grid_noise"] == pytest.approx(grid, abs=0.006)
    assert shares["clipping"] == pytest.approx(clipping, abs=0.006)


def test_scale_precision_falls_to_the_real_valued_scale():
    """Ratio to the floor for k = 0..8 mantissa bits on Gaussian data (spec section 11, row 6)."""
    x = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.linspace(0, 1, 4096)).unsqueeze(
        1
    )
    errors = precision_sweep(x)
    floor = errors[None]
    assert errors[0] == pytest.approx((fake_quantize(x) - x).double().square().sum().item(), rel=1e-5)
    ratios = [errors[k] / floor for k in range(9)]
    assert all(a > b for a, b in itertools.pairwise(ratios))
    for ratio, expected in zip(ratios, (1.333, 1.286, 1.245, 1.085, 1.031, 1.013, 1.006, 1.003, 1.001)):
        assert ratio == pytest.approx(expected, abs=0.012)
    x[0, 0] = float("nan")
    assert precision_sweep(x)[None] == pytest.approx(floor, rel=1e-3)


def test_scale_ratios_are_between_zero_and_one_octave_without_clipping():
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.linspace(0, 1, 512)).unsqueeze(1)
    delta = scale_ratios(x)
    assert delta.shape == (512 * 8,) and (delta >= -1e-6).all() and (delta < 1).all()
    assert delta.double().mean().item() == pytest.approx(error_stats(x).metrics()["delta_mean"], abs=1e-6)
    assert torch.exp2(delta.double()).mean().item() == pytest.approx(1.4427, abs=0.01)  # 1 / ln 2: the paper's 44 %
    assert scale_ratios(x, QuantRecipe(scale_rule="floor")).min() < 0
    assert scale_ratios(torch.zeros(4, 64)).numel() == 0


@pytest.mark.parametrize("text", ["mxfp4+hadamard64", "mxfp4+hadamard256+of", "nvfp4+hadamard128"])
@pytest.mark.parametrize("length", [256, 200, 2])
def test_rotated_recipes_have_statistics_but_no_parts(text, length):
    x = torch.randn(64, length, generator=torch.Generator().manual_seed(0))
    recipe = QuantRecipe.parse(text)
    error = (fake_quantize(x, recipe) - x).double().square().sum().item()
    stats = error_stats(x, recipe)
    assert stats.error == pytest.approx(error, rel=1e-5)
    assert stats.product == pytest.approx((fake_quantize(x, recipe).double() * x).sum().item(), rel=1e-5)
    assert 0 <= stats.metrics()["zero_fraction"] < 0.3 and 0 <= stats.metrics()["deadzone_fraction"] < 0.3
    with pytest.raises(RecipeError, match="hadamard=None"):
        decompose(x, recipe)
