"""The sums of a block: what the error statistics need of 32 elements, by device functions.

A thread holds whole blocks, so that nothing moves between threads but the last sums. No sum knows a sign: y is |x|, times its
macro block's factor. With q what the first pass makes of y, h the ideal quantiser's result in units of its own scale A / 6
(A = max y), and

    e = y - q        rho = y - h A / 6        d = [h = 0]        z = [q = 0]

five products and two masked squares an element hold the energies of all parts:

    scale bias = sum e^2 - 2 e rho + rho^2        deadzone = sum d y^2        cross = sum (1 - d) (e - rho) rho
    grid noise = sum rho^2 - deadzone             zeroed = sum z y^2          product = sum y^2 - e y

No difference of these sums is small against its terms where the error is not. They are float32, over a block and then over a
thread's blocks. Programs first assume that no block is broken, that squares neither overflow nor vanish and, under rules with
c <= 6, that nothing saturates; a program whose energy is tiny or not a finite number takes its tiles again, carefully: y in
units of a block's scale, and float64 over blocks.

The ideal quantiser rounds u = 6 y / A. With the power of two S that makes 1 <= 6 S / A < 2, S u = y + (6 S / A - 1) y is one
fused multiply-add, off by less than 2^-25 of it before it is rounded: exact on the grid and on its midpoints. For BF16 and
float16 numbers u is there or 2^-15 and more away, and falls to the right side. For float32, where the reference decides in
float64, elements within a factor 1 +- 2^-21 of a midpoint may fall to its other side.

Assembly says what the compiler does not find, such as two BF16 numbers an instruction. Around the counts, whose sums LLVM would
otherwise reorder, it also keeps a block's elements one after another: all at once they do not fit into the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_kernels.device import INTERPRETED, exp2_byte, inverse_scale, largest_magnitude, scale_byte
from mxfp4_rl.quant.scales import carry_and_exponent

_IDEAL_CARRY = tl.constexpr(carry_and_exponent("rceil")[0])
_IDEAL_SHIFT = tl.constexpr(2 + carry_and_exponent("rceil")[1])
_TOGETHER = tl.constexpr(8 if INTERPRETED else 2)  # elements of a block: a register's, but the interpreter is slow at calls


@triton.jit
def _scale(amax, CARRY: tl.constexpr, SHIFT: tl.constexpr):
    """The power of two that a rule chooses (`scales.scale_byte`), without its end above."""
    bits = (amax.to(tl.int32, bitcast=True) + CARRY) & 0x7F800000
    return tl.maximum(bits - (SHIFT << 23), 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _octaves(scale, other):
    """log2 of the quotient of two powers of two."""
    return (scale.to(tl.int32, bitcast=True) - other.to(tl.int32, bitcast=True)).to(tl.float32) * 2.0**-23


@triton.jit
def _inverse(scale):
    """1 over a power of two."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(x):
    """1 / x to an ulp; infinite for subnormal numbers."""
    if INTERPRETED:
        return tl.where(tl.abs(x) < 2.0**-126, float("inf"), 1.0 / x)
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def magnitude(x):
    """|x|, two 16-bit numbers at a time."""
    if INTERPRETED or x.dtype == tl.float32:
        return tl.abs(x)
    else:
        return tl.inline_asm_elementwise("and.b32 $0, $1, 0x7FFF7FFF;", "=r,r", [x], x.dtype, is_pure=True, pack=2)


@triton.jit
def _round(y, scale, SIGNED: tl.constexpr):
    """The nearest E2M1 value in units of `scale`, ties to even, for |y| < 8 scale (`elements.round_e2m1`).

    2^22 times a number has the grid's step there as the last bit or a multiple of it, and its difference from y is rounded to
    the step: right below a power of two to a finer one, but to the power of two itself, which the grid has.
    """
    size = tl.maximum(tl.abs(y), 1.5 * scale)
    if SIGNED:
        size = (size.to(tl.int32, bitcast=True) | (y.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)
    return tl.fma(size, 4194304.0, tl.fma(size, -4194304.0, y))


@triton.jit
def _clamp(y, end):
    return tl.minimum(tl.maximum(y, -end), end)


@triton.jit
def _first_pass(x, factor, scale, SCALED: tl.constexpr, SATURATE: tl.constexpr):
    """y = factor x, what the first pass leaves of it, and what of it is beyond the grid's end."""
    if x.dtype == tl.bfloat16 and not (SCALED or INTERPRETED):  # two at a time; everything is a BF16 number
        least, end = (1.5 * scale).to(tl.bfloat16), (6.0 * scale).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 inside, size, q, e, beyond, minus, minus_one, plus;"
            "mov.b32 minus, 0xC280C280; mov.b32 plus, 0x42804280; mov.b32 minus_one, 0xBF80BF80;"  # 2^6, as BF16 has 8 bits
            + ("min.bf16x2 inside, $6, $8;" if SATURATE else "mov.b32 inside, $6;")
            + "max.bf16x2 size, inside, $7;"
            "fma.rn.bf16x2 q, size, minus, inside; fma.rn.bf16x2 q, size, plus, q;"
            "fma.rn.bf16x2 e, q, minus_one, $6; fma.rn.bf16x2 beyond, inside, minus_one, $6;"
            "shl.b32 $0, $6, 16; and.b32 $1, $6, 0xFFFF0000;"
            "shl.b32 $2, e, 16; and.b32 $3, e, 0xFFFF0000;"
            "shl.b32 $4, beyond, 16; and.b32 $5, beyond, 0xFFFF0000; }",
            "=&r,=&r,=&r,=&r,=&r,=&r,r,r,r", [x, tl.broadcast_to(least, x.shape), tl.broadcast_to(end, x.shape)],
            (tl.float32, tl.float32, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        if x.dtype == tl.bfloat16 and not INTERPRETED:
            asm: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;"
            y = tl.inline_asm_elementwise(asm, "=&r,=r,r", [x], tl.float32, is_pure=True, pack=2)
        else:
            y = x.to(tl.float32)
        if SCALED:
            y *= factor
        inside = tl.minimum(y, 6.0 * scale) if SATURATE else y
        return y, y - _round(inside, scale, False), y - inside


@triton.jit
def _equal(a, b, count):
    """1.0 where a is b, else 0.0, and `count` plus the bits of that."""
    if INTERPRETED:
        equal = tl.where(a == b, 1.0, 0.0)
        return equal, count + equal.to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 bits; set.eq.f32.f32 $0, $2, $3; mov.b32 bits, $0; add.s32 $1, $4, bits; }",
            "=&f,=r,f,f,r", [a, b, count], (tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _count(ones):
    """How many 1.0s, up to 511, sums (B, n) of their bits hold: n times 127 * 2^23, and 383 * 127 = 1 modulo 512."""
    return ((tl.sum(ones, 1) * 383) >> 23) & 511


@triton.jit
def _four(a, b, c, d):
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _eight(a, b, c, d, e, f, g, h):
    """Eight tensors (B,) as one (B, 2, 2, 2), in order."""
    return tl.join(_four(a, c, e, g), _four(b, d, f, h))


@triton.jit
def _halves(x):
    """x (B, n) as two (B, n / 2); registers of two numbers stay whole."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def block_largest(x):
    """`largest_magnitude` of blocks (B, 32) of magnitudes, two numbers at a time where a register holds them."""
    if x.dtype == tl.float32 or INTERPRETED or x.shape[1] == 2:
        return largest_magnitude(x.to(tl.float32), 1)
    else:
        a, b = _halves(x)
        TYPE: tl.constexpr = "bf16x2" if x.dtype == tl.bfloat16 else "f16x2"
        asm: tl.constexpr = "max.NaN." + TYPE + " $0, $1, $2;"
        return block_largest(tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], x.dtype, is_pure=True, pack=2))


@triton.jit
def _largest_left(x, factor, scale, largest, SCALED: tl.constexpr, SATURATE: tl.constexpr):
    """The largest in magnitude of `largest` and what the first pass leaves of x (B, n), whatever the sign."""
    if x.shape[1] > _TOGETHER:
        a, b = _halves(x)
        largest = _largest_left(a, factor, scale, largest, SCALED, SATURATE)
        return _largest_left(b, factor, scale, largest, SCALED, SATURATE)
    else:
        _y, e, _beyond = _first_pass(x, factor, scale, SCALED, SATURATE)
        return tl.maximum(largest, tl.abs(e))


@triton.jit
def _add_elements(x, block, sums, others, SCALED: tl.constexpr, SATURATE: tl.constexpr, FALLBACK: tl.constexpr):
    """Add x (B, n), an element of a block after the other: chains of fused multiply-adds, and few registers."""
    if x.shape[1] > _TOGETHER:
        a, b = _halves(x)
        sums, others = _add_elements(a, block, sums, others, SCALED, SATURATE, FALLBACK)
        return _add_elements(b, block, sums, others, SCALED, SATURATE, FALLBACK)
    else:
        factor, scale, _ideal_scale, _ratio, _sixth, _second_scale, _alpha = block
        y, e, beyond = _first_pass(x, factor, scale, SCALED, SATURATE)
        if INTERPRETED:
            return _add(y, e, beyond, block, sums, others, SATURATE, FALLBACK)
        else:
            y0, y1 = _halves(y)
            e0, e1 = _halves(e)
            beyond0, beyond1 = _halves(beyond)
            sums, others = _add(y0, e0, beyond0, block, sums, others, SATURATE, FALLBACK)
            return _add(y1, e1, beyond1, block, sums, others, SATURATE, FALLBACK)


@triton.jit
def _add(y, e, beyond, block, sums, others, SATURATE: tl.constexpr, FALLBACK: tl.constexpr):
    """Add elements and what the first pass leaves of them to a block's sums."""
    _factor, _scale, ideal_scale, ratio, sixth, second_scale, alpha = block
    energy, product, first, ideal, mixed, deadzone, zeroed, dead_count, zero_count = sums
    clipped, dead_product, dead_first, fallback, error, correction, dead_error, final_zero_count = others
    h = _round(tl.fma(y, ratio, y), ideal_scale, False)
    rho = tl.fma(h, sixth, y)
    y2 = y * y
    dead, dead_count = _equal(h, tl.zeros_like(h), dead_count)
    zero, zero_count = _equal(e, y, zero_count)
    energy += y2
    product = tl.fma(e, y, product)
    first = tl.fma(e, e, first)
    ideal = tl.fma(rho, rho, ideal)
    mixed = tl.fma(e, rho, mixed)
    deadzone = tl.fma(dead, y2, deadzone)
    zeroed = tl.fma(zero, y2, zeroed)
    if SATURATE:
        clipped = tl.fma(beyond, beyond, clipped)
        dead_e = dead * e
        dead_product = tl.fma(dead_e, y, dead_product)
        dead_first = tl.fma(dead_e, e, dead_first)
    if FALLBACK:
        second = _round(_clamp(e, 6.0 * second_scale) if SATURATE else e, second_scale, True)
        left = tl.fma(second, -alpha, e)
        fallback = tl.fma(second, second, fallback)
        error = tl.fma(left, left, error)
        correction = tl.fma(second, y, correction)
        dead_error = tl.fma(dead * left, left, dead_error)
        _final_zero, final_zero_count = _equal(tl.fma(second, alpha, y - e), tl.zeros_like(h), final_zero_count)
    sums = (energy, product, first, ideal, mixed, deadzone, zeroed, dead_count, zero_count)
    return sums, (clipped, dead_product, dead_first, fallback, error, correction, dead_error, final_zero_count)


@triton.jit
def add_blocks(
    x, amax, factor, valid, alpha, totals,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Add blocks x (B, 32), their largest magnitudes, factors and numbers of elements that are no padding (B,).

    Totals are (B, 2, 2, 2) twice, further sums the second, and counts (B, 2, 2); `_stats` names them.
    """
    B: tl.constexpr = x.shape[0]
    SCALED: tl.constexpr = GROUP > 0 or CAREFUL
    SATURATE: tl.constexpr = CLIPS or CAREFUL
    broken = tl.zeros((B,), tl.float32)
    top = amax
    if CAREFUL:
        finite = amax < float("inf")
        broken = tl.where(finite, 0, valid).to(tl.float32)
        x = tl.where(finite[:, None], x, 0.0)
        top = tl.where(finite, amax, 0.0)
        byte = scale_byte(top * factor if GROUP > 0 else top, CARRY, SHIFT)
        unit = tl.div_rn(exp2_byte(byte), factor)  # of y
        to_grid = inverse_scale(byte)
        factor *= to_grid
        top *= factor
        scale = tl.full((B,), 1.0, tl.float32)
    else:
        unit = _reciprocal(factor)
        if GROUP > 0:
            top *= factor
        scale = _scale(top, CARRY, SHIFT)
    ideal_scale = _scale(top, _IDEAL_CARRY, _IDEAL_SHIFT)
    some = top > 0
    top = tl.where(some, top, 6.0 * ideal_scale)
    sixth = top * (1 / 6)
    inverse = _reciprocal(sixth)  # infinite where amax is subnormal or almost: then sums are NaN
    ratio = tl.fma(ideal_scale, inverse, -1.0)
    rest = tl.fma(ratio, -top, tl.fma(ideal_scale, 6.0, -top))
    ratio = tl.fma(rest * (1 / 6), inverse, ratio)
    second_scale = scale
    if FALLBACK:
        none = tl.zeros((B, _TOGETHER), tl.float32)
        largest = _largest_left(x, factor[:, None], scale[:, None], none, SCALED, SATURATE)
        second_scale = _scale(largest_magnitude(largest, 1), CARRY, SHIFT)
        if CAREFUL:  # within the ends of written scales
            second_scale = tl.minimum(tl.maximum(second_scale, to_grid * 2.0**-126), to_grid * 2.0**123)
    none = tl.zeros((B, _TOGETHER if INTERPRETED else 1), tl.float32)
    no_ones = none.to(tl.int32)
    sums, others = _add_elements(
        x,
        (
            factor[:, None], scale[:, None], ideal_scale[:, None], ratio[:, None],
            (-sixth * _inverse(ideal_scale))[:, None], second_scale[:, None], alpha,
        ),
        (none, none, none, none, none, none, none, no_ones, no_ones), (none, none, none, none, none, none, none, no_ones),
        SCALED, SATURATE, FALLBACK,
    )  # fmt: skip
    energy, product, first, ideal, mixed, deadzone, zeroed, dead_count, zero_count = sums
    clipped, dead_product, dead_first, fallback, error, correction, dead_error, final_zero_count = others
    deadzone = tl.sum(deadzone, 1)
    # Relative to what they are where q = 0 wherever h = 0, as without saturation: then these are zero.
    dead_product = deadzone - tl.sum(dead_product, 1) if SATURATE else broken
    dead_first = tl.sum(dead_first, 1) - deadzone if SATURATE else broken
    delta = tl.where(some, _log2(1.0 + ratio) + _octaves(scale, ideal_scale), 0.0)
    energies = _eight(
        tl.sum(energy, 1), tl.sum(product, 1), tl.sum(first, 1), tl.sum(ideal, 1), tl.sum(mixed, 1), deadzone,
        tl.sum(zeroed, 1), delta,
    )  # fmt: skip
    further = _eight(
        tl.sum(clipped, 1), dead_product, dead_first, tl.sum(fallback, 1), tl.sum(error, 1), tl.sum(correction, 1),
        tl.sum(dead_error, 1), broken,
    )  # fmt: skip
    counts = _four(_count(dead_count), _count(zero_count), _count(final_zero_count), some.to(tl.int32))
    old_energies, old_further, old_counts = totals
    if SCALED:
        unit = unit.to(old_energies.dtype)
        square, one = unit * unit, tl.full((B,), 1.0, old_energies.dtype)
        squares = _eight(square, square, square, square, square, square, square, one)
        energies = energies.to(old_energies.dtype) * squares
        further = further.to(old_energies.dtype) * squares
    return old_energies + energies, old_further + further, old_counts + counts


@triton.jit
def nothing(B: tl.constexpr, CAREFUL: tl.constexpr):
    """Totals to add to, in float64 where squares of scales may leave float32's range."""
    none = tl.zeros((B, 2, 2, 2), tl.float64 if CAREFUL else tl.float32)
    return none, none, tl.zeros((B, 2, 2), tl.int32)


@triton.jit
def over_blocks(totals, padding, FURTHER: tl.constexpr):
    """Sums over the blocks of a program, whose padding was counted as zeros; zeros where nothing further was added."""
    energies, further, counts = totals
    further = tl.sum(further, 0).to(tl.float64) if FURTHER else tl.zeros((2, 2, 2), tl.float64)
    return tl.sum(energies, 0).to(tl.float64), further, tl.sum(counts, 0) - _four(padding, padding, padding, padding * 0)
