"""The quantised Linear's products on FP8 tensor cores: the operands of `linear.py` as containers.

Plain operands are the same bits. Operands with macro blocks are a float32 scale times E4M3, where `linear.py` rounds them to
the compute dtype: closer to what the recipe says, by up to 2^-9 of an element away from what a BF16 product sees.

The forward product is W4A4 in FP8. Backward products of kind "mx" are too, where containers hold the gradient's recipe; "ste"
and "bf16" products have an unquantised gradient, or an operand blocked along the wrong axis, and stay BF16. Whatever a step
needs of a tensor, the container of its rows, that of its columns and the dequantised operand, is made at once.

Plain recipes multiply with a scale a row (`matmul/fp8.py`), macro blocks with one for every 128 elements (`matmul/blocks.py`).
"""

from __future__ import annotations

import torch

from mxfp4_rl.nn.operand import operand
from mxfp4_rl.recipe import ModelRecipe, RecipeError


def check(recipe: ModelRecipe, name: str) -> None:
    """Raise RecipeError, naming the fix, if a layer's forward product cannot be an FP8 one."""
    try:
        from mxfp4_kernels.container.blocks import fits
    except ImportError as error:
        raise RecipeError(f"product='fp8' needs Triton ({error}): install triton, or give product='bf16'") from error
    for side in ("weight", "activation"):
        own = getattr(recipe, side)
        if not fits(own):
            what = own.describe() if own is not None else "unquantised"
            raise RecipeError(
                f"product='fp8' needs MXFP4 with a fixed scale rule and static macro blocks or none as {side} recipe in "
                f"{name}, not {what}: give fallback_alpha=null and macro_block=null or static, or product='bf16'"
            )


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FP8 products of `dtype` activations run on `device`."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 9)


class Plan:
    """Which products of a layer are FP8, with which kernels, and what they need of a tensor; for a number of tokens."""

    def __init__(self, recipe: ModelRecipe, tokens: int, in_features: int, out_features: int):
        from mxfp4_kernels.container import blocks as containers
        from mxfp4_kernels.matmul import blocks, fp8

        grad = recipe.grad if recipe.grad is not None and containers.fits(recipe.grad) else None
        weight, activation = (recipe.in_backward(o) if recipe.grad else None for o in ("weight", "activation"))
        self.dgrad = recipe.dgrad == "mx" and grad is not None and containers.fits(weight)
        self.wgrad = recipe.wgrad == "mx" and grad is not None and containers.fits(activation)
        used = [recipe.weight, recipe.activation, *([grad] if self.dgrad or self.wgrad else [])]
        whole = all(n % fp8.MULTIPLE == 0 for n in (tokens, in_features, out_features))
        self.kernels = fp8 if whole and all(fp8.fits(r) for r in used) else blocks
        self.of_weight = {"rows": recipe.weight, "columns": weight if self.dgrad else None}
        self.of_input = {"rows": recipe.activation, "columns": activation if self.wgrad else None}
        self.of_grad = {"rows": grad if self.dgrad else None, "columns": grad if self.wgrad else None}


class FP8Matmul(torch.autograd.Function):
    """Y = x_hat w_hat^T + b and its backward products, for x (tokens, in) and `layer`, an MXFP4Linear.

    x, w and b carry the gradients; `operands` are (x, x^T, x_hat) as `plan.kernels.operands` makes them of x.
    """

    @staticmethod
    def forward(ctx, x, w, b, layer, plan, operands, stats):
        ctx.layer, ctx.plan, ctx.stats = layer, plan, stats
        ctx.weight_dtype, ctx.bias_dtype = w.dtype, b.dtype if b is not None else None
        rows, columns, x_hat = operands
        ctx.columns = columns and columns.with_tensors((None,) * 4)
        # Through autograd, so that checkpointing and offloading see it.
        ctx.save_for_backward(*(columns.tensors() if columns is not None else (x if x_hat is None else x_hat,)))
        return plan.kernels.product(rows, layer.weight_operands(plan, x.dtype)[0], x.dtype, b if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx, g):
        layer, plan, recipe = ctx.layer, ctx.plan, ctx.layer.recipe
        g = g.contiguous()
        dx = dw = db = None
        rows = columns = None
        if any(recipe is not None for recipe in plan.of_grad.values()):
            rows, columns, _ = plan.kernels.operands(g, **plan.of_grad)
        if ctx.needs_input_grad[0]:
            if plan.dgrad:
                dx = plan.kernels.product(rows, layer.weight_operands(plan, g.dtype)[1], g.dtype)
            else:
                dx = operand(g, recipe.grad) @ layer.dgrad_operand(g.dtype)
        if ctx.needs_input_grad[1]:
            if plan.wgrad:
                dw = plan.kernels.product(columns, ctx.columns.with_tensors(ctx.saved_tensors), g.dtype)
            else:
                (x,) = ctx.saved_tensors  # "ste": quantised already
                if recipe.wgrad == "mx":
                    x = operand(x, recipe.in_backward("activation"), axis=0)
                dw = operand(g, recipe.grad, axis=0).t() @ x
            dw = dw.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            db = g.sum(0).to(ctx.bias_dtype)
        if ctx.stats is not None:
            ctx.stats.measure("grad", g, recipe.grad)
        return dx, dw, db, None, None, None, None
