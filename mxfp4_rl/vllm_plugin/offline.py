"""A vLLM engine in this process that holds a trainer's weights: for checks of the two against each other, and benchmarks.

Under verl the same layers get the same tensors from `mxfp4_rl.verl_plugin.vllm_rollout`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from mxfp4_rl.nn import converted_layers
from mxfp4_rl.nn.experts import quantize_experts
from mxfp4_rl.quant import quantize
from mxfp4_rl.quant.tensor import QuantizedTensor
from mxfp4_rl.recipe import ModelRecipe
from mxfp4_rl.vllm_plugin import METHOD, compile_key, quantization_config
from mxfp4_rl.vllm_plugin.shipment import Shipment


def start(model: str, recipe: ModelRecipe | None, **options: Any):
    """vLLM's LLM for the checkpoint folder `model` with layers for `recipe` (None: BF16) and no weights yet."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's model is then reachable from here
    from vllm import LLM

    quantised = {}
    if recipe is not None:
        quantised = {
            "quantization": METHOD,
            "hf_overrides": {"quantization_config": quantization_config(recipe)},
            "additional_config": compile_key(recipe),
        }
    options = {"load_format": "dummy", "dtype": "bfloat16", "logprobs_mode": "processed_logprobs", **quantised, **options}
    return LLM(model=model, **options)


def model_of(llm) -> torch.nn.Module:
    """The model that an engine of `start` runs."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def exported(
    trained: torch.nn.Module, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
    """(name, weight) of a transformers model, converted or not, as an actor exports them: quantised where its recipe says."""
    layers = {layer.weight_name: layer for layer in converted_layers(trained).values()}
    for name, weight in trained.state_dict().items():
        layer = layers.get(name)
        if layer is None or layer.recipe.weight is None:
            yield name, weight
        else:
            quantized = quantize if weight.ndim == 2 else quantize_experts
            yield name, quantized(weight.to(dtype), layer.recipe.weight, layer.axis)


@torch.no_grad()
def load(llm, trained: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> Shipment:
    """Ship the weights of a transformers model to an engine of this process, as verl's sync does; returns what was shipped."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    shipment = Shipment(dtype, getattr(trained.config, "model_type", ""))
    held = model_of(llm)
    held.load_weights(shipment.tensors(exported(trained, dtype)))
    process_weights_after_loading(held, llm.llm_engine.model_config, next(held.parameters()).device)
    return shipment
