"""Pack a weight that FSDP2 has cut: every rank its own rows, then gather the codes.

FSDP2 cuts along the output features (dimension 0) and blocks lie along the inputs, so no block straddles a cut and the codes of
the parts, put together, are the codes of the whole. Fused weights of experts are cut between experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.distributed.tensor import DTensor

from mxfp4_rl.nn.experts import quantize_experts
from mxfp4_rl.nn.operand import looks_at_other_rows
from mxfp4_rl.quant import QuantizedTensor, quantize
from mxfp4_rl.recipe import QuantRecipe


def pack(weight: torch.Tensor, recipe: QuantRecipe, dtype: torch.dtype, axis: int = -1) -> QuantizedTensor:
    """The whole weight (out, in), quantised along its inputs from its bits in `dtype`; the same on every rank.

    A weight of three axes is one of experts, (E, out, in), or (E, in, out) with `axis=-2`. Every rank must call it, for a
    DTensor.
    """
    quantized = quantize if weight.ndim == 2 else quantize_experts
    if not isinstance(weight, DTensor):
        return quantized(weight.to(dtype), recipe, axis)
    cut_along_rows = all(p.is_shard(0) or p.is_replicate() for p in weight.placements)
    if looks_at_other_rows(recipe) or not cut_along_rows:
        return quantized(weight.to(dtype).full_tensor(), recipe, axis)
    return _gathered(quantized(weight.to_local().to(dtype), recipe, axis), weight)


def _gathered(part: QuantizedTensor, of: DTensor) -> QuantizedTensor:
    whole = {"shape": of.shape}
    for field in dataclasses.fields(part):
        own = getattr(part, field.name)
        if isinstance(own, torch.Tensor):
            shape = torch.Size((of.shape[0], *own.shape[1:]))
            stride = own.new_empty(shape, device="meta").stride()
            cut = DTensor.from_local(own, of.device_mesh, of.placements, run_check=False, shape=shape, stride=stride)
            whole[field.name] = cut.full_tensor()
        elif isinstance(own, QuantizedTensor):
            whole[field.name] = _gathered(own, of)
    return dataclasses.replace(part, **whole)
