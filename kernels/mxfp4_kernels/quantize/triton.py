"""Quantise along either axis of a matrix: to packed codes and scales, or straight to the operand they stand for.

Both are the reference's `quantize` and `fake_quantize` (`mxfp4_rl.quant.quantizer`), to the bit. Blocks are independent, so a
program takes a tile. How the tile is spread over threads decides the speed: a thread that owns much of a block computes scales
for many elements and exchanges little, but neighbouring threads should read and write whole sectors of memory together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import (
    BLOCK,
    LAST_AXIS_FIRST,
    constants,
    exp2_byte,
    first_scale,
    inverse_scale,
    largest_magnitude,
    launches,
    over_factor,
    round_e2m1,
    round_e2m1_stochastic,
    second_scale,
    tile_of,
    tiny,
    to_type,
    uniform,
)
from mxfp4_kernels.views import matrices, merges, one_row, paired
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import QuantRecipe


@triton.jit
def _places(R: tl.constexpr, NB: tl.constexpr, SHARE: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tile's elements; their columns in two parts, the second the same in all threads.

    The axes (neighbours, blocks, parts of a block, elements of a load) are in the order that makes Triton spread the tile as it
    should: threads take neighbours along the first, then along the second, and all along the others. SHARE threads share a
    block. Along a row they load V elements of it in turn; where blocks lie along columns, a load is of V columns.
    """
    P: tl.constexpr = R // V if COLUMNS else 1
    STEP: tl.constexpr = SHARE if COLUMNS else SHARE * V
    near, part = tl.arange(0, SHARE * P), tl.arange(0, 32 // STEP) * STEP
    if LAST_AXIS_FIRST:
        near, part = near[None, None, :, None], part[:, None, None, None]
    else:
        near, part = near[:, None, None, None], part[None, None, :, None]
    block = tl.arange(0, NB if COLUMNS else R * NB)[None, :, None, None]
    one = tl.arange(0, V)[None, None, None, :]
    if COLUMNS:
        return near % P * V + one, block * 32 + near // P, part
    else:
        return block // NB, block % NB * 32 + near * V, part + one


@triton.jit
def _as_blocks(x, R: tl.constexpr, NB: tl.constexpr, SHARE: tl.constexpr, COLUMNS: tl.constexpr):
    """From the axes of `_places` to (R, NB, 32)."""
    if LAST_AXIS_FIRST:
        x = tl.permute(x, (2, 1, 0, 3))
    x = tl.reshape(x, (SHARE, x.shape[0] // SHARE, x.shape[1], x.shape[2], x.shape[3]))
    return tl.reshape(tl.permute(x, (1, 4, 2, 3, 0) if COLUMNS else (1, 2, 3, 0, 4)), (R, NB, 32))


@triton.jit
def _as_placed(x, SHARE: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `_as_blocks`."""
    R: tl.constexpr = x.shape[0]
    NB: tl.constexpr = x.shape[1]
    if COLUMNS:
        x = tl.permute(tl.reshape(x, (R // V, V, NB, 32 // SHARE, SHARE)), (4, 0, 2, 3, 1))
    else:
        x = tl.permute(tl.reshape(x, (1, R * NB, 32 // (SHARE * V), SHARE, V)), (3, 0, 1, 2, 4))
    x = tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2], x.shape[3], x.shape[4]))
    return tl.permute(x, (2, 1, 0, 3)) if LAST_AXIS_FIRST else x


@triton.jit
def _pointers(ptr, m0, k0, rows, start, step, stride_m, stride_k):
    """To elements of a tile. The steps are apart, so that one addition finds the next of a thread's addresses."""
    return ptr + (m0 + rows) * stride_m + (k0 + start) * stride_k + step.to(tl.int64) * stride_k


@triton.jit
def _round(t, place, seed, STREAM: tl.constexpr, STOCHASTIC: tl.constexpr):
    """t in units of its scale, rounded as the recipe says; `place` is an element's own (`mxfp4_rl.quant.philox`)."""
    if STOCHASTIC:
        return round_e2m1_stochastic(t, uniform(place, seed, STREAM))
    else:
        return round_e2m1(t)


@triton.jit(do_not_specialize=["seed", "place"])
def _operand_kernel(
    x_ptr, out_ptr, M, K, stride_m, stride_k, out_m, out_k, alpha, seed: tl.int64, place: tl.int64,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    R: tl.constexpr, NB: tl.constexpr, SHARE: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """EVEN: K is a multiple of 32. seed: of stochastic rounding. place: of x's first element among those of whole blocks."""
    m0, k0, height, width = tile_of(M, K, R, NB * 32)
    rows, start, step = _places(R, NB, SHARE, V, COLUMNS)
    mask = (rows < height) & (start < width if EVEN else start + step < width)
    x = tl.load(_pointers(x_ptr, m0, k0, rows, start, step, stride_m, stride_k), mask=mask, other=0.0)
    x = _as_blocks(x, R, NB, SHARE, COLUMNS).to(tl.float32)
    amax = largest_magnitude(x, 2)
    byte, factor = first_scale(amax, CARRY, SHIFT, GROUP, LARGEST)
    scale = exp2_byte(byte)
    t = x * (inverse_scale(byte) * factor)[:, :, None]
    if STOCHASTIC:
        place += _as_blocks((m0 + rows) * (tl.cdiv(K, 32) * 32) + k0 + start + step, R, NB, SHARE, COLUMNS)
    first = _round(t, place, seed, 0, STOCHASTIC)
    x_hat = first * scale[:, :, None]
    is_tiny = tiny(amax, scale)
    if FALLBACK:
        rest = t - first
        rest_amax = largest_magnitude(rest, 2)
        byte2, shift = second_scale(rest_amax, byte, CARRY, SHIFT)
        scale2 = exp2_byte(byte2)
        second = _round(rest * inverse_scale(shift)[:, :, None], place, seed, 1, STOCHASTIC)
        x_hat = tl.fma(first, tl.broadcast_to(scale[:, :, None], x.shape), second * scale2[:, :, None] * alpha)  # exact product
        is_tiny |= tiny(rest_amax, scale2 * alpha)
    if GROUP > 0:
        x_hat = over_factor(x_hat, factor, is_tiny)
    x_hat = _as_placed(to_type(x_hat, out_ptr.dtype.element_ty), SHARE, V, COLUMNS)
    tl.store(_pointers(out_ptr, m0, k0, rows, start, step, out_m, out_k), x_hat, mask=mask)


@triton.jit
def _encode(t):
    """The E2M1 value nearest to t, and bits of which the last three are its code without the sign.

    As `round_e2m1`, but what is added to |t| is 0, 2 or 8 more for the powers of two 1, 2 and 4, which are 0, 2 and 4 units of
    the sum's last place; so these places count codes. Rounded, 2.5 p - 2.625 is 0, 2 and 8.
    """
    magnitude = tl.minimum(tl.abs(t), 6.0)  # of NaN too
    power = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000).to(tl.float32, bitcast=True)
    added = tl.fma(power, 6291456.0 + 2.5, -2.625)
    rounded = magnitude + added
    value = (rounded - added).to(tl.int32, bitcast=True) | (t.to(tl.int32, bitcast=True) & -0x80000000)
    return value.to(tl.float32, bitcast=True), rounded.to(tl.int32, bitcast=True)


@triton.jit
def _halves(x):
    """Even and odd elements of the last axis."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _eighths(x):
    """x (R, NB, 32) -> the eight elements of every word of codes, (R * NB, 4) each."""
    even, odd = _halves(tl.reshape(x, (x.shape[0] * x.shape[1], 32)))
    a, c = _halves(even)
    b, d = _halves(odd)
    a, e = _halves(a)
    b, f = _halves(b)
    c, g = _halves(c)
    d, h = _halves(d)
    return a, b, c, d, e, f, g, h


@triton.jit
def _words(bits, t):
    """Codes, eight a word, int32 (R * NB, 4): the last three of `bits` (R, NB, 32), and the signs of t.

    Above these three `bits` are zero up to bit 21: four codes are added before what is above needs to be cut off.
    """
    a, b, c, d, e, f, g, h = _eighths(bits)
    low = a + (b << 4) + (c << 8) + (d << 12)
    high = e + (f << 4) + (g << 8) + (h << 12)
    codes = (low & 0xFFFF) | (high << 16)
    a, b, c, d, e, f, g, h = _eighths(t.to(tl.uint32, bitcast=True) >> 28)
    signs = ((((((h << 4 | g) << 4 | f) << 4 | e) << 4 | d) << 4 | c) << 4 | b) << 4 | a
    return (codes & 0x77777777) | (signs.to(tl.int32, bitcast=True) & -0x77777778)


@triton.jit
def _packed_kernel(
    x_ptr, codes_ptr, scales_ptr, macro_ptr, codes2_ptr, scales2_ptr, M, K, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    R: tl.constexpr, NB: tl.constexpr, SHARE: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes are stored as words. EVEN: K is a multiple of 32."""
    m0, k0, height, width = tile_of(M, K, R, NB * 32)
    rows, start, step = _places(R, NB, SHARE, V, COLUMNS)
    mask = (rows < height) & (start < width if EVEN else start + step < width)
    x = tl.load(_pointers(x_ptr, m0, k0, rows, start, step, stride_m, stride_k), mask=mask, other=0.0)
    x = _as_blocks(x, R, NB, SHARE, COLUMNS).to(tl.float32)
    byte, factor = first_scale(largest_magnitude(x, 2), CARRY, SHIFT, GROUP, LARGEST)
    t = x * (inverse_scale(byte) * factor)[:, :, None]
    first, bits = _encode(t)
    row, block = tl.arange(0, R * NB) // NB, tl.arange(0, R * NB) % NB
    mask = (row < height) & (block * 32 < width)
    blocks = tl.cdiv(K, 32)
    at = m0 * blocks + k0 // 32 + (row * blocks + block)
    words_at = at[:, None] * 4 + tl.arange(0, 4)[None, :]
    words_mask = tl.broadcast_to(mask[:, None], (R * NB, 4))
    tl.store(codes_ptr + words_at, _words(bits, t), mask=words_mask)
    tl.store(scales_ptr + at, tl.reshape(byte, (R * NB,)).to(tl.uint8), mask=mask)
    if FALLBACK:
        rest = t - first
        byte2, shift = second_scale(largest_magnitude(rest, 2), byte, CARRY, SHIFT)
        t = rest * inverse_scale(shift)[:, :, None]
        _second, bits = _encode(t)
        tl.store(codes2_ptr + words_at, _words(bits, t), mask=words_mask)
        tl.store(scales2_ptr + at, tl.reshape(byte2, (R * NB,)).to(tl.uint8), mask=mask)
    if GROUP > 0:
        macros = tl.cdiv(blocks, GROUP)
        at = m0 * macros + k0 // (32 * GROUP) + (row * macros + block // GROUP)
        tl.store(macro_ptr + at, tl.reshape(factor, (R * NB,)), mask=mask & (block % GROUP == 0))


@launches
def operand(x: torch.Tensor, recipe: QuantRecipe, axis: int, dtype: torch.dtype, seed: int | None = None) -> torch.Tensor:
    """`fake_quantize` of a contiguous or strided tensor; the result is contiguous. Stochastic rounding needs a seed."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    place = 0
    for pair in paired(x, out, axis):
        rows, length = pair[0].shape
        x_matrix, out_matrix = one_row(_unit(recipe), *pair)
        tile, grid = _tiling(x_matrix, recipe, 2, 1 if recipe.fallback_alpha is None else 2)
        _operand_kernel[grid](
            x_matrix, out_matrix, *x_matrix.shape, *x_matrix.stride(), *out_matrix.stride(), recipe.fallback_alpha or 0.0,
            seed or 0, place, **tile, **constants(recipe), STOCHASTIC=recipe.rounding == "stochastic",
        )  # fmt: skip
        place += rows * -(-length // BLOCK) * BLOCK
    return out


@launches
def packed(x: torch.Tensor, recipe: QuantRecipe, axis: int) -> MXFP4Tensor:
    """`quantize` of a contiguous or strided tensor."""
    lead = [*x.shape[:axis], *x.shape[axis + 1 :]]
    length = x.shape[axis]
    blocks = -(-length // BLOCK)

    def store(width, dtype=torch.uint8):
        return torch.empty(*lead, width, dtype=dtype, device=x.device)

    passes = [(store(4 * blocks, torch.int32), store(blocks)) for _ in range(1 + (recipe.fallback_alpha is not None))]
    macro = store(-(-length // recipe.macro_size), torch.float32) if recipe.macro_block else None
    done = 0
    for matrix in matrices(x, axis, merges(x, axis)):
        own = [[t.view(-1, t.shape[-1])[done:] for t in one] for one in passes]
        own_macro = macro.view(-1, macro.shape[-1])[done:] if macro is not None else None
        done += len(matrix)
        (matrix,) = one_row(_unit(recipe), matrix)
        tile, grid = _tiling(matrix, recipe, 1, 1)
        _packed_kernel[grid](
            matrix, *own[0], own_macro, *own[-1], *matrix.shape, *matrix.stride(), **tile, **constants(recipe)
        )  # fmt: skip
    built = None
    for words, scales in reversed(passes):
        built = MXFP4Tensor(words.view(torch.uint8), scales, x.shape, axis, residual=built)
    built.macro, built.macro_size, built.alpha = macro, recipe.macro_size, recipe.fallback_alpha or 0.0
    return built


def _unit(recipe: QuantRecipe) -> int:
    return recipe.macro_size if recipe.macro_block else BLOCK


def _tiling(x: torch.Tensor, recipe: QuantRecipe, share_rows: int, share_columns: int) -> tuple[dict[str, int], tuple[int]]:
    """Constants of a tile, and the grid, for as many threads a block where blocks lie along rows, or along columns."""
    M, K = x.shape
    columns = x.stride(0) == 1 != x.stride(1)
    blocks = triton.next_power_of_2(max(_unit(recipe) // BLOCK, min(4 if columns else 8, triton.cdiv(K, BLOCK))))
    if columns:  # a warp takes a block of its columns, and compares macro blocks with others
        share, rows, per_load, warps = share_columns, 64 // share_columns, 2, blocks
    else:
        blocks = 128 // share_rows if M == 1 else blocks
        share, rows, per_load, warps = share_rows, 128 // (share_rows * blocks), 16 // x.element_size(), 4
    tile = {"R": rows, "NB": blocks, "SHARE": share, "V": per_load, "num_warps": warps}
    tile |= {"COLUMNS": columns, "EVEN": K % BLOCK == 0}
    return tile, (triton.cdiv(M, rows) * triton.cdiv(K, blocks * BLOCK),)
