"""A trainer's weights on their way to vLLM: named as its layers name them, cast to its dtype, counted and summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from mxfp4_rl.quant.tensor import QuantizedTensor, StackedTensor
from mxfp4_rl.vllm_plugin.expert_names import FUSED_IN_VLLM, checkpoint_name, is_fused, taken_apart, travels_packed
from mxfp4_rl.vllm_plugin.layout import checksum, named_tensors, packs


class Shipment:
    """The tensors of one sync on their way: named as the rollout's layers name them, cast, counted.

    Args:
        dtype: of what travels unpacked.
        family: the model's `model_type`, of whose checkpoints vLLM's loader takes the names.

    Attributes:
        sizes: "bytes", and of these "packed_bytes", with "packed_elements" weights in them.
        checksum: of the packed tensors.
    """

    def __init__(self, dtype: torch.dtype, family: str = ""):
        self.dtype = dtype
        self.family = family
        self.sizes = {"bytes": 0, "packed_bytes": 0, "packed_elements": 0}
        self.checksum = 0

    def tensors(self, weights: Iterable[tuple[str, torch.Tensor | QuantizedTensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs for vLLM from the engine's (name, tensor or QuantizedTensor)."""
        for own_name, weight in weights:
            name = checkpoint_name(own_name, self.family)
            if is_fused(name, weight) and (isinstance(weight, QuantizedTensor) or self.family not in FUSED_IN_VLLM):
                yield from self._experts(name, weight)
            elif not isinstance(weight, QuantizedTensor):
                yield self._counted(name, weight.to(self.dtype) if weight.is_floating_point() else weight)
            elif packs(weight):
                self._sum(weight)
                yield from self._packed(name, weight)
            else:
                yield self._counted(name, weight.dequantize(self.dtype))

    def _experts(self, name: str, weight: torch.Tensor | QuantizedTensor):
        packed = isinstance(weight, QuantizedTensor) and travels_packed(weight)
        if packed:
            # Of the fused tensors: apart, Qwen3-30B's are 92k, each a kernel or two to be launched.
            for whole in weight.parts if isinstance(weight, StackedTensor) else (weight,):
                self._sum(whole)
        else:
            weight = weight.dequantize(self.dtype) if isinstance(weight, QuantizedTensor) else weight.to(self.dtype)
        for own_name, own in taken_apart(name, weight, self.family):
            if packed:
                yield from self._packed(own_name, own)
            else:
                yield self._counted(own_name, own)

    def _sum(self, weight: QuantizedTensor) -> None:
        self.checksum = self.checksum + checksum(named_tensors("weight", weight))

    def _packed(self, name: str, weight: QuantizedTensor):
        self.sizes["packed_elements"] += weight.shape.numel()
        for pair in named_tensors(name, weight):
            self.sizes["packed_bytes"] += pair[1].nbytes
            yield self._counted(*pair)

    def _counted(self, name: str, tensor: torch.Tensor):
        self.sizes["bytes"] += tensor.nbytes
        return name, tensor
