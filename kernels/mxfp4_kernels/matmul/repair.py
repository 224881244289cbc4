"""Rows that no FP8 container holds: multiplied from their unquantised sources, overwriting what the product left there.

Such rows are rare (a row, or a group of 128 elements, whose block scales spread over more than 15 exponents). Programs look at
the flags and end at once where there is none, so the host never waits to know.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.container.triton import Side
from mxfp4_kernels.device import constants, exp2_byte, load_tile, over_factor, two_passes
from mxfp4_kernels.launch import Launch, Part


@triton.jit
def x_hat(
    x_ptr, rows, count, columns, K, stride_row, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, MACRO: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The operand at some rows and columns, float32 (rows, columns)."""
    x = load_tile(x_ptr, rows, columns, count, K, stride_row, stride_k)
    R: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    first, byte, _v, _b, factor = two_passes(tl.reshape(x, (R, BK // 32, 32)), CARRY, SHIFT, MACRO, LARGEST, False)
    operand = first * exp2_byte(byte)[:, :, None]
    if MACRO > 0:
        operand = over_factor(operand, factor)
    return tl.reshape(operand, (R, BK))


@triton.jit
def repair_rows(
    a_ptr, b_ptr, wide_ptr, bias_ptr, y_ptr, rows, columns, first, last, a_row, a_k, b_row, b_k, y_row, y_column, part, parts,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, MACRO_A: tl.constexpr,
    CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, MACRO_B: tl.constexpr, LARGEST: tl.constexpr,
    BIAS_ALONG_ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """y[r, :] = sum over k = first .. last - 1 of a_hat[r, k] b_hat[:, k], plus a bias, for the flagged rows of A.

    Program `part` of `parts` computes every parts-th group of BN columns.
    """
    for r0 in range(0, rows, FLAGS):
        flags = tl.load(wide_ptr + r0 + tl.arange(0, FLAGS), mask=r0 + tl.arange(0, FLAGS) < rows, other=0)
        if tl.max(flags.to(tl.int32), axis=0) > 0:
            for r in range(r0, tl.minimum(r0 + FLAGS, rows)):
                if tl.load(wide_ptr + r) != 0:
                    for c0 in range(part * BN, columns, parts * BN):
                        column = c0 + tl.arange(0, BN)
                        total = tl.zeros((BN,), tl.float32)
                        for k0 in range(first, last, BK):
                            k = k0 + tl.arange(0, BK)
                            row = x_hat(
                                a_ptr, r + tl.arange(0, 1), rows, k, last, a_row, a_k, CARRY_A, SHIFT_A, MACRO_A, LARGEST
                            )
                            tile = x_hat(b_ptr, column, columns, k, last, b_row, b_k, CARRY_B, SHIFT_B, MACRO_B, LARGEST)
                            total += tl.sum(tile * row, axis=1)
                        if bias_ptr is not None:
                            if BIAS_ALONG_ROWS:
                                total += tl.load(bias_ptr + r).to(tl.float32)
                            else:
                                total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
                        at = (r + tl.zeros((BN,), tl.int64)) * y_row + column.to(tl.int64) * y_column
                        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _repair_kernel(
    a_ptr, b_ptr, wide_a_ptr, wide_b_ptr, any_a_ptr, any_b_ptr, bias_ptr, y_ptr,
    M, N, K, a_row, a_k, b_row, b_k, y_row, y_column,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, MACRO_A: tl.constexpr,
    CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, MACRO_B: tl.constexpr, LARGEST: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Program (part, 0) looks after A's rows, (part, 1) after B's, which are columns of y."""
    none = tl.program_id(0) * 0
    if tl.program_id(1) == 0:
        wanted = True if any_a_ptr is None else tl.load(any_a_ptr) != 0
        if wanted:
            repair_rows(
                a_ptr, b_ptr, wide_a_ptr, bias_ptr, y_ptr, M, N, none, none + K, a_row, a_k, b_row, b_k, y_row, y_column,
                tl.program_id(0), tl.num_programs(0),
                CARRY_A, SHIFT_A, MACRO_A, CARRY_B, SHIFT_B, MACRO_B, LARGEST, False, BN, BK, FLAGS,
            )  # fmt: skip
    else:
        wanted = True if any_b_ptr is None else tl.load(any_b_ptr) != 0
        if wanted:
            repair_rows(
                b_ptr, a_ptr, wide_b_ptr, bias_ptr, y_ptr, N, M, none, none + K, b_row, b_k, a_row, a_k, y_column, y_row,
                tl.program_id(0), tl.num_programs(0),
                CARRY_B, SHIFT_B, MACRO_B, CARRY_A, SHIFT_A, MACRO_A, LARGEST, True, BN, BK, FLAGS,
            )  # fmt: skip


def repair(a: Side, b: Side, y: torch.Tensor, bias: torch.Tensor | None = None) -> Launch:
    """A launch that overwrites the rows and columns of y (M, N) = A B^T + bias that the containers of A and B left out.

    It takes both matrices, the containers' buffers, y, and the bias if there is one.
    """
    (M, N), K = y.shape, a.shape[1]
    how_a, how_b = constants(a.recipe), constants(b.recipe)
    flags = [Part(i, side.flags, torch.uint8) for i, side in ((2, a), (3, b))]
    any_flag = [Part(i, side.flags + side.size[0], torch.uint8) for i, side in ((2, a), (3, b))]
    return Launch(
        _repair_kernel, (min(triton.cdiv(max(M, N), 64), 264), 2),
        [Part(0), Part(1), *flags, *any_flag, Part(5) if bias is not None else None, Part(4)],
        (M, N, K, *a.strides, *b.strides, *y.stride()),
        CARRY_A=how_a["CARRY"], SHIFT_A=how_a["SHIFT"], MACRO_A=how_a["GROUP"],
        CARRY_B=how_b["CARRY"], SHIFT_B=how_b["SHIFT"], MACRO_B=how_b["GROUP"], LARGEST=how_a["LARGEST"],
        BN=64, BK=32 * max(2, how_a["GROUP"], how_b["GROUP"]), FLAGS=4096, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
