"""Quantise along either axis of a matrix: to packed codes and scales, or straight to the operand they stand for.

Both are the reference's `quantize` and `fake_quantize` (`mxfp4_rl.quant.quantizer`), to the bit. Blocks are independent, so a
program takes a tile: whole cache lines of rows, or a block of 32 rows of 64 columns where the blocks lie along the columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import (
    BLOCK,
    constants,
    e2m1_code,
    exp2_byte,
    launches,
    load_tile,
    over_factor,
    tile_of,
    to_type,
    two_passes,
)
from mxfp4_kernels.views import matrices, merges, paired
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import QuantRecipe


@triton.jit
def _load_blocks(x_ptr, M, K, stride_m, stride_k, R: tl.constexpr, BK: tl.constexpr):
    down, across = tile_of(M, R)
    rows = down * R + tl.arange(0, R)
    columns = across * BK + tl.arange(0, BK)
    x = load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k)
    return tl.reshape(x, (R, BK // 32, 32)), rows, columns, across


@triton.jit
def _operand_kernel(
    x_ptr, out_ptr, M, K, stride_m, stride_k, out_m, out_k, alpha,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    x, rows, columns, _across = _load_blocks(x_ptr, M, K, stride_m, stride_k, R, BK)
    first, byte, second, byte2, factor = two_passes(x, CARRY, SHIFT, GROUP, LARGEST, FALLBACK)
    x_hat = first * exp2_byte(byte)[:, :, None]
    if FALLBACK:
        x_hat += second * exp2_byte(byte2)[:, :, None] * alpha
    if GROUP > 0:
        x_hat = over_factor(x_hat, factor)
    x_hat = tl.reshape(x_hat, (R, BK))
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows[:, None].to(tl.int64) * out_m + columns[None, :].to(tl.int64) * out_k
    tl.store(out_ptr + at, to_type(x_hat, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_pass(values, byte, codes_ptr, scales_ptr, rows, across, M, NB, R: tl.constexpr, BK: tl.constexpr):
    even, odd = tl.split(tl.reshape(e2m1_code(values), (R, BK // 2, 2)))
    pairs = across * (BK // 2) + tl.arange(0, BK // 2)
    offset = rows[:, None].to(tl.int64)
    mask = (rows < M)[:, None] & (pairs < NB * 16)[None, :]
    tl.store(codes_ptr + offset * (NB * 16) + pairs[None, :], (even | (odd << 4)).to(tl.uint8), mask=mask)
    blocks = across * (BK // 32) + tl.arange(0, BK // 32)
    mask = (rows < M)[:, None] & (blocks < NB)[None, :]
    tl.store(scales_ptr + offset * NB + blocks[None, :], byte.to(tl.uint8), mask=mask)


@triton.jit
def _packed_kernel(
    x_ptr, codes_ptr, scales_ptr, macro_ptr, codes2_ptr, scales2_ptr, M, K, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    x, rows, _columns, across = _load_blocks(x_ptr, M, K, stride_m, stride_k, R, BK)
    first, byte, second, byte2, factor = two_passes(x, CARRY, SHIFT, GROUP, LARGEST, FALLBACK)
    NB = tl.cdiv(K, 32)
    _store_pass(first, byte, codes_ptr, scales_ptr, rows, across, M, NB, R, BK)
    if FALLBACK:
        _store_pass(second, byte2, codes2_ptr, scales2_ptr, rows, across, M, NB, R, BK)
    if GROUP > 0:
        G: tl.constexpr = BK // (32 * GROUP)
        NM = tl.cdiv(K, 32 * GROUP)
        macros = across * G + tl.arange(0, G)
        per_macro = tl.max(tl.reshape(factor, (R, G, GROUP)), axis=2)
        mask = (rows < M)[:, None] & (macros < NM)[None, :]
        tl.store(macro_ptr + rows[:, None].to(tl.int64) * NM + macros[None, :], per_macro, mask=mask)


@launches
def operand(x: torch.Tensor, recipe: QuantRecipe, axis: int, dtype: torch.dtype) -> torch.Tensor:
    """`fake_quantize` of a contiguous or strided tensor; the result is contiguous."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for x_matrix, out_matrix in paired(x, out, axis):
        M, K = x_matrix.shape
        tile, grid = _tiling(x_matrix, recipe)
        _operand_kernel[grid](
            x_matrix, out_matrix, M, K, *x_matrix.stride(), *out_matrix.stride(), recipe.fallback_alpha or 0.0,
            **tile, **constants(recipe),
        )  # fmt: skip
    return out


@launches
def packed(x: torch.Tensor, recipe: QuantRecipe, axis: int) -> MXFP4Tensor:
    """`quantize` of a contiguous or strided tensor."""
    lead = [*x.shape[:axis], *x.shape[axis + 1 :]]
    length = x.shape[axis]
    blocks = -(-length // BLOCK)

    def store(width, dtype=torch.uint8):
        return torch.empty(*lead, width, dtype=dtype, device=x.device)

    passes = [(store(blocks * 16), store(blocks)) for _ in range(1 + (recipe.fallback_alpha is not None))]
    macro = store(-(-length // recipe.macro_size), torch.float32) if recipe.macro_block else None
    start = 0
    for matrix in matrices(x, axis, merges(x, axis)):
        M, K = matrix.shape
        tile, grid = _tiling(matrix, recipe)
        own = [[t.view(-1, t.shape[-1])[start : start + M] for t in one] for one in passes]
        own_macro = macro.view(-1, macro.shape[-1])[start : start + M] if macro is not None else None
        _packed_kernel[grid](
            matrix, *own[0], own_macro, *own[-1], M, K, *matrix.stride(), **tile, **constants(recipe)
        )  # fmt: skip
        start += M
    built = None
    for codes, scales in reversed(passes):
        built = MXFP4Tensor(codes, scales, x.shape, axis, residual=built)
    built.macro, built.macro_size, built.alpha = macro, recipe.macro_size, recipe.fallback_alpha or 0.0
    return built


def _tiling(x: torch.Tensor, recipe: QuantRecipe) -> tuple[dict[str, int], tuple[int]]:
    M, K = x.shape
    unit = BLOCK * max(1, constants(recipe)["GROUP"])
    if x.stride(1) == 1 or x.stride(0) != 1:
        wide = max(unit, min(2048, triton.next_power_of_2(K)))
        tile = {"R": max(1, 2048 // wide), "BK": wide, "num_warps": 4}
    else:  # blocks along columns: neighbouring threads read neighbouring rows, each thread its own block
        tile = {"R": 64, "BK": unit, "num_warps": 2 if unit <= 64 else 4}
    return tile, (triton.cdiv(M, tile["R"]) * triton.cdiv(K, tile["BK"]),)
