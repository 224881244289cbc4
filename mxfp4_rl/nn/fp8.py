"""The quantised Linear's products on FP8 tensor cores: the operands of `linear.py`, bit for bit, as containers.

The forward product is W4A4 in FP8. Backward products of kind "mx" are too, where the gradient's recipe is plain; "ste" and
"bf16" products have an unquantised gradient, or an operand blocked along the wrong axis, and stay BF16. What is saved for the
backward is the layer's input, whose operands are made again there.
"""

from __future__ import annotations

import torch

from mxfp4_rl.nn.operand import operand
from mxfp4_rl.recipe import ModelRecipe, RecipeError


def check(recipe: ModelRecipe, in_features: int, out_features: int, name: str) -> None:
    """Raise RecipeError, naming the fix, if a layer's forward product cannot be an FP8 one."""
    try:
        from mxfp4_kernels.matmul.fp8 import MULTIPLE, fits
    except ImportError as error:
        raise RecipeError(f"product='fp8' needs Triton ({error}): install triton, or give product='bf16'") from error
    for side in ("weight", "activation"):
        own = getattr(recipe, side)
        if not fits(own):
            what = own.describe() if own is not None else "unquantised"
            raise RecipeError(
                f"product='fp8' needs a plain {side} recipe in {name}, not {what}: give macro_block=null, "
                "fallback_alpha=null and a fixed scale rule, or product='bf16'"
            )
    if in_features % MULTIPLE or out_features % MULTIPLE:
        raise RecipeError(
            f"product='fp8' needs features in multiples of {MULTIPLE}, and {name} has {in_features} x {out_features}: "
            "exclude it, or give product='bf16'"
        )


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FP8 products of `dtype` activations run on `device`."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 9)


class FP8Matmul(torch.autograd.Function):
    """Y = x_hat w_hat^T and its two backward products, for x (tokens, in) in bfloat16 and `layer`, an MXFP4Linear."""

    @staticmethod
    def forward(ctx, x, w, layer, stats):
        from mxfp4_kernels.matmul.fp8 import Operand, product

        ctx.layer, ctx.stats, ctx.weight_dtype = layer, stats, w.dtype
        ctx.save_for_backward(x)
        return product(Operand(x, layer.recipe.activation), layer.weight_container())

    @staticmethod
    def backward(ctx, g):
        from mxfp4_kernels.matmul.fp8 import MULTIPLE, Operand, fits, product

        (x,) = ctx.saved_tensors
        layer, recipe = ctx.layer, ctx.layer.recipe
        g = g.contiguous()
        dx = dw = None
        fp8 = recipe.grad is not None and fits(recipe.grad)
        if ctx.needs_input_grad[0]:
            if recipe.dgrad == "mx" and fp8 and fits(recipe.in_backward("weight")):
                dx = product(Operand(g, recipe.grad), layer.weight_container(transposed=True))
            else:
                dx = operand(g, recipe.grad) @ layer.dgrad_operand(g.dtype)
        if ctx.needs_input_grad[1]:
            own = recipe.activation
            if recipe.wgrad == "mx":
                own = recipe.in_backward("activation")
            if recipe.wgrad == "mx" and fp8 and fits(own) and g.shape[0] % MULTIPLE == 0:
                dw = product(Operand(g.t(), recipe.grad), Operand(x.t(), own))
            else:
                x_back = {"ste": lambda: operand(x, own), "bf16": lambda: x, "mx": lambda: operand(x, own, axis=0)}
                dw = operand(g, recipe.grad, axis=0).t() @ x_back[recipe.wgrad]()
            dw = dw.to(ctx.weight_dtype)
        if ctx.stats is not None:
            ctx.stats.measure("grad", g, recipe.grad)
        return dx, dw, None, None
