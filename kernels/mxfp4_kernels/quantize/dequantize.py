"""Dequantise: packed codes and scales to the operand they stand for, `MXFP4Tensor.dequantize` to the bit.

A code's three magnitude bits, moved to bits 22 ... 24 of a float32, are E2M1 times 2^-126, its subnormal 0.5 included; so a
value is two exact multiplications. A thread decodes what it can write at once: a word of eight codes, or a word of each of
eight neighbouring columns, where blocks lie along columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import BLOCK, LAST_AXIS_FIRST, launches, over_factor, tile_of, tiny, to_type
from mxfp4_kernels.views import matrices, merges, one_row
from mxfp4_rl.quant.tensor import MXFP4Tensor


@triton.jit
def _places(R: tl.constexpr, NB: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, words of codes, and elements of these words in a tile, in the order of axes that makes Triton spread it so.

    It would give a thread neighbouring words, which are faster to load, if `max_contiguous` did not hide that they are.
    """
    eight = tl.arange(0, 8)
    if COLUMNS:
        near = tl.arange(0, R // 8)
        if LAST_AXIS_FIRST:
            near, nibble = near[None, None, :, None], eight[:, None, None, None]
        else:
            near, nibble = near[:, None, None, None], eight[None, None, :, None]
        word = tl.max_contiguous(tl.arange(0, NB * 4), 1)[None, :, None, None]
        return near * 8 + eight[None, None, None, :], word, nibble
    else:
        word = tl.max_contiguous(tl.arange(0, R * NB * 4), 1)[None, :, None]
        return word // (NB * 4), word % (NB * 4), eight[None, None, :]


@triton.jit
def _load_pass(codes_ptr, scales_ptr, word, block, nibble, mask):
    """E2M1 values, their scales, and words that are not 0 where a value is not."""
    codes = tl.load(codes_ptr + word, mask=mask, other=0)
    values = ((codes << (28 - 4 * nibble)) >> 6) & -0x7E400000
    byte = tl.load(scales_ptr + block, mask=mask, other=127).to(tl.int32)
    scale = ((byte << 23) | tl.where((byte == 0) | (byte == 255), 0x00400000, 0)).to(tl.float32, bitcast=True)
    return values.to(tl.float32, bitcast=True) * 2.0**126, scale, codes & 0x77777777


@triton.jit
def _dequantize_kernel(
    codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, out_ptr, M, K, out_m, out_k, alpha, pre_scale,
    FALLBACK: tl.constexpr, GROUP: tl.constexpr, PRE_SCALED: tl.constexpr,
    R: tl.constexpr, NB: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Codes come as words. EVEN: K is a multiple of 32."""
    m0, k0, height, width = tile_of(M, K, R, NB * 32)
    row, word, nibble = _places(R, NB, COLUMNS)
    mask = (row < height) & (word * 8 < width)
    blocks = tl.cdiv(K, 32)
    start = m0 * blocks + k0 // 32
    word_at, block_at = row * (blocks * 4) + word, row * blocks + word // 4
    values, scale, some = _load_pass(codes_ptr + start * 4, scales_ptr + start, word_at, block_at, nibble, mask)
    x = values * scale
    is_tiny = tiny(some, scale)
    if FALLBACK:
        values, scale, some = _load_pass(codes2_ptr + start * 4, scales2_ptr + start, word_at, block_at, nibble, mask)
        x += values * scale * alpha
        is_tiny |= tiny(some, scale * alpha)
    if GROUP > 0:
        macros = tl.cdiv(blocks, GROUP)
        if NB % GROUP == 0:
            at = m0 * macros + k0 // (32 * GROUP) + (row * macros + word // (4 * GROUP))
        else:
            at = (m0 + row) * macros + (k0 // 32 + word // 4) // GROUP
        factor = tl.load(macro_ptr + at, mask=mask, other=1.0)
        x = tl.div_rn(x, tl.broadcast_to(factor * pre_scale, x.shape)) if PRE_SCALED else over_factor(x, factor, is_tiny)
    elif PRE_SCALED:
        x = tl.div_rn(x, tl.full(x.shape, 1.0, tl.float32) * pre_scale)
    at = (m0 + row) * out_m + (k0 + word * 8) * out_k + nibble.to(tl.int64) * out_k
    if not EVEN:
        mask &= word * 8 + nibble < width
    tl.store(out_ptr + at, to_type(x, out_ptr.dtype.element_ty), mask=mask)


def supports(q: MXFP4Tensor) -> bool:
    """Whether the kernel dequantises the tensor: blocks of 32, not rotated, a second pass without factors of its own."""
    second = q.residual
    return q.block_size == BLOCK and not q.hadamard and (second is None or (second.macro is None and second.residual is None))


@launches
def dequantize(q: MXFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`q.dequantize(dtype)`, contiguous, of shape `q.shape`; dtype is float32, bfloat16 or float16.

    Raises:
        ValueError: a tensor that `supports` refuses.
    """
    if not supports(q):
        raise ValueError(
            f"no Triton kernel for blocks of {q.block_size}, hadamard={q.hadamard}, or a second pass with factors of its own: "
            "use the reference"
        )
    out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    views = matrices(out, q.axis, merges(out, q.axis))
    if not views:
        return out
    stored = {name: tensor.reshape(-1, tensor.shape[-1]).contiguous() for name, tensor in q.tensors().items()}
    stored |= {name: _as_words(tensor) for name, tensor in stored.items() if name.endswith("codes")}
    group = q.macro_size // BLOCK if q.macro is not None else 0
    start = 0
    for matrix in views:
        own = {name: tensor[start:] for name, tensor in stored.items()}
        start += len(matrix)
        (matrix,) = one_row(max(1, group) * BLOCK, matrix)
        tile, grid = _tiling(matrix, max(1, group))
        _dequantize_kernel[grid](
            own["codes"], own["scales"], own.get("residual.codes"), own.get("residual.scales"), own.get("macro"),
            matrix, *matrix.shape, *matrix.stride(), q.alpha, q.pre_scale,
            FALLBACK=q.residual is not None, GROUP=group, PRE_SCALED=q.pre_scale != 1, **tile, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _as_words(codes: torch.Tensor) -> torch.Tensor:
    """As int32; codes that lie at an odd address, in a buffer of other things, are copied."""
    aligned = codes.data_ptr() % 4 == codes.storage_offset() % 4 == 0
    return (codes if aligned else codes.clone()).view(torch.int32)


def _tiling(out: torch.Tensor, group: int) -> tuple[dict[str, int], tuple[int]]:
    """Constants of a tile, and the grid."""
    M, K = out.shape
    columns = out.stride(0) == 1 != out.stride(1)
    blocks = triton.next_power_of_2(max(group, min(4 if columns else 8, triton.cdiv(K, BLOCK))))
    if columns:
        tile = {"R": 64, "NB": blocks, "num_warps": blocks}
    else:
        blocks = 128 if M == 1 else blocks
        tile = {"R": 128 // blocks, "NB": blocks, "num_warps": 4}
    return tile | {"COLUMNS": columns, "EVEN": K % BLOCK == 0}, (triton.cdiv(M, tile["R"]) * triton.cdiv(K, blocks * BLOCK),)
