"""The quantised Linear's products on FP8 tensor cores: the operands of `linear.py` as containers.

Plain operands are the same bits. Operands with macro blocks are a float32 scale times E4M3, where `linear.py` rounds them to
the compute dtype: closer to what the recipe says, by up to 2^-9 of an element away from what a BF16 product sees.

The forward product is W4A4 in FP8. Backward products of kind "mx" are too, where containers hold the gradient's recipe; "ste"
and "bf16" products have an unquantised gradient, or an operand blocked along the wrong axis, and stay BF16. Whatever a step
needs of a tensor, the container of its rows, that of its columns and the dequantised operand, is made at once.

Plain recipes multiply with a scale a row, macro blocks with one for every 128 elements (`mxfp4_kernels.matmul.fp8`).
"fp8_fast" leaves the sums of the former to the tensor core's own accumulator, which "fp8" promotes to float32.
"""

from __future__ import annotations

import functools

import torch

from mxfp4_rl.nn.operand import operand
from mxfp4_rl.recipe import ModelRecipe, RecipeError


def check(recipe: ModelRecipe, name: str) -> None:
    """Raise RecipeError, naming the fix, if a layer's forward product cannot be an FP8 one."""
    try:
        from mxfp4_kernels.container.reference import fits, fits_rows
        from mxfp4_kernels.device import unsupported
    except ImportError as error:
        raise RecipeError(
            f"product={recipe.product!r} needs Triton ({error}): install triton, or give product='bf16'"
        ) from error
    for side in ("weight", "activation"):
        own = getattr(recipe, side)
        if not fits(own):
            why = f"{own.describe()}: {unsupported(own) or 'it has a fallback'}" if own is not None else "unquantised"
            raise RecipeError(
                f"product={recipe.product!r} cannot multiply the {side} of {name} ({why}). Give a fixed scale rule, "
                "macro_block=null or static and fallback_alpha=null, or product='bf16'"
            )
    sides = ("weight", "activation", *(["grad"] if "mx" in (recipe.dgrad, recipe.wgrad) else []))
    for side in sides if recipe.product == "fp8_fast" else ():
        own = getattr(recipe, side)
        if fits(own) and not fits_rows(own):
            raise RecipeError(
                f"product='fp8_fast' leaves whole sums to the tensor core, and the macro blocks of {name}'s {side} are scaled "
                "every 128 elements: give product='fp8'"
            )


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FP8 products of `dtype` activations run on `device`."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 9)


class Plan:
    """Which products of a layer are FP8, and what they need of a tensor.

    Args:
        weight, activation, grad: recipes of the forward's operands and of the gradient, as in ModelRecipe.
        weight_back, activation_back: those of the operands in an "mx" backward product, None without a `grad`.
        dgrad, wgrad, product: as in ModelRecipe.
    """

    def __init__(self, weight, activation, grad, weight_back, activation_back, dgrad, wgrad, product):
        from mxfp4_kernels.container.reference import fits, fits_rows

        grad = grad if fits(grad) else None
        self.dgrad = dgrad == "mx" and grad is not None and fits(weight_back)
        self.wgrad = wgrad == "mx" and grad is not None and fits(activation_back)
        used = [weight, activation, *([grad] if self.dgrad or self.wgrad else [])]
        self.whole_rows = all(fits_rows(r) for r in used)
        self.fast = product == "fp8_fast"
        self.of_weight = {"rows": weight, "columns": weight_back if self.dgrad else None}
        self.of_input = {"rows": activation, "columns": activation_back if self.wgrad else None}
        self.of_grad = {"rows": grad if self.dgrad else None, "columns": grad if self.wgrad else None}

    def operands(self, x, rows=None, columns=None, operand_dtype=None):
        """`mxfp4_kernels.matmul.fp8.operands` of this plan."""
        from mxfp4_kernels.matmul.fp8 import operands

        return operands(x, rows, columns, operand_dtype, self.whole_rows)

    def product(self, a, b, dtype, bias=None):
        """`mxfp4_kernels.matmul.fp8.product` of this plan."""
        from mxfp4_kernels.matmul.fp8 import product

        return product(a, b, dtype, bias, fast=self.fast)


_plan = functools.cache(Plan)  # asked for at every forward


def plan_for(recipe: ModelRecipe) -> Plan:
    """The plan of a layer; read only, since layers share it."""
    backward = (recipe.in_backward(operand) if recipe.grad else None for operand in ("weight", "activation"))
    return _plan(recipe.weight, recipe.activation, recipe.grad, *backward, recipe.dgrad, recipe.wgrad, recipe.product)


class FP8Matmul(torch.autograd.Function):
    """Y = x_hat w_hat^T + b and its backward products, for x (tokens, in) in the compute dtype.

    x, w and b carry the gradients. `of_input` is (x, x^T, x_hat) and `of_weight` (w, w^T, w_hat), as `plan.operands`
    makes them; what is None is not needed.
    """

    @staticmethod
    def forward(ctx, x, w, b, recipe, plan, of_input, of_weight, stats):
        ctx.recipe, ctx.plan, ctx.stats = recipe, plan, stats
        ctx.weight_dtype, ctx.bias_dtype = w.dtype, b.dtype if b is not None else None
        x_t, w_t = of_input[1] if ctx.needs_input_grad[1] else None, of_weight[1] if ctx.needs_input_grad[0] else None
        ctx.templates = tuple(operand and operand.template() for operand in (x_t, w_t))
        # Through autograd, so that checkpointing and offloading see it, and changes before the backward are noticed.
        saved = [*_saved(x_t, of_input[2], x, ctx.needs_input_grad[1])]
        ctx.of_input = len(saved)
        ctx.save_for_backward(*saved, *_saved(w_t, of_weight[2], w, ctx.needs_input_grad[0]))
        return plan.product(of_input[0], of_weight[0], x.dtype, b if b is None else b.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        plan, recipe = ctx.plan, ctx.recipe
        g = g.contiguous()
        dx = dw = db = None
        saved = ctx.saved_tensors  # once: a checkpoint gives them out only once
        of_x, of_w = saved[: ctx.of_input], saved[ctx.of_input :]
        x_t, w_t = (t and t.with_tensors(s) for t, s in zip(ctx.templates, (of_x, of_w), strict=True))
        wanted = {"rows": w_t and plan.of_grad["rows"], "columns": x_t and plan.of_grad["columns"]}
        rows, columns, _ = plan.operands(g, **wanted) if any(wanted.values()) else (None, None, None)
        if ctx.needs_input_grad[0]:
            if w_t is not None:
                dx = plan.product(rows, w_t, g.dtype)
            else:
                (w,) = of_w  # "ste": quantised already
                w = w.to(g.dtype)
                dx = operand(g, recipe.grad) @ (operand(w, recipe.in_backward("weight"), axis=0) if recipe.dgrad == "mx" else w)
        if ctx.needs_input_grad[1]:
            if x_t is not None:
                dw = plan.product(columns, x_t, g.dtype)
            else:
                (x,) = of_x
                x = operand(x, recipe.in_backward("activation"), axis=0) if recipe.wgrad == "mx" else x
                dw = operand(g, recipe.grad, axis=0).t() @ x
            dw = dw.to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            db = g.sum(0).to(ctx.bias_dtype)
        if ctx.stats is not None:
            ctx.stats.measure("grad", g, recipe.grad)
        return dx, dw, db, None, None, None, None, None


def _saved(transposed, dequantised, plain, needed):
    """What a backward product needs of a tensor: its FP8 operand, else its dequantised one, else itself."""
    if not needed:
        return ()
    if transposed is not None:
        return transposed.tensors()
    return (plain if dequantised is None else dequantised,)
