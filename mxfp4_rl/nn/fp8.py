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


@functools.cache
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
        from mxfp4_kernels.matmul import fp8 as kernels

        grad = grad if fits(grad) else None
        self.dgrad = dgrad == "mx" and grad is not None and fits(weight_back)
        self.wgrad = wgrad == "mx" and grad is not None and fits(activation_back)
        used = [weight, activation, *([grad] if self.dgrad or self.wgrad else [])]
        self.whole_rows = all(fits_rows(r) for r in used)
        self.fast = product == "fp8_fast"
        self.keeps_input = wgrad == "ste"
        self.of_weight = weight, weight_back if self.dgrad else None
        self.of_input = activation, activation_back if self.wgrad else None
        self.grad, self.kernels = grad, kernels

    def operands(self, x, rows=None, columns=None, operand_dtype=None):
        """`mxfp4_kernels.matmul.fp8.operands` of this plan."""
        return self.kernels.operands(x, rows, columns, operand_dtype, self.whole_rows)

    def product(self, a, b, dtype, bias=None):
        """`mxfp4_kernels.matmul.fp8.product` of this plan."""
        return self.kernels.product(a, b, dtype, bias, None, self.fast)


_plan = functools.cache(Plan)
_plans: dict[int, tuple[ModelRecipe, Plan]] = {}  # by a recipe's identity: asked for at every forward


def plan_for(recipe: ModelRecipe) -> Plan:
    """The plan of a layer; read only, since layers share it."""
    known = _plans.get(id(recipe))
    if known is None:
        backward = (recipe.in_backward(operand) if recipe.grad else None for operand in ("weight", "activation"))
        plan = _plan(recipe.weight, recipe.activation, recipe.grad, *backward, recipe.dgrad, recipe.wgrad, recipe.product)
        known = _plans[id(recipe)] = recipe, plan
    return known[1]


def matmul(x, w, b, recipe, plan, of_input, of_weight, stats):
    """`FP8Matmul`, without autograd where nothing wants a gradient.

    `of_input` is (x, x^T, x_hat) and `of_weight` (w, w^T, w_hat), as `plan.operands` makes them; what is None is not needed.
    """
    if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (b is not None and b.requires_grad)):
        return FP8Matmul.apply(x, w, b, (recipe, plan, of_input, of_weight, stats))
    return plan.product(of_input[0], of_weight[0], x.dtype, b if b is None else b.to(x.dtype))


class FP8Matmul(torch.autograd.Function):
    """Y = x_hat w_hat^T + b and its backward products, for x (tokens, in) in the compute dtype.

    x, w and b carry the gradients. `layer` is the rest of `matmul`'s arguments, as one: autograd looks at each.
    """

    @staticmethod
    def forward(ctx, x, w, b, layer):
        recipe, plan, of_input, of_weight, stats = layer
        needs_x, needs_w = ctx.needs_input_grad[:2]
        x_t, w_t = of_input[1] if needs_w else None, of_weight[1] if needs_x else None
        # Through autograd, so that checkpointing and offloading see it, and changes before the backward are noticed.
        of_x, of_w = _saved(x_t, of_input[2], x, needs_w), _saved(w_t, of_weight[2], w, needs_x)
        ctx.save_for_backward(*of_x, *of_w)
        templates = x_t and x_t.template(), w_t and w_t.template()
        ctx.step = recipe, plan, stats, *templates, len(of_x), w.dtype, b if b is None else b.dtype
        return plan.product(of_input[0], of_weight[0], x.dtype, b if b is None else b.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        recipe, plan, stats, x_t, w_t, count, weight_dtype, bias_dtype = ctx.step
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        g = g.contiguous()
        dx = dw = db = None
        saved = ctx.saved_tensors  # once: a checkpoint gives them out only once
        if w_t is not None or x_t is not None:
            rows, columns, _ = plan.operands(g, w_t and plan.grad, x_t and plan.grad)
        if w_t is not None:
            dx = plan.product(rows, w_t.with_tensors(saved[count:]), g.dtype)
        elif needs_x:
            w = saved[count].to(g.dtype)  # "ste": quantised already
            dx = operand(g, recipe.grad) @ (operand(w, recipe.in_backward("weight"), axis=0) if recipe.dgrad == "mx" else w)
        if x_t is not None:
            dw = plan.product(columns, x_t.with_tensors(saved[:count]), g.dtype).to(weight_dtype)
        elif needs_w:
            x = operand(saved[0], recipe.in_backward("activation"), axis=0) if recipe.wgrad == "mx" else saved[0]
            dw = (operand(g, recipe.grad, axis=0).t() @ x).to(weight_dtype)
        if needs_b:
            db = g.sum(0).to(bias_dtype)
        if stats is not None:
            stats.measure("grad", g, recipe.grad)
        return dx, dw, db, None


def _saved(transposed, dequantised, plain, needed):
    """What a backward product needs of a tensor: its FP8 operand, else its dequantised one, else itself."""
    if not needed:
        return ()
    if transposed is not None:
        return transposed.tensors()
    return (plain if dequantised is None else dequantised,)
