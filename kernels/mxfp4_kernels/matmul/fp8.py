"""Y = A_hat B_hat^T of two MXFP4 operands as one FP8 product, exact operands in every case.

Containers hold the operands without losing a bit, each row with one power of two, so the product is `torch._scaled_mm` with
row-wise scales. It accumulates without `use_fast_accum`: partial sums are promoted to float32, as DeepGEMM does.

Rows whose scales spread over more than E4M3 holds are zero in their container. A second kernel computes their products from
the unquantised operands, quantising them again, block by block, and overwrites the zeros; it leaves at once where no row is
flagged, so nothing waits for the GPU's answer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.container.triton import container
from mxfp4_kernels.device import constants, exp2_byte, supports, two_passes
from mxfp4_kernels.matmul import operand
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.recipe import QuantRecipe

MULTIPLE = 16  # of both the contraction and the output columns: what FP8 products ask for


def fits(recipe: QuantRecipe | None) -> bool:
    """Whether operands of this recipe can be multiplied here: plain MXFP4 with any fixed scale rule."""
    return recipe is not None and supports(recipe) and recipe.macro_block is None and recipe.fallback_alpha is None


class Operand(operand.Operand):
    """One side of a product: the container of a matrix (rows, K) quantised along K, and what it was made from.

    Raises:
        ValueError: the recipe has macro blocks, a fallback, or no kernel.
    """

    def __init__(self, source: torch.Tensor, recipe: QuantRecipe):
        if not fits(recipe):
            raise ValueError(
                f"a row-wise FP8 product needs a plain MXFP4 recipe, not {recipe.describe()}: dequantise and multiply in BF16"
            )
        super().__init__(source, recipe, container(source, recipe))


def operands(
    x: torch.Tensor,
    rows: QuantRecipe | None = None,
    columns: QuantRecipe | None = None,
    operand: torch.dtype | None = None,
) -> tuple[Operand | None, Operand | None, torch.Tensor | None]:
    """x (M, K) by `rows` and x^T (K, M) by `columns` as operands of products, and x_hat (M, K) in the dtype `operand`.

    Raises:
        ValueError: as `Operand`.
    """
    return (
        Operand(x, rows) if rows is not None else None,
        Operand(x.t(), columns) if columns is not None else None,
        fake_quantize(x, rows, dtype=operand) if operand is not None else None,
    )


def product(a: Operand, b: Operand, out_dtype: torch.dtype = torch.bfloat16, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A_hat (M, K) times B_hat (N, K) transposed, plus bias (N,) if given: (M, N).

    On a CPU, where only the repair is a kernel (interpreted), the product itself is in float32.

    Raises:
        ValueError: K differs, or K or N is no multiple of 16.
    """
    (M, K), (N, other) = a.container.payload.shape, b.container.payload.shape
    if other != K:
        raise ValueError(f"A has {K} columns and B {other}: both are contracted")
    if K % MULTIPLE or N % MULTIPLE:
        raise ValueError(f"K={K} and N={N} must be multiples of {MULTIPLE} for an FP8 product: multiply in BF16")
    if not (M and N and K):
        y = torch.zeros(M, N, dtype=out_dtype, device=a.source.device)
        return y if bias is None else y.add_(bias)
    if a.source.is_cuda:
        y = torch._scaled_mm(
            a.container.payload,
            b.container.payload.t(),
            scale_a=a.container.scale.unsqueeze(1),
            scale_b=b.container.scale.unsqueeze(0),
            out_dtype=out_dtype,
            use_fast_accum=False,
        )
    else:
        y = (a.container.dequantize() @ b.container.dequantize().t()).to(out_dtype)
    _repair(a, b, y)
    _repair(b, a, y.t())
    return y if bias is None else y.add_(bias)


@triton.jit
def _operand(x_ptr, rows, count, columns, K, stride_row, stride_k, CARRY: tl.constexpr, SHIFT: tl.constexpr):
    """x_hat of some rows and columns, float32 (rows, columns)."""
    mask = (rows < count)[:, None] & (columns < K)[None, :]
    at = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_k
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    R: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    values, byte, _v, _b, _f = two_passes(tl.reshape(x, (R, BK // 32, 32)), CARRY, SHIFT, 0, 1.0, False)
    return tl.reshape(values * exp2_byte(byte)[:, :, None], (R, BK))


@triton.jit
def _repair_kernel(
    a_ptr, b_ptr, wide_ptr, y_ptr, M, N, K, a_row, a_k, b_row, b_k, y_row, y_column,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    for m0 in range(0, M, FLAGS):
        flags = tl.load(wide_ptr + m0 + tl.arange(0, FLAGS), mask=m0 + tl.arange(0, FLAGS) < M, other=0)
        if tl.max(flags.to(tl.int32), axis=0) > 0:
            for m in range(m0, tl.minimum(m0 + FLAGS, M)):
                if tl.load(wide_ptr + m) != 0:
                    total = tl.zeros((BN,), tl.float32)
                    for k0 in range(0, K, BK):
                        k = k0 + tl.arange(0, BK)
                        row = _operand(a_ptr, m + tl.arange(0, 1), M, k, K, a_row, a_k, CARRY_A, SHIFT_A)
                        tile = _operand(b_ptr, columns, N, k, K, b_row, b_k, CARRY_B, SHIFT_B)
                        total += tl.sum(tile * row, axis=1)
                    at = (m + tl.zeros((BN,), tl.int64)) * y_row + columns.to(tl.int64) * y_column
                    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=columns < N)


def _repair(a: Operand, b: Operand, y: torch.Tensor) -> None:
    """Overwrite the rows of y that A's container left out."""
    (M, N), K = y.shape, a.source.shape[1]
    how_a, how_b = constants(a.recipe), constants(b.recipe)
    _repair_kernel[(triton.cdiv(N, 64),)](
        a.source, b.source, a.container.wide.view(torch.uint8), y, M, N, K,
        *a.source.stride(), *b.source.stride(), *y.stride(),
        CARRY_A=how_a["CARRY"], SHIFT_A=how_a["SHIFT"], CARRY_B=how_b["CARRY"], SHIFT_B=how_b["SHIFT"],
        BN=64, BK=64, FLAGS=4096, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
