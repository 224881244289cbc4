"""Quantise a matrix into FP8 containers in one kernel: `reference.py`, to the bit.

Payloads are relative to their row's largest scale. A program quantises whole rows: it first reads a row for that scale, then
again (from the cache) for the payloads; rows that fit the registers are read once. Columns, which the backward products need,
are too long for a program: one kernel finds their scales, a second writes the payloads, transposed. Scale rules, static macro
blocks and both passes of the outlier fallback are fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.container.reference import Container
from mxfp4_kernels.device import BLOCK, constants, exp2_byte, launches, supports, two_passes
from mxfp4_rl.recipe import QuantRecipe

_ONE_READ = 8192  # longest row that is kept in registers between the two passes


@triton.jit
def _used(values, byte):
    """Blocks that hold a number other than zero, and no NaN."""
    return (tl.max(tl.abs(values), axis=2) > 0) & (byte != 255)


@triton.jit
def _payload(values, byte, top, wide):
    """E4M3 bits of values in units of the row's scale; zeros in rows that do not fit, NaN in broken blocks."""
    shift = exp2_byte(tl.minimum(tl.maximum(byte - top[:, None] + 6 + 127, 1), 254))
    payload = (values * shift[:, :, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    payload = tl.where((byte == 255)[:, :, None], 0x7F, payload)
    return tl.where(wide[:, None, None], 0, payload).to(tl.uint8)


@triton.jit
def _span(values, byte):
    """Largest byte (7 at least) and smallest byte (255 if there is none) of the blocks in use, for every row."""
    used = _used(values, byte)
    return tl.maximum(tl.max(tl.where(used, byte, 0), axis=1), 7), tl.min(tl.where(used, byte, 255), axis=1)


@triton.jit
def _widen(top, low, values, byte):
    """A span that also holds these blocks."""
    high, least = _span(values, byte)
    return tl.maximum(top, high), tl.minimum(low, least)


@triton.jit
def _store_factor(factor_ptr, factor, rows, k0, M, K, GROUP: tl.constexpr):
    R: tl.constexpr = factor.shape[0]
    G: tl.constexpr = factor.shape[1] // GROUP
    macros = k0 // (32 * GROUP) + tl.arange(0, G)
    per_macro = tl.max(tl.reshape(factor, (R, G, GROUP)), axis=2)
    mask = (rows < M)[:, None] & (macros * (32 * GROUP) < K)[None, :]
    tl.store(factor_ptr + macros[None, :].to(tl.int64) * M + rows[:, None], per_macro, mask=mask)


@triton.jit
def _rows_kernel(
    x_ptr, payload_ptr, scale_ptr, wide_ptr, factor_ptr, payload2_ptr, scale2_ptr, wide2_ptr,
    M, K, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, ONE_READ: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = BK // 32
    rows = tl.program_id(0) * R + tl.arange(0, R)
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_m
    out = rows[:, None].to(tl.int64) * K
    columns = tl.arange(0, BK)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_rows + columns[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
    first, byte, second, byte2, factor = two_passes(tl.reshape(x, (R, NB, 32)), CARRY, SHIFT, GROUP, LARGEST, FALLBACK)
    top, low = _span(first, byte)
    top2, low2 = _span(second, byte2)
    if GROUP > 0:
        _store_factor(factor_ptr, factor, rows, 0, M, K, GROUP)
    if not ONE_READ:
        for k0 in range(BK, K, BK):
            mask_k = (rows < M)[:, None] & (k0 + columns < K)[None, :]
            x = tl.load(x_rows + (k0 + columns)[None, :] * stride_k, mask=mask_k, other=0.0).to(tl.float32)
            v, b, v2, b2, f = two_passes(tl.reshape(x, (R, NB, 32)), CARRY, SHIFT, GROUP, LARGEST, FALLBACK)
            top, low = _widen(top, low, v, b)
            if FALLBACK:
                top2, low2 = _widen(top2, low2, v2, b2)
            if GROUP > 0:
                _store_factor(factor_ptr, f, rows, k0, M, K, GROUP)
    wide, wide2 = low < top - 14, low2 < top2 - 14
    tl.store(scale_ptr + rows, exp2_byte(top - 6), mask=rows < M)
    tl.store(wide_ptr + rows, wide, mask=rows < M)
    tl.store(payload_ptr + out + columns[None, :], tl.reshape(_payload(first, byte, top, wide), (R, BK)), mask=mask)
    if FALLBACK:
        tl.store(scale2_ptr + rows, exp2_byte(top2 - 6), mask=rows < M)
        tl.store(wide2_ptr + rows, wide2, mask=rows < M)
        tl.store(payload2_ptr + out + columns[None, :], tl.reshape(_payload(second, byte2, top2, wide2), (R, BK)), mask=mask)
    if not ONE_READ:
        for k0 in range(BK, K, BK):
            mask_k = (rows < M)[:, None] & (k0 + columns < K)[None, :]
            x = tl.load(x_rows + (k0 + columns)[None, :] * stride_k, mask=mask_k, other=0.0).to(tl.float32)
            v, b, v2, b2, f = two_passes(tl.reshape(x, (R, NB, 32)), CARRY, SHIFT, GROUP, LARGEST, FALLBACK)
            where = out + (k0 + columns)[None, :]
            tl.store(payload_ptr + where, tl.reshape(_payload(v, b, top, wide), (R, BK)), mask=mask_k)
            if FALLBACK:
                tl.store(payload2_ptr + where, tl.reshape(_payload(v2, b2, top2, wide2), (R, BK)), mask=mask_k)


@triton.jit
def _spans_kernel(
    x_ptr, span_ptr, factor_ptr, M, K, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = BK // 32
    rows = tl.program_id(0) * R + tl.arange(0, R)
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_m
    top = tl.full((R,), 7, tl.int32)
    low = tl.full((R,), 255, tl.int32)
    top2 = tl.full((R,), 7, tl.int32)
    low2 = tl.full((R,), 255, tl.int32)
    for step in range(STEPS):
        k0 = (tl.program_id(1) * STEPS + step) * BK
        columns = k0 + tl.arange(0, BK)
        mask = (rows < M)[:, None] & (columns < K)[None, :]
        x = tl.load(x_rows + columns[None, :].to(tl.int64) * stride_k, mask=mask, other=0.0).to(tl.float32)
        v, b, v2, b2, f = two_passes(tl.reshape(x, (R, NB, 32)), CARRY, SHIFT, GROUP, LARGEST, FALLBACK)
        top, low = _widen(top, low, v, b)
        if FALLBACK:
            top2, low2 = _widen(top2, low2, v2, b2)
        if GROUP > 0:
            _store_factor(factor_ptr, f, rows, k0, M, K, GROUP)
    tl.atomic_max(span_ptr + rows, top, mask=rows < M)
    tl.atomic_min(span_ptr + M + rows, low, mask=rows < M)
    if FALLBACK:
        tl.atomic_max(span_ptr + 2 * M + rows, top2, mask=rows < M)
        tl.atomic_min(span_ptr + 3 * M + rows, low2, mask=rows < M)


@triton.jit
def _payloads_kernel(
    x_ptr, span_ptr, payload_ptr, scale_ptr, wide_ptr, payload2_ptr, scale2_ptr, wide2_ptr, M, K, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, FALLBACK: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    NB: tl.constexpr = BK // 32
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    at = rows[:, None].to(tl.int64) * stride_m + columns[None, :].to(tl.int64) * stride_k
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v, b, v2, b2, _f = two_passes(tl.reshape(x, (R, NB, 32)), CARRY, SHIFT, GROUP, LARGEST, FALLBACK)
    out = rows[:, None].to(tl.int64) * K + columns[None, :]
    top = tl.load(span_ptr + rows, mask=rows < M, other=7)
    wide = tl.load(span_ptr + M + rows, mask=rows < M, other=255) < top - 14
    tl.store(payload_ptr + out, tl.reshape(_payload(v, b, top, wide), (R, BK)), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + rows, exp2_byte(top - 6), mask=rows < M)
        tl.store(wide_ptr + rows, wide, mask=rows < M)
    if FALLBACK:
        top2 = tl.load(span_ptr + 2 * M + rows, mask=rows < M, other=7)
        wide2 = tl.load(span_ptr + 3 * M + rows, mask=rows < M, other=255) < top2 - 14
        tl.store(payload2_ptr + out, tl.reshape(_payload(v2, b2, top2, wide2), (R, BK)), mask=mask)
        if tl.program_id(1) == 0:
            tl.store(scale2_ptr + rows, exp2_byte(top2 - 6), mask=rows < M)
            tl.store(wide2_ptr + rows, wide2, mask=rows < M)


@launches
def container(x: torch.Tensor, recipe: QuantRecipe) -> Container:
    """Quantise the rows of a matrix (M, K), float32, bfloat16 or float16, of any strides; `x.t()` quantises columns."""
    M, K = x.shape
    if not supports(recipe):
        raise ValueError(f"no Triton kernel for {recipe.describe()}: use the reference")
    how = constants(recipe)
    fallback, group = how["FALLBACK"], how["GROUP"]

    def empty_pass():
        return (
            torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device),
            torch.empty(M, dtype=torch.float32, device=x.device),
            torch.empty(M, dtype=torch.bool, device=x.device),
        )

    first = empty_pass()
    second = empty_pass() if fallback else first
    factor = torch.empty(-(-K // recipe.macro_size), M, device=x.device) if group else None
    outputs = [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (*first, *second)]
    size = (M, K, x.stride(0), x.stride(1))
    if x.numel() == 0:
        pass
    elif x.stride(1) == 1 or x.stride(0) != 1:
        one_read = K <= _ONE_READ
        block_k = max(triton.next_power_of_2(K), 256) if one_read else 4096
        rows = max(1, 2048 // block_k)
        _rows_kernel[(triton.cdiv(M, rows),)](
            x, *outputs[:3], factor, *outputs[3:], *size,
            R=rows, BK=block_k, ONE_READ=one_read, num_warps=max(1, min(8, rows * block_k // 512)), **how,
        )  # fmt: skip
    else:
        span = torch.empty(2, 2, M, dtype=torch.int32, device=x.device)  # of both passes the largest and the smallest byte
        span[:, 0], span[:, 1] = 7, 255
        tile = {"R": 64, "BK": max(1, group) * BLOCK, "num_warps": 2}  # the best of ten on an H100: a block a thread
        steps = max(1, 16 // max(1, group))
        grid = (triton.cdiv(M, tile["R"]), triton.cdiv(K, tile["BK"]))
        _spans_kernel[grid[0], triton.cdiv(grid[1], steps)](x, span, factor, *size, STEPS=steps, **tile, **how)
        _payloads_kernel[grid](x, span, *outputs, *size, **tile, **how)
    residual = Container(*second) if fallback else None
    return Container(*first, factor, recipe.macro_size, residual, recipe.fallback_alpha or 0.0)
