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
_PROCESSORS = 132  # of an H100
_POOLS: dict[torch.device, list[list]] = {}  # of arrival counters: the zeros and where the next are, for calls and for graphs
_ASM = os.environ.get("TRITON_INTERPRET") != "1"  # the interpreter has neither inline assembly nor products of bfloat16


class Plan(NamedTuple):
    """How a product is cut."""

    BN: int  # outputs of a program
    W: int  # warps of a program; 4, 8 or 16 if they share the rows
    ALONG_K: bool  # they share the contraction instead
    SPLIT: int  # programs that share the contraction
    QUARTERS: bool = False  # X goes from memory to the tensor core a quarter of a chunk at a time, whatever the warps share

    def rows(self, M: int) -> int:
        """What M is padded to."""
        return max(8 if self.ALONG_K or self.QUARTERS else 16, triton.next_power_of_2(M))


@functools.cache
def plan(M: int, N: int, K: int, macro: bool = False, residual: bool = False) -> Plan:
    """The plan that should be fastest on an H100: a rule drawn from sweeps of all plans over the products of two models.

    Up to 8 rows: a tile of 16 outputs, and as many warps along the contraction as keep all processors busy. Up to 16, and
    with macro blocks (of a multiple of 128) any number: in quarters. More: tiles of 128 outputs, or 64 of narrow weights.
    As many programs share the contraction as run at once.
    """
    chunks = triton.cdiv(K, CHUNK)
    small = N <= 2560 and K <= 2048
    if M > 8 and not residual and (M <= 16 or macro):
        narrow = N <= 6144
        if macro:
            at_once = 4 if M <= 16 else 3 if narrow and M <= 32 else 2 if narrow else 6 if M <= 32 else 4
            tile = (64, 2, False) if M > 32 and not narrow else (32, 4, True)
        else:
            tile, at_once = ((16, 8, True), 3) if narrow else ((32, 4, True), 4)
        alone = chunks // tile[1] if tile[2] else chunks
        return Plan(*tile, _split(triton.cdiv(N, tile[0]), alone // 2, at_once), True)
    if M <= 8 or (M <= 16 and small) or (M <= 32 and N <= 2048 and small):
        warps = 16 if N <= 4096 else 8 if N <= 8192 else 4
        if chunks % warps == 0:
            return Plan(16, warps, True, 1)
        return Plan(16, 4, True, _split(triton.cdiv(N, 16), chunks // 4, 8))
    if N < 4096:
        tile, at_once = (64, 4), 4 if M <= 32 else 2
    else:
        tile, at_once = ((128, 4), 4) if M <= 16 else ((128, 8), 2)
    return Plan(*tile, False, _split(triton.cdiv(N, tile[0]), chunks // 2, at_once))


def _split(tiles: int, most: int, at_once: int) -> int:
    """Programs that share the contraction of a tile, `most` at most: all run at once, `at_once` of them on a multiprocessor."""
    fit = [split for split in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16) if tiles * split <= _PROCESSORS * at_once and split <= most]
    return max(fit, default=1)


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
    allocator, so they belong to the stream or the graph. Arrival counters, which the kernel leaves zero, are dealt in turn from
    a pool, a thousand calls long or more; captured calls keep theirs for good (see `forget_graphs`), and when their pool is
    empty, every replay clears counters of its own first.

    Args:
        x: bfloat16 (M, K), at most 64 rows, any strides; K % 8 == 0 and aligned rows spare a copy.
        w: quantised along its last axis, in blocks of 32, of shape (N, K).
        bias: (N,), any stride, or None.
        out_dtype: torch.bfloat16 or torch.float32.
        activation: quantise x along K with this recipe first (W4A4); None multiplies x as it is.
        how: None for `plan`'s.

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
    macro = w.macro is not None and w.macro_size % CHUNK == 0
    how = how or plan(M, N, K, macro, w.residual is not None)
    tiles = triton.cdiv(N, how.BN)
    BM = how.rows(M)
    y = torch.empty(M, N, dtype=out_dtype, device=x.device)
    partial = arrived = None
    if how.SPLIT > 1:
        partial = torch.empty(how.SPLIT, tiles, BM, how.BN, dtype=torch.float32, device=x.device)
        arrived = _counters(x.device, tiles, x.is_cuda and torch.cuda.is_current_stream_capturing())
    second = w.residual
    dot_kernel[(how.SPLIT, tiles)](
        words, _code_words(w.codes), w.scales.contiguous(),
        second and _code_words(second.codes), second and second.scales.contiguous(),
        None if w.macro is None else w.macro.contiguous(), bias, y, partial, arrived,
        M, N, words.shape[1] * 2, w.scales.shape[1], words.stride(0) // 4, w.alpha,
        BM=BM, BN=how.BN, W=how.W, ALONG_K=how.ALONG_K, SHARED=how.SPLIT > 1,
        MACRO=0 if w.macro is None else w.macro_size, RESIDUAL=second is not None,
        EVEN=K % (CHUNK * (how.W if how.ALONG_K else 1)) == 0, ASM=_ASM, QUARTERS=how.QUARTERS,
        num_warps=how.W, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def why_not(w: object) -> str | None:
    """Why there is no decode product of a weight, with what to do; None if there is one."""
    if not isinstance(w, MXFP4Tensor) or len(w.shape) != 2 or w.axis != 1 or w.block_size != BLOCK:
        return "the weight must be an MXFP4Tensor (N, K), quantised along its last axis in blocks of 32"
    if w.hadamard or w.pre_scale != 1:
        return "a rotated or pre-scaled weight has no decode product: dequantise and multiply in BF16"
    return None


def _check(x: torch.Tensor, w: MXFP4Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> None:
    if why_not(w):
        raise ValueError(why_not(w))
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
    if K % 8 or x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) * M >= 1 << 31 or x.storage_offset() % 8:
        padded = x.new_zeros(M, -(-K // 8) * 8)
        padded[:, :K] = x
        x = padded
    return x.view(torch.int32)


def _code_words(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes a word, int32 (N, blocks * 4)."""
    codes = codes.contiguous()
    return (codes.clone() if codes.storage_offset() % 4 else codes).view(torch.int32)


def forget_graphs() -> None:
    """All CUDA graphs captured so far are gone: deal their arrival counters anew."""
    for _calls, graphs in _POOLS.values():
        graphs[1] = 0


def _counters(device: torch.device, count: int, captured: bool) -> torch.Tensor:
    """`count` zeros, aligned to 16 bytes, which the kernel leaves zero."""
    if device not in _POOLS and not captured:
        _POOLS[device] = [[torch.zeros(1 << 20, dtype=torch.int32, device=device), 0] for _ in range(2)]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams must not read them earlier
    if count > 1 << 20 or (captured and (device not in _POOLS or _POOLS[device][1][1] + count > 1 << 20)):
        return torch.zeros(count, dtype=torch.int32, device=device)
    pool = _POOLS[device][captured]
    zeros, start = pool
    start = 0 if start + count > zeros.numel() else start
    pool[1] = start + -(-count // 4) * 4  # a pointer of another alignment would compile another kernel
    return zeros[start : start + count]
