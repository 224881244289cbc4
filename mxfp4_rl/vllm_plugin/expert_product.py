"""The products of a mixture of experts in vLLM as one operator, which torch.compile and CUDA graphs see as a whole.

It computes what `mxfp4_rl.nn.experts.MXFP4Experts.forward` does, on operands that are equal bit for bit: tokens sorted by
expert, quantised before each product (every token before the first, every routed token before the second), and the gate in the
model's dtype.

Few tokens an expert, as in decoding, are multiplied by the packed codes of the experts they meet
(`mxfp4_kernels.matmul.grouped_decode`); for more, the layer's weights are dequantised for the call and the trainer's grouped
kernels multiply. Offsets stay on the device, and no shape depends on the routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mxfp4_rl.nn.operand import operand
from mxfp4_rl.nn.products import WeightPerExpert
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import QuantRecipe
from mxfp4_rl.vllm_plugin.layout import fields
from mxfp4_rl.vllm_plugin.product import as_text, kernels_run_on, library, recipe_from

library.define(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor[] gate_up, Tensor[] down, str[] recipes, str gate) -> Tensor"
)

GATES = {  # vLLM's name of a gate -> the function of the gate's half, as transformers computes it
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}


def recipe_texts(*recipes: QuantRecipe | None) -> list[str]:
    """How the operator takes recipes: of gate_up's weight and activation, and of down's. "" keeps a side as it is."""
    return [as_text(recipe) for recipe in recipes]


def weights_of(held: Sequence[torch.Tensor], recipe: QuantRecipe, K: int) -> MXFP4Tensor:
    """The packed weights (E, N, K) of a projection from the tensors that `layout.fields` lists, in its order; no copy."""
    named = dict(zip(fields(recipe, K), held, strict=True))
    shape = torch.Size((*named["weight_packed"].shape[:2], K))
    residual = None
    if recipe.fallback_alpha is not None:
        residual = MXFP4Tensor(named["residual_packed"], named["residual_scale"], shape, 2)
    return MXFP4Tensor(
        named["weight_packed"],
        named["weight_scale"],
        shape,
        2,
        macro=named.get("weight_macro"),
        macro_size=recipe.macro_size,
        residual=residual,
        alpha=recipe.fallback_alpha or 0.0,
    )


def _product(x: torch.Tensor, held: Sequence[torch.Tensor], recipe: QuantRecipe | None, products: WeightPerExpert):
    """Every token with its expert's weight; `held` is one plain tensor where there is no recipe."""
    if recipe is None:
        return products.forward(x, held[0])
    weight = weights_of(held, recipe, x.shape[1])
    if kernels_run_on(x):
        from mxfp4_kernels.matmul.grouped_decode import MOST_TOKENS, grouped_decode_product

        if x.shape[0] <= MOST_TOKENS * weight.shape[0]:
            return grouped_decode_product(x, weight, products.offsets, x.dtype)
    return products.forward(x, weight.dequantize(x.dtype))


def _experts(x, ids, weights, gate_up, down, recipes, gate):
    (count, k), E = ids.shape, gate_up[0].shape[0]
    if not count:
        return torch.empty_like(x)
    gate_up_weight, gate_up_activation, down_weight, down_activation = map(recipe_from, recipes)
    expert, order = ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(E + 1, device=expert.device, dtype=expert.dtype)
    products = WeightPerExpert(torch.searchsorted(expert, bounds).int())
    tokens = operand(x, gate_up_activation).index_select(0, order // k)
    wide = _product(tokens, gate_up, gate_up_weight, products)
    half, up = wide.chunk(2, dim=-1)
    inner = operand(GATES[gate](half) * up, down_activation)
    outputs = _product(inner, down, down_weight, products)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(count * k, device=order.device))
    routed = outputs.index_select(0, place).view(count, k, outputs.shape[-1])
    return (routed * weights.unsqueeze(-1)).sum(1).to(x.dtype)


for _key in ("CUDA", "CPU"):
    library.impl("experts", _experts, _key)
torch.library.register_fake("mxfp4_rl::experts", lambda x, *_: torch.empty_like(x), lib=library)
