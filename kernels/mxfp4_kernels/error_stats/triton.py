"""Error statistics in one read: `mxfp4_rl.quant.error_stats` without a tensor of errors.

A thread holds whole blocks, so that nothing moves between threads but the last sums (`sums.py`). Programs first assume that no
block is broken, that squares neither overflow nor vanish and, under rules with c <= 6, that nothing saturates; a program whose
energy is tiny or not a finite number takes its tiles again, carefully.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import BLOCK, LAST_AXIS_FIRST, constants, launches, static_factor
from mxfp4_kernels.error_stats.sums import add_blocks, block_largest, magnitude, nothing, over_blocks
from mxfp4_kernels.views import matrices, merges
from mxfp4_rl.quant.decomposition import ErrorStats
from mxfp4_rl.quant.scales import CONSTANTS
from mxfp4_rl.recipe import QuantRecipe

_BLOCKS = 128  # of a tile along rows: one a thread
_COLUMNS = 256  # of a tile along columns: two a thread
_STEPS = 64  # of a program at most, for the sake of float32 sums
_SUMS = 20  # of a program
_MULTIPROCESSORS = 132  # of an H100
_LEAST_ENERGY = tl.constexpr(2.0**-70)  # of a program whose squares do not underflow


@triton.jit
def _column_blocks(x_ptr, columns, block, M, K, stride_m, stride_k, WHOLE: tl.constexpr):
    """Block `block` of each of the columns, (C, 32)."""
    k = tl.arange(0, 32)
    first_ptr = x_ptr + block.to(tl.int64) * 32 * stride_k + columns[None, :].to(tl.int64) * stride_m
    at = first_ptr + k.to(tl.int64)[:, None] * stride_k
    x = tl.load(at) if WHOLE else tl.load(at, mask=(k < K - block * 32)[:, None] & (columns < M)[None, :], other=0.0)
    return tl.trans(magnitude(x))


@triton.jit
def _column_sums(
    x_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = GROUP if GROUP > 0 else 1
    columns = tl.program_id(0) * C + tl.arange(0, C)
    columns = tl.max_contiguous(columns, C // 128)  # more a load, and a thread would not hold whole blocks
    first = tl.program_id(1) * steps
    steps = tl.minimum(steps, tl.cdiv(K, BLOCKS * 32) - first)
    totals = nothing(C, CAREFUL)
    factor = tl.full((C,), 1.0, tl.float32)
    for step in range(steps):
        block = (first + step) * BLOCKS
        if GROUP > 0:
            macro = tl.zeros((C,), tl.float32)
            for i in range(GROUP):
                amax = block_largest(_column_blocks(x_ptr, columns, block + i, M, K, stride_m, stride_k, WHOLE))
                macro = tl.maximum(macro, tl.where(amax < float("inf"), amax, 0.0))
            factor = static_factor(macro, LARGEST)
        for i in range(BLOCKS):
            x = _column_blocks(x_ptr, columns, block + i, M, K, stride_m, stride_k, WHOLE)
            valid = tl.where(columns < M, tl.minimum(tl.maximum(K - (block + i) * 32, 0), 32), 0)
            totals = add_blocks(
                x, block_largest(x), factor, valid, alpha, totals, CARRY, SHIFT, GROUP, FALLBACK, CLIPS, CAREFUL
            )
    inside = tl.minimum(M - tl.program_id(0) * C, C) * tl.minimum(K - first * (BLOCKS * 32), steps * (BLOCKS * 32))
    return over_blocks(totals, steps * (BLOCKS * 32 * C) - inside, CLIPS or FALLBACK or CAREFUL)


@triton.jit
def _row_sums(
    x_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, WHOLE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = R * NB
    V: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    # (pieces, blocks, elements of a load): threads share out the blocks and load a piece of their block at a time.
    AXIS: tl.constexpr = 0 if LAST_AXIS_FIRST else 1  # of the pieces
    block = tl.arange(0, B)
    column = tl.program_id(0) * (NB * 32) + (block % NB) * 32
    piece = tl.expand_dims(tl.expand_dims(tl.arange(0, 32 // V) * V, 1 - AXIS), 2)
    k = tl.expand_dims(column[:, None], AXIS) + piece + tl.arange(0, V)[None, None, :]
    at = tl.expand_dims((block // NB).to(tl.int64)[:, None], AXIS) * stride_m + k.to(tl.int64) * stride_k
    first = tl.program_id(1) * steps
    steps = tl.minimum(steps, tl.cdiv(M, R) - first)
    tile_stride = tl.full((), R, tl.int64) * stride_m
    tile_ptr = x_ptr + first * tile_stride
    totals = nothing(B, CAREFUL)
    for step in range(steps):
        row = (first + step) * R + block // NB
        if WHOLE:
            x = tl.load(tile_ptr + at)
        else:
            x = tl.load(tile_ptr + at, mask=tl.expand_dims((row < M)[:, None], AXIS) & (k < K), other=0.0)
        tile_ptr += tile_stride
        x = magnitude(tl.reshape(tl.permute(x, (1, 0, 2)) if AXIS == 0 else x, (B, 32)))
        amax = block_largest(x)
        factor = tl.full((B,), 1.0, tl.float32)
        if GROUP > 0:
            finite = tl.where(amax < float("inf"), amax, 0.0)
            macro = tl.max(tl.reshape(finite, (B // GROUP, GROUP)), axis=1)
            factor = static_factor(macro, LARGEST)
            factor = tl.reshape(tl.broadcast_to(factor[:, None], (B // GROUP, GROUP)), (B,))
        valid = tl.where(row < M, tl.minimum(tl.maximum(K - column, 0), 32), 0)
        totals = add_blocks(x, amax, factor, valid, alpha, totals, CARRY, SHIFT, GROUP, FALLBACK, CLIPS, CAREFUL)
    inside = tl.minimum(M - first * R, steps * R) * tl.minimum(K - tl.program_id(0) * (NB * 32), NB * 32)
    return over_blocks(totals, steps * (B * 32) - inside, CLIPS or FALLBACK or CAREFUL)


@triton.jit
def _program_sums(
    x_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, WHOLE: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    if NB > 0:
        return _row_sums(
            x_ptr, M, K, stride_m, stride_k, steps, alpha,
            CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, R, NB, WHOLE, CAREFUL
        )  # fmt: skip
    else:
        return _column_sums(
            x_ptr, M, K, stride_m, stride_k, steps, alpha,
            CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, R, WHOLE, CAREFUL
        )  # fmt: skip


@triton.jit(do_not_specialize=["steps"])
def _sums_kernel(
    x_ptr, out_ptr, M, K, stride_m, stride_k, steps, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    CLIPS: tl.constexpr, R: tl.constexpr, NB: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Sums of a program, a column of 20. NB blocks of R rows are a tile along rows, R columns (NB = 0) one along columns.

    WHOLE tiles have no padding.
    """
    energies, further, counts = _program_sums(
        x_ptr, M, K, stride_m, stride_k, steps, alpha,
        CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, R, NB, WHOLE, False
    )  # fmt: skip
    sums = tl.reshape(energies, (8,))
    index = tl.arange(0, 8)
    energy = tl.sum(tl.where(index == 0, sums, 0.0), 0)
    if not ((energy > _LEAST_ENERGY) & (tl.abs(tl.sum(sums, 0)) < float("inf"))):
        energies, further, counts = _program_sums(
            x_ptr, M, K, stride_m, stride_k, steps, alpha,
            CARRY, SHIFT, GROUP, LARGEST, FALLBACK, CLIPS, R, NB, WHOLE, True
        )  # fmt: skip
    programs = tl.num_programs(0) * tl.num_programs(1)
    out_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + index * programs, tl.reshape(energies, (8,)))
    tl.store(out_ptr + (8 + index) * programs, tl.reshape(further, (8,)))
    tl.store(out_ptr + (16 + tl.arange(0, 4)) * programs, tl.reshape(counts, (4,)).to(tl.float64))


@launches
def error_stats(x: torch.Tensor, recipe: QuantRecipe, axis: int) -> ErrorStats:
    """`mxfp4_rl.quant.error_stats` of a recipe that `device.supports`.

    Args:
        x: float32, bfloat16 or float16, any strides.
        axis: the quantised axis, non-negative.

    Returns:
        Counts as the reference's (for float32 as the module says), energies within float32 rounding. The same bits every time.
    """
    if not x.numel():
        return ErrorStats()
    views = [x if axis else x.t()] if x.ndim == 2 else matrices(x, axis, merges(x, axis))
    parts = [partial_sums(matrix, recipe) for matrix in views]
    sums = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _stats(sums.sum(0).tolist(), x.numel(), recipe)


def partial_sums(matrix: torch.Tensor, recipe: QuantRecipe) -> torch.Tensor:
    """float64 (programs, 20) of a matrix whose blocks lie along the last axis; a sum's parts are neighbours in memory."""
    how = constants(recipe)
    macro = max(1, how["GROUP"])
    M, K = matrix.shape
    rows = matrix.stride(1) == 1 or matrix.stride(0) != 1
    if rows:
        if matrix.is_contiguous() and K % (macro * BLOCK) == 0:  # blocks one after another: any width will do
            K = BLOCK * math.gcd(matrix.numel() // BLOCK, _BLOCKS)
            matrix = matrix.view(-1, K)
            M = matrix.shape[0]
        most = _BLOCKS if K == _BLOCKS * BLOCK else 32
        blocks = max(macro, min(1 << (_over(K, BLOCK) - 1).bit_length(), most))
        tile, tile_rows, tile_length = {"R": _BLOCKS // blocks, "NB": blocks}, _BLOCKS // blocks, blocks * BLOCK
        tiles, others = _over(M, tile_rows), _over(K, tile_length)
    else:
        tile, tile_rows, tile_length = {"R": _COLUMNS, "NB": 0}, _COLUMNS, macro * BLOCK
        tiles, others = _over(K, tile_length), _over(M, tile_rows)
    # What the loops get along with, and programs that run at once, of 128 threads each.
    registers = (128 if how["FALLBACK"] else 64) if rows else (168 if how["FALLBACK"] else 128)
    programs = _MULTIPROCESSORS * (65536 // (128 * registers))
    steps = min(_STEPS, _over(tiles, max(1, programs // others)))
    grid = (others, _over(tiles, steps))
    out = torch.empty(_SUMS, grid[0] * grid[1], dtype=torch.float64, device=matrix.device)
    _sums_kernel[grid](
        matrix, out, M, K, *matrix.stride(), steps, recipe.fallback_alpha or 0.0, CLIPS=_clips(recipe),
        WHOLE=M % tile_rows == K % tile_length == 0, num_warps=4, maxnreg=registers, **tile, **how,
    )  # fmt: skip
    return out.t()


def _over(number: int, divisor: int) -> int:
    """Rounded up; `triton.cdiv` takes the host ten times as long."""
    return -(-number // divisor)


def _clips(recipe: QuantRecipe) -> bool:
    """Whether elements below the largest scale's reach may be beyond the grid's end."""
    rule = recipe.scale_rule
    return (CONSTANTS[rule] if isinstance(rule, str) else rule) > 6


def _stats(sums: list[float], elements: int, recipe: QuantRecipe) -> ErrorStats:
    energy, product, first, ideal, mixed, deadzone, zeroed, delta = sums[:8]
    clipped, dead_product, dead_first, fallback, error, correction, dead_error, broken = sums[8:16]
    dead, zero, final_zero, blocks = sums[16:]
    alpha = recipe.fallback_alpha
    if alpha is None:
        alpha, error, dead_error, final_zero = 0.0, first, deadzone + dead_first, zero
    return ErrorStats(
        energy=energy,
        scale_bias=max(0.0, first - 2 * mixed + ideal),
        deadzone=deadzone,
        grid_noise=max(0.0, ideal - deadzone),
        fallback=alpha**2 * fallback,
        cross=mixed - ideal + dead_product,
        cross_deadzone=-dead_product,
        zeroed=zeroed,
        clipped=clipped,
        first_error=first,
        error=error,
        dead_error=dead_error,
        product=energy - product + alpha * correction,
        dead_elements=dead - broken,  # which were counted as zeros
        zero_elements=zero - broken,
        final_zeros=final_zero - broken,
        elements=elements - broken,
        broken=broken,
        delta=delta,
        blocks=blocks,
    )
