"""Fused tensors of experts taken apart: an expert's layers, named as vLLM's `load_weights` knows them from checkpoints.

transformers keeps a layer's experts in `experts.gate_up_proj` (E, 2 I, H) and `experts.down_proj` (E, H, I). Checkpoints, and
so vLLM's loaders, have a weight for every expert: `experts.3.gate_proj.weight`, or `block_sparse_moe.experts.3.w1.weight`
(Mixtral). An expert's codes are rows of the fused tensor's, so nothing is quantised again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from mxfp4_rl.nn.experts import LAYERS_OF
from mxfp4_rl.quant.tensor import QuantizedTensor, StackedTensor
from mxfp4_rl.recipe import RecipeError
from mxfp4_rl.vllm_plugin.layout import packs


class Family(NamedTuple):
    """How a family's checkpoints name what transformers names otherwise."""

    block: str = "mlp"  # transformers' `mlp`, where the experts are
    layers: dict[str, str] = {}  # an expert's layers


FAMILIES = {
    "mixtral": Family("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
}
TRIED = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral")  # vLLM's loaders of these were run on what we ship
MULTIPLE = 16  # of an expert's widths on a GPU, for the grouped kernels
FUSED_IN_VLLM = ("gpt_oss",)  # its loader takes fused tensors only, of vLLM's own MXFP4 or none


def checkpoint_name(name: str, family: str) -> str:
    """A parameter's name in checkpoints of the family (a config's `model_type`) from transformers' name."""
    block = FAMILIES.get(family, Family()).block
    return name.replace(".mlp.", f".{block}.")


def transformers_name(name: str) -> str:
    """The name that transformers gives a layer which vLLM names `name`; recipes' patterns are about those."""
    for family in FAMILIES.values():
        name = name.replace(f".{family.block}.", ".mlp.")
    return name


def is_fused(name: str, weight: torch.Tensor | QuantizedTensor) -> bool:
    """Whether this is a fused tensor of experts."""
    return len(weight.shape) == 3 and name.rsplit(".", 1)[-1] in LAYERS_OF


def taken_apart(
    name: str, weight: torch.Tensor | QuantizedTensor, family: str
) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
    """(name, weight) of every expert's every layer, from a fused tensor of experts, plain or packed; in order, no copies.

    Raises:
        RecipeError: vLLM's loader of this family takes no expert by itself.
    """
    base, _, own = name.rpartition(".")
    if family in FUSED_IN_VLLM:
        raise RecipeError(
            f"{name}: vLLM loads the experts of {family} only in fused tensors, which our layers do not hold. "
            "Leave them unquantised (mxfp4.recipe.exclude: ['re:experts'])"
        )
    if isinstance(weight, QuantizedTensor) and weight.axis != 2:
        raise RecipeError(f"{name} is kept transposed, which the rollout's layers do not hold: exclude it")
    parts, names = LAYERS_OF[own], FAMILIES.get(family, Family()).layers
    rows = weight.shape[1] // len(parts)
    for e in range(weight.shape[0]):
        for i, part in enumerate(parts):
            yield f"{base}.{e}.{names.get(part, part)}.weight", _rows_of_expert(weight, e, slice(i * rows, (i + 1) * rows))


def _rows_of_expert(weight: torch.Tensor | QuantizedTensor, e: int, rows: slice):
    if isinstance(weight, torch.Tensor):
        return weight[e, rows]
    part = weight.parts[e] if isinstance(weight, StackedTensor) else _expert(weight, e)
    return _rows(part, rows)


def _expert(weight: QuantizedTensor, e: int) -> QuantizedTensor:
    own = {name: value[e] if isinstance(value, torch.Tensor) else _expert(value, e) for name, value in _stored(weight)}
    return dataclasses.replace(weight, **own, shape=torch.Size(weight.shape[1:]), axis=weight.axis - 1)


def _rows(weight: QuantizedTensor, rows: slice) -> QuantizedTensor:
    own = {name: value[rows] if isinstance(value, torch.Tensor) else _rows(value, rows) for name, value in _stored(weight)}
    return dataclasses.replace(weight, **own, shape=torch.Size((rows.stop - rows.start, weight.shape[1])))


def _stored(weight: QuantizedTensor):
    """Names and values of the fields that hold a row's numbers: tensors, and a residual."""
    for field in dataclasses.fields(weight):
        value = getattr(weight, field.name)
        if isinstance(value, torch.Tensor | QuantizedTensor):
            yield field.name, value


def travels_packed(weight: QuantizedTensor) -> bool:
    """Whether a fused tensor's experts travel packed; see `layout.packs`."""
    return all(packs(part) for part in weight.parts) if isinstance(weight, StackedTensor) else packs(weight)
