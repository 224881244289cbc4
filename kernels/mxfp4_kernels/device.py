"""The quantiser's arithmetic as Triton device functions: the formulas of `mxfp4_rl.quant`, to the bit.

Blocks are the last axis of a (rows, blocks, 32) tensor in float32. Divisions by scales are multiplications by exact powers of
two; the only rounding division, 6 / amax, is IEEE's (`tl.div_rn`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from mxfp4_rl.quant.macro_blocks import LARGEST_SCALED
from mxfp4_rl.quant.scales import carry_and_exponent
from mxfp4_rl.recipe import QuantRecipe

BLOCK = 32
INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # kernels run on a CPU, by Triton's interpreter
# Neighbouring threads take neighbours along the last of the axes that are not contiguous; until Triton 3.6 along the first.
LAST_AXIS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))


@functools.cache
def unsupported(recipe: QuantRecipe, draws: bool = False) -> str | None:
    """Why the kernels do not compute the recipe, which then runs the reference; None if they do.

    Args:
        draws: of a kernel that rounds stochastically too.
    """
    reasons = {
        f"its format is {recipe.format}": recipe.format != "mxfp4",
        "its scales are searched for": recipe.scale_rule == "search",
        f"its blocks have {recipe.block_size} elements": recipe.block_size != BLOCK,
        "its macro blocks are dynamic": recipe.macro_block == "dynamic",
        f"its macro blocks have {recipe.macro_size} elements": bool(recipe.macro_block)
        and recipe.macro_size not in (32, 64, 128, 256),
        "its fallback is masked": recipe.fallback_fraction is not None or recipe.fallback_threshold is not None,
        f"its pre-scale is {recipe.pre_scale}": recipe.pre_scale != 1,
        "it rounds stochastically": recipe.rounding != "nearest" and not draws,
        "its blocks are tiles": recipe.tile,
        "it rotates": bool(recipe.hadamard),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def supports(recipe: QuantRecipe) -> bool:
    """Whether the kernels compute the recipe."""
    return unsupported(recipe) is None


def launches(function):
    """Decorator: the device of the first argument is current while `function` runs, for Triton launches on the current one."""

    @functools.wraps(function)
    def launch(*args, **kwargs):
        tensor = args[0] if args else next(iter(kwargs.values()), None)
        while not isinstance(tensor, torch.Tensor):
            tensor = next(getattr(tensor, name) for name in ("source", "codes", "payload") if hasattr(tensor, name))
        if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(*args, **kwargs)

    return launch


@functools.cache
def constants(recipe: QuantRecipe) -> dict[str, Any]:
    """The recipe as compile-time constants of the kernels below. Read only: every call for a recipe gets the same dict."""
    carry, exponent = carry_and_exponent(recipe.scale_rule)
    return {
        "CARRY": carry,
        "SHIFT": 2 + exponent,
        "GROUP": recipe.macro_size // BLOCK if recipe.macro_block else 0,
        "LARGEST": LARGEST_SCALED,
        "FALLBACK": recipe.fallback_alpha is not None,
        "enable_fp_fusion": False,  # it would take the residual from a product that was not rounded
    }


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """max |x| along an axis; NaN wins, as in PyTorch and unlike in `tl.max`."""
    if INTERPRETED:  # which reduces with functions of its own a thousand times slower; as integers magnitudes order alike
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)
    else:
        return tl.reduce(tl.abs(x), axis, _larger)


@triton.jit
def load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k):
    """Some rows and columns of x (M, K), float32 (rows, columns), zeros outside of x."""
    at = rows[:, None].to(tl.int64) * stride_m + columns[None, :].to(tl.int64) * stride_k
    return tl.load(x_ptr + at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_columns(x_ptr, m0, k0, M, K, stride_m, stride_k, BM: tl.constexpr, BK: tl.constexpr):
    """A tile of x (M, K), its columns as rows: float32 (BK, BM / 32, 32), zeros outside of x.

    The order of the axes while it is loaded is what makes Triton give a thread whole blocks of two neighbouring columns: a warp
    reads whole cache lines, and nothing is exchanged between threads to find a block's scale.
    """
    pair = tl.arange(0, BK // 2)[None, :, None, None]
    one = tl.arange(0, 2)[None, None, None, :]
    if LAST_AXIS_FIRST:
        row = tl.arange(0, 32)[:, None, None, None]
        block = tl.arange(0, BM // 32)[None, None, :, None]
    else:
        block = tl.arange(0, BM // 32)[:, None, None, None]
        row = tl.arange(0, 32)[None, None, :, None]
    rows, columns = block * 32 + row, pair * 2 + one
    tile_ptr = x_ptr + m0.to(tl.int64) * stride_m + k0.to(tl.int64) * stride_k
    mask = (rows < M - m0) & (columns < K - k0)
    x = tl.load(tile_ptr + (rows * stride_m + columns * stride_k), mask=mask, other=0.0)
    x = tl.permute(x, (1, 3, 2, 0) if LAST_AXIS_FIRST else (1, 3, 0, 2))
    return tl.reshape(x, (BK, BM // 32, 32)).to(tl.float32)


@triton.jit
def tile_of(M, K, R: tl.constexpr, BK: tl.constexpr):
    """First row and column of this program's tile, int64, and how many rows and columns it has; rows first.

    One axis of programs: the others end at 65535.
    """
    down = tl.cdiv(M, R)
    m0 = (tl.program_id(0) % down).to(tl.int64) * R
    k0 = (tl.program_id(0) // down).to(tl.int64) * BK
    return m0, k0, tl.minimum(M - m0, R).to(tl.int32), tl.minimum(K - k0, BK).to(tl.int32)


@triton.jit
def to_type(x, TYPE: tl.constexpr):
    """x, float32, in another type; float16 saturates, as the reference does, and NaN stays."""
    if TYPE == tl.float16:  # noqa: SIM300
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(TYPE)


@triton.jit
def scale_byte(amax, CARRY: tl.constexpr, SHIFT: tl.constexpr):
    """Largest magnitudes -> E8M0 bytes 1..250, 255 for NaN and Inf (`scales.scale_byte`)."""
    bits = amax.to(tl.int32, bitcast=True)
    finite = bits < 0x7F800000
    byte = ((tl.where(finite, bits, 0) + CARRY) >> 23) - SHIFT
    return tl.where(finite, tl.minimum(tl.maximum(byte, 1), 250), 255)


@triton.jit
def exp2_byte(byte):
    """2^(byte - 127) for bytes 1..254, NaN for 255."""
    return tl.where(byte == 255, 0x7FC00000, byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_scale(byte):
    """2^(127 - byte) for bytes 1..250, NaN for 255."""
    return tl.where(byte == 255, 0x7FC00000, (254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_e2m1(t):
    """The nearest E2M1 value of |t| < 64, ties to even, saturating; NaN stays NaN, zero keeps its sign (`elements.round_e2m1`).

    Adding 1.5 * 2^22 times the power of two below |t|, 1 at least, leaves one mantissa bit.
    """
    bits = t.to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)
    rounded = tl.fma(power, -6291456.0, tl.fma(power, 6291456.0, t))
    rounded = tl.minimum(tl.abs(rounded), 6.0, propagate_nan=tl.PropagateNan.ALL)
    return (rounded.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def uniform(place, seed, STREAM: tl.constexpr):
    """float32 in [0, 1) for the elements at `place` (int64) of their tensor (`philox.uniform`): multiples of 2^-24.

    A word of four is an element's own; the other three are made in vain, which costs less than to exchange them.
    """
    quarter = place >> 2
    low, high = (quarter & 0xFFFFFFFF).to(tl.uint32), (quarter >> 32).to(tl.uint32)
    stream = tl.full(place.shape, STREAM, tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, stream, tl.zeros_like(stream))
    own = (place & 3).to(tl.int32)
    word = tl.where(own < 2, tl.where(own == 0, a, b), tl.where(own == 2, c, d))
    return (word >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def round_e2m1_stochastic(t, uniform):
    """One of the two E2M1 neighbours of t, saturating; NaN stays NaN (`elements.round_e2m1_stochastic`)."""
    magnitude = tl.minimum(tl.abs(t), 6.0, propagate_nan=tl.PropagateNan.ALL)
    power = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    step = power.to(tl.float32, bitcast=True) * 0.5
    steps = magnitude * ((255 << 23) - power).to(tl.float32, bitcast=True)  # times 2 / power: exact
    lower = tl.floor(steps)
    rounded = (lower + (uniform < steps - lower).to(tl.float32)) * step
    rounded = tl.where(magnitude == magnitude, rounded, magnitude)
    return (rounded.to(tl.int32, bitcast=True) | (t.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def static_factor(macro_amax, LARGEST: tl.constexpr):
    """Macro-block factors 1 + m8 / 256 (`macro_blocks.static_factor`)."""
    quotient = tl.div_rn(tl.full(macro_amax.shape, 6.0, tl.float32), macro_amax)
    bits = quotient.to(tl.int32, bitcast=True)
    factor = ((bits & 0x007F8000) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where((macro_amax > 0) & (macro_amax < LARGEST), factor, 1.0)


@triton.jit
def tiny(largest, scale):
    """Blocks that are not zero, and whose scale (or largest magnitude) is too small for `over_factor` to multiply."""
    return (largest > 0) & (scale < 2.0**-80)


@triton.jit
def over_factor(x, factor, is_tiny=None):
    """x (R, blocks, n) over the factors 1 + m8 / 256 (R, blocks) of its macro blocks, correctly rounded.

    With r just below 1 / f and the rest d = 1 / f - r, x r + x d misses x / f by less than 2^-40 of it, and no quotient by nine
    bits is as near as 2^-34 to the middle of two float32. Where the product x d could vanish, a tile is divided.

    Args:
        factor: or with as many axes as x.
        is_tiny: shaped as factors, where x may be below 2^-110 and not zero; None looks at x.
    """
    if is_tiny is None:
        magnitude = largest_magnitude(x, 2)
        is_tiny = tiny(magnitude, magnitude)
    some_tiny = is_tiny.to(tl.int32)
    for _ in tl.static_range(len(is_tiny.shape)):
        some_tiny = tl.max(some_tiny, axis=len(some_tiny.shape) - 1)
    below = ((1.0 / factor).to(tl.int32, bitcast=True) - 4).to(tl.float32, bitcast=True)
    rest = tl.fma(-below, factor, 1.0) * below
    if len(factor.shape) < len(x.shape):
        factor, below, rest = factor[:, :, None], below[:, :, None], rest[:, :, None]
    if some_tiny > 0:
        x = tl.div_rn(x, tl.broadcast_to(factor, x.shape))
    else:
        x = tl.fma(x, tl.broadcast_to(below, x.shape), x * rest)
    return x


@triton.jit
def first_scale(amax, CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr):
    """Largest magnitudes -> scale bytes and factors, all (R, blocks); factors are 1 without macro blocks (GROUP = 0)."""
    R: tl.constexpr = amax.shape[0]
    NB: tl.constexpr = amax.shape[1]
    factor = tl.full((R, NB), 1.0, tl.float32)
    if GROUP > 0:
        finite = tl.where(amax < float("inf"), amax, 0.0)  # a broken block does not touch its neighbours
        macro = largest_magnitude(tl.reshape(finite, (R, NB // GROUP, GROUP)), 2)
        factor = static_factor(macro, LARGEST)
        factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (R, NB // GROUP, GROUP)), (R, NB))
        amax = amax * factor
    return scale_byte(amax, CARRY, SHIFT), factor


@triton.jit
def second_scale(rest_amax, byte, CARRY: tl.constexpr, SHIFT: tl.constexpr):
    """Largest magnitudes of what the first pass left, in units of its scale -> bytes of the second, and in these units."""
    byte2 = tl.minimum(tl.maximum(scale_byte(rest_amax, CARRY, SHIFT) + byte - 127, 1), 250)
    shift = tl.where(rest_amax == 0, 127, byte2 - byte + 127)
    byte2 = tl.where(rest_amax == 0, 1, byte2)
    broken = byte == 255
    return tl.where(broken, 255, byte2), tl.where(broken, 127, shift)


@triton.jit
def two_passes(x, CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr):
    """x (R, blocks, 32) -> E2M1 values and bytes of both passes, and factors (R, blocks).

    The second pass repeats the first where there is no fallback; factors are 1 without macro blocks (GROUP = 0).
    """
    byte, factor = first_scale(largest_magnitude(x, 2), CARRY, SHIFT, GROUP, LARGEST)
    t = x * (inverse_scale(byte) * factor)[:, :, None]
    first = round_e2m1(t)
    second = first
    byte2 = byte
    if FALLBACK:
        rest = t - first
        byte2, shift = second_scale(largest_magnitude(rest, 2), byte, CARRY, SHIFT)
        second = round_e2m1(rest * inverse_scale(shift)[:, :, None])
    return first, byte, second, byte2, factor
