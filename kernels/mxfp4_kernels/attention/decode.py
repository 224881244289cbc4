"""Decode attention over a packed KV cache on the host: checks, how it is cut, launches (see `kernel`)."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from mxfp4_kernels.attention.kernel import combine_kernel, partial_kernel
from mxfp4_kernels.device import INTERPRETED, launches
from mxfp4_rl.kv_cache.blocks import Stored

TILE = 64  # tokens that a program dequantises at once
_PROGRAMS = 4 * 132  # that an H100 runs at once
_MOST_PARTS = 64
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@functools.cache
def parts(heads: int, tokens: int) -> int:
    """Programs that share the packed tokens of a head: as many as run at once, each with a tile at least."""
    return max(1, min(_MOST_PARTS, _PROGRAMS // max(heads, 1), triton.cdiv(tokens, TILE)))


@launches
def attend(q: torch.Tensor, held: Stored, scale: float, split: int | None = None) -> torch.Tensor:
    """Attention of one query a sequence, (R, Hq, D) -> (R, Hq, D) in q's type; sums in float32. No autograd.

    Products are of q's type (a float32 model multiplies in float32). Every sequence holds at least one token.

    Args:
        q: bfloat16, float16 or float32, rotated where the keys are.
        held: D of 32, 64, 128 or 256; blocks of a power of two of tokens, at least 16.
        split: parts of the packed tokens; None for `parts`.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    rows, heads, room, block, _ = held.keys.codes.shape
    width = q.shape[-1] if q.ndim == 3 else 0
    _check(q, held)
    queries = q.shape[1] // heads
    split = split or parts(rows * heads, room * block)
    acc = torch.empty(rows * heads, split + 1, queries, width, dtype=torch.float32, device=q.device)
    stat = torch.empty(rows * heads, split + 1, 2, queries, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k, v = held.keys, held.values
    dense = [t.contiguous() for t in (held.sink_keys, held.sink_values, held.open_keys, held.open_values)]
    partial_kernel[(rows * heads, split + 1)](
        q.detach().contiguous(), k.codes.contiguous(), k.scales.contiguous(), _contiguous(k.exponents),
        v.codes.contiguous(), v.scales.contiguous(), _contiguous(v.exponents), *dense, held.lengths, held.packed,
        acc, stat, scale * math.log2(math.e), heads, room, held.sink_keys.shape[2],
        G=queries, BM=max(16, triton.next_power_of_2(queries)), D=width, B=block, TT=TILE, SIZE=held.recipe.block_size,
        E8M0=held.recipe.format == "mxfp4", TYPE=tl.float32 if INTERPRETED.value else _TYPES[q.dtype],
        num_warps=4, num_stages=2,
    )  # fmt: skip
    combine_kernel[(rows * heads * queries,)](
        acc, stat, out, split + 1, G=queries, D=width, PARTS=triton.next_power_of_2(split + 1), num_warps=1
    )
    return out


def _contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _check(q: torch.Tensor, held: Stored) -> None:
    rows, heads, _room, block, half = held.keys.codes.shape
    if q.dtype not in _TYPES or q.ndim != 3:
        raise ValueError(f"q must be (R, Hq, D) in bfloat16, float16 or float32, not {q.dtype} of shape {tuple(q.shape)}")
    if q.shape[0] != rows or q.shape[2] != 2 * half or q.shape[1] % heads:
        raise ValueError(
            f"q of shape {tuple(q.shape)} does not fit a cache of {rows} sequences, {heads} heads and {2 * half} channels"
        )
    if 2 * half not in (32, 64, 128, 256) or block < 16 or block & (block - 1):
        raise ValueError(
            f"heads of {2 * half} channels and blocks of {block} tokens: the kernel takes 32, 64, 128 or 256 channels and "
            "powers of two of tokens from 16 on; use attention over dequantised tensors (View.layer.materialized)"
        )
    for name in ("lengths", "packed"):
        t = getattr(held, name)
        if t.dtype != torch.int32 or tuple(t.shape) != (rows,) or t.device != q.device:
            raise ValueError(f"{name} must be int32 ({rows},) on {q.device}, not {t.dtype} {tuple(t.shape)} on {t.device}")
