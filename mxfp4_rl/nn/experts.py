"""Experts in MXFP4: the fused weights of a mixture of experts, quantised as one Linear layer an expert.

transformers keeps a layer's experts in two tensors, `gate_up_proj` and `down_proj`. Every expert's weight is quantised by
itself along the contraction axis of its forward product, and its tokens are what a Linear layer's input is: the products are
`linear.QuantizedMatmul`, with tokens sorted by expert. The router, its input, the routing weights and biases stay as they are,
and the gate between the two products is the family's own.

`MXFP4Experts` is the family's class with another forward. Converting swaps the class, as it does for `MXFP4Linear`: parameters
and their names stay. Each of the two tensors is a layer of its own for recipes, reports, the monitor and the weight sync: an
`ExpertsProjection`, named like its parameter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import nn

from mxfp4_rl.nn import expert_fp8, fp8
from mxfp4_rl.nn.linear import KeptOperand, LayerStats, QuantizedMatmul, compute_dtype
from mxfp4_rl.nn.operand import looks_at_other_rows, operand
from mxfp4_rl.nn.products import WeightPerExpert, operand_of_experts
from mxfp4_rl.quant import QuantizedTensor, StackedTensor, quantize
from mxfp4_rl.recipe import ModelRecipe, QuantRecipe, RecipeError

PROJECTIONS = ("gate_up_proj", "down_proj")
# What each is made of where an expert's layers lie apart, by verl's and most families' names.
LAYERS_OF = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what transformers' decorator records


class _Unquantized:
    """Stands for the recipe of a projection that is left alone."""

    weight = activation = grad = None
    dgrad = wgrad = "ste"
    in_fp8 = False


UNQUANTIZED = _Unquantized()


def fused_parameters(module: nn.Module) -> list[str]:
    """Names of the module's own parameters of three axes or more, which only experts and convolutions have."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    if isinstance(module, MXFP4Experts):
        return list(PROJECTIONS)
    return [name for name, p in module.named_parameters(recurse=False) if p.ndim >= 3]


def check_layout(module: nn.Module, name: str) -> None:
    """Raise RecipeError, naming class and parameter, unless `MXFP4Experts` computes what this module does.

    That is the interface of transformers 5 (`use_experts_implementation`): `gate_up_proj` (E, 2 I, H) and `down_proj`
    (E, H, I), or both with their last two axes exchanged (`is_transposed`, gpt-oss); biases (E, 2 I) and (E, H) or none; and
    `_apply_gate` between the products.
    """
    kind, fused = type(module).__name__, fused_parameters(module)
    where = f"{name}.{fused[0]}" if name else fused[0]

    def refuse(why: str):
        raise RecipeError(
            f"{kind} keeps its experts in fused tensors ({where}) of a layout that MXFP4 does not know: {why}. "
            f"Leave them unquantised (mxfp4.recipe.exclude), or use another model"
        )

    missing = [flag for flag in _FLAGS if not isinstance(getattr(module, flag, None), bool)]
    if missing or not hasattr(module, "_apply_gate"):
        refuse(f"it does not record {missing[0] if missing else '_apply_gate'}")
    if not module.has_gate or sorted(fused) != sorted(PROJECTIONS):
        refuse(f"its tensors are {', '.join(fused)} instead of {' and '.join(PROJECTIONS)}")
    biases = [f"{own}_bias" for own in PROJECTIONS] if module.has_bias else []
    shapes = {own: tuple(p.shape) for own, p in module.named_parameters(recurse=False)}
    if shapes.keys() != {*PROJECTIONS, *biases}:
        refuse(f"its parameters are {', '.join(shapes)}")
    (experts, *first), (count, *second) = (shapes[own] for own in PROJECTIONS)
    (wide, hidden), (outputs, inner) = (s[::-1] if module.is_transposed else s for s in (first, second))
    if experts != count or experts != module.num_experts or outputs != hidden or wide != 2 * inner:
        refuse(f"gate_up_proj {shapes['gate_up_proj']} and down_proj {shapes['down_proj']} do not fit each other")
    if biases and (shapes["gate_up_proj_bias"], shapes["down_proj_bias"]) != ((experts, wide), (experts, hidden)):
        refuse(f"gate_up_proj_bias is {shapes['gate_up_proj_bias']}, down_proj_bias {shapes['down_proj_bias']}")


class ExpertsProjection(KeptOperand):
    """One fused tensor of an `MXFP4Experts` and its products; what an `MXFP4Linear` is to the rest of this package.

    Attributes:
        layer_name, weight_name: dotted name of the parameter in the converted model.
        recipe: ModelRecipe of this projection (overrides applied).
        axis: the axis of `weight` that the forward product contracts, -1 or -2 (`is_transposed`).
        stats: `LayerStats` while the monitor measures, else None.
    """

    def __init__(self, experts: MXFP4Experts, own_name: str, layer_name: str, recipe: ModelRecipe | _Unquantized):
        self.experts, self.own_name = experts, own_name
        self.layer_name = self.weight_name = layer_name
        self.recipe = recipe
        self.axis = -2 if experts.is_transposed else -1
        self.stats: LayerStats | None = None
        self._held, self._held_key = {}, None

    @property
    def weight(self) -> torch.Tensor | None:
        """The parameter, as the family keeps it."""
        return getattr(self.experts, self.own_name)

    def make_operand(self, w: torch.Tensor) -> torch.Tensor:
        return operand_of_experts(w, self.recipe.weight, self.axis)

    def __call__(self, x: torch.Tensor, make_operand: Callable[[], torch.Tensor], products: WeightPerExpert) -> torch.Tensor:
        """Y (T, out) of tokens x (T, in) sorted by expert; without the bias. `make_operand` gives their operand x_hat."""
        if self.stats is not None:
            self.stats.count_tokens(products.offsets.diff())
            self.stats.measure("activation", x, self.recipe.activation)
            self.stats.measure_experts("activation", x, self.recipe.activation, products.offsets)
        if len(x) and self.recipe.in_fp8 and fp8.runs_on(x.device, x.dtype):
            return self._fp8_product(x, products)
        return self._product(x, make_operand(), self._outputs_first(self.weight_operand(x.dtype)), products)

    def fp8_weights(self, dtype: torch.dtype) -> expert_fp8.Weights:
        """The weights for FP8 products of tokens in `dtype`, kept as `weight_operand`'s are."""

        def make(w):
            self._held.pop("operand", None)  # that a weight sync left: nothing reads it any more
            # Of a copy: what FSDP gathered for this forward is freed after it. In another dtype it is one already.
            w = w.clone() if self.weight.dtype == dtype else w
            return expert_fp8.weights_of(self._outputs_first(w), self.recipe, expert_fp8.plan_for(self.recipe))

        return self._kept("operands", dtype, make)

    def _fp8_product(self, x, products):
        plan, of_weight = expert_fp8.plan_for(self.recipe), self.fp8_weights(x.dtype)
        weight = self._outputs_first(self.weight)
        return expert_fp8.GroupedFP8Matmul.apply(x, weight, of_weight, self.recipe, plan, self.stats, products)

    def _product(self, x, x_hat, w_hat, products):
        weight = self._outputs_first(self.weight)
        return QuantizedMatmul.apply(x, weight, x_hat, w_hat, self.recipe, self.stats, products)

    def _outputs_first(self, w: torch.Tensor) -> torch.Tensor:
        """The weight as (E, out, in)."""
        return w.transpose(1, 2) if self.axis == -2 else w


class PackedProjection(ExpertsProjection):
    """The rollout's side of an ExpertsProjection: no parameter, only the operand last shipped, dequantised. Forward only."""

    def __init__(self, experts: MXFP4Experts, own_name: str, layer_name: str, recipe: ModelRecipe):
        super().__init__(experts, own_name, layer_name, recipe)
        self.shape = tuple(self.weight.shape)
        setattr(experts, own_name, None)

    def hold(self, packed: QuantizedTensor, dtype: torch.dtype) -> None:
        """Take over the weights of all experts for products in `dtype`.

        Raises:
            ValueError: they have another shape.
        """
        if tuple(packed.shape) != self.shape:
            raise ValueError(f"{self.layer_name} holds {self.shape}, not {tuple(packed.shape)}: ship those of the same model")
        super().hold(packed, dtype)

    def release(self) -> None:
        """Nothing: there is no weight to quantise again."""

    @property
    def path(self) -> str:
        """What multiplies the weights it holds, for logs."""
        return "dequantised weights of experts" if self._held else "no weights yet"

    def weight_operand(self, dtype: torch.dtype) -> torch.Tensor:
        if self._held_key != dtype:
            raise RuntimeError(f"{self.layer_name} has no weights in {dtype}: load them with hold() first")
        return self._held["operand"]

    def _product(self, x, x_hat, w_hat, products):
        return products.forward(x_hat, w_hat)

    def _key(self, dtype):
        return dtype


class MXFP4Experts(nn.Module):
    """A family's experts with quantised products; made by `mxfp4_rl.nn.convert`, as a subclass of the family's class.

    Attributes:
        projections: "gate_up_proj" and "down_proj" -> ExpertsProjection.
    """

    projections: dict[str, ExpertsProjection]

    @staticmethod
    def swap(experts: nn.Module, name: str, recipes: dict[str, ModelRecipe], packed: bool = False) -> None:
        """Turn a module that `check_layout` knows into MXFP4Experts, in place.

        Args:
            name: its dotted name in the model.
            recipes: of the projections, by parameter name; one that is missing stays unquantised.
            packed: quantised weights are dropped and come by `hold` (`PackedProjection`).
        """
        if isinstance(experts, MXFP4Experts):
            experts.unswap()
        experts.__class__ = _quantized_class(type(experts))
        experts.projections = {}
        for own in PROJECTIONS:
            recipe = recipes.get(own, UNQUANTIZED)
            kind = PackedProjection if packed and recipe.weight is not None else ExpertsProjection
            if kind is PackedProjection:  # which multiplies what it was shipped, dequantised
                recipe = dataclasses.replace(recipe, product="bf16")
            experts.projections[own] = kind(experts, own, f"{name}.{own}" if name else own, recipe)

    def unswap(self) -> None:
        """Turn it back into the module it was, in place."""
        del self.projections
        self.__class__ = type(self).family

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of every token's experts.

        Args:
            hidden_states: (tokens, H). top_k_index: (tokens, k), an expert each; E stands for none, as where experts live
                on another rank. top_k_weights: (tokens, k).

        Returns:
            (tokens, H), in the dtype of `hidden_states`.
        """
        gate_up, down = (self.projections[own] for own in PROJECTIONS)
        count, k = top_k_index.shape
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        bounds = torch.arange(self.num_experts + 1, device=expert.device, dtype=expert.dtype)
        products = WeightPerExpert(torch.searchsorted(expert, bounds).int())

        def by_expert(t):
            # By way of k copies, so that a token's gradients are summed in one go, and not one by one in the compute dtype.
            return t.unsqueeze(1).expand(-1, k, -1).reshape(count * k, t.shape[-1]).index_select(0, order)

        x = hidden_states.to(compute_dtype(hidden_states))
        tokens = by_expert(x)
        recipe = gate_up.recipe.activation

        def tokens_hat():
            if recipe is None or looks_at_other_rows(recipe):
                return products.quantized_rows(tokens, recipe)
            return operand(x, recipe).index_select(0, order // k)  # the same bits: every token's are made once, not k times

        def inner_hat():
            return products.quantized_rows(inner, down.recipe.activation)

        inner = self._apply_gate(self._biased(gate_up(tokens, tokens_hat, products), "gate_up_proj_bias", expert))
        outputs = self._biased(down(inner, inner_hat, products), "down_proj_bias", expert)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(count * k, device=order.device))
        weighted = outputs.index_select(0, place) * top_k_weights.reshape(-1, 1)
        return weighted.view(count, k, outputs.shape[-1]).sum(1).to(hidden_states.dtype)

    def _biased(self, y: torch.Tensor, name: str, expert: torch.Tensor) -> torch.Tensor:
        if not self.has_bias:
            return y
        bias = getattr(self, name)
        wide = bias.to(torch.promote_types(bias.dtype, torch.float32))  # a bias' gradient is a sum over many tokens
        return y + wide.index_select(0, expert.clamp(max=self.num_experts - 1)).to(y.dtype)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        for projection in self.projections.values():
            projection.release()

    def extra_repr(self) -> str:
        named = {own: projection.recipe for own, projection in self.projections.items()}
        return "; ".join(f"{own}: {r.describe()}" for own, r in named.items() if r is not UNQUANTIZED)


@functools.cache
def _quantized_class(family: type[nn.Module]) -> type[nn.Module]:
    return type(f"MXFP4{family.__name__}", (MXFP4Experts, family), {"family": family, "__module__": __name__})


def quantize_experts(w: torch.Tensor, recipe: QuantRecipe, axis: int = -1) -> QuantizedTensor:
    """Weights (E, rows, columns), every expert's quantised by itself along `axis`, -1 or -2: the codes of its operand."""
    if recipe.tile or not looks_at_other_rows(recipe):
        return quantize(w, recipe, axis)
    return StackedTensor(tuple(quantize(own, recipe, axis) for own in w), axis % w.ndim)
