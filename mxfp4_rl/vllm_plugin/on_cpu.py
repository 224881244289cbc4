"""vLLM's build for CPUs as a rollout whose weights come again and again.

There its linear layers pack a weight once it is loaded, and drop it: the next sync would find no place for the trainer's. So
they keep it, which costs the unpacked weights' memory once more.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


def _pack_and_keep(self, layer: torch.nn.Module) -> None:
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def keep_weights() -> None:
    """For all linear layers of this process that vLLM multiplies itself, with a recipe or without."""
    UnquantizedLinearMethod.process_weights_after_loading = _pack_and_keep
