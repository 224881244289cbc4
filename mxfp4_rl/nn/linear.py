"""A Linear layer whose matrix products see MXFP4 operands.

With Q_w and Q_a the weight's and the activation's quantise-dequantise (`mxfp4_rl.quant`),

    forward   Y  = Q_a(X) Q_w(W)^T + b
    dgrad     dX = G W'        W' = Q_w(W) "ste" | W "bf16" | Q_w(W) again, along the output features "mx"
    wgrad     dW = G^T X'      X' = Q_a(X) "ste" | X "bf16" | Q_a(X) again, along the tokens "mx"

and G is quantised too, along each product's contraction axis, if the recipe has a `grad`. In an "mx" product W and X
are rotated (`hadamard`) and rounded as G is: the rotations cancel in it, and with stochastic rounding it stays unbiased.
Gradients pass the rounding unchanged: a straight-through estimator, as in arXiv 2605.20402. Quantisation happens outside
autograd, so nothing of it is recorded, and the weight's operand is made once per optimiser step and kept.

`MXFP4Linear` is `nn.Linear` with another forward: converting a layer swaps its class, so parameters, their names, optimiser
states, FSDP and checkpoints stay as they are.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mxfp4_rl.nn import by_group, fp8
from mxfp4_rl.nn.operand import operand
from mxfp4_rl.nn.products import ONE_WEIGHT, OneWeight, WeightPerExpert
from mxfp4_rl.quant import ErrorStats, QuantizedTensor, error_stats, fake_quantize
from mxfp4_rl.recipe import ModelRecipe, QuantRecipe

_optimizer_steps = 0


def _count_step(*_):
    global _optimizer_steps
    _optimizer_steps += 1


# Every optimiser step of this process makes the kept weight operands stale, whoever owns the optimiser and however the
# parameters are sharded (FSDP2 hides the change from the version counter of the gathered weight).
register_optimizer_step_post_hook(_count_step)


class QuantizedMatmul(torch.autograd.Function):
    """Y = x_hat w_hat^T and its two backward products; see the module's docstring for the operands.

    x, x_hat: (..., in); w, w_hat: (out, in), or (E, out, in) for the products of experts. x and w only carry the gradients,
    and serve "bf16" and "mx".
    """

    @staticmethod
    def forward(ctx, x, w, x_hat, w_hat, recipe: ModelRecipe, stats, products: OneWeight | WeightPerExpert = ONE_WEIGHT):
        ctx.recipe, ctx.stats, ctx.products = recipe, stats, products
        ctx.weight_dtype = w.dtype
        ctx.save_for_backward(
            x_hat if recipe.wgrad == "ste" else x.detach(),
            w_hat if recipe.dgrad == "ste" else w.detach().to(w_hat.dtype),
        )
        return products.forward(x_hat, w_hat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        recipe, products = ctx.recipe, ctx.products
        dx = dw = None
        if ctx.needs_input_grad[0]:
            if recipe.dgrad == "mx":
                w = products.quantized_weight(w, recipe.in_backward("weight"), axis=-2)
            dx = products.dgrad(products.quantized_rows(g, recipe.grad), w)
        if ctx.needs_input_grad[1]:
            tokens_g, tokens_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            if recipe.wgrad == "mx":
                tokens_x = products.quantized_columns(tokens_x, recipe.in_backward("activation"))
            dw = products.wgrad(products.quantized_columns(tokens_g, recipe.grad), tokens_x).to(ctx.weight_dtype)
        if ctx.stats is not None:
            ctx.stats.measure("grad", g, recipe.grad)
        return dx, dw, None, None, None, None, None


class KeptOperand:
    """What keeps a layer's weight operand from one optimiser step to the next.

    The layer has a `weight` and a `recipe`, and `make_operand`, which quantises and dequantises the weight given.
    """

    weight: torch.Tensor | None
    recipe: ModelRecipe
    _held: dict
    _held_key: object

    def make_operand(self, w: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def weight_operand(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight, of its own shape, in the compute dtype, quantised from the weight's bits in that dtype.

        It is kept until an optimiser step, an in-place change of the weight, a state-dict load or `release`. A write through
        `weight.data` is invisible to PyTorch: call `release` (or `mxfp4_rl.nn.release_operands`) after one.
        """
        if self.recipe.weight is None:
            return self.weight.detach().to(dtype)  # nothing to keep, and under FSDP the gathered tensor is not ours to hold
        return self._kept("operand", dtype, self.make_operand)

    def _kept(self, kind, dtype: torch.dtype, make):
        """`make(weight in dtype)`, made once for a state of the weight; in a CUDA graph each time it is replayed."""
        weight = self.weight
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return make(weight.detach().to(dtype))
        key = self._key(dtype)
        if self._held_key != key:
            self._hold({}, key)
        if kind not in self._held:
            self._held[kind] = _made(make, weight, dtype)
        return self._held[kind]

    def _hold(self, held, key) -> None:
        vars(self).update(_held=held, _held_key=key)  # nn.Module's own way looks for parameters first, for 3 us

    def hold(self, packed: QuantizedTensor, dtype: torch.dtype) -> None:
        """Keep the operand that `packed` stands for, e.g. one just shipped to the rollout, as this step's own."""
        if self.recipe.in_fp8 and fp8.runs_on(packed.codes.device, dtype):
            self.release()  # FP8 products have operands of another kind, made of the same bits
        else:
            self._hold({"operand": packed.dequantize(dtype)}, self._key(dtype))

    def release(self) -> None:
        """Forget the kept operand; the next forward quantises the weight again."""
        self._hold({}, None)

    def _key(self, dtype):
        # A weight that FSDP gathers for the forward is another tensor than the sharded parameter, with a version counter
        # that the optimiser never touches; the count of optimiser steps covers that case.
        weight = self.weight
        sharded = (type(weight) is not nn.Parameter and hasattr(weight, "to_local")) or vars(self).get("gathered", False)
        unversioned = sharded or weight.is_inference()
        version = None if unversioned else (weight.data_ptr(), weight._version)
        steps = _optimizer_steps if weight.requires_grad else None  # the base of LoRA adapters stays
        return dtype, self.recipe, steps, version


class MXFP4Linear(KeptOperand, nn.Linear):
    """`nn.Linear` with quantised operands; made by `mxfp4_rl.nn.convert`, not by its constructor.

    Attributes:
        recipe: ModelRecipe of this layer (overrides applied).
        layer_name: dotted name in the converted model.
        stats: `LayerStats` while the monitor measures, else None.
    """

    recipe: ModelRecipe
    layer_name: str
    axis = -1  # of the weight, that the forward product contracts

    @classmethod
    def swap(cls, linear: nn.Linear, name: str, recipe: ModelRecipe) -> None:
        """Turn `linear` into an MXFP4Linear in place."""
        linear.__class__ = cls
        linear.recipe, linear.layer_name = recipe, name
        linear.stats = None
        linear._held, linear._held_key = {}, None

    def unswap(self) -> None:
        """Turn it back into the `nn.Linear` it was, in place."""
        for name in ("recipe", "layer_name", "stats", "_held", "_held_key"):
            delattr(self, name)
        self.__class__ = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(x)
        x = x.to(dtype)
        if self.stats is not None:
            self.stats.measure("activation", x, self.recipe.activation)
        if self.recipe.in_fp8 and fp8.runs_on(x.device, dtype):
            return self._fp8_forward(x)
        w_hat = self.weight_operand(dtype)
        x_hat = quantized_input(x, self.recipe.activation)
        y = QuantizedMatmul.apply(x, self.weight, x_hat, w_hat, self.recipe, self.stats)
        return y if self.bias is None else y + self.bias.to(dtype)

    def _fp8_forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        weight, plan = self.weight, fp8.plan_for(self.recipe)
        rows, columns = plan.of_input
        dtype = None
        if not (torch.is_grad_enabled() and weight.requires_grad):
            columns = None
        elif plan.keeps_input:
            dtype = x.dtype
        of_input = _shared_input(
            x,
            (plan.whole_rows, rows, columns, dtype),
            lambda own: plan.operands(own if own.ndim == 2 else own.reshape(tokens.shape), rows, columns, dtype),
        )
        of_weight = self.weight_operands(plan, x.dtype)
        y = fp8.matmul(tokens, weight, self.bias, self.recipe, plan, of_input, of_weight, self.stats)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], self.out_features)

    @property
    def weight_name(self) -> str:
        """Of the parameter in the converted model."""
        return f"{self.layer_name}.weight"

    def make_operand(self, w: torch.Tensor) -> torch.Tensor:
        return operand(w, self.recipe.weight)

    def weight_operands(self, plan: fp8.Plan, dtype: torch.dtype):
        """The weight for FP8 products: quantised along its inputs, for dgrad along its outputs, dequantised; kept likewise.

        Those that no product of the plan needs are None.
        """

        def make(w):
            self._held.pop("operand", None)  # that a weight sync left: nothing reads it any more
            # Of a copy: what FSDP gathered for this forward is freed after it. In another dtype it is one already.
            w = w.clone() if self.weight.dtype == dtype else w
            return plan.operands(w, *plan.of_weight, dtype if self.recipe.dgrad == "ste" else None)

        return self._kept("operands", dtype, make)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.release()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe.describe()}"


class LayerStats:
    """Error statistics of one layer's activation and gradient: `max_rows` tokens of the first micro-batch that passes."""

    def __init__(self, max_rows: int | None):
        self.max_rows = max_rows
        self.sums: dict[str, ErrorStats] = {}
        self.tokens: torch.Tensor | None = None  # of every expert, int64 (E,), where the layer has experts
        self.by_expert: dict[str, torch.Tensor] = {}  # operand -> energies (`nn.by_group`), where the layer has experts

    def count_tokens(self, counts: torch.Tensor) -> None:
        """Add the tokens that a forward brought to each expert; not those of a checkpointed forward's second run."""
        if torch._C._current_graph_task_id() == -1:  # no backward runs here
            self.tokens = counts.long() if self.tokens is None else self.tokens + counts

    @torch.no_grad()
    def measure_experts(self, operand: str, t: torch.Tensor, recipe: QuantRecipe | None, offsets: torch.Tensor) -> None:
        """As `measure`, of tokens (T, features) sorted by expert, for each expert by itself."""
        if recipe is not None and operand not in self.by_expert:
            experts = len(offsets) - 1
            row, expert = by_group.rows_of_groups(offsets, len(t), by_group.rows_each(self.max_rows, experts))
            self.by_expert[operand] = by_group.energies_by_group(t.index_select(0, row), recipe, expert, experts)

    @torch.no_grad()
    def measure(self, operand: str, t: torch.Tensor, recipe: QuantRecipe | None) -> None:
        """Measure the error of quantising t (..., features) along its last axis, the first time; not if `recipe` is None.

        Stochastic rounding has a seed of its own here: measuring does not touch the run's random numbers.
        """
        if recipe is not None and operand not in self.sums:
            self.sums[operand] = error_stats(spaced_rows(t.reshape(-1, t.shape[-1]), self.max_rows, recipe), recipe, seed=0)


def spaced_rows(t: torch.Tensor, max_rows: int | None, recipe: QuantRecipe) -> torch.Tensor:
    """At most `max_rows` evenly spaced rows of t (rows, features), or as many in whole tiles; all of them for None."""
    unit = recipe.tile_rows
    if max_rows is None or t.shape[0] <= max(max_rows, unit):
        return t
    groups = t.shape[0] // unit  # of neighbouring rows that share their scales
    index = torch.linspace(0, groups - 1, max(1, max_rows // unit), device=t.device).round().long() * unit
    return t.index_select(0, (index.unsqueeze(-1) + torch.arange(unit, device=t.device)).flatten())


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _made(make, t: torch.Tensor, dtype: torch.dtype):
    """`make(t in dtype)`, outside of autograd and to be kept: for training passes too, if this is inference."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return make(t.detach().to(dtype))
    return make(t.detach().to(dtype))


class _LastInput:
    """What was made of the last input. Query, key and value (gate and up) read the same tensor: it is quantised once."""

    def __init__(self):
        self.source = lambda: None
        self.key = self.made = None

    def __call__(self, x: torch.Tensor, key, make):
        """`make(x detached)`, or what it gave for this `key` and the same state of x before."""
        if x.is_inference():  # without a version, nobody knows whether it changed
            return make(x.detach())
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # a replay has to make it again
            return make(x.detach())
        key = (key, x._version)
        if self.source() is not x or self.key != key:
            self.made = None
            self.made = _made(make, x, x.dtype)
            self.source, self.key = weakref.ref(x, self._forget), key
        return self.made

    def _forget(self, reference):
        if self.source is reference:
            self.made = None


_shared_input = _LastInput()


def quantized_input(x: torch.Tensor, recipe: QuantRecipe | None) -> torch.Tensor:
    return x if recipe is None else _shared_input(x, recipe, lambda own: fake_quantize(own, recipe))
