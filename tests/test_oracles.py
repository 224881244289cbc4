"""The quantisers against other people's: torchao, compressed-tensors, ml_dtypes, transformers; codes and scales bit for bit.

Where an implementation is wrong, or differs by convention, a test says exactly where and by how much. Every comparison is
counted; the run's summary lists the counts.

    what is written    ours: E8M0 bytes 1..250. torchao and compressed-tensors: 0..254, and 0 for a block of zeros. So only
                       blocks whose scale leaves 1..250 differ, and only as `test_beyond_the_written_range` says
    -0                 ours, torchao and ml_dtypes keep it; compressed-tensors' rounder makes +0 of a quotient -0
    torchao RCEIL      takes a float32 logarithm: too small by one where amax is just above 6 * 2^k
    infinity           marks its block as NaN here, is finite in torchao; NaN marks it in both
    byte 255           ours and torchao: NaN. transformers reads 2^128
    NVFP4              torchao's smallest block scale is 2^-6, ours 2^-9; compressed-tensors stores 1 / g
"""

import dataclasses
import functools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize as compressed_tensors_quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize, per_tensor_amax_to_scale
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant.elements import decode_packed, encode_e2m1, round_e2m1, unpack_codes
from mxfp4_rl.quant.scales import MAX_BYTE, MIN_BYTE, exp2_byte
from tests.oracle import scale_exponent
from tests.oracle_data import FIRST_EXPONENT, KINDS, LAST_EXPONENT, MIDPOINTS, beyond, neighbours

TORCHAO_RULES = ("floor", "ceil", "even")
RULES = ("floor", "rceil", "ceil", "even", "oas")
INT = {torch.float32: torch.int32, torch.bfloat16: torch.int16}

each_kind = pytest.mark.parametrize("kind", KINDS)
data = functools.cache(lambda kind: KINDS[kind]())


def ours(x, rule):
    """(scale bytes, codes) of every element, uint8."""
    q = quantize(x, QuantRecipe(scale_rule=rule))
    return q.scales, unpack_codes(q.codes)


def torchao(x, rule):
    scales, packed = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[rule.upper()])
    return scales.view(torch.uint8), unpack_codes(packed)


def block_amax(x, size=32):
    return x.float().unflatten(-1, (-1, size)).abs().amax(-1)


def in_units(x, byte):
    """x over its block's scale, float32; exact (or far below the smallest midpoint) for bytes 1..253."""
    return (x.float().unflatten(-1, (-1, 32)) * exp2_byte(254 - byte.int()).unsqueeze(-1)).flatten(-2)


def mismatches(a, b):
    """How many elements of two float or integer tensors differ in their bits."""
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
    view = INT.get(a.dtype, a.dtype)
    return (a.contiguous().view(view) != b.contiguous().view(view)).sum().item()


def compare(tally, name, kind, x, mine, theirs):
    """Assert equal codes, and equal scale bytes but for blocks of zeros (byte 1 here, 0 there), and count them."""
    (byte, code), (their_byte, their_code) = mine, theirs
    zero = block_amax(x) == 0
    assert (byte[zero] == MIN_BYTE).all() and (their_byte[zero] == 0).all()
    differ = mismatches(byte[~zero], their_byte[~zero]) + mismatches(code, their_code)
    tally.add(name, kind, code.numel(), byte.numel(), differ, zero.sum())
    assert differ == 0


# The data: a comparison that no quantiser could fail would prove nothing.


@pytest.mark.parametrize("rule", RULES)
def test_ties_hit_every_midpoint_at_every_scale(rule):
    """Midpoint 5 needs amax / s above 5, which "ceil" never has; all the others are hit by every rule, with either sign."""
    x = data("ties")
    byte, _ = ours(x, rule)
    t = in_units(x, byte)
    written = byte.unique()
    assert len(written) >= LAST_EXPONENT - FIRST_EXPONENT + 1
    inner = written[1:-1]  # at both ends of the range only some largest magnitudes give this byte
    blocks, units = byte.flatten(), t.view(-1, 32)
    for midpoint in MIDPOINTS[:-1] if rule == "ceil" else MIDPOINTS:
        for value in (midpoint, -midpoint):
            hit = blocks[(units == value).any(-1)].unique()
            assert torch.isin(inner, hit).all(), (midpoint, value)


@pytest.mark.parametrize(
    "rule, boundary, exponents",  # of the scale for amax one ulp below the boundary, at it, and one ulp above
    [
        ("floor", 4.0, (-1, 0, 0)),
        ("even", 7.0, (0, 1, 1)),
        ("oas", 7.0, (0, 0, 1)),
        ("rceil", 6.0, (0, 0, 1)),
        ("ceil", 4.0, (0, 0, 1)),
    ],
)
def test_one_ulp_decides_at_every_boundary(rule, boundary, exponents):
    x = data("boundary")
    byte, amax = ours(x, rule)[0].flatten(), block_amax(x).flatten()
    k = torch.arange(FIRST_EXPONENT, LAST_EXPONENT + 1)
    for edge, exponent in zip(neighbours(torch.tensor([boundary])).flatten(), exponents, strict=True):
        at = torch.ldexp(edge.expand(len(k)), k)
        assert torch.isin(at, amax).all()
        for value, expected in zip(at, k + 127 + exponent, strict=True):
            assert (byte[amax == value] == expected).all(), value


# torchao


@each_kind
@pytest.mark.parametrize("rule", TORCHAO_RULES)
def test_torchao(rule, kind, tally):
    x = data(kind)
    compare(tally, f"torchao {rule}", kind, x, ours(x, rule), torchao(x, rule))


def float32_bits(exponents):
    """(4, 64) float32 of arbitrary bits whose exponent field is folded into `exponents`, (first, last)."""
    first, last = exponents

    def finite(bits):
        field = (bits >> 23 & 0xFF) % (last - first + 1) + first
        return torch.from_numpy((bits & 0x807FFFFF | field << 23).astype(np.uint32).view(np.float32))

    return hnp.arrays(np.uint32, (4, 64), elements=st.integers(0, 2**32 - 1)).map(finite)


window = st.tuples(st.integers(0, 250), st.integers(0, 40)).map(lambda w: (w[0], min(w[0] + w[1], 254)))


def expected_from_torchao(x, rule):
    """torchao's result with its range narrowed to the bytes that are written here."""
    byte, code = torchao(x, rule)
    kept = byte.clamp(MIN_BYTE, MAX_BYTE)
    above = (byte > MAX_BYTE).repeat_interleave(32, dim=-1)
    # Byte 0 already divides by 2^-126, byte 1's scale. Above, its rounder and saturation apply to the largest scale kept.
    return kept, torch.where(above, f32_to_f4_unpacked(x.float() * 2.0 ** (127 - MAX_BYTE)), code)


@settings(max_examples=1000, deadline=None, database=None)
@given(window.flatmap(float32_bits), st.sampled_from(TORCHAO_RULES), st.booleans())
def test_torchao_on_arbitrary_finite_float32(tally, x, rule, narrow):
    if narrow:
        x = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()  # truncated: rounding could reach infinity
    (byte, code), (their_byte, their_code) = ours(x, rule), expected_from_torchao(x, rule)
    differ = mismatches(byte, their_byte) + mismatches(code, their_code)
    outside = mismatches(byte, torchao(x, rule)[0])
    tally.add("torchao, hypothesis", "drawn bits", code.numel(), byte.numel(), differ, outside)
    assert differ == 0


@pytest.mark.parametrize("rule", TORCHAO_RULES)
def test_beyond_the_written_range(rule, tally):
    """Byte 0 becomes byte 1 with the same codes; bytes above 250 become 250, where the codes saturate; nothing else differs."""
    x = beyond()
    (byte, code), (their_byte, their_code) = ours(x, rule), torchao(x, rule)
    low, high = their_byte < MIN_BYTE, their_byte > MAX_BYTE
    assert low.any() and high.any() and (~low & ~high).any()
    expected_byte, expected_code = expected_from_torchao(x, rule)
    assert mismatches(byte, expected_byte) == 0 and mismatches(code, expected_code) == 0
    changed = (code != their_code).unflatten(-1, (-1, 32)).any(-1)
    assert not changed[~high].any()  # so the codes differ above only
    saturated = (code.unflatten(-1, (-1, 32)) & 7) == 7
    assert saturated.any(-1)[their_byte > MAX_BYTE + 1].all()
    tally.add(f"torchao {rule}", "beyond", code.numel(), byte.numel(), 0, mismatches(byte, their_byte))


@pytest.mark.parametrize("rule", TORCHAO_RULES)
def test_blocks_with_nan_and_infinity(rule):
    """Both mark a block with NaN by byte 255. With infinity too here; torchao 0.18 writes infinity as 6 * 2^126 there."""
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 40], x[2, 70] = torch.nan, torch.inf, -torch.inf
    (byte, code), (their_byte, their_code) = ours(x, rule), torchao(x, rule)
    assert byte.diag().tolist() == [255, 255, 255] and their_byte.diag().tolist() == [255, 253, 253]
    assert their_code[1, 40] == 7 and their_code[2, 70] == 15
    clean = ~torch.eye(3, dtype=torch.bool)
    assert mismatches(byte[clean], their_byte[clean]) == 0
    clean = clean.repeat_interleave(32, dim=1)
    assert mismatches(code[clean], their_code[clean]) == 0


def exact_bytes(amax, rule):
    """Scale bytes of largest magnitudes, float32 (...), in exact rational arithmetic."""
    values, index = amax.unique(return_inverse=True)
    return torch.tensor([scale_exponent(v, rule) + 127 for v in values.tolist()], dtype=torch.uint8)[index]


@each_kind
def test_torchao_rceil_where_its_logarithm_is_right(kind, tally):
    """Its scale is one too small where float32's log2 rounds amax / 6, just above a power of two, down to the integer."""
    x = data(kind)
    amax = block_amax(x)
    (byte, code), (their_byte, their_code) = ours(x, "rceil"), torchao(x, "rceil")
    wrong = (byte != their_byte) & (amax > 0)
    if wrong.any():
        assert mismatches(byte[wrong], exact_bytes(amax[wrong], "rceil")) == 0
        assert (their_byte[wrong] == byte[wrong] - 1).all()
        over = amax[wrong].double() / (6 * exp2_byte(their_byte[wrong]).double())
        assert (over > 1).all() and (over <= 1 + 2.0**-18).all()
    assert wrong.any() == (kind == "boundary")
    right = (~wrong).repeat_interleave(32, dim=-1)
    differ = mismatches(code[right], their_code[right])
    tally.add("torchao rceil, off its log2's errors", kind, right.sum(), (~wrong).sum(), differ, (amax == 0).sum())
    assert differ == 0


def test_torchao_rceil_is_wrong_only_just_above_six_times_a_power_of_two():
    """All float32 within 64 ulps of 6 * 2^k: ours is exact for each, torchao's one too small for the first few above.

    How many grows with |k|, as log2's own rounding does: none at |k| <= 3, two at the 2^-8 of weights, 33 from |k| = 64 on.
    """
    k = torch.arange(FIRST_EXPONENT, LAST_EXPONENT + 1)
    edge = torch.ldexp(torch.full((len(k),), 6.0), k).view(torch.int32).unsqueeze(-1)
    steps = torch.arange(-64, 65, dtype=torch.int32)
    amax = (edge + steps).view(torch.float32)
    x = torch.zeros(*amax.shape, 32)
    x[..., 0] = amax
    x = x.flatten(-2)
    (byte, _), (their_byte, _) = ours(x, "rceil"), torchao(x, "rceil")
    assert mismatches(byte, exact_bytes(amax, "rceil")) == 0
    assert mismatches(byte.int(), (k.unsqueeze(-1) + 127 + (steps > 0)).int()) == 0
    wrong = byte != their_byte
    assert (their_byte[wrong] == byte[wrong] - 1).all()
    reach = wrong.sum(-1)
    assert torch.equal(wrong, (steps > 0) & (steps <= reach.unsqueeze(-1)))  # an unbroken run, from one ulp above
    # Bounds, not counts: the last bit of log2 is the C library's.
    assert reach[k.abs() <= 3].max() <= 1 and reach[k.abs() > 64].min() >= 16 and reach.max() <= 48


# compressed-tensors


MXFP4_ARGS = QuantizationArgs(
    num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8
)
MXFP4_SCHEME = QuantizationScheme(targets=["Linear"], weights=MXFP4_ARGS)


@each_kind
def test_compressed_tensors_even(kind, tally):
    """Its rounder multiplies by sign(x / s), which is 0 for -0, given so or underflown; then the code is 0 there, 8 here."""
    x = data(kind)
    their_byte = generate_mx_scales(block_amax(x)).clamp(0, 254).to(torch.uint8)
    t = in_units(x, their_byte)
    their_code = unpack_codes(pack_fp4_to_uint8(FP4_E2M1_DATA.cast_to_fp4(t)))
    byte, code = ours(x, "even")
    negative_zero = (t == 0) & torch.signbit(x)
    assert (their_code[negative_zero] == 0).all() and (code[negative_zero] == 8).all()
    name = "compressed-tensors even"
    compare(tally, name, kind, x, (byte, torch.where(negative_zero, 0, code)), (their_byte, their_code))
    tally.add(name, kind, convention=negative_zero.sum())


@each_kind
def test_compressed_tensors_packs_and_unpacks_the_same_bytes(kind, tally):
    """Its packer makes our bytes out of our values, its unpacker our values out of our bytes, and -0 survives both."""
    q = quantize(data(kind))
    values = decode_packed(q.codes)
    differ = mismatches(pack_fp4_to_uint8(values), q.codes)
    differ += mismatches(unpack_fp4_from_uint8(q.codes, *values.shape, dtype=torch.float32), values)
    tally.add("compressed-tensors packing", kind, codes=2 * values.numel(), differ=differ)
    assert differ == 0


checkpoint_kinds = pytest.mark.parametrize("kind", ["normal", "bf16", "ties", "boundary", "signs"])
MXFP4_PACKED = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")


@checkpoint_kinds
def test_compressed_tensors_writes_our_checkpoint(kind, tally):
    """`mxfp4-pack-quantized`, from observed extremes to bytes: weight_packed and weight_scale are our codes and scales."""
    x = data(kind) + 0.0  # -0 becomes 0, as its rounder has it
    q = quantize(x, QuantRecipe(scale_rule="even"))
    scale, _ = calculate_qparams(*block_min_max(x), MXFP4_ARGS)
    written = MXFP4_PACKED.compress({"weight": x.float(), "weight_scale": scale}, MXFP4_SCHEME)
    differ = mismatches(written["weight_packed"], q.codes) + mismatches(written["weight_scale"], q.scales)
    tally.add("compressed-tensors writing", kind, x.numel(), q.scales.numel(), differ)
    assert differ == 0


@checkpoint_kinds
def test_compressed_tensors_reads_our_checkpoint(kind, tally):
    """Its decompressor makes our BF16 operand of our codes and scales."""
    q = quantize(data(kind))
    stored = {"weight_packed": q.codes, "weight_scale": q.scales}
    try:
        read = MXFP4_PACKED.decompress(stored, MXFP4_SCHEME)["weight"]
    except NotImplementedError as error:  # 0.15, which vLLM 0.22 needs
        pytest.skip(str(error))
    differ = mismatches(read, q.dequantize(torch.bfloat16))
    tally.add("compressed-tensors reading", kind, read.numel(), q.scales.numel(), differ)
    assert differ == 0


def block_min_max(x, size=32):
    blocks = x.float().unflatten(-1, (-1, size))
    return blocks.amin(-1), blocks.amax(-1)


# ml_dtypes


def ml_dtypes_codes(t):
    return torch.from_numpy(t.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


@each_kind
@pytest.mark.parametrize("rule", RULES)
def test_ml_dtypes_rounds_to_the_same_codes(rule, kind, tally):
    """x / s, rounded by an independent rounder: that of every rule's codes, -0 included."""
    byte, code = ours(data(kind), rule)
    t = in_units(data(kind), byte)
    differ = mismatches(ml_dtypes_codes(t), code) + mismatches(encode_e2m1(round_e2m1(t)), code)
    tally.add("ml_dtypes rounder", kind, codes=code.numel(), differ=differ)
    assert differ == 0


def test_ml_dtypes_on_every_bfloat16(tally):
    """Finite ones below 2^100, `round_e2m1`'s domain, all agree, float64 too; NaN and infinity differ as stated here."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = every[every.abs() < 2.0**100]
    assert len(x) == 2 * (127 + 100) * 128
    rounded = round_e2m1(x)
    differ = mismatches(encode_e2m1(rounded), ml_dtypes_codes(x))
    assert torch.equal(round_e2m1(x.double()).float(), rounded)
    assert (rounded[x.abs() >= 5.5].abs() == 6).all()  # saturates
    tally.add("ml_dtypes rounder", "every bfloat16", codes=len(x), differ=differ)
    assert differ == 0
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert round_e2m1(special).isnan().all()  # and the block's scale is NaN
    assert [c & 7 for c in ml_dtypes_codes(special).tolist()] == [0, 7, 7]  # NaN becomes a zero, infinity 6


@settings(max_examples=200, deadline=None, database=None)
@given(hnp.arrays(np.uint32, 256, elements=st.integers(0, 2**32 - 1)))
def test_ml_dtypes_on_arbitrary_float32(tally, bits):
    x = torch.from_numpy(bits.view(np.float32))
    x = x[x.abs() < 2.0**100]
    differ = mismatches(encode_e2m1(round_e2m1(x)), ml_dtypes_codes(x))
    tally.add("ml_dtypes rounder", "drawn bits", codes=len(x), differ=differ)
    assert differ == 0


# Dequantisers


def every_pair_at_every_scale():
    """An MXFP4Tensor of 256 rows: row b has all 256 pairs of codes in 16 blocks of scale byte b."""
    q = quantize(torch.zeros(256, 512))
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(-1).repeat(1, 16)
    return dataclasses.replace(q, codes=codes, scales=scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_dequantises_every_byte_at_every_scale(dtype, tally):
    """Bits equal for scale bytes 0..254, where 2^-127 is subnormal and 6 * 2^127 is infinite; 255 is 2^128 there, not NaN."""
    q = every_pair_at_every_scale()
    theirs = convert_moe_packed_tensors(q.codes.view(1, 256, 16, 16), q.scales.view(1, 256, 16), dtype=dtype)[0].T
    mine = q.dequantize(dtype)
    differ = mismatches(mine[:255], theirs[:255])
    tally.add("transformers dequantiser", str(dtype), mine[:255].numel(), 255 * 16, differ, convention=512 + 16)
    assert differ == 0
    assert mine[255].isnan().all()
    assert theirs[255].isfinite().any() and theirs[255, 2] == 2.0**127  # code 1, 0.5


def test_torchao_dequantises_every_byte_at_every_scale(tally):
    """All 256 scale bytes, 0 (2^-127), 254 (2^127) and 255 (NaN) included."""
    q = every_pair_at_every_scale()
    theirs = to_dtype(q.codes, q.scales.view(torch.float8_e8m0fnu), torch.float4_e2m1fn_x2, 32, torch.float32)
    mine = q.dequantize()
    assert mine[255].isnan().all() and theirs[255].isnan().all()
    differ = mismatches(mine[:255], theirs[:255])
    tally.add("torchao dequantiser", "every pair of codes", mine.numel(), 256 * 16, differ)
    assert differ == 0


def test_scale_bytes_0_254_and_255_are_exact_rationals():
    """The ends of the range against fractions, so that agreement of two implementations is not all that is known."""
    grid = [Fraction(v) for v in decode_packed(torch.tensor([0x10, 0x32, 0x54, 0x76], dtype=torch.uint8)).tolist()]
    assert grid == [0, Fraction(1, 2), 1, Fraction(3, 2), 2, 3, 4, 6]
    mine = every_pair_at_every_scale().dequantize()[:, ::2][:, :8]  # low nibbles 0..7
    for byte in (0, 1, 250, 251, 254):
        for value, got in zip(grid, mine[byte].tolist(), strict=True):
            exact = value * Fraction(2) ** (byte - 127)
            assert got == (float("inf") if exact >= 2**128 else exact), (byte, value)
    assert mine[255].isnan().all()


@each_kind
def test_torchao_reads_what_we_write(kind, tally):
    """The operand that the default recipe's codes stand for, dequantised by torchao."""
    q = quantize(data(kind))
    theirs = to_dtype(q.codes, q.scales.view(torch.float8_e8m0fnu), torch.float4_e2m1fn_x2, 32, torch.float32)
    differ = mismatches(q.dequantize(), theirs)
    tally.add("torchao dequantiser", kind, theirs.numel(), q.scales.numel(), differ)
    assert differ == 0


# NVFP4

# One scale for the whole tensor: kinds that spread over hundreds of octaves would be all zeros but for a few blocks.
nvfp4_kinds = pytest.mark.parametrize("kind", ["normal", "bf16", "zeros", "signs", "levels", "bf16_levels"])
SMALLEST_NORMAL = 8  # E4M3 bits of 2^-6, torchao's smallest block scale


def nvfp4_data(kind):
    """Kinds of `KINDS`, and "levels": normal numbers over 20 octaves, so that block scales go from 448 down to 0."""
    if "levels" not in kind:
        return data(kind)
    octave = torch.arange(512).unsqueeze(-1) % 20
    x = torch.ldexp(torch.randn(512, 1024, generator=torch.Generator().manual_seed(10)), -octave)
    return x.bfloat16() if kind == "bf16_levels" else x


def ours_nvfp4(x):
    q = quantize(x, QuantRecipe(format="nvfp4", scale_rule="static"))
    return q, q.scales, unpack_codes(q.codes)


def exact_quotient(x, q):
    """x over its scale as quantised, float64 (rows, K): g and s are stored, their product is exact."""
    scale = q.scales.view(torch.float8_e4m3fn).double() * q.tensor_scale.double()
    return (x.double().unflatten(-1, (-1, 16)) / scale.unsqueeze(-1)).flatten(-2)


def near(values, points, ulps):
    """Which of `values`, float64, are within `ulps` float32 roundings of one of `points`."""
    gap = (values.abs().unsqueeze(-1) - points).abs().amin(-1)
    return gap <= ulps * 2.0**-24 * values.abs()


@nvfp4_kinds
def test_nvfp4_torchao(kind, tally):
    """Same g, scales and codes; a block scale below 2^-6 is 2^-6 in torchao, and those blocks differ in nothing else."""
    x = nvfp4_data(kind)
    q, byte, code = ours_nvfp4(x)
    g = per_tensor_amax_to_scale(x.abs().max())
    assert mismatches(g, q.tensor_scale) == 0
    scales, packed = nvfp4_quantize(x, 16, g)
    their_byte, their_code = scales.view(torch.uint8), unpack_codes(packed)
    small = byte < SMALLEST_NORMAL
    assert (their_byte[small] == SMALLEST_NORMAL).all()
    kept = ~small.repeat_interleave(16, dim=-1)
    differ = mismatches(byte[~small], their_byte[~small]) + mismatches(code[kept], their_code[kept])
    tally.add("torchao nvfp4", kind, kept.sum(), (~small).sum(), differ, small.sum())
    assert differ == 0
    assert small.any() == (kind in ("zeros", "levels", "bf16_levels"))


@nvfp4_kinds
def test_nvfp4_torchao_dequantiser(kind, tally):
    x = nvfp4_data(kind)
    q, _, _ = ours_nvfp4(x)
    theirs = NVFP4Tensor(q.codes, q.scales.view(torch.float8_e4m3fn), 16, torch.float32, q.tensor_scale)
    differ = mismatches(q.dequantize(), theirs.dequantize())
    tally.add("torchao nvfp4 dequantiser", kind, x.numel(), q.scales.numel(), differ)
    assert differ == 0


NVFP4_ARGS = QuantizationArgs(
    num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, scale_dtype=torch.float8_e4m3fn
)


@nvfp4_kinds
def test_nvfp4_compressed_tensors(kind, tally):
    """It rounds 2688 / amax where we round amax / 2688, then multiplies where we divide: scales and codes part only where
    the exact quotient is a few float32 roundings from a midpoint. Zero blocks get 2^-3 there, and lose the sign of -0."""
    x = nvfp4_data(kind).float()
    q, byte, code = ours_nvfp4(x)
    inverse = generate_gparam(x.amin(), x.amax())
    scale, _ = calculate_qparams(*block_min_max(x, 16), NVFP4_ARGS, global_scale=inverse)
    their_byte = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    rounded = compressed_tensors_quantize(x, scale, None, NVFP4_ARGS, global_scale=inverse)
    their_code = unpack_codes(pack_fp4_to_uint8(rounded))

    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    wanted = block_amax(x, 16).double() / 6 / q.tensor_scale.double()
    vanishes = wanted <= 2.0**-10  # below half of E4M3's smallest number
    assert (their_byte[vanishes] == 0x20).all() and (byte[vanishes] == 1).all()
    scales_differ = (byte != their_byte) & ~vanishes
    assert near(wanted[scales_differ], (e4m3[1:] + e4m3[:-1]) / 2, ulps=6).all()
    assert ((byte.int() - their_byte.int())[scales_differ].abs() == 1).all()

    compared = (byte == their_byte).repeat_interleave(16, dim=-1)
    negative_zero = (x == 0) & torch.signbit(x)
    codes_differ = (code != their_code) & compared & ~negative_zero
    assert near(exact_quotient(x, q)[codes_differ], torch.tensor(MIDPOINTS).double(), ulps=6).all()
    assert scales_differ.sum() <= 0.01 * byte.numel() and codes_differ.sum() <= 0.002 * code.numel()
    counts = scales_differ.sum() + codes_differ.sum() + vanishes.sum() + negative_zero.sum()
    tally.add("compressed-tensors nvfp4", kind, compared.sum(), byte.numel(), 0, counts)


def test_nvfp4_scale_is_the_nearest_e4m3_of_the_exact_ratio():
    """Against rational arithmetic: E4M3's nearest to amax / 6 / g, unless float32 roundings of that reach a midpoint."""
    grid = [Fraction(v) for v in torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()]
    x = nvfp4_data("bf16_levels")[:40, :256]
    q, byte, _ = ours_nvfp4(x)
    g = Fraction(q.tensor_scale.item())
    for amax, got in zip(block_amax(x, 16).flatten().tolist(), byte.flatten().tolist(), strict=True):
        ratio = Fraction(amax) / 6 / g
        nearest = min(range(1, 127), key=lambda c: (abs(grid[c] - ratio), c % 2))
        if got != nearest:
            tie = (grid[got] + grid[nearest]) / 2
            assert abs(got - nearest) == 1 and abs(ratio - tie) <= tie * Fraction(3, 2**24)
