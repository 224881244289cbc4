"""vLLM's Marlin kernel on the same codes and scales, where vLLM is installed: the rival for few rows with BF16 activations."""

from __future__ import annotations

import importlib.util

import torch

from mxfp4_rl.export.serving import marlin_has_a_tiling
from mxfp4_rl.quant.tensor import MXFP4Tensor


def available(outputs: int, inputs: int) -> bool:
    """Whether vLLM is here, and its Marlin has a tiling for the shape."""
    here = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
    return here and marlin_has_a_tiling(inputs, outputs)


def prepared(weight: MXFP4Tensor) -> torch.nn.Module:
    """A layer with the weight in Marlin's order."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_fp4_layer_for_marlin

    layer = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = weight.shape
    layer.params_dtype = torch.bfloat16
    layer.weight = torch.nn.Parameter(weight.codes.clone(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(weight.scales.clone(), requires_grad=False)
    prepare_fp4_layer_for_marlin(layer)
    return layer


def product(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """x [rows, inputs] BF16 -> [rows, outputs] BF16."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import apply_fp4_marlin_linear

    out, features = layer.output_size_per_partition, layer.input_size_per_partition
    return apply_fp4_marlin_linear(x, layer.weight, layer.weight_scale, None, layer.workspace, out, features)
