"""Y = A_hat B_hat^T of two MXFP4 operands as one FP8 product, exact operands in every case.

Containers hold the operands without losing a bit, each row with one power of two, so the product is `torch._scaled_mm` with
row-wise scales. It accumulates without `use_fast_accum`: partial sums are promoted to float32, as DeepGEMM does.

Rows whose scales spread over more than E4M3 holds are zero in their container; `repair.py` computes their products.
"""

from __future__ import annotations

import torch

from mxfp4_kernels.container.triton import container
from mxfp4_kernels.device import launches, supports
from mxfp4_kernels.matmul import operand
from mxfp4_kernels.matmul.repair import repair
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
    operand_dtype: torch.dtype | None = None,
) -> tuple[Operand | None, Operand | None, torch.Tensor | None]:
    """x (M, K) by `rows` and x^T (K, M) by `columns` as operands of products, and x_hat (M, K) in `operand_dtype`.

    Raises:
        ValueError: as `Operand`.
    """
    return (
        Operand(x, rows) if rows is not None else None,
        Operand(x.t(), columns) if columns is not None else None,
        fake_quantize(x, rows, dtype=operand_dtype) if operand_dtype is not None else None,
    )


def row_wise(a, b, out_dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """P_a P_b^T, each row and column times its scale: (M, N).

    a, b have `payload` float8_e4m3fn (rows, K), `scale` float32 (rows,) and `dequantize()`. In float32 on a CPU; `fast` leaves
    all sums to the tensor core's own accumulator.

    Raises:
        ValueError: K differs, or K or N is no multiple of 16.
    """
    (M, K), (N, other) = a.payload.shape, b.payload.shape
    if other != K:
        raise ValueError(f"A has {K} columns and B {other}: both are contracted")
    if K % MULTIPLE or N % MULTIPLE:
        raise ValueError(f"K={K} and N={N} must be multiples of {MULTIPLE} for an FP8 product: multiply in BF16")
    if not (M and N and K):
        return torch.zeros(M, N, dtype=out_dtype, device=a.payload.device)
    if not a.payload.is_cuda:
        return (a.dequantize() @ b.dequantize().t()).to(out_dtype)
    return torch._scaled_mm(
        a.payload,
        b.payload.t(),
        scale_a=a.scale.unsqueeze(1),
        scale_b=b.scale.unsqueeze(0),
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )


@launches
def product(a: Operand, b: Operand, out_dtype: torch.dtype = torch.bfloat16, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A_hat (M, K) times B_hat (N, K) transposed, plus bias (N,) if given: (M, N).

    On a CPU, where only the repair is a kernel (interpreted), the product itself is in float32.

    Raises:
        ValueError: as `row_wise`.
    """
    y = row_wise(a.container, b.container, out_dtype)
    if y.numel() and a.source.numel():
        repair(a, b, y)
    return y if bias is None else y.add_(bias)
