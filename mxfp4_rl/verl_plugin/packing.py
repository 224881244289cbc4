"""Pack a weight that FSDP2 has cut: every rank its own rows, then gather the codes.

FSDP2 cuts along the output features (dimension 0) and blocks lie along the inputs, so no block straddles a cut and the codes of
the parts, put together, are the codes of the whole.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.distributed.tensor import DTensor

from mxfp4_rl.quant import QuantizedTensor, quantize
from mxfp4_rl.recipe import QuantRecipe


def looks_at_other_rows(recipe: QuantRecipe) -> bool:
    """Whether a row's codes depend on other rows: tiles, a fraction of the tensor's blocks, NVFP4's scale of a tensor."""
    return recipe.tile or recipe.fallback_fraction is not None or recipe.format != "mxfp4"


def pack(weight: torch.Tensor, recipe: QuantRecipe, dtype: torch.dtype) -> QuantizedTensor:
    """The whole weight (out, in), quantised along its inputs from its bits in `dtype`; the same on every rank.

    Every rank must call it, for a DTensor.
    """
    if not isinstance(weight, DTensor):
        return quantize(weight.to(dtype), recipe)
    cut_along_rows = all(p.is_shard(0) or p.is_replicate() for p in weight.placements)
    if looks_at_other_rows(recipe) or not cut_along_rows:
        return quantize(weight.to(dtype).full_tensor(), recipe)
    return _gathered(quantize(weight.to_local().to(dtype), recipe), weight)


def _gathered(part: QuantizedTensor, of: DTensor) -> QuantizedTensor:
    whole = {"shape": of.shape}
    for field in dataclasses.fields(part):
        own = getattr(part, field.name)
        if isinstance(own, torch.Tensor):
            shape = torch.Size((of.shape[0], own.shape[1]))
            cut = DTensor.from_local(own, of.device_mesh, of.placements, run_check=False, shape=shape, stride=(own.shape[1], 1))
            whole[field.name] = cut.full_tensor()
        elif isinstance(own, QuantizedTensor):
            whole[field.name] = _gathered(own, of)
    return dataclasses.replace(part, **whole)
