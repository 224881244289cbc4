"""Decode products on the host: what multiplies packed MXFP4 weights with few rows, and how it is cut (see `decode_kernel`)."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton

from mxfp4_kernels.device import BLOCK, launches
from mxfp4_kernels.matmul.decode_kernel import dot_kernel
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import QuantRecipe

CHUNK = 128  # elements of a row that four threads load at once
MOST_ROWS = 64
SMS, LATENCY = 132, 1200  # of the plan's model: multiprocessors, cycles until a load arrives
_POOLS: dict[torch.device, list] = {}
_ASM = os.environ.get("TRITON_INTERPRET") != "1"  # the interpreter has neither inline assembly nor products of bfloat16


class Plan(NamedTuple):
    """How a product is cut."""

    BN: int  # outputs of a program
    W: int  # warps of a program; 4 or 8 if they share the rows
    ALONG_K: bool  # they share the contraction instead
    SPLIT: int  # programs that share the contraction
    STAGES: int  # of the loads' pipeline; 1 keeps them in registers


@functools.cache
def plan(M: int, N: int, K: int) -> Plan:
    """The plan that should be fastest on an H100.

    The time of a step is its instructions, shared by the programs of a multiprocessor, or the latency of its loads; programs
    that do not fit at once run in turns.
    """
    along_k = M <= 16
    chunks = triton.cdiv(K, CHUNK)
    best, least = None, float("inf")
    for BN in (32, 64) if along_k else (64, 128):
        resident = 128 // BN if M <= 32 else 2
        cycles = BN * 16 if along_k else BN * 5  # of a warp, for its codes of one step
        for split in (1, 2, 3, 4, 6, 8):
            steps = triton.cdiv(chunks, split * (4 if along_k else 1))
            programs = triton.cdiv(N, BN) * split
            waves, together = triton.cdiv(programs, SMS * resident), min(resident, triton.cdiv(programs, SMS))
            time = waves * (steps * max(together * cycles, LATENCY + cycles) + LATENCY) + (LATENCY if split > 1 else 0)
            if time < least:
                best, least = Plan(BN, 4, along_k, split, 1 if along_k else 3), time
    return best


@launches
def decode_product(
    x: torch.Tensor,
    w: MXFP4Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    activation: QuantRecipe | None = None,
    how: Plan | None = None,
) -> torch.Tensor:
    """x (M, K) times w_hat (N, K) transposed, plus bias: (M, N). Accumulated in float32; the same bits every time.

    No autograd: the result has no gradient.

    The operand is the dequantised weight: code * scale exactly, whatever the scale; macro factors divide the sums of 128
    columns, or, where their blocks are no multiple of 128 elements, the values, which are then rounded to bfloat16; the second
    pass of an outlier fallback is summed apart and added with its alpha.

    Call it once outside a CUDA graph before capturing, since kernels compile then. Partial sums come from the caching
    allocator, so they belong to the stream or the graph; so do the arrival counters of a captured call. Those of other calls
    are dealt in turn from a pool, a thousand calls long or more, and the kernel leaves them zero.

    Args:
        x: bfloat16 (M, K), at most 64 rows, any strides; K % 8 == 0 and aligned rows spare a copy.
        w: quantised along its last axis, in blocks of 32, of shape (N, K); K % 128 == 0 spares a copy of the scales.
        bias: (N,), any stride, or None.
        out_dtype: torch.bfloat16 or torch.float32.
        activation: quantise x along K with this recipe first (W4A4); None multiplies x as it is.
        how: None for `plan(M, N, K)`.

    Raises:
        ValueError: shapes, types or devices that do not fit, more than 64 rows, a weight that was rotated or pre-scaled.
    """
    _check(x, w, bias, out_dtype)
    (M, K), N = x.shape, w.shape[0]
    bias = None if bias is None else bias.detach().contiguous()
    if not (M and N and K):
        y = torch.zeros(M, N, dtype=out_dtype, device=x.device)
        return y if bias is None else y + bias.to(out_dtype)
    if activation is not None:
        x = fake_quantize(x, activation)
    words = _x_words(x.detach())
    how = how or plan(M, N, K)
    tiles, steps = triton.cdiv(N, how.BN), triton.cdiv(triton.cdiv(K, CHUNK), how.SPLIT * (how.W if how.ALONG_K else 1))
    y = torch.empty(M, N, dtype=out_dtype, device=x.device)
    partial = arrived = None
    if how.SPLIT > 1:
        partial = torch.empty(how.SPLIT, M, N, dtype=torch.float32, device=x.device)
        arrived = _counters(x.device, tiles)
    second = w.residual
    scales = _scale_words(w.scales)
    dot_kernel[(tiles, how.SPLIT)](
        words, w.codes.contiguous(), scales,
        second and second.codes.contiguous(), second and _scale_words(second.scales),
        None if w.macro is None else w.macro.contiguous(), bias, y, partial, arrived,
        M, N, words.shape[1] * 2, w.scales.shape[1], scales.shape[1], words.stride(0), w.alpha, steps,
        BM=max(8 if how.ALONG_K else 16, triton.next_power_of_2(M)), BN=how.BN, W=how.W, ALONG_K=how.ALONG_K, SPLIT=how.SPLIT,
        MACRO=0 if w.macro is None else w.macro_size, RESIDUAL=second is not None, STAGES=how.STAGES, ASM=_ASM,
        num_warps=how.W, num_stages=how.STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _check(x: torch.Tensor, w: MXFP4Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> None:
    if not isinstance(w, MXFP4Tensor) or len(w.shape) != 2 or w.axis != 1 or w.block_size != BLOCK:
        raise ValueError("the weight must be an MXFP4Tensor (N, K), quantised along its last axis in blocks of 32")
    if w.hadamard or w.pre_scale != 1:
        raise ValueError("a rotated or pre-scaled weight has no decode product: dequantise and multiply in BF16")
    if x.ndim != 2 or x.dtype != torch.bfloat16:
        raise ValueError(f"x must be a bfloat16 matrix, not {x.dtype} of shape {tuple(x.shape)}")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns and the weight {w.shape[1]}: both are contracted")
    if x.shape[0] > MOST_ROWS:
        raise ValueError(f"x has {x.shape[0]} rows; a decode product takes at most {MOST_ROWS}")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"bias must be of shape ({w.shape[0]},), not {tuple(bias.shape)}")
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out_dtype={out_dtype} is not torch.bfloat16 or torch.float32")
    if any(t.device != x.device for t in (w.codes, *([] if bias is None else [bias]))):
        raise ValueError("x, the weight and the bias must be on one device")


def _x_words(x: torch.Tensor) -> torch.Tensor:
    """Pairs of columns as int32 words (M, ceil(K / 8) * 4), rows aligned to 16 bytes; the tail is zero."""
    M, K = x.shape
    if K % 8 or x.stride(1) != 1 or x.stride(0) % 8 or x.storage_offset() % 8:
        padded = x.new_zeros(M, -(-K // 8) * 8)
        padded[:, :K] = x
        x = padded
    return x.view(torch.int32)


def _scale_words(scales: torch.Tensor) -> torch.Tensor:
    """Four scales a word, int32 (N, ceil(blocks / 4))."""
    scales = torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4)) if scales.shape[1] % 4 else scales.contiguous()
    if scales.storage_offset() % 4:
        scales = scales.clone()
    return scales.view(torch.int32)


def _counters(device: torch.device, count: int) -> torch.Tensor:
    """`count` zeros, aligned to 16 bytes, which the kernel leaves zero: a graph's own, or the next of the device's pool."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    if device not in _POOLS:
        _POOLS[device] = [torch.zeros(1 << 20, dtype=torch.int32, device=device), 0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams must not read it earlier
    pool, start = _POOLS[device]
    start = 0 if start + count > pool.numel() else start
    _POOLS[device][1] = start + -(-count // 4) * 4  # a pointer of another alignment would compile another kernel
    return pool[start : start + count]
