"""How a packed weight is stored in a vLLM layer and named on its way there: one definition for both ends.

A weight "X.weight" of shape (N, K) in MXFP4 becomes, with B = ceil(K / 32) blocks a row,

    X.weight_packed    uint8 (N, 16 B)      two E2M1 codes a byte, low nibble = even column
    X.weight_scale     uint8 (N, B)         E8M0
    X.weight_macro     float32 (N, ceil(K / macro_size))    factors of macro-block scaling, if the recipe has it
    X.residual_packed, X.residual_scale     the second pass of the outlier fallback, if it has one

A layer of experts has all of them in tensors with another axis in front, and the prefix w13_ (gate and up) or w2_ (down).
The first two are compressed-tensors' names for the same bytes. Rows are output features, so a layer's tensors are cut between
GPUs along outputs anywhere, along inputs between blocks (and macro blocks).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from mxfp4_rl.quant.tensor import MXFP4Tensor, QuantizedTensor
from mxfp4_rl.recipe import ModelRecipe, QuantRecipe

NAMES = {  # MXFP4Tensor.tensors() -> the parameter of the layer
    "codes": "weight_packed",
    "scales": "weight_scale",
    "macro": "weight_macro",
    "residual.codes": "residual_packed",
    "residual.scales": "residual_scale",
}


class Field(NamedTuple):
    """One stored tensor of a weight."""

    columns: int  # of K elements of a row
    dtype: torch.dtype


def why_not_packed(recipe: QuantRecipe) -> str | None:
    """Why the rollout keeps dequantised weights for this recipe; None if it keeps packed ones."""
    if recipe.format != "mxfp4" or recipe.block_size != 32:
        return f"{recipe.describe()} has no kernel for packed weights, only MXFP4 in blocks of 32 does"
    if recipe.hadamard or recipe.pre_scale != 1:
        return f"{recipe.describe()}: rotated or pre-scaled weights have no kernel for packed weights"
    return None


def packs(weight: QuantizedTensor) -> bool:
    """Whether a weight, of a recipe with or without reason in `why_not_packed`, travels packed."""
    return isinstance(weight, MXFP4Tensor) and weight.block_size == 32 and not weight.hadamard and weight.pre_scale == 1


def fields(recipe: QuantRecipe, K: int) -> dict[str, Field]:
    """Parameter name -> what a row of K elements takes in it."""
    blocks = -(-K // 32)
    stored = {"weight_packed": Field(16 * blocks, torch.uint8), "weight_scale": Field(blocks, torch.uint8)}
    if recipe.macro_block:
        stored["weight_macro"] = Field(-(-K // recipe.macro_size), torch.float32)
    if recipe.fallback_alpha is not None:
        stored |= {"residual_packed": stored["weight_packed"], "residual_scale": stored["weight_scale"]}
    return stored


def check_cut(recipe: ModelRecipe, K: int, parts: int, name: str) -> None:
    """Raise ValueError if a layer's K inputs cannot be cut into `parts` for tensor parallelism.

    A part must not end inside a block of the activation, or of a packed weight, and an activation's blocks must not look at
    each other: every worker quantises its own part of it.
    """
    if parts == 1:
        return
    weight = recipe.weight if recipe.weight and not why_not_packed(recipe.weight) else None
    for own in (recipe.activation, weight):
        if own is None:
            continue
        if own is recipe.activation and (own.format != "mxfp4" or own.tile or own.fallback_fraction is not None):
            raise ValueError(
                f"{name}: activations in {own.describe()} depend on the whole tensor, and tensor parallelism shows a worker "
                "only a part of it. Use rollout.tensor_model_parallel_size=1"
            )
        unit = math.lcm(own.block_size, own.macro_size if own.macro_block else 1, own.hadamard or 1)
        if K % parts or (K // parts) % unit:
            fits = max((n for n in (2, 4, 8, 16) if n < parts and K % (n * unit) == 0), default=1)
            smaller = ", or a smaller macro_size" if own.macro_block and K % (parts * own.block_size) == 0 else ""
            raise ValueError(
                f"{name} has {K} inputs: tensor parallelism over {parts} GPUs would cut its blocks of {unit} elements "
                f"({own.describe()}). Use rollout.tensor_model_parallel_size={fits}{smaller}"
            )


def named_tensors(name: str, weight: QuantizedTensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the packed weight "X.weight" under the names that the layer X gives them."""
    stem = name.removesuffix("weight")
    for own, tensor in weight.tensors().items():
        yield stem + NAMES[own], tensor


def weight_of(layer: torch.nn.Module, recipe: QuantRecipe, K: int) -> MXFP4Tensor:
    """The packed weight that a layer's parameters hold; no copy."""
    shape = torch.Size((layer.weight_packed.shape[0], K))
    residual = None
    if recipe.fallback_alpha is not None:
        residual = MXFP4Tensor(layer.residual_packed.data, layer.residual_scale.data, shape, 1)
    return MXFP4Tensor(
        layer.weight_packed.data,
        layer.weight_scale.data,
        shape,
        1,
        macro=layer.weight_macro.data if recipe.macro_block else None,
        macro_size=recipe.macro_size,
        residual=residual,
        alpha=recipe.fallback_alpha or 0.0,
    )


def is_packed(name: str) -> bool:
    """Whether this is the name of a packed weight's stored tensor."""
    return name.rsplit(".", 1)[-1].removeprefix("w13_").removeprefix("w2_") in NAMES.values()


def checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor | int:
    """Sum of the packed tensors' bytes: of all layers and workers together, whatever is fused or cut.

    Sums of bytes cannot tell a permutation; a missing, stale or foreign tensor they can.
    """
    return sum(t.contiguous().view(torch.uint8).sum(dtype=torch.int64) for name, t in tensors if is_packed(name))
