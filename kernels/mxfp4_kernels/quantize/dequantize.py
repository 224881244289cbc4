"""Dequantise: packed codes and scales to the operand they stand for, `MXFP4Tensor.dequantize` to the bit.

A code's three magnitude bits, moved to bits 22 ... 24 of a float32, are E2M1 times 2^-126, its subnormal 0.5 included; so a
value is two exact multiplications. A thread decodes whole words of codes; where the blocks lie along columns the tile is turned
on its way out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import BLOCK, launches, over_factor, tile_of, to_type
from mxfp4_kernels.views import matrices, merges
from mxfp4_rl.quant.tensor import MXFP4Tensor


@triton.jit
def _block_values(codes_ptr, scales_ptr, rows, across, M, NB, R: tl.constexpr, BK: tl.constexpr):
    """Codes times scales of blocks, float32 (R, BK / 32, 32)."""
    pairs = across * (BK // 2) + tl.arange(0, BK // 2)
    mask = (rows < M)[:, None] & (pairs < NB * 16)[None, :]
    offset = rows[:, None].to(tl.int64)
    byte = tl.load(codes_ptr + offset * (NB * 16) + pairs[None, :], mask=mask, other=0).to(tl.int32)
    low = ((byte & 7) << 22) | ((byte & 8) << 28)
    high = ((byte & 0x70) << 18) | ((byte & 0x80) << 24)
    bits = tl.reshape(tl.join(low, high), (R, BK // 32, 32))
    blocks = across * (BK // 32) + tl.arange(0, BK // 32)
    mask = (rows < M)[:, None] & (blocks < NB)[None, :]
    scale = tl.load(scales_ptr + offset * NB + blocks[None, :], mask=mask, other=127).to(tl.int32)
    scale = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale << 23)).to(tl.float32, bitcast=True)
    return bits.to(tl.float32, bitcast=True) * 2.0**126 * scale[:, :, None]


@triton.jit
def _dequantize_kernel(
    codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, out_ptr, M, K, out_m, out_k, alpha, pre_scale,
    FALLBACK: tl.constexpr, GROUP: tl.constexpr, PRE_SCALED: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    down, across = tile_of(M, R)
    rows = down * R + tl.arange(0, R)
    NB = tl.cdiv(K, 32)
    x = _block_values(codes_ptr, scales_ptr, rows, across, M, NB, R, BK)
    if FALLBACK:
        x += _block_values(codes2_ptr, scales2_ptr, rows, across, M, NB, R, BK) * alpha
    if GROUP > 0:
        NM = tl.cdiv(NB, GROUP)
        macros = (across * (BK // 32) + tl.arange(0, BK // 32)) // GROUP
        mask = (rows < M)[:, None] & (macros < NM)[None, :]
        factor = tl.load(macro_ptr + rows[:, None].to(tl.int64) * NM + macros[None, :], mask=mask, other=1.0) * pre_scale
        x = over_factor(x, factor)
    elif PRE_SCALED:
        x = tl.div_rn(x, tl.full(x.shape, 1.0, tl.float32) * pre_scale)
    x = tl.reshape(x, (R, BK))
    columns = across * BK + tl.arange(0, BK)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows[:, None].to(tl.int64) * out_m + columns[None, :].to(tl.int64) * out_k
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
    K = q.shape[q.axis]
    stored = {name: tensor.reshape(-1, tensor.shape[-1]).contiguous() for name, tensor in q.tensors().items()}
    start = 0
    for matrix in views:
        M = matrix.shape[0]
        own = {name: tensor[start : start + M] for name, tensor in stored.items()}
        tile = _tile(matrix)
        _dequantize_kernel[(triton.cdiv(M, tile["R"]) * triton.cdiv(K, tile["BK"]),)](
            own["codes"], own["scales"], own.get("residual.codes"), own.get("residual.scales"), own.get("macro"),
            matrix, M, K, *matrix.stride(), q.alpha, q.pre_scale,
            FALLBACK=q.residual is not None, GROUP=q.macro_size // BLOCK if q.macro is not None else 0,
            PRE_SCALED=q.pre_scale != 1, **tile, enable_fp_fusion=False,
        )  # fmt: skip
        start += M
    return out


def _tile(out: torch.Tensor) -> dict[str, int]:
    K = out.shape[1]
    if out.stride(1) == 1 or out.stride(0) != 1:
        wide = max(BLOCK, min(2048, triton.next_power_of_2(K)))
        return {"R": max(1, 2048 // wide), "BK": wide, "num_warps": 4}
    return {"R": 64, "BK": max(BLOCK, min(128, triton.next_power_of_2(K))), "num_warps": 4}
