"""Error statistics in one read: `mxfp4_rl.quant.error_stats` without a tensor of errors.

A thread holds whole blocks, so that nothing moves between threads but the last sums. In units of a block's scale s, with
t = f x / s, the first pass q, the ideal quantiser's grid value h, its scale s* = A / 6 (A = max|t|), and

    e = q - t        rho = h A / 6 - t = ideal - t        d = [h = 0]        z = [q = 0]

five products and two masked squares an element hold the energies of all parts (E = sum t^2):

    scale bias = sum e^2 - 2 e rho + rho^2        deadzone = sum d t^2        cross = sum (1 - d) (e - rho) rho
    grid noise = sum rho^2 - deadzone             zeroed = sum z t^2          product = sum q t

No difference of these sums is small against its terms where the error is not. Sums over a block are float32 in units of s, sums
over blocks float64. Programs first assume that no block is broken and, under rules with c <= 6, that none saturates; a program
whose energy turns out not to be a finite number takes its tiles again, carefully.

The ideal quantiser rounds u = 6 t / A. For BF16 and float16 numbers u is a midpoint of the grid or 2^-15 and more away from
all, so rounding to a multiple of 2^-17 makes an approximate quotient decide like the exact one. For float32, where the
reference decides in float64, elements within a factor 1 +- 2^-21 of a midpoint may fall to its other side.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import (
    BLOCK,
    LAST_AXIS_FIRST,
    constants,
    exp2_byte,
    inverse_scale,
    largest_magnitude,
    launches,
    scale_byte,
    static_factor,
)
from mxfp4_kernels.views import matrices, merges
from mxfp4_rl.quant.decomposition import ErrorStats
from mxfp4_rl.quant.scales import CONSTANTS
from mxfp4_rl.recipe import QuantRecipe

_BLOCKS = 128  # of a tile along rows: one a thread
_COLUMNS = 256  # of a tile along columns: two a thread
_PROGRAMS = 1056  # eight for each of an H100's multiprocessors
_SATURATES = tl.constexpr(1.5 * 2.0**125)  # 6 times the largest scale


@triton.jit
def _round(t):
    """The nearest E2M1 value below saturation, ties to even (`elements.round_e2m1`)."""
    exponent = tl.maximum(t.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)
    return tl.fma(exponent, -6291456.0, tl.fma(exponent, 6291456.0, t))  # 1.5 * 2^22


@triton.jit
def _clamp(q, SATURATE: tl.constexpr):
    return tl.minimum(tl.maximum(q, -6.0), 6.0) if SATURATE else q


@triton.jit
def _eight(a, b, c, d, e, f, g, h):
    """Eight tensors (B,) as one (B, 2, 2, 2), in order."""
    return tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))


@triton.jit
def _count(ones):
    """How many 1.0s, up to 511, sums (B, n) of their bits hold: n times 127 * 2^23, and 383 * 127 = 1 modulo 512."""
    return (((tl.sum(ones, 1) >> 23) * 383) & 511).to(tl.float32)


@triton.jit
def _log2(x, ASSEMBLY: tl.constexpr):
    if ASSEMBLY:
        return tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _halves(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _add_elements(
    x, to_grid, ratio, sixth, bound, to_second, from_second, sums, further,
    SNAP: tl.constexpr, SATURATE: tl.constexpr, FALLBACK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Add x (B, n) to sums (B, TOGETHER), as many elements at a time: chains of fused multiply-adds, and few registers."""
    if x.shape[1] > TOGETHER:
        a, b = _halves(x)
        sums, further = _add_elements(
            a, to_grid, ratio, sixth, bound, to_second, from_second, sums, further, SNAP, SATURATE, FALLBACK, TOGETHER
        )  # fmt: skip
        return _add_elements(
            b, to_grid, ratio, sixth, bound, to_second, from_second, sums, further, SNAP, SATURATE, FALLBACK, TOGETHER
        )  # fmt: skip
    else:
        energy, product, first, ideal, mixed, deadzone, zeroed, dead_count, zero_count = sums
        t = x * to_grid
        q = _clamp(_round(t), SATURATE)
        e = q - t
        h = _round(tl.fma(t, ratio, 96.0) - 96.0 if SNAP else t * ratio)
        rho = tl.fma(h, sixth, -t)
        t2 = t * t
        dead = tl.where(h == 0, 1.0, 0.0)
        zero = tl.where(q == 0, 1.0, 0.0)
        energy += t2
        product = tl.fma(q, t, product)
        first = tl.fma(e, e, first)
        ideal = tl.fma(rho, rho, ideal)
        mixed = tl.fma(e, rho, mixed)
        deadzone = tl.fma(dead, t2, deadzone)
        zeroed = tl.fma(zero, t2, zeroed)
        dead_count += dead.to(tl.int32, bitcast=True)
        zero_count += zero.to(tl.int32, bitcast=True)
        dead_mixed, dead_error, clipped, fallback, error, correction, nonzero = further
        if SATURATE:
            beyond_e = tl.where(tl.abs(x) > bound, e, 0.0)
            clipped = tl.fma(beyond_e, e, clipped)
            dead_e = dead * e
            dead_mixed = tl.fma(dead_e, rho, dead_mixed)
            if not FALLBACK:
                dead_error = tl.fma(dead_e, e, dead_error)
        if FALLBACK:
            added = _clamp(_round(e * to_second), SATURATE) * from_second
            final_error = e + added
            fallback = tl.fma(added, added, fallback)
            error = tl.fma(final_error, final_error, error)
            correction = tl.fma(added, t, correction)
            dead_error = tl.fma(dead * final_error, final_error, dead_error)
            nonzero += tl.where(q + added == 0, 0.0, 1.0)
        sums = (energy, product, first, ideal, mixed, deadzone, zeroed, dead_count, zero_count)
        return sums, (dead_mixed, dead_error, clipped, fallback, error, correction, nonzero)


@triton.jit
def _block_sums(
    x, amax, factor, valid, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, SNAP: tl.constexpr, ASSEMBLY: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Blocks x (B, 32), their largest magnitudes, factors and numbers of elements that are no padding (B,).

    Returns (B, 2, 2, 2) three times: energies, those of clipping and of the second pass, counts; `_stats` names them.
    """
    SATURATE: tl.constexpr = CLIPS or CAREFUL
    broken = valid * 0
    if CAREFUL:
        finite = amax < float("inf")
        x = tl.where(finite[:, None], x, 0.0)
        amax = tl.where(finite, amax, 0.0)
        broken = tl.where(finite, 0, valid)
        valid = tl.where(finite, valid, 0)
    scaled = amax * factor if GROUP > 0 else amax
    byte = scale_byte(scaled, CARRY, SHIFT)
    scale = exp2_byte(byte)
    to_grid = inverse_scale(byte)
    if GROUP > 0:
        scale = tl.div_rn(scale, factor)
        to_grid *= factor
    top = amax * to_grid
    ratio = tl.where(top > 0, 6.0 / top, 0.0)
    to_second = to_grid
    from_second = to_grid
    if FALLBACK:
        t = x * to_grid[:, None]
        rest_amax = tl.max(tl.abs(_clamp(_round(t), SATURATE) - t), axis=1)
        shift = tl.minimum(tl.maximum(scale_byte(rest_amax, CARRY, SHIFT) + byte - 127, 1), 250) - byte + 127
        shift = tl.where(rest_amax == 0, 127, shift)
        to_second = inverse_scale(shift)
        from_second = exp2_byte(shift) * -alpha
    TOGETHER: tl.constexpr = 2 if ASSEMBLY else 8  # the interpreter is slow at calls
    none = tl.zeros((x.shape[0], TOGETHER), tl.float32)
    no_ones = tl.zeros((x.shape[0], TOGETHER), tl.int32)
    sums, further = _add_elements(
        x, to_grid[:, None], ratio[:, None], (top * (1 / 6))[:, None], (6.0 * scale)[:, None],
        to_second[:, None], from_second[:, None],
        (none, none, none, none, none, none, none, no_ones, no_ones), (none, none, none, none, none, none, none),
        SNAP, SATURATE, FALLBACK, TOGETHER,
    )  # fmt: skip
    energy, product, first, ideal, mixed, deadzone, zeroed, dead_count, zero_count = sums
    dead_mixed, dead_error, clipped, fallback, error, correction, nonzero = further
    energy = tl.sum(energy, 1)
    if not SATURATE:  # whoever looks at the energy sees that this block needs care
        energy = tl.where(scaled > _SATURATES, float("inf"), energy)
    deadzone = tl.sum(deadzone, 1)
    nothing = tl.zeros_like(energy)
    some = top > 0
    delta = tl.where(some, _log2(ratio, ASSEMBLY), 0.0)
    energies = _eight(
        energy, tl.sum(product, 1), tl.sum(first, 1), tl.sum(ideal, 1), tl.sum(mixed, 1), deadzone, tl.sum(zeroed, 1), delta
    )  # fmt: skip
    # Relative to what they are where nothing saturates and there is one pass: then these are zero.
    cross_deadzone = tl.sum(dead_mixed, 1) - deadzone if SATURATE else nothing
    dead_error = tl.sum(dead_error, 1) - deadzone if SATURATE or FALLBACK else nothing
    others = _eight(
        cross_deadzone, dead_error, tl.sum(clipped, 1), tl.sum(fallback, 1), tl.sum(error, 1), tl.sum(correction, 1),
        nothing, nothing,
    )  # fmt: skip
    padding = (32 - valid).to(tl.float32)
    counts = _eight(
        _count(dead_count) - padding, _count(zero_count) - padding, tl.sum(nonzero, 1), broken.to(tl.float32),
        tl.where(some, 1.0, 0.0), nothing, nothing, nothing,
    )  # fmt: skip
    return energies, others, counts, scale


@triton.jit
def _pooled(total, energies, scale):
    """total + energies * scale^2 in float64; the last of the eight has no scale."""
    weight = scale.to(tl.float64)
    weight *= weight
    one = tl.full(scale.shape, 1.0, tl.float64)
    return tl.fma(energies.to(tl.float64), _eight(weight, weight, weight, weight, weight, weight, weight, one), total)


@triton.jit
def _over_blocks(energies, further, counts, FURTHER: tl.constexpr):
    """Sums over the blocks of a program; `further` is zero where nothing was added to it."""
    more = tl.sum(further, 0) if FURTHER else tl.zeros((2, 2, 2), tl.float64)
    return tl.sum(energies, 0), more, tl.sum(counts, 0)


@triton.jit
def _column_blocks(x_ptr, columns, block, M, K, stride_m, stride_k):
    """Block `block` of each of the columns, (C, 32), and its number of elements."""
    C: tl.constexpr = columns.shape[0]
    k = tl.arange(0, 32)
    mask = (k < K - block * 32)[:, None] & (columns < M)[None, :]
    start = x_ptr + block.to(tl.int64) * 32 * stride_k + columns[None, :].to(tl.int64) * stride_m
    x = tl.trans(tl.load(start + k[:, None] * stride_k, mask=mask, other=0.0).to(tl.float32))
    valid = tl.minimum(tl.maximum(K - block * 32, 0), 32)
    return x, tl.where(columns < M, tl.full((C,), 1, tl.int32) * valid, 0)


@triton.jit
def _column_sums(
    x_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, SNAP: tl.constexpr, ASSEMBLY: tl.constexpr, C: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = GROUP if GROUP > 0 else 1
    columns = tl.program_id(0) * C + tl.arange(0, C)
    columns = tl.max_contiguous(columns, C // 128)  # more a load, and a thread would not hold whole blocks
    energies = tl.zeros((C, 2, 2, 2), tl.float64)
    further = tl.zeros((C, 2, 2, 2), tl.float64)
    counts = tl.zeros((C, 2, 2, 2), tl.float32)
    factor = tl.full((C,), 1.0, tl.float32)
    for step in range(steps):
        block = (tl.program_id(1) * steps + step) * BLOCKS
        if GROUP > 0:
            macro = tl.zeros((C,), tl.float32)
            for i in range(GROUP):
                x, _valid = _column_blocks(x_ptr, columns, block + i, M, K, stride_m, stride_k)
                amax = largest_magnitude(x, 1)
                macro = tl.maximum(macro, tl.where(amax < float("inf"), amax, 0.0))
            factor = static_factor(macro, LARGEST)
        for i in range(BLOCKS):
            x, valid = _column_blocks(x_ptr, columns, block + i, M, K, stride_m, stride_k)
            a, b, c, scale = _block_sums(
                x, largest_magnitude(x, 1), factor, valid, alpha, CARRY, SHIFT, GROUP, FALLBACK, CLIPS, SNAP, ASSEMBLY, CAREFUL
            )  # fmt: skip
            energies = _pooled(energies, a, scale)
            if CLIPS or CAREFUL or FALLBACK:
                further = _pooled(further, b, scale)
            counts += c
    return _over_blocks(energies, further, counts, CLIPS or CAREFUL or FALLBACK)


@triton.jit
def _row_sums(
    x_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, SNAP: tl.constexpr, ASSEMBLY: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = R * NB
    V: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    # (pieces, blocks, elements of a load): threads share out the blocks and load a piece of their block at a time.
    AXIS: tl.constexpr = 0 if LAST_AXIS_FIRST else 1  # of the pieces
    block = tl.arange(0, B)
    column = tl.program_id(0) * (NB * 32) + (block % NB) * 32
    piece = tl.expand_dims(tl.expand_dims(tl.arange(0, 32 // V) * V, 1 - AXIS), 2)
    k = tl.expand_dims(column[:, None], AXIS) + piece + tl.arange(0, V)[None, None, :]
    in_block = tl.minimum(tl.maximum(K - column, 0), 32)
    energies = tl.zeros((B, 2, 2, 2), tl.float64)
    further = tl.zeros((B, 2, 2, 2), tl.float64)
    counts = tl.zeros((B, 2, 2, 2), tl.float32)
    for step in range(steps):
        row = (tl.program_id(1) * steps + step) * R + block // NB
        mask = tl.expand_dims((row < M)[:, None], AXIS) & (k < K)
        at = tl.expand_dims(row.to(tl.int64)[:, None], AXIS) * stride_m + k.to(tl.int64) * stride_k
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        x = tl.reshape(tl.permute(x, (1, 0, 2)) if AXIS == 0 else x, (B, 32)).to(tl.float32)
        amax = largest_magnitude(x, 1)
        factor = amax
        if GROUP > 0:
            finite = tl.where(amax < float("inf"), amax, 0.0)
            macro = tl.max(tl.reshape(finite, (B // GROUP, GROUP)), axis=1)
            factor = static_factor(macro, LARGEST)
            factor = tl.reshape(tl.broadcast_to(factor[:, None], (B // GROUP, GROUP)), (B,))
        valid = tl.where(row < M, in_block, 0)
        a, b, c, scale = _block_sums(
            x, amax, factor, valid, alpha, CARRY, SHIFT, GROUP, FALLBACK, CLIPS, SNAP, ASSEMBLY, CAREFUL
        )  # fmt: skip
        energies = _pooled(energies, a, scale)
        if CLIPS or CAREFUL or FALLBACK:
            further = _pooled(further, b, scale)
        counts += c
    return _over_blocks(energies, further, counts, CLIPS or CAREFUL or FALLBACK)


@triton.jit
def _program_sums(
    x_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, SNAP: tl.constexpr, ASSEMBLY: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    if NB > 0:
        return _row_sums(
            x_ptr, M, K, stride_m, stride_k, steps, alpha,
            CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, SNAP, ASSEMBLY, R, NB, CAREFUL
        )  # fmt: skip
    else:
        return _column_sums(
            x_ptr, M, K, stride_m, stride_k, steps, alpha,
            CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, SNAP, ASSEMBLY, R, CAREFUL
        )  # fmt: skip


@triton.jit(do_not_specialize=["steps"])
def _sums_kernel(
    x_ptr, out_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, SNAP: tl.constexpr, ASSEMBLY: tl.constexpr, R: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Sums of one program into a row of 24. NB blocks of R rows are a tile along rows, R columns (NB = 0) one along columns."""
    energies, further, counts = _program_sums(
        x_ptr, M, K, stride_m, stride_k, steps, alpha,
        CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, SNAP, ASSEMBLY, R, NB, False
    )  # fmt: skip
    energy = tl.sum(tl.reshape(energies, (8,)), 0)
    if not (tl.abs(energy) < float("inf")):
        energies, further, counts = _program_sums(
            x_ptr, M, K, stride_m, stride_k, steps, alpha,
            CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, SNAP, ASSEMBLY, R, NB, True
        )  # fmt: skip
    out = out_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 24 + tl.arange(0, 8)
    tl.store(out, tl.reshape(energies, (8,)))
    tl.store(out + 8, tl.reshape(further, (8,)))
    tl.store(out + 16, tl.reshape(counts, (8,)).to(tl.float64))


@launches
def error_stats(x: torch.Tensor, recipe: QuantRecipe, axis: int) -> ErrorStats:
    """`mxfp4_rl.quant.error_stats` of a recipe that `device.supports`.

    Args:
        x: float32, bfloat16 or float16, any strides.
        axis: the quantised axis, non-negative.

    Returns:
        Counts as the reference's (for float32 as the module says), energies within float32 rounding. The same bits every time.
    """
    partial = [partial_sums(matrix, recipe) for matrix in matrices(x, axis, merges(x, axis))]
    if not partial:
        return ErrorStats()
    return _stats(torch.cat(partial).sum(0).tolist(), x.numel(), recipe)


def partial_sums(matrix: torch.Tensor, recipe: QuantRecipe) -> torch.Tensor:
    """float64 (programs, 24) of a matrix whose blocks lie along the last axis."""
    how = constants(recipe)
    macro = max(1, how["GROUP"])
    if matrix.stride(1) == 1 or matrix.stride(0) != 1:
        K = matrix.shape[1]
        if matrix.is_contiguous() and K % (macro * BLOCK) == 0:  # blocks one after another: any width will do
            K = BLOCK * math.gcd(matrix.numel() // BLOCK, _BLOCKS)
            matrix = matrix.view(-1, K)
        blocks = max(macro, min(triton.next_power_of_2(triton.cdiv(K, BLOCK)), _BLOCKS if K == _BLOCKS * BLOCK else 32))
        tile = {"R": _BLOCKS // blocks, "NB": blocks}
        tiles, others = triton.cdiv(matrix.shape[0], tile["R"]), triton.cdiv(K, blocks * BLOCK)
    elif BLOCK * matrix.stride(1) >= 2**31:  # the kernel's offsets within a block are 32 bits wide
        return partial_sums(matrix.contiguous(), recipe)
    else:
        tile = {"R": _COLUMNS, "NB": 0}
        tiles, others = triton.cdiv(matrix.shape[1], macro * BLOCK), triton.cdiv(matrix.shape[0], _COLUMNS)
    tile_elements = tile["R"] * (tile["NB"] or macro) * BLOCK
    # As many steps a program as keep the device full, and its counts exact in float32.
    steps = min(tiles, triton.cdiv(tiles * others, _PROGRAMS), 2**23 // tile_elements)
    grid = (others, triton.cdiv(tiles, steps))
    out = torch.empty(grid[0] * grid[1], 24, dtype=torch.float64, device=matrix.device)
    _sums_kernel[grid](
        matrix, out, *matrix.shape, *matrix.stride(), steps, recipe.fallback_alpha or 0.0,
        CLIPS=_clips(recipe), SNAP=matrix.dtype != torch.float32, ASSEMBLY=matrix.is_cuda,
        num_warps=4, maxnreg=_registers(how, tile), **tile, **how,
    )  # fmt: skip
    return out


def _registers(how: dict, tile: dict) -> int | None:
    """As few as the loop does without, so that four programs of one pass along rows share a multiprocessor."""
    return 128 if tile["NB"] and not how["FALLBACK"] else None


def _clips(recipe: QuantRecipe) -> bool:
    """Whether elements below the largest scale's reach may be beyond the grid's end."""
    rule = recipe.scale_rule
    return (CONSTANTS[rule] if isinstance(rule, str) else rule) > 6


def _stats(sums: list[float], elements: int, recipe: QuantRecipe) -> ErrorStats:
    energy, product, first, ideal, mixed, deadzone, zeroed, delta = sums[:8]
    cross_deadzone, more_dead_error, clipped, fallback, error, correction, *_ = sums[8:16]
    dead, zero, final_nonzero, broken, blocks, *_ = sums[16:]
    elements -= broken
    second = recipe.fallback_alpha is not None
    return ErrorStats(
        energy=energy,
        scale_bias=max(0.0, first - 2 * mixed + ideal),
        deadzone=deadzone,
        grid_noise=max(0.0, ideal - deadzone),
        fallback=fallback,
        cross=mixed - ideal - cross_deadzone,
        cross_deadzone=cross_deadzone,
        zeroed=zeroed,
        clipped=clipped,
        first_error=first,
        error=error if second else first,
        dead_error=deadzone + more_dead_error,
        product=product + correction,
        dead_elements=dead,
        zero_elements=zero,
        final_zeros=elements - final_nonzero if second else zero,
        elements=elements,
        broken=broken,
        delta=delta,
        blocks=blocks,
    )
