"""Rows that no FP8 container holds, in grouped products: multiplied from their unquantised sources, overwriting zeros.

`fp8.py`'s repair for groups. A program belongs to an expert and looks at the flags of one of its operands: the tokens' or the
weight's in a product, where columns or rows are the expert's tokens, both sides' features in a wgrad, where the contraction is.
Where no row is flagged it ends at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import constants
from mxfp4_kernels.matmul.fp8 import _operand
from mxfp4_kernels.matmul.operand import Operand


@triton.jit
def _rows(
    a_ptr, b_ptr, wide_ptr, y_ptr, rows, columns, first, last, a_row, a_k, b_row, b_k, y_row, y_column,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """y[r, :] = sum over k = first .. last - 1 of a_hat[r, k] b_hat[:, k], for the flagged rows of A."""
    for r0 in range(0, rows, FLAGS):
        flags = tl.load(wide_ptr + r0 + tl.arange(0, FLAGS), mask=r0 + tl.arange(0, FLAGS) < rows, other=0)
        if tl.max(flags.to(tl.int32), axis=0) > 0:
            for r in range(r0, tl.minimum(r0 + FLAGS, rows)):
                if tl.load(wide_ptr + r) != 0:
                    for c0 in range(tl.program_id(1) * BN, columns, tl.num_programs(1) * BN):
                        column = c0 + tl.arange(0, BN)
                        total = tl.zeros((BN,), tl.float32)
                        for k0 in range(first, last, BK):
                            k = k0 + tl.arange(0, BK)
                            row = _operand(a_ptr, r + tl.arange(0, 1), rows, k, last, a_row, a_k, CARRY_A, SHIFT_A)
                            tile = _operand(b_ptr, column, columns, k, last, b_row, b_k, CARRY_B, SHIFT_B)
                            total += tl.sum(tile * row, axis=1)
                        at = (r + tl.zeros((BN,), tl.int64)) * y_row + column.to(tl.int64) * y_column
                        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _repair_kernel(
    a_ptr, b_ptr, a_wide_ptr, b_wide_ptr, y_ptr, offsets_ptr, N, K, a_row, a_k, b_expert, b_row, b_k,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, WGRAD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Of A (T, K) and B (E, N, K), or of the wgrad's A (N, T) and B (K, T), both with flags for every expert."""
    expert = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + tl.program_id(0))
    end = tl.load(offsets_ptr + tl.program_id(0) + 1)
    if WGRAD:
        rows, columns, first, last, width = N, K, begin, end, K
        a_wide_ptr += expert * N
        b_wide_ptr += expert * K
        y_ptr += expert * N * K
    else:
        rows, columns, first, last, width = end - begin, N, begin * 0, begin * 0 + K, N
        a_ptr += begin.to(tl.int64) * a_row
        b_ptr += expert * b_expert
        a_wide_ptr += begin
        b_wide_ptr += expert * N
        y_ptr += begin.to(tl.int64) * N
    if end > begin:
        if tl.program_id(2) == 0:
            _rows(
                a_ptr, b_ptr, a_wide_ptr, y_ptr, rows, columns, first, last, a_row, a_k, b_row, b_k, width, 1,
                CARRY_A, SHIFT_A, CARRY_B, SHIFT_B, BN, BK, FLAGS,
            )  # fmt: skip
        else:
            _rows(
                b_ptr, a_ptr, b_wide_ptr, y_ptr, columns, rows, first, last, b_row, b_k, a_row, a_k, 1, width,
                CARRY_B, SHIFT_B, CARRY_A, SHIFT_A, BN, BK, FLAGS,
            )  # fmt: skip


def repair(a: Operand, b: Operand, y: torch.Tensor, offsets: torch.Tensor, wgrad: bool) -> None:
    """Overwrite what the containers of A and B left out of y, (T, N) or a wgrad's (E, N, K), contiguous."""
    experts, (N, K) = offsets.numel() - 1, y.shape[1:] if wgrad else b.source.shape[1:]
    how_a, how_b = constants(a.recipe), constants(b.recipe)
    parts = max(1, min(512 // experts, triton.cdiv(max(y.shape[-2:]), 64)))
    _repair_kernel[(experts, parts, 2)](
        a.source, b.source, a.container.wide.view(torch.uint8), b.container.wide.view(torch.uint8), y, offsets, N, K,
        *(a.source.stride() if not wgrad else a.source.t().stride()),
        *(b.source.stride() if not wgrad else (0, *b.source.t().stride())),
        CARRY_A=how_a["CARRY"], SHIFT_A=how_a["SHIFT"], CARRY_B=how_b["CARRY"], SHIFT_B=how_b["SHIFT"], WGRAD=wgrad,
        BN=64, BK=64, FLAGS=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
