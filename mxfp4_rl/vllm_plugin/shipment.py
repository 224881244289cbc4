"""A trainer's weights on their way to vLLM: named as its layers name them, cast to its dtype, counted and summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from mxfp4_rl.quant.tensor import QuantizedTensor
from mxfp4_rl.vllm_plugin.layout import checksum, named_tensors, packs


class Shipment:
    """The tensors of one sync on their way: named as the rollout's layers name them, cast, counted.

    Attributes:
        sizes: "bytes", and of these "packed_bytes", with "packed_elements" weights in them.
        checksum: of the packed tensors.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.sizes = {"bytes": 0, "packed_bytes": 0, "packed_elements": 0}
        self.checksum = 0

    def tensors(self, weights: Iterable[tuple[str, torch.Tensor | QuantizedTensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs for vLLM from the engine's (name, tensor or QuantizedTensor)."""
        for name, weight in weights:
            if not isinstance(weight, QuantizedTensor):
                yield self._counted(name, weight.to(self.dtype) if weight.is_floating_point() else weight)
                continue
            if not packs(weight):
                yield self._counted(name, weight.dequantize(self.dtype))
                continue
            self.sizes["packed_elements"] += weight.shape.numel()
            for pair in named_tensors(name, weight):
                self.sizes["packed_bytes"] += pair[1].nbytes
                self.checksum = self.checksum + checksum([pair])
                yield self._counted(*pair)

    def _counted(self, name: str, tensor: torch.Tensor):
        self.sizes["bytes"] += tensor.nbytes
        return name, tensor
