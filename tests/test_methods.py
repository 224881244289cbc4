"""Every method beyond plain MXFP4, each against its definition written out another way."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize, rel_mse
from mxfp4_rl.quant.elements import E2M1_VALUES, round_e2m1_stochastic, unpack_codes
from mxfp4_rl.quant.hadamard import rotate, rotate_back
from mxfp4_rl.quant.philox import philox4x32, random_words, uniform
from mxfp4_rl.quant.scales import exp2_byte
from tests.oracle import GRID, e2m1_code
from tests.test_quant import awkward, same_bits


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block_errors(x, recipe, size=32):
    return (fake_quantize(x, recipe) - x).double().square().unflatten(-1, (-1, size)).sum(-1)


# ---- the scale rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, constant", [("rceil", 6.0), ("oas", 7.0), ("ceil", 4.0)])
def test_named_rules_are_members_of_the_constant_family(rule, constant):
    x = awkward()
    a, b = quantize(x, QuantRecipe(scale_rule=rule)), quantize(x, QuantRecipe(scale_rule=constant))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@given(st.floats(4, 12), st.floats(2.0**-100, 2.0**100, width=32))
@settings(deadline=None)
def test_a_constant_puts_the_largest_element_into_its_octave(constant, amax):
    x = torch.full((1, 32), amax)
    ratio = amax / exp2_byte(quantize(x, QuantRecipe(scale_rule=constant)).scales).item()
    rounded = torch.tensor(constant).item()  # c is compared as a float32
    assert rounded / 2 < ratio <= rounded


def test_oas_is_rceil_with_scales_halved_where_that_loses_little():
    """arXiv 2603.08713's wording: rceil; if amax / s <= 3.5 then s is halved."""
    x = awkward()
    rceil, oas = quantize(x).scales.int(), quantize(x, QuantRecipe(scale_rule="oas")).scales.int()
    amax = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(-1, (-1, 32)).abs().amax(-1)
    halve = (amax.double() / exp2_byte(rceil).double() <= 3.5) & (rceil > 1) & (rceil < 250)
    assert torch.equal(oas, rceil - halve.int())
    assert halve.any() and not halve.all()


@pytest.mark.parametrize("window", [(-1, 0), (-2, 1), (0, 0)])
def test_exponent_search_equals_exhaustive_search_in_exact_arithmetic(window):
    x = torch.cat((randn(24, 32), randn(8, 32, seed=1) ** 3, awkward()[2:24, :32]))
    q = quantize(x, QuantRecipe(scale_rule="search", search_window=window))
    base = quantize(x).scales.squeeze(-1).tolist()
    for row, (byte, start) in enumerate(zip(q.scales.squeeze(-1).tolist(), base, strict=True)):
        values = [Fraction(v) for v in x[row].tolist()]

        def error(b):
            s = Fraction(2) ** (b - 127)
            return sum((abs(v) - s * GRID[e2m1_code(v / s, False)]) ** 2 for v in values)  # noqa: B023

        candidates = {b: error(b) for b in range(max(start + window[0], 1), min(start + window[1], 250) + 1)}
        best = min(candidates.values())
        # Squares are rounded to float32: where two candidates agree to a millionth, either is right.
        assert candidates[byte] <= best * (1 + Fraction(1, 10**6)), row
        if list(candidates.values()).count(best) > 1 and best == 0:
            assert byte == next(b for b, e in candidates.items() if e == best), "the first of equals is kept"


@given(st.integers(0, 2**31), st.sampled_from([16, 32]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_search_is_never_worse_than_the_rules_in_its_window(seed, size, heavy):
    x = randn(8, 128, seed=seed)
    x = x**3 if heavy else x
    searched = block_errors(x, QuantRecipe(scale_rule="search", block_size=size), size)
    for rule in ("rceil", "floor", "oas"):
        assert (searched <= block_errors(x, QuantRecipe(scale_rule=rule, block_size=size), size) * (1 + 1e-5)).all(), rule


def test_blocks_of_16_are_blocks_of_32_of_spread_out_rows():
    x = randn(16, 64)
    spread = torch.zeros(16, 4, 32)
    spread[..., :16] = x.unflatten(-1, (-1, 16))
    assert torch.equal(
        fake_quantize(x, QuantRecipe(block_size=16)), fake_quantize(spread.flatten(1)).view(16, 4, 32)[..., :16].flatten(1)
    )


# ---- macro blocks ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from([32, 64, 96, 128, 192, 256]), st.integers(0, 2**31), st.sampled_from(["rceil", "oas", "search", 7.25]))
@settings(max_examples=30, deadline=None)
def test_dynamic_macro_blocks_take_the_best_of_the_sixteen_candidates(size, seed, rule):
    x = randn(6, 768, seed=seed) * torch.exp2(randn(6, 768, seed=seed + 1))

    def errors(x_hat):
        return (x_hat - x).double().square().unflatten(-1, (-1, size)).sum(-1)

    plain = QuantRecipe(scale_rule=rule)
    candidates = torch.stack([errors(fake_quantize(x * (1 + j / 16), plain) / (1 + j / 16)) for j in range(16)])
    dynamic = QuantRecipe(scale_rule=rule, macro_block="dynamic", macro_size=size)
    assert torch.allclose(errors(fake_quantize(x, dynamic)), candidates.amin(0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_macro_blocks_over_blocks_of_16(kind):
    x = randn(8, 512)
    q = quantize(x, QuantRecipe(block_size=16, macro_block=kind, macro_size=64))
    assert q.macro.shape == (8, 8) and q.scales.shape == (8, 32)
    factor = q.macro.repeat_interleave(64, -1)
    assert same_bits(q.dequantize(), fake_quantize(x * factor, QuantRecipe(block_size=16)) / factor)
    if kind == "static":
        scaled = torch.frexp((x * factor).unflatten(-1, (-1, 64)).abs().amax(-1) / 6).mantissa
        assert ((scaled > 1 - 2**-8) | (scaled == 0.5)).all()


def test_static_macro_blocks_of_one_block_reach_the_real_valued_scale():
    from mxfp4_rl.quant import precision_sweep

    x = randn(512, 1024)
    floor = precision_sweep(x)[None] / x.numel()
    assert rel_mse(x, QuantRecipe.parse("mxfp4+mbs32")) * x.square().mean() == pytest.approx(floor, rel=0.01)


# ---- outlier fallback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [False, True])
def test_masked_fallback_touches_the_largest_blocks_only(tile):
    x = randn(64, 512) * torch.exp2(randn(64, 1, seed=1))
    common = {"fallback_alpha": 1.0, "tile": tile}
    amax = x.abs().unflatten(-1, (-1, 32)).amax(-1)
    if tile:
        amax = amax.unflatten(0, (-1, 32)).amax(1).repeat_interleave(32, 0)
    count = 100 if not tile else 7
    threshold = amax.flatten().unique().sort(descending=True).values[count - 1]
    fraction = (amax >= threshold).double().mean().item()
    chosen = (amax >= threshold).repeat_interleave(32, -1)
    plain, full = fake_quantize(x, QuantRecipe(tile=tile)), fake_quantize(x, QuantRecipe(**common))
    expected = torch.where(chosen, full, plain)
    assert torch.equal(fake_quantize(x, QuantRecipe(fallback_fraction=fraction, **common)), expected)
    assert torch.equal(fake_quantize(x, QuantRecipe(fallback_fraction=1.0, **common)), full)
    above = torch.where((amax > threshold).repeat_interleave(32, -1), full, plain)
    assert torch.equal(fake_quantize(x, QuantRecipe(fallback_threshold=threshold.item(), **common)), above)
    assert torch.equal(fake_quantize(x, QuantRecipe(fallback_threshold=0.0, **common)), full)


def test_masked_fallback_stores_zero_codes_where_it_is_left_out():
    x = randn(32, 256)
    q = quantize(x, QuantRecipe(fallback_alpha=0.5, fallback_fraction=0.25))
    left_out = q.residual.scales == 1
    assert left_out.double().mean().item() == pytest.approx(0.75)
    codes = unpack_codes(q.residual.codes).unflatten(-1, (-1, 32))
    assert (codes[left_out] & 7 == 0).all() and (codes[~left_out] & 7 != 0).any()
    assert same_bits(q.dequantize(), fake_quantize(x, QuantRecipe(fallback_alpha=0.5, fallback_fraction=0.25)))


# ---- pre-scaling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["rceil", "floor", "oas"])
def test_pre_scale_is_quantising_three_quarters(rule):
    x = randn(64, 256)
    expected = fake_quantize(0.75 * x, QuantRecipe(scale_rule=rule)) / 0.75
    assert same_bits(fake_quantize(x, QuantRecipe(scale_rule=rule, pre_scale=0.75)), expected)


def test_pre_scaled_rceil_is_the_unclipped_floor_of_training_llms_with_mxfp4():
    """arXiv 2502.20586 scales by floor and the elements by 3/4: the same scales, but where amax is a power of two."""
    x = randn(256, 512)
    q = quantize(x, QuantRecipe(pre_scale=0.75))
    floor = quantize(x, QuantRecipe(scale_rule="floor"))
    assert torch.equal(q.scales, floor.scales)
    assert torch.equal(quantize(torch.full((1, 32), 4.0), QuantRecipe(pre_scale=0.75)).scales.int() + 1, torch.tensor([[127]]))
    assert quantize(torch.full((1, 32), 4.0), QuantRecipe(scale_rule="floor")).scales.item() == 127


# ---- 2-D tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["mxfp4+tile", "mxfp4+tile+oas+of1", "nvfp4+tile", "nvfp4+tile+static4"])
@pytest.mark.parametrize("shape", [(64, 96), (80, 72), (5, 33)])
def test_a_tiled_weight_is_the_same_along_either_axis(text, shape):
    w = randn(*shape)
    recipe = QuantRecipe.parse(text)
    assert torch.equal(fake_quantize(w, recipe, axis=-1), fake_quantize(w, recipe, axis=0))


def test_a_tile_has_one_scale_and_experts_do_not_share_it():
    w = torch.stack((randn(40, 64), 100 * randn(40, 64, seed=1)))
    recipe = QuantRecipe(tile=True)
    q = quantize(w, recipe)
    assert (q.scales[:, :32] == q.scales[:, :1]).all() and (q.scales[:, 32:] == q.scales[:, 32:33]).all()
    for expert in range(2):
        assert same_bits(q.dequantize()[expert].contiguous(), quantize(w[expert], recipe).dequantize())
    amax = w[1, :32].unflatten(-1, (2, 32)).abs().amax((0, 2))
    assert torch.equal(q.scales[1, 0], quantize(amax.view(2, 1).expand(2, 32)).scales[:, 0])


# ---- Hadamard --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_rotation_is_orthogonal_and_its_inverse_undoes_it(size):
    basis = rotate(torch.eye(size), size)  # row i is R e_i
    assert torch.allclose(basis @ basis.t(), torch.eye(size), atol=1e-5)
    assert (basis.abs() - size**-0.5).abs().max() < 1e-6
    x = randn(5, 3 * size)
    assert torch.allclose(rotate_back(rotate(x, size), size), x, atol=1e-5)
    assert torch.allclose(rotate(x, size).unflatten(-1, (-1, size)), x.unflatten(-1, (-1, size)) @ basis, atol=1e-4)


def test_rotated_operands_multiply_like_a_kernel_that_never_rotates_back():
    a, b = randn(32, 256), randn(48, 256, seed=1)
    recipe, plain = QuantRecipe(hadamard=128), QuantRecipe()
    product = fake_quantize(a, recipe) @ fake_quantize(b, recipe).t()
    kernel = fake_quantize(rotate(a, 128), plain) @ fake_quantize(rotate(b, 128), plain).t()
    assert torch.allclose(product, kernel, rtol=1e-4, atol=1e-3)


def test_rotation_keeps_outliers_from_sending_their_block_to_zero():
    x = randn(64, 256)
    x[:, 7::32] *= 50

    def zeros(recipe):
        return (unpack_codes(quantize(x, recipe).codes) & 7 == 0).double().mean().item()

    assert zeros(QuantRecipe()) > 0.7
    assert zeros(QuantRecipe(hadamard=32)) < 0.05


# ---- stochastic rounding ---------------------------------------------------------------------------------------------------


def words(*values):
    return [torch.tensor([v]) for v in values]


@pytest.mark.parametrize(
    "counter, key, expected",  # the known-answer vectors published with Random123
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert [w.item() for w in philox4x32(words(*counter), key)] == list(expected)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**36), st.integers(1, 40), st.integers(0, 3))
@settings(deadline=None)
def test_random_words_depend_on_seed_and_position_only(seed, start, count, stream):
    whole = random_words(seed, start, count + 8, stream)
    assert torch.equal(random_words(seed, start + 3, count, stream), whole[3 : 3 + count])
    assert (whole >= 0).all() and (whole < 2**32).all()
    assert not torch.equal(random_words(seed + 1, start, count + 8, stream), whole)


def test_stochastic_rounding_picks_a_neighbour_with_the_right_probability():
    u = torch.arange(4096) / 4096
    for t in (0.0, 0.1, 0.5, 0.7, 1.25, 1.9, 2.0, 2.3, 3.5, 4.5, 5.9, 6.0):
        got = round_e2m1_stochastic(torch.full_like(u, -t), u)
        below, above = max(v for v in E2M1_VALUES if v <= t), min(v for v in E2M1_VALUES if v >= t)
        assert set(got.tolist()) <= {-below, -above}
        assert got.double().mean().item() == pytest.approx(-t, abs=2e-3)
        assert torch.signbit(got).all()
    assert round_e2m1_stochastic(torch.tensor([7.5, -1e30]), torch.tensor([0.9, 0.0])).tolist() == [6.0, -6.0]
    assert round_e2m1_stochastic(torch.tensor([float("nan")]), torch.zeros(1)).isnan().all()


def test_stochastic_rounding_is_unbiased_where_the_scale_does_not_clip():
    x = randn(4, 64)
    for text in ("mxfp4+sr", "mxfp4+sr+prescale", "mxfp4+sr+mbs32", "mxfp4+sr+tile", "mxfp4+sr+of1"):
        recipe = QuantRecipe.parse(text)
        mean = torch.stack([fake_quantize(x, recipe, seed=s) for s in range(600)]).double().mean(0)
        step = exp2_byte(quantize(x).scales).repeat_interleave(32, -1) * 2  # the largest step of each block's grid
        assert ((mean - x).abs() < 4 * step / 600**0.5).all(), text
    assert (fake_quantize(x, QuantRecipe(scale_rule="floor", rounding="stochastic"), seed=0).abs() <= x.abs().max()).all()


def test_stochastic_rounding_is_reproducible_and_independent_of_chunks():
    recipe = QuantRecipe.parse("mxfp4+sr+of0.5")
    x = randn(700, 416)  # several chunks
    a = fake_quantize(x, recipe, seed=5)
    assert same_bits(a, quantize(x, recipe, seed=5).dequantize())
    assert not torch.equal(a, fake_quantize(x, recipe, seed=6))
    assert same_bits(a[:3], fake_quantize(x[:3].contiguous(), recipe, seed=5))
    torch.manual_seed(1)
    first = fake_quantize(x, recipe)
    assert not torch.equal(first, fake_quantize(x, recipe))
    torch.manual_seed(1)
    assert same_bits(first, fake_quantize(x, recipe))


def test_uniform_bits_are_uniform():
    u = uniform(3, 0, 1 << 18)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - 4096).square() / 4096).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi squared, five deviations


# ---- combinations ----------------------------------------------------------------------------------------------------------


WORDS = ("oas", "search", "mbs32", "mbs-dynamic", "of1", "prescale", "b16", "tile", "hadamard64", "sr")
CLASHES = ({"oas", "search"}, {"mbs32", "mbs-dynamic"}, {"tile", "mbs32"}, {"tile", "mbs-dynamic"}, {"tile", "hadamard64"})


@pytest.mark.parametrize(
    "words",
    [w for n in range(4) for w in itertools.combinations(WORDS, n) if not any(clash <= set(w) for clash in CLASHES)],
    ids="+".join,
)
def test_corrections_combine(words):
    """Every combination of three stores what it computes, and its error is of the size that its strongest word promises."""
    x = randn(64, 256)
    recipe = QuantRecipe.parse("+".join(("mxfp4", *words)))
    error = rel_mse(x, recipe, seed=0)
    assert same_bits(quantize(x, recipe, seed=0).dequantize(), fake_quantize(x, recipe, seed=0))
    bound = 0.0145 * (1.8 if "tile" in words else 1) * (2.3 if "sr" in words else 1)
    if "of1" in words:  # the second pass's relative error times the first's (spec 4.3: r = .014 of it)
        bound *= 0.06 if "sr" in words or "tile" in words else 0.025
    assert bound / 12 < error < bound


def test_the_two_passes_of_a_stochastic_fallback_draw_apart():
    q = quantize(randn(64, 256), QuantRecipe.parse("mxfp4+sr+of1"), seed=3)
    first, second = unpack_codes(q.codes).float(), unpack_codes(q.residual.codes).float()
    again = quantize(randn(64, 256), QuantRecipe.parse("mxfp4+sr+of1"), seed=3)
    assert torch.equal(again.residual.codes, q.residual.codes) and not torch.equal(first, second)
    u, v = uniform(3, 0, 1 << 16), uniform(3, 0, 1 << 16, stream=1)
    assert abs(torch.corrcoef(torch.stack((u, v)))[0, 1].item()) < 0.02
    # Where the first pass rounded up the residual is negative: with shared bits the second would round it away from zero.
    x = torch.full((256, 256), 0.3)
    x[:, ::32] = 6.0
    mean = torch.stack([fake_quantize(x, QuantRecipe.parse("mxfp4+sr+of1"), seed=s) for s in range(20)]).mean()
    assert mean.item() == pytest.approx(x.mean().item(), rel=2e-3)


def test_a_zero_residual_has_the_canonical_scale():
    x = torch.tensor([[4.0, 2.0, 1.0, 0.5] * 8]) * 2.0**20
    q = quantize(x, QuantRecipe(fallback_alpha=1.0))
    assert q.residual.scales.item() == 1 and (q.residual.codes & 0x77 == 0).all()
