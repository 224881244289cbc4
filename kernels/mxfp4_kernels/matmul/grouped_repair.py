"""Rows that no FP8 container holds, in grouped products: multiplied from their unquantised sources, overwriting zeros.

`repair.py` for groups. A program belongs to an expert and looks at the flags of one of its operands: the tokens' or the
weight's in a product, where columns or rows are the expert's tokens, both sides' features in a wgrad, where the contraction is.
Where neither operand has a flagged row it ends at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import constants
from mxfp4_kernels.matmul.operand import Operand
from mxfp4_kernels.matmul.repair import repair_rows


@triton.jit
def _repair_kernel(
    a_ptr, b_ptr, a_wide_ptr, b_wide_ptr, any_a_ptr, any_b_ptr, y_ptr, offsets_ptr, N, K, a_row, a_k, b_expert, b_row, b_k,
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
    if ((tl.load(any_a_ptr) | tl.load(any_b_ptr)) != 0) & (end > begin):
        if tl.program_id(2) == 0:
            repair_rows(
                a_ptr, b_ptr, a_wide_ptr, None, y_ptr, rows, columns, first, last, a_row, a_k, b_row, b_k, width, 1,
                tl.program_id(1), tl.num_programs(1), CARRY_A, SHIFT_A, 0, CARRY_B, SHIFT_B, 0, 1.0, False, BN, BK, FLAGS,
            )  # fmt: skip
        else:
            repair_rows(
                b_ptr, a_ptr, b_wide_ptr, None, y_ptr, columns, rows, first, last, b_row, b_k, a_row, a_k, 1, width,
                tl.program_id(1), tl.num_programs(1), CARRY_B, SHIFT_B, 0, CARRY_A, SHIFT_A, 0, 1.0, False, BN, BK, FLAGS,
            )  # fmt: skip


def repair(a: Operand, b: Operand, y: torch.Tensor, offsets: torch.Tensor, wgrad: bool) -> None:
    """Overwrite what the containers of A and B left out of y, (T, N) or a wgrad's (E, N, K), contiguous."""
    experts, (N, K) = offsets.numel() - 1, y.shape[1:] if wgrad else b.source.shape[1:]
    how_a, how_b = constants(a.recipe), constants(b.recipe)
    parts = max(1, min(512 // experts, triton.cdiv(max(y.shape[-2:]), 64)))
    _repair_kernel[(experts, parts, 2)](
        a.source, b.source, a.container.wide, b.container.wide, a.container.any_wide, b.container.any_wide, y, offsets, N, K,
        *(a.source.stride() if not wgrad else a.source.t().stride()),
        *(b.source.stride() if not wgrad else (0, *b.source.t().stride())),
        CARRY_A=how_a["CARRY"], SHIFT_A=how_a["SHIFT"], CARRY_B=how_b["CARRY"], SHIFT_B=how_b["SHIFT"], WGRAD=wgrad,
        BN=64, BK=64, FLAGS=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
