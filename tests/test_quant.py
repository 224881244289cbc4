"""The quantiser against exact rational arithmetic, and the properties it promises."""

import dataclasses
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize, tensor
from mxfp4_rl.quant.elements import decode_packed, encode_e2m1, pack_codes, round_e2m1, unpack_codes
from mxfp4_rl.quant.scales import exp2_byte
from tests.oracle import quantize_block

RULES = ("floor", "rceil", "ceil", "even", "oas")
BASIC = [
    QuantRecipe(),
    QuantRecipe(scale_rule="floor"),
    QuantRecipe(scale_rule="oas", macro_block="static"),
    QuantRecipe(macro_block="static", macro_size=32),
    QuantRecipe(macro_block="dynamic", macro_size=64),
    QuantRecipe(fallback_alpha=0.5),
    QuantRecipe(macro_block="static", fallback_alpha=0.5),
    QuantRecipe(macro_block="dynamic", fallback_alpha=1.0),
    QuantRecipe(scale_rule="search"),
    QuantRecipe(scale_rule="search", macro_block="dynamic", macro_size=256),
    QuantRecipe(scale_rule="search", macro_block="static", fallback_alpha=0.5),
]
RECIPES = [
    *BASIC,
    QuantRecipe(scale_rule=7.25, block_size=16),
    QuantRecipe(fallback_alpha=1.0, fallback_fraction=0.2),
    QuantRecipe(pre_scale=0.75, macro_block="static", fallback_alpha=0.5),
    QuantRecipe(hadamard=64),
    QuantRecipe(tile=True, fallback_alpha=0.5),
    QuantRecipe(scale_rule="search", tile=True, fallback_alpha=1.0),
    QuantRecipe(block_size=16, macro_block="dynamic", macro_size=32, fallback_alpha=0.5),
    QuantRecipe(format="nvfp4"),
    QuantRecipe(format="nvfp4", scale_rule="four_over_six", tile=True),
    QuantRecipe(format="nvfp4", scale_rule="search", hadamard=32),
    QuantRecipe(format="nvfp4", scale_rule="soar"),
]
ids = [r.describe() for r in RECIPES]


def same_bits(a, b):
    view = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(view), b.view(view))


def awkward(rows=64, length=160, seed=0, dtype=torch.float32):
    """Normal values, exact ties, wide exponents, zeros, negative zeros and amax one ulp around every boundary."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=g) * torch.exp2(torch.randint(-100, 100, (rows, 1), generator=g).float())
    x[0] = 0
    x[1, ::2] = -0.0
    grid = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -2.5, -5.0])
    x[2:6] = grid[torch.randint(0, len(grid), (4, length), generator=g)]
    for i, c in enumerate((3.0, 3.5, 4.0, 6.0, 7.0, 8.0)):
        for j, direction in enumerate((-np.inf, 0, np.inf)):
            row = 6 + 3 * i + j
            edge = np.float32(c) if direction == 0 else np.nextafter(np.float32(c), np.float32(direction))
            x[row] = torch.rand(length, generator=g) * 2 - 1
            x[row, 5::32] = float(edge)
    x[24:28] = torch.randn(4, length, generator=g) * 2.0**-126  # subnormal and nearly so
    x[28:30] = torch.randn(2, length, generator=g).clamp(-0.99, 0.99) * 3e38
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [*RULES, 7.25, 4.0, 8.0, 11.5])
def test_codes_and_scales_equal_the_exact_oracle(rule, dtype):
    x = awkward(dtype=dtype)
    x = torch.where(x.float().isfinite(), x, torch.zeros((), dtype=dtype))  # 3e38 may round to inf in BF16
    q = quantize(x, QuantRecipe(scale_rule=rule))
    codes, values = unpack_codes(q.codes), q.dequantize()
    for row in range(x.shape[0]):
        for block in range(x.shape[1] // 32):
            part = slice(32 * block, 32 * block + 32)
            byte, expected, dequantised = quantize_block(x[row, part].tolist(), rule)
            assert q.scales[row, block].item() == byte, (row, block)
            assert codes[row, part].tolist() == expected, (row, block)
            assert [Fraction(v) for v in values[row, part].tolist()] == dequantised, (row, block)


def test_rounding_equals_ml_dtypes_on_every_bfloat16():
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() < 2.0**100]  # the domain of round_e2m1; a block scale brings everything below 8
    ours = round_e2m1(x)
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert same_bits(ours, torch.from_numpy(theirs.astype(np.float32)))
    assert torch.equal(encode_e2m1(ours), torch.from_numpy(theirs.view(np.uint8)))
    assert torch.equal(round_e2m1(x.double()).float(), ours)


def test_packing_round_trips_for_all_bytes():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes = unpack_codes(packed)
    assert codes[0, 2 * 0x21].item() == 1 and codes[0, 2 * 0x21 + 1].item() == 2  # low nibble first
    assert torch.equal(pack_codes(codes), packed)
    assert torch.equal(encode_e2m1(decode_packed(packed)), codes)


@pytest.mark.parametrize("byte, value", [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (254, 2.0**127), (255, float("nan"))])
def test_scale_bytes_decode_exactly(byte, value):
    got = exp2_byte(torch.tensor([byte], dtype=torch.uint8)).item()
    assert got == value or (value != value and got != got)


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_operand_is_the_dequantised_codes_bit_for_bit(recipe):
    x = awkward(rows=40, length=200)
    assert same_bits(fake_quantize(x, recipe), quantize(x, recipe).dequantize())
    y = x.clamp(-1e38, 1e38).bfloat16()
    assert same_bits(fake_quantize(y, recipe), quantize(y, recipe).dequantize(torch.bfloat16))


@pytest.mark.parametrize("recipe", BASIC, ids=ids[: len(BASIC)])
def test_definition_in_float32_steps(recipe):
    """x_hat = (Q(f x) + alpha Q(f x - Q(f x))) / f, each step written out with plain passes over whole tensors."""
    x = torch.randn(32, 416, generator=torch.Generator().manual_seed(3)) * 0.02
    q = quantize(x, recipe)
    factor = torch.ones(32, 416)
    if recipe.macro_block:
        factor = q.macro.repeat_interleave(recipe.macro_size, dim=-1)[:, :416]
    plain = QuantRecipe(scale_rule=recipe.scale_rule)
    y = x * factor
    first = quantize(y, plain)
    assert torch.equal(first.codes, q.codes) and torch.equal(first.scales, q.scales)
    total = first.dequantize()
    if recipe.fallback_alpha is not None:
        second = quantize(y - total, plain)
        assert torch.equal(second.codes, q.residual.codes) and torch.equal(second.scales, q.residual.scales)
        total = total + recipe.fallback_alpha * second.dequantize()
    assert same_bits(q.dequantize(), total / factor)


def test_static_factor_truncates_the_correctly_rounded_quotient():
    """f = 1 + floor(256 (m - 1)) / 256, m the mantissa of fp32(6 / amax); near a boundary one rounding too many shows."""
    boundaries = torch.tensor([6 / (1 + j / 256) for j in range(256)], dtype=torch.float32)
    amax = torch.cat([boundaries, *(torch.nextafter(boundaries, torch.tensor(e)) for e in (0.0, 9.0))])
    got = quantize(amax.view(-1, 1), QuantRecipe(macro_block="static")).macro.view(-1)
    for a, f in zip(amax.tolist(), got.tolist(), strict=True):
        quotient = np.float32(np.float64(6.0) / np.float64(a))  # exact to far below half a float32 step of a tie
        mantissa = float(np.frexp(quotient)[0]) * 2
        assert f == 1 + int(256 * (mantissa - 1)) / 256, a


def test_static_factor_is_the_truncated_mantissa_of_six_over_amax():
    x = torch.rand(512, 128, generator=torch.Generator().manual_seed(1)) * 3 - 1.5
    f = quantize(x, QuantRecipe(macro_block="static")).macro.squeeze(-1)
    amax = x.abs().amax(-1)
    scaled = f * amax / 6
    assert ((f * 256) == (f * 256).round()).all() and (f >= 1).all() and (f < 2).all()
    assert (torch.frexp(scaled).mantissa > 1 - 2**-8).logical_or(torch.frexp(scaled).mantissa == 0.5).all()


@pytest.mark.parametrize("words", ("mxfp4+mbs-dynamic+of", "mxfp4+sr+mbs+of", "mxfp4+tile", "nvfp4+search", "mxfp4+hadamard64"))
def test_the_size_of_chunks_does_not_matter(words, monkeypatch):
    """A GPU reads larger ones than a CPU; what is drawn for stochastic rounding depends on an element's place alone."""
    recipe, x = QuantRecipe.parse(words), torch.randn(300, 416, generator=torch.Generator().manual_seed(0))
    results = []
    for size in (1 << 12, 1 << 17, tensor.GPU_CHUNK):
        monkeypatch.setattr(tensor, "CHUNK", size)
        results.append((fake_quantize(x, recipe, seed=3), quantize(x, recipe, seed=3).dequantize()))
    for operand, dequantised in results[1:]:
        assert torch.equal(operand, results[0][0]) and torch.equal(dequantised, results[0][1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**31), st.sampled_from(RECIPES))
def test_any_length_keeps_shape_and_pads_with_zero_codes(length, seed, recipe):
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(seed))
    q = quantize(x, recipe)
    unit = recipe.hadamard or recipe.block_size
    width = -(-length // unit) * unit
    assert q.codes.shape == (3, width // 2) and q.scales.shape == (3, width // recipe.block_size)
    assert q.dequantize().shape == x.shape
    if not recipe.hadamard:
        assert (unpack_codes(q.codes)[:, length:] == 0).all()
    if recipe.macro_block:
        assert q.macro.shape == (3, -(-length // recipe.macro_size))
    padded = torch.nn.functional.pad(x, (0, width - length))
    assert torch.equal(quantize(padded, recipe).codes, q.codes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.sampled_from(RECIPES),
)
def test_finite_input_never_becomes_nan(values, recipe):
    x = torch.tensor([values])
    assert fake_quantize(x, recipe).isfinite().all()
    assert fake_quantize(torch.cat((x, x.sign() * 3.4e38)), recipe).isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_float16_stays_finite_at_the_end_of_its_range(recipe):
    x = torch.linspace(-65504, 65504, 4 * 256).view(4, 256).half()
    x[0] = 65504
    out = fake_quantize(x, recipe)
    assert out.dtype == torch.float16 and out.isfinite().all()
    assert torch.equal(quantize(x, recipe).dequantize(torch.float16), out)


@settings(max_examples=40, deadline=None)
@given(st.integers(-60, 60), st.integers(0, 2**31), st.sampled_from(RECIPES))
def test_powers_of_two_and_signs_commute(shift, seed, recipe):
    x = torch.randn(2, 130, generator=torch.Generator().manual_seed(seed))
    once = fake_quantize(x, recipe)
    assert torch.equal(fake_quantize(x * 2.0**shift, recipe), once * 2.0**shift)
    assert torch.equal(fake_quantize(-x, recipe), -once)


@pytest.mark.parametrize("rule", RULES)
def test_quantising_twice_changes_nothing(rule):
    x = awkward(rows=30)
    recipe = QuantRecipe(scale_rule=rule)
    once = fake_quantize(x, recipe)
    # Rules that clip keep it too: the clipped maximum 6 s is in the binade of amax, so the scale stays.
    assert torch.equal(fake_quantize(once, recipe), once)


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_axis_and_layout_do_not_matter(recipe, axis):
    x = torch.randn(37, 70, 45, generator=torch.Generator().manual_seed(0))
    q = quantize(x, recipe, axis=axis)
    moved = quantize(x.movedim(axis, -1).contiguous(), recipe)
    assert torch.equal(q.codes, moved.codes) and q.axis == axis % 3
    assert same_bits(q.dequantize().contiguous(), moved.dequantize().movedim(-1, axis).contiguous())
    strided = torch.randn(37, 70, 90)[..., ::2].copy_(x)
    assert torch.equal(quantize(strided, recipe, axis=axis).codes, q.codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", RECIPES, ids=ids)
def test_nan_and_inf_mark_their_block_and_no_other(recipe, bad):
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    x[33, 40] = bad
    out = quantize(x, recipe).dequantize()
    columns = recipe.hadamard or recipe.block_size
    rows = recipe.block_size if recipe.tile else 1
    broken = torch.zeros(40, 256, dtype=torch.bool)
    broken[33 // rows * rows : (33 // rows + 1) * rows, 40 // columns * columns : (40 // columns + 1) * columns] = True
    assert torch.equal(out.isnan(), broken) and out[~broken].isfinite().all()
    assert torch.equal(fake_quantize(x, recipe).isnan(), broken)
    without = x.clone()
    without[broken] = 0
    if recipe.fallback_fraction is None:  # the count of blocks, and so the mask, is the tensor's
        assert torch.equal(out[~broken], fake_quantize(without, recipe)[~broken]), "a broken block touches no other"


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_dynamic_macro_blocks_are_never_worse_than_none(size):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    plain = (fake_quantize(x) - x).unflatten(-1, (-1, size)).square().sum(-1)
    dynamic = fake_quantize(x, QuantRecipe(macro_block="dynamic", macro_size=size)) - x
    assert (dynamic.unflatten(-1, (-1, size)).square().sum(-1) <= plain * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "recipe, expected",  # relative MSE over N(0, 1) with fixed sigma; spec section 11 and 3.3, +-0.5 %
    [
        (QuantRecipe(scale_rule="floor"), 0.013218),
        (QuantRecipe(scale_rule="rceil"), 0.013306),
        (QuantRecipe(scale_rule="ceil"), 0.020802),
        (QuantRecipe(scale_rule="even"), 0.012510),
        (QuantRecipe(scale_rule="oas"), 0.012510),
    ],
    ids=lambda v: v.describe() if isinstance(v, QuantRecipe) else "",
)
def test_published_mean_squared_errors(recipe, expected):
    x = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    assert (fake_quantize(x, recipe) - x).square().mean().item() == pytest.approx(expected, rel=5e-3)


def test_fallback_error_follows_the_formula():
    """Error ratio (1 - alpha)^2 + alpha^2 r with r about .014 (spec 4.3)."""
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    plain = (fake_quantize(x) - x).square().sum()
    for alpha, ratio in ((0.25, 0.561), (0.5, 0.250), (0.75, 0.068), (1.0, 0.014)):
        got = (fake_quantize(x, QuantRecipe(fallback_alpha=alpha)) - x).square().sum() / plain
        assert got.item() == pytest.approx(ratio, abs=0.004)


def test_empty_tensors_and_bad_arguments():
    for text in ("mxfp4", "mxfp4+mbs+of", "mxfp4+hadamard32", "mxfp4+tile", "nvfp4"):
        for shape in ((0, 64), (3, 0), (0,), (2, 0, 5)):
            recipe = QuantRecipe.parse(text)
            assert quantize(torch.empty(shape), recipe).dequantize().shape == shape
            assert fake_quantize(torch.empty(shape), recipe, axis=0).shape == shape
    assert fake_quantize(torch.empty(3, 0)).shape == (3, 0)
    with pytest.raises(TypeError, match="int32"):
        quantize(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(IndexError, match="axis=2"):
        quantize(torch.zeros(4, 4), axis=2)
    with pytest.raises(ValueError, match="backend='cuda'"):
        quantize(torch.zeros(4), backend="cuda")


def test_stored_size_and_tensors():
    q = quantize(torch.randn(64, 256), QuantRecipe(macro_block="static", fallback_alpha=0.5))
    assert set(q.tensors()) == {"codes", "scales", "macro", "residual.codes", "residual.scales"}
    assert q.nbytes == 2 * 64 * (128 + 8) + 64 * 2 * 4
    copy = q.to("cpu")
    assert torch.equal(copy.dequantize(), q.dequantize())
    assert dataclasses.replace(q, residual=None).dequantize().shape == (64, 256)
