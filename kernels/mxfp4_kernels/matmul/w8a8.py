"""FP8 W8A8 with row-wise scales: what the MXFP4 products have to beat, in speed and in error.

A row is quantised to E4M3 with one float32 scale, so that its largest element is E4M3's:

    s = max(amax / 448, 2^-126),  1 for rows of zeros, NaN for rows with NaN or Inf        P = E4M3(x * (1 / s))

The product is `torch._scaled_mm`, as in `fp8.py`. A row is read once and kept in registers up to 16384 elements; columns (a
view `x.t()`) take two kernels, one for the largest magnitudes, one that writes the numbers, transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import INTERPRETED, largest_magnitude, launches, load_tile
from mxfp4_kernels.matmul.fp8 import row_wise

LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126  # its reciprocal is still a float32 number
_ONE_READ = 16384  # longest row that is kept in registers


class Operand:
    """One side of a product: a matrix (rows, K), float32, bfloat16 or float16 of any strides, quantised by rows.

    Attributes:
        payload: float8_e4m3fn (rows, K), contiguous.
        scale: float32 (1, rows).
    """

    def __init__(self, source: torch.Tensor):
        self.payload, scale = quantize_rows(source)
        self.scale = scale.unsqueeze(0)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """x_hat, (rows, K)."""
        return (self.payload.float() * self.scale.t()).to(dtype)


@launches
def product(a: Operand, b: Operand, out_dtype: torch.dtype = torch.bfloat16, fast: bool = False) -> torch.Tensor:
    """A_hat (M, K) times B_hat (N, K) transposed: (M, N). `fast` leaves all sums to the tensor core's own accumulator.

    On a CPU in float32, then rounded.

    Raises:
        ValueError: as `fp8.row_wise`.
    """
    return row_wise(a, b, out_dtype, fast=fast)


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_rows` computes, to the bit: a matrix (rows, K) -> float8_e4m3fn (rows, K), float32 (rows,)."""
    x = x.float()
    amax = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    scale = (amax / torch.full_like(amax, LARGEST)).clamp(min=SMALLEST_SCALE)
    scale = torch.where(amax == 0, 1.0, torch.where(amax.isfinite(), scale, torch.nan))
    return (x * (torch.ones_like(scale) / scale).unsqueeze(1)).to(torch.float8_e4m3fn), scale


@triton.jit
def _scale(amax, LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr):
    """Largest magnitudes -> scales; NaN where the largest is NaN or Inf."""
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)), SMALLEST_SCALE)
    return tl.where(amax == 0, 1.0, tl.where(amax < float("inf"), scale, float("nan")))


@triton.jit
def _round_e4m3(t):
    """The nearest E4M3 number, as float32: adding 1.5 * 2^(e + 20) leaves multiples of 2^(e - 3), e >= -6. Of NaN, anything."""
    bits = t.to(tl.int32, bitcast=True)
    magic = tl.maximum(bits & 0x7F800000, 0x3C800000).to(tl.float32, bitcast=True) * 1572864.0
    magnitude = ((t + magic) - magic).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (magnitude | (bits & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _payload(x, scale):
    """E4M3 bits of a tile (rows, columns) in units of its rows' scales."""
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    t = x * inverse[:, None]
    if INTERPRETED:  # whose FP8 conversion loses carries and NaN
        exact = _round_e4m3(t).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(t == t, exact, 0x7F).to(tl.uint8)
    return t.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _rows_kernel(
    x_ptr, payload_ptr, scale_ptr, M, K, stride_m, stride_k,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr, ONE_READ: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, BK)
    inside = (rows < M)[:, None]
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_m
    out = payload_ptr + rows[:, None].to(tl.int64) * K
    mask = inside & (columns < K)[None, :]
    x = tl.load(x_rows + columns[None, :].to(tl.int64) * stride_k, mask=mask, other=0.0).to(tl.float32)
    amax = largest_magnitude(x, 1)
    if ONE_READ:
        scale = _scale(amax, LARGEST, SMALLEST_SCALE)
        tl.store(out + columns[None, :], _payload(x, scale), mask=mask)
    else:
        bits = amax.to(tl.int32, bitcast=True)
        for k0 in range(BK, K, BK):
            at = k0 + columns
            mask = inside & (at < K)[None, :]
            x = tl.load(x_rows + at[None, :].to(tl.int64) * stride_k, mask=mask, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, largest_magnitude(x, 1).to(tl.int32, bitcast=True))
        scale = _scale(bits.to(tl.float32, bitcast=True), LARGEST, SMALLEST_SCALE)
        for k0 in range(0, K, BK):
            at = k0 + columns
            mask = inside & (at < K)[None, :]
            x = tl.load(x_rows + at[None, :].to(tl.int64) * stride_k, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + at[None, :], _payload(x, scale), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


@triton.jit
def _column_amax_kernel(
    x_ptr, bits_ptr, M, K, stride_m, stride_k, R: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    largest = tl.zeros((R, BK), tl.int32)
    for step in range(STEPS):
        columns = (tl.program_id(1) * STEPS + step) * BK + tl.arange(0, BK)
        x = load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(bits_ptr + rows, tl.max(largest, axis=1), mask=rows < M)


@triton.jit
def _columns_kernel(
    x_ptr, bits_ptr, payload_ptr, scale_ptr, M, K, stride_m, stride_k,
    LARGEST: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
    R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    bits = tl.load(bits_ptr + rows, mask=rows < M, other=0)
    scale = _scale(bits.to(tl.float32, bitcast=True), LARGEST, SMALLEST_SCALE)
    payload = _payload(load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k), scale)
    out = payload_ptr + rows[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(out, payload, mask=(rows < M)[:, None] & (columns < K)[None, :])
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + rows, scale, mask=rows < M)


@launches
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (rows, K), float32, bfloat16 or float16 of any strides -> float8_e4m3fn (rows, K), float32 (rows,)."""
    M, K = x.shape
    payload = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.ones(M, device=x.device) if not K else torch.empty(M, device=x.device)
    arguments = (M, K, x.stride(0), x.stride(1))
    how = {"LARGEST": LARGEST, "SMALLEST_SCALE": SMALLEST_SCALE, "enable_fp_fusion": False}
    if not x.numel():
        pass
    elif x.stride(1) == 1 or x.stride(0) != 1:
        one_read = K <= _ONE_READ
        block_k = max(triton.next_power_of_2(K), 256) if one_read else 8192
        rows = max(1, 2048 // block_k)
        _rows_kernel[(triton.cdiv(M, rows),)](
            x, payload.view(torch.uint8), scale, *arguments, R=rows, BK=block_k, ONE_READ=one_read,
            num_warps=max(2, min(16, rows * block_k // 1024)), **how,
        )  # fmt: skip
    else:
        bits = torch.zeros(M, dtype=torch.int32, device=x.device)
        steps = 16
        _column_amax_kernel[triton.cdiv(M, 64), triton.cdiv(K, 32 * steps)](
            x, bits, *arguments, R=64, BK=32, STEPS=steps, num_warps=4, enable_fp_fusion=False
        )
        _columns_kernel[triton.cdiv(M, 64), triton.cdiv(K, 128)](
            x, bits, payload.view(torch.uint8), scale, *arguments, R=64, BK=128, num_warps=8, **how
        )
    return payload, scale
