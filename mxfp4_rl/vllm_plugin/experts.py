"""A mixture of experts under the quantisation method "mxfp4_rl": what vLLM's FusedMoE layer holds and how it multiplies.

Every tensor of `layout.fields` has another axis in front, of experts, and the prefix w13_ (gate and up, one below the other) or
w2_ (down): the names that vLLM's models give their experts' layers. The layer's own loader cuts and places them, an expert's
layer at a time, in place, as often as the trainer ships them.

The two projections may have recipes of their own, as in the trainer; one without a kernel for packed weights, or none, is kept
in the model's dtype. The router decides before any of this, on an input that is not quantised.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from mxfp4_rl.nn.operand import looks_at_other_rows
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import ModelRecipe, RecipeError
from mxfp4_rl.vllm_plugin.expert_names import MULTIPLE
from mxfp4_rl.vllm_plugin.expert_product import GATES, recipe_texts, weights_of
from mxfp4_rl.vllm_plugin.layout import check_cut, fields, why_not_packed

PREFIXES = {"gate_up_proj": "w13_", "down_proj": "w2_"}
_ROUTING = (  # what a layer says about it, as vLLM's `select_experts` asks
    "top_k", "use_grouped_topk", "renormalize", "topk_group", "num_expert_group", "custom_routing_function", "scoring_func",
    "routed_scaling_factor", "e_score_correction_bias",
)  # fmt: skip


def check_layer(layer: torch.nn.Module, prefix: str, recipes: dict[str, ModelRecipe | None]) -> None:
    """Raise RecipeError unless our products compute what this FusedMoE layer does."""
    config = layer.moe_config
    gate = getattr(layer.activation, "value", layer.activation)

    def refuse(why: str):
        raise RecipeError(f"{prefix}: {why}; leave its experts unquantised (mxfp4.recipe.exclude: ['re:experts'])")

    if config.moe_parallel_config.use_ep:
        raise RecipeError(
            f"{prefix}: experts in MXFP4 are cut by tensor parallelism, not dealt out: switch expert parallelism off "
            "(rollout.expert_parallel_size=1)"
        )
    if config.has_bias:
        refuse("its experts have biases (as gpt-oss'), and vLLM loads those in fused tensors, which our layers do not hold")
    if not config.is_act_and_mul or gate not in GATES:
        refuse(f"its gate is {gate!r}, and ours are {', '.join(GATES)}")
    if layer.apply_router_weight_on_input:
        refuse("it weighs its experts' inputs instead of their outputs")
    widths = config.hidden_dim, config.intermediate_size_per_partition
    if any(width % MULTIPLE for width in widths):
        refuse(f"its widths {widths} are no multiples of {MULTIPLE}, as the grouped kernels need them")
    for recipe in recipes.values():
        if recipe and recipe.activation and looks_at_other_rows(recipe.activation):
            refuse(
                f"activations in {recipe.activation.describe()} depend on all tokens of an expert, which no CUDA graph knows"
            )


class MXFP4ExpertsMethod(FusedMoEMethodBase):
    """Packed weights of a layer's experts and their products.

    Args:
        recipes: of "gate_up_proj" and "down_proj"; None leaves one unquantised.
    """

    def __init__(self, moe, recipes: dict[str, ModelRecipe | None], prefix: str):
        super().__init__(moe)
        self.recipes, self.prefix = recipes, prefix
        self._packed = {
            own: recipe.weight if recipe and recipe.weight and not why_not_packed(recipe.weight) else None
            for own, recipe in recipes.items()
        }
        self._texts = recipe_texts(
            *(r for own, recipe in recipes.items() for r in (self._packed[own], recipe.activation if recipe else None))
        )
        self._held: dict[str, list[str]] = {}

    @property
    def path(self) -> str:
        """What multiplies which weights, for logs."""
        kept = []
        for own, recipe in self.recipes.items():
            if self._packed[own] is None:
                no_weight = "not quantised" if recipe is None else "its weights are not quantised"
                kept.append(f"{own} {why_not_packed(recipe.weight) if recipe and recipe.weight else no_weight}")
        if len(kept) == len(self.recipes):
            return f"experts' dequantised weights, grouped kernels ({'; '.join(kept)})"
        path = "packed weights of experts by the grouped decode kernel (for many tokens: dequantised for the call)"
        if current_platform.is_cpu():
            path = "packed weights of experts, dequantised for each call (a CPU)"
        return f"{path}; dequantised: {'; '.join(kept)}" if kept else path

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **attributes):
        # By way of the configuration: vLLM 0.24's layer has no tp_size of its own.
        inner, parts = intermediate_size_per_partition, layer.moe_config.moe_parallel_config.tp_size
        if self.recipes["down_proj"] is not None:
            check_cut(self.recipes["down_proj"], inner * parts, parts, f"{self.prefix}.down_proj")
        shapes = {"gate_up_proj": (2 * inner, hidden_size), "down_proj": (hidden_size, inner)}
        self._widths = {own: columns for own, (_, columns) in shapes.items()}
        for own, (rows, columns) in shapes.items():
            stored = {"weight": (columns, params_dtype)}
            if self._packed[own] is not None:
                stored = fields(self._packed[own], columns)
            self._held[own] = [PREFIXES[own] + field for field in stored]
            for name, (width, dtype) in zip(self._held[own], stored.values(), strict=True):
                # Zeros, not garbage: the engine starts on them, and a garbage scale may be NaN.
                empty = torch.ones if dtype == torch.float32 else torch.zeros
                parameter = torch.nn.Parameter(empty(num_experts, rows, width, dtype=dtype), requires_grad=False)
                layer.register_parameter(name, parameter)
                # "group" says to vLLM's loader (which verl may put in place of ours) that scales are cut like weights.
                set_weight_attrs(parameter, {"weight_loader": _loader(attributes["weight_loader"]), "quant_method": "group"})

    def get_fused_moe_quant_config(self, layer):
        return None

    def maybe_make_prepare_finalize(self, routing_tables=None):
        """None: experts are not dealt out, so tokens stay where they are."""
        return None

    @property
    def is_monolithic(self) -> bool:
        """Whether the method routes, too: on a CPU, where vLLM's router has no kernel."""
        return current_platform.is_cpu()

    def apply_monolithic(self, layer, x: torch.Tensor, router_logits: torch.Tensor, *_, **__) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import select_experts

        told = {name: getattr(layer, name) for name in _ROUTING}
        weights, ids = select_experts(hidden_states=x, router_logits=router_logits, **told)
        return self.apply(layer, x, weights, ids)

    def apply(self, layer, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_, **__) -> torch.Tensor:
        gate_up, down = ([getattr(layer, name) for name in names] for names in self._held.values())
        gate = getattr(layer.activation, "value", layer.activation)
        return torch.ops.mxfp4_rl.experts(x, topk_ids, topk_weights, gate_up, down, self._texts, gate)

    def weight(self, layer, own: str) -> MXFP4Tensor | torch.Tensor:
        """The weights (E, N, K) of "gate_up_proj" or "down_proj" that the layer holds; no copy."""
        held = [getattr(layer, name).data for name in self._held[own]]
        return held[0] if self._packed[own] is None else weights_of(held, self._packed[own], self._widths[own])


def _loader(of_layer):
    """The layer's loader, which knows by a tensor's name what it is: all of ours are cut and placed as weights are."""

    def load(param, loaded_weight, weight_name, **place):
        return of_layer(param, loaded_weight, "weight", **place)

    return load
