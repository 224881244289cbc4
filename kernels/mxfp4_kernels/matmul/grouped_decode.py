"""Products of few tokens with many experts' packed MXFP4 weights: decoding with a mixture of experts, bound by their bytes.

    Y[t] = W_hat[e(t)] x[t], tokens sorted by expert, offsets (E + 1,) on the device, which the host never reads.

Only experts that have tokens are read, as they are stored. A program has a tile of an expert's rows of W and of its tokens. It
makes its part of the operand as `MXFP4Tensor.dequantize` does, in float32 and in the same order (code times scale, plus alpha
times the residual, divided by the macro factor), and rounds it once to bfloat16: the operand is the trainer's bit for bit,
whatever the recipe. (The decode product of one weight sums macro blocks apart instead.)

As in `grouped`, a first kernel lists the row tiles of all experts; there are as many programs as any counts could need, and
those that are not needed leave at once. So a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import BLOCK, INTERPRETED, launches
from mxfp4_kernels.matmul.decode_kernel import _nibble, _scale_bits
from mxfp4_kernels.matmul.grouped import _schedule_kernel
from mxfp4_rl.quant.tensor import MXFP4Tensor

MOST_TOKENS = 64  # an expert, on average; with more, dequantising all weights for the call costs less than doing so a tile
_OUTPUTS = (torch.bfloat16, torch.float32)


@triton.jit
def _load(codes_ptr, scales_ptr, at, there):
    """Words of codes and the scales of their blocks, of which each is four words."""
    words = tl.load(codes_ptr + at, mask=there, other=0)
    byte = tl.load(scales_ptr + at // 4, mask=there, other=127).to(tl.int32)
    return words, (_scale_bits(byte) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _value(n: tl.constexpr, words, scale, words2, scale2, factor, alpha, RESIDUAL: tl.constexpr, MACRO: tl.constexpr):
    """Column n of each word, float32."""
    value = _nibble(words, n, scale)
    if RESIDUAL:
        value += alpha * _nibble(words2, n, scale2)
    if MACRO > 0:
        value = tl.div_rn(value, factor)
    return value


@triton.jit
def _values(words, scale, words2, scale2, factor, alpha, RESIDUAL: tl.constexpr, MACRO: tl.constexpr):
    """The operand, float32 (rows, 8 * words), of words of codes with what belongs to each of them."""
    v0 = _value(0, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    v1 = _value(1, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    v2 = _value(2, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    v3 = _value(3, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    v4 = _value(4, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    v5 = _value(5, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    v6 = _value(6, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    v7 = _value(7, words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    values = tl.join(even, odd)  # (rows, words, n / 4, n / 2 % 2, n % 2): columns in order
    return tl.reshape(values, (words.shape[0], words.shape[1] * 8))


@triton.jit
def _rounded(values):
    """To bfloat16. The interpreter, whose bfloat16 truncates and has no products, keeps the rounded values in float32."""
    if INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(values == values, nearest, bits).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.bfloat16)


@triton.jit(do_not_specialize=["T", "alpha"])
def _product_kernel(
    x_ptr, codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, y_ptr, offsets_ptr, tiles_ptr, total_ptr,
    T, E, N, K, NB, alpha,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MACRO: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    if tile < tl.load(total_ptr):
        expert = tl.load(tiles_ptr + 2 * tile)
        first = tl.load(tiles_ptr + 2 * tile + 1)
        last = tl.minimum(tl.load(offsets_ptr + expert + 1, mask=expert < E, other=T), T)
        depth = tl.where(expert < E, K, 0)  # tokens behind the last expert's get zeros
        token = first + tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        row = tl.minimum(expert, E - 1).to(tl.int64) * N + tl.minimum(n, N - 1)
        word = tl.arange(0, BK // 8)
        column = tl.arange(0, BK)
        acc = tl.zeros((BN, BM), tl.float32)
        for k in range(0, depth, BK):
            here = k // 8 + word
            there = (here < NB * 4)[None, :] & (n < N)[:, None]
            at = row[:, None] * (NB * 4) + here[None, :]
            words, scale = _load(codes_ptr, scales_ptr, at, there)
            words2, scale2, factor = words, scale, scale
            if RESIDUAL:
                words2, scale2 = _load(codes2_ptr, scales2_ptr, at, there)
            if MACRO > 0:  # the columns of a word, and of a block, have the same factor
                macro_at = row[:, None] * tl.cdiv(K, MACRO) + (here // (MACRO // 8))[None, :]
                factor = tl.load(macro_ptr + macro_at, mask=there, other=1.0)
            values = _values(words, scale, words2, scale2, factor, alpha, RESIDUAL, MACRO)
            x_at = token[None, :].to(tl.int64) * K + (k + column)[:, None]
            x = tl.load(x_ptr + x_at, mask=(token < last)[None, :] & (k + column < K)[:, None], other=0.0)
            if INTERPRETED:
                x = x.to(tl.float32)
            acc = tl.dot(_rounded(values), x, acc, input_precision="ieee")
        y_at = token[:, None].to(tl.int64) * N + n[None, :]
        tl.store(y_ptr + y_at, tl.trans(acc).to(y_ptr.dtype.element_ty), mask=(token < last)[:, None] & (n < N)[None, :])


@launches
def grouped_decode_product(
    x: torch.Tensor, w: MXFP4Tensor, offsets: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Y[t] = W_hat[e(t)] x[t], of packed weights: (T, N). Accumulated in float32; nothing is synchronised. No autograd.

    Args:
        x: tokens sorted by expert, bfloat16 (T, K).
        w: the experts' weights (E, N, K), quantised along K in blocks of 32.
        offsets: int32 (E + 1,): expert e owns the tokens from offsets[e] to offsets[e + 1], from 0 on and in order. Rows
            behind the last expert's are zero in Y.
        out_dtype: torch.bfloat16 or torch.float32.

    Raises:
        ValueError: shapes, types or devices that do not fit, a weight that was rotated or pre-scaled.
    """
    _check(x, w, offsets, out_dtype)
    (T, K), (E, N, _) = x.shape, w.shape
    if not (T and N and K and E):
        return x.new_zeros(T, N, dtype=out_dtype)
    BM = 16 if T <= 16 * E else 32 if T <= 32 * E else 64
    y = x.new_empty(T, N, dtype=out_dtype)
    limit = min(T, T // BM + E + 1)  # of row tiles, those behind the last expert included
    schedule = torch.empty(4 + 2 * limit, dtype=torch.int32, device=x.device)
    total, tiles = schedule, schedule[4:]  # apart, so that both are aligned
    every = {"EXPERTS": triton.next_power_of_2(E), "CHUNK": 128}
    _schedule_kernel[(E + 1,)](offsets, tiles, total, T, E, limit, BM=BM, **every)
    second = w.residual
    BN = 64
    _product_kernel[(triton.cdiv(N, BN), limit)](
        x.contiguous(), _words(w.codes), w.scales.contiguous(),
        second and _words(second.codes), second and second.scales.contiguous(),
        None if w.macro is None else w.macro.contiguous(), y, offsets, tiles, total,
        T, E, N, K, w.scales.shape[-1], float(w.alpha),
        BM=BM, BN=BN, BK=128, MACRO=0 if w.macro is None else w.macro_size, RESIDUAL=second is not None,
        num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes a word, int32 (..., blocks * 4)."""
    codes = codes.contiguous()
    return (codes.clone() if codes.storage_offset() % 4 else codes).view(torch.int32)


def _check(x: torch.Tensor, w: MXFP4Tensor, offsets: torch.Tensor, out_dtype: torch.dtype) -> None:
    if not isinstance(w, MXFP4Tensor) or len(w.shape) != 3 or w.axis != 2 or w.block_size != BLOCK:
        raise ValueError("the weights must be an MXFP4Tensor (E, N, K), quantised along its last axis in blocks of 32")
    if w.hadamard or w.pre_scale != 1:
        raise ValueError("rotated or pre-scaled weights have no decode product: dequantise and multiply in BF16")
    if x.ndim != 2 or x.dtype != torch.bfloat16 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x must be a bfloat16 matrix (T, {w.shape[2]}), not {x.dtype} of shape {tuple(x.shape)}")
    if out_dtype not in _OUTPUTS:
        raise ValueError(f"out_dtype={out_dtype} is not torch.bfloat16 or torch.float32")
    right = offsets.dtype == torch.int32 and tuple(offsets.shape) == (w.shape[0] + 1,) and offsets.is_contiguous()
    if not right or any(t.device != x.device for t in (w.codes, offsets)):
        have = f"{offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
        raise ValueError(f"offsets must be contiguous torch.int32 ({w.shape[0] + 1},) on {x.device}, not {have}")
