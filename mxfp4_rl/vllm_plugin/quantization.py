"""The quantisation method "mxfp4_rl" of vLLM: which layers hold packed MXFP4 weights, their parameters, and their product.

The recipe comes in the model's `quantization_config` (`mxfp4_rl.vllm_plugin.quantization_config`). Weights come packed, under
the names of `layout`, through the model's own `load_weights`: vLLM's loaders cut and place them as they do any linear layer's,
in place, as often as the trainer ships them. Layers that vLLM fuses (query, key and value; gate and up) must agree on their
recipe. A weight recipe without a kernel for packed weights is kept as the dequantised weight in the model's dtype, by name.
Layers of experts are in `experts`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import GroupQuantScaleParameter
from vllm.platforms import current_platform

from mxfp4_rl.nn.convert import why_left_alone
from mxfp4_rl.nn.experts import PROJECTIONS
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import ModelRecipe, RecipeError
from mxfp4_rl.vllm_plugin import METHOD, product
from mxfp4_rl.vllm_plugin.expert_names import transformers_name
from mxfp4_rl.vllm_plugin.experts import MXFP4ExpertsMethod, check_layer
from mxfp4_rl.vllm_plugin.layout import check_cut, fields, weight_of, why_not_packed


@register_quantization_config(METHOD)
class MXFP4Config(QuantizationConfig):
    """A ModelRecipe as vLLM's description of a quantised model.

    Attributes:
        recipe: what the trainer's model is converted with.
        chosen: layer (by vLLM's name) -> what multiplies its weights, as layers are built.
    """

    def __init__(self, recipe: ModelRecipe):
        super().__init__()
        self.recipe = recipe
        self.chosen: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"MXFP4Config({self.recipe.describe()})"

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MXFP4Config:
        return cls(ModelRecipe.from_dict(config.get("recipe"), "quantization_config.recipe"))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """The method of one layer; None leaves what is neither linear nor experts (embeddings, attention) to vLLM.

        Raises:
            RecipeError: the layers that vLLM fuses into this one have different recipes, or its experts are of a kind that
                our products do not compute.
        """
        if hasattr(layer, "moe_config"):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        recipe = self._recipe_of(prefix)
        if recipe is None:
            self.chosen[prefix] = "not quantised"
            return UnquantizedLinearMethod()
        why_not = "its weights are not quantised" if recipe.weight is None else why_not_packed(recipe.weight)
        method = MXFP4LinearMethod(recipe) if why_not is None else DequantizedLinearMethod(recipe)
        self.chosen[prefix] = method.path if why_not is None else f"{method.path} ({why_not})"
        return method

    def _experts_method(self, layer: torch.nn.Module, prefix: str) -> MXFP4ExpertsMethod | None:
        recipes = {own: self._own(f"{transformers_name(prefix)}.{own}") for own in PROJECTIONS}
        if not any(recipes.values()):
            self.chosen[prefix] = "not quantised"
            return None
        check_layer(layer, prefix, recipes)
        method = MXFP4ExpertsMethod(layer.moe_config, recipes, prefix)
        self.chosen[prefix] = method.path
        return method

    def describe(self) -> str:
        """How many layers each path serves, for the log."""
        return "; ".join(f"{count} layers: {path}" for path, count in Counter(self.chosen.values()).items())

    def _recipe_of(self, prefix: str) -> ModelRecipe | None:
        stem, _, last = prefix.rpartition(".")
        parts = [f"{stem}.{part}" if stem else part for part in self.packed_modules_mapping.get(last, [last])]
        recipes = [self._own(part) for part in parts]
        if any(r != recipes[0] for r in recipes):
            raise RecipeError(
                f"vLLM multiplies {' and '.join(parts)} as one layer, but overrides or exclude give them different recipes: "
                "write the pattern so that it matches all of them or none"
            )
        return recipes[0]

    def _own(self, name: str) -> ModelRecipe | None:
        """The recipe of one of the trainer's layers, None if it is left alone."""
        left_alone, overriding = why_left_alone(name, self.recipe)
        return None if left_alone else self.recipe.for_layer(overriding)


@register_weight_loader_v2_supported_method
class MXFP4LinearMethod(LinearMethodBase):
    """Packed weights of a linear layer and their product; `recipe` is the layer's own."""

    path = (
        "packed weights, dequantised for each call (a CPU)"
        if current_platform.is_cpu()
        else "packed weights by the decode kernel (for many tokens: dequantised for the call, cuBLAS)"
    )

    def __init__(self, recipe: ModelRecipe):
        self.recipe = recipe
        self._activation = product.as_text(recipe.activation)

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **attributes
    ):
        check_cut(self.recipe, input_size, input_size // input_size_per_partition, getattr(layer, "prefix", "") or "a layer")
        rows = sum(output_partition_sizes)
        for field, (columns, dtype) in fields(self.recipe.weight, input_size_per_partition).items():
            # Zeros, not garbage: the engine starts on them, and a garbage scale may be NaN.
            data = torch.zeros(rows, columns, dtype=dtype) if dtype == torch.uint8 else torch.ones(rows, columns, dtype=dtype)
            loader = attributes["weight_loader"]
            parameter = GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
            layer.register_parameter(field, parameter)

    def apply(self, layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        macro, *second = (getattr(layer, name, None) for name in ("weight_macro", "residual_packed", "residual_scale"))
        recipe = self.recipe.weight
        return torch.ops.mxfp4_rl.linear(
            x, layer.weight_packed, layer.weight_scale, macro, *second, bias,
            recipe.macro_size, recipe.fallback_alpha or 0.0, self._activation,
        )  # fmt: skip

    def weight(self, layer) -> MXFP4Tensor:
        """The packed weight that the layer holds; no copy."""
        return weight_of(layer, self.recipe.weight, layer.input_size_per_partition)


@register_weight_loader_v2_supported_method
class DequantizedLinearMethod(UnquantizedLinearMethod):
    """Weights in the model's dtype, dequantised by the trainer or never quantised; quantised activations."""

    path = "dequantised weights, vLLM's own product"

    def __init__(self, recipe: ModelRecipe):
        super().__init__()
        self.recipe, self._activation = recipe, product.as_text(recipe.activation)

    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **attributes
    ):
        check_cut(self.recipe, input_size, input_size // input_size_per_partition, getattr(layer, "prefix", "") or "a layer")
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **attributes
        )

    def apply(self, layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._activation:
            x = torch.ops.mxfp4_rl.quantized(x, self._activation)
        return super().apply(layer, x, bias)
