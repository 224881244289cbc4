"""The products of experts on FP8 tensor cores: what `fp8.py` is for a Linear layer, with the grouped kernels.

Weights are one container of all experts' rows, tokens one of the sorted rows; both hold MXFP4 bit for bit, and rows that none
holds are multiplied again from their sources (`mxfp4_kernels.matmul.grouped_repair`). The forward product is FP8. Backward
products of kind "mx" are too: dgrad with the weights' container along their outputs, wgrad with each expert's tokens quantised
along them, in blocks of their own. "ste" and "bf16" products have an unquantised gradient and stay BF16.

A grouped product has one scale a row, so macro blocks and a fallback have no FP8 product here: such recipes stay BF16.
"""

from __future__ import annotations

import dataclasses

import torch

from mxfp4_rl.nn.products import WeightPerExpert, operand_of_experts
from mxfp4_rl.recipe import ModelRecipe


def multiplies(recipe: ModelRecipe, shape: torch.Size) -> bool:
    """Whether the grouped FP8 products hold a projection's weights (E, rows, columns) and recipe; else it stays BF16."""
    if not recipe.in_fp8 or any(width % 16 for width in shape[1:]):
        return False
    try:
        from mxfp4_kernels.container.reference import fits_rows
    except ImportError:  # without Triton
        return False
    return fits_rows(recipe.weight) and fits_rows(recipe.activation)


class Plan:
    """Which backward products of a projection are FP8, too."""

    def __init__(self, recipe: ModelRecipe):
        from mxfp4_kernels.container.reference import fits_rows

        whole = fits_rows(recipe.grad)
        self.dgrad = recipe.dgrad == "mx" and whole and fits_rows(recipe.in_backward("weight"))
        self.wgrad = recipe.wgrad == "mx" and whole and fits_rows(recipe.in_backward("activation"))
        self.exact = recipe.product != "fp8_fast"


_plans: dict[int, tuple[ModelRecipe, Plan]] = {}  # by a recipe's identity: asked for at every forward


def plan_for(recipe: ModelRecipe) -> Plan:
    """The plan of a projection; read only, since layers share it."""
    known = _plans.get(id(recipe))
    if known is None:
        known = _plans[id(recipe)] = recipe, Plan(recipe)
    return known[1]


@dataclasses.dataclass
class Weights:
    """A projection's weights (E, out, in) for FP8 products, kept for an optimiser step. What no product needs is None.

    Attributes:
        forward, back: `Experts` along the inputs, and along the outputs for an FP8 dgrad.
        dequantised: w_hat, for "ste".
    """

    forward: object
    back: object | None
    dequantised: torch.Tensor | None


def weights_of(w: torch.Tensor, recipe: ModelRecipe, plan: Plan) -> Weights:
    """Of weights that nobody changes: containers are repaired from them."""
    from mxfp4_kernels.matmul.grouped_operands import Experts

    return Weights(
        Experts(w, recipe.weight),
        Experts(w.transpose(1, 2), recipe.in_backward("weight")) if plan.dgrad else None,
        operand_of_experts(w, recipe.weight) if recipe.dgrad == "ste" else None,
    )


class GroupedFP8Matmul(torch.autograd.Function):
    """Y[t] = w_hat[e(t)] x_hat[t] and its backward products, of sorted tokens x (T, in) and weights w (E, out, in).

    x and w carry the gradients, `of_weight` is the `Weights`; nothing of the quantisation is recorded.
    """

    @staticmethod
    def forward(ctx, x, w, of_weight, recipe, plan, stats, products: WeightPerExpert):
        from mxfp4_kernels.matmul import fp8, grouped

        needs_x, needs_w = ctx.needs_input_grad[:2]
        keeps = x.dtype if needs_w and recipe.wgrad == "ste" else None
        rows, _, x_hat = fp8.operands(x.detach(), recipe.activation, None, keeps, True)
        # "bf16" needs the unquantised weight, and so does an "mx" that no container holds.
        plain_w = (w,) if needs_x and of_weight.dequantised is None and not plan.dgrad else ()
        ctx.save_for_backward(*((x if keeps is None else x_hat,) if needs_w else ()), *plain_w)
        ctx.step = recipe, plan, stats, products, of_weight, w.dtype
        return grouped.grouped_product(rows, of_weight.forward, products.offsets, x.dtype, plan.exact)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        from mxfp4_kernels.matmul import fp8, grouped

        recipe, plan, stats, products, of_weight, weight_dtype = ctx.step
        needs_x, needs_w = ctx.needs_input_grad[:2]
        saved, g = ctx.saved_tensors, g.contiguous()
        dx = dw = None
        if needs_x and plan.dgrad:
            rows, _, _ = fp8.operands(g, recipe.grad, None, None, True)
            dx = grouped.grouped_product(rows, of_weight.back, products.offsets, g.dtype, plan.exact)
        elif needs_x:
            w = of_weight.dequantised if of_weight.dequantised is not None else saved[-1].to(g.dtype)
            if recipe.dgrad == "mx":
                w = products.quantized_weight(w, recipe.in_backward("weight"), axis=-2)
            dx = products.dgrad(products.quantized_rows(g, recipe.grad), w)
        if needs_w and plan.wgrad:
            dw = _wgrad(g, saved[0], recipe, plan, products).to(weight_dtype)
        elif needs_w:
            x = products.quantized_columns(saved[0], recipe.in_backward("activation")) if recipe.wgrad == "mx" else saved[0]
            dw = products.wgrad(products.quantized_columns(g, recipe.grad), x).to(weight_dtype)
        if stats is not None:
            stats.measure("grad", g, recipe.grad)
        return dx, dw, None, None, None, None, None


def _wgrad(g, x, recipe, plan, products):
    """g^T x of every expert, both quantised along its tokens, which begin at a block of their own."""
    from mxfp4_kernels.matmul import grouped
    from mxfp4_kernels.matmul.grouped_operands import Tokens, align_to_blocks

    aligned, where, rows = align_to_blocks(products.offsets, len(x))

    def apart(t, own):
        return Tokens(t.new_zeros(rows, t.shape[1]).index_copy_(0, where, t), own, aligned)

    sides = apart(g, recipe.grad), apart(x, recipe.in_backward("activation"))
    return grouped.grouped_wgrad(*sides, aligned, g.dtype, plan.exact)
