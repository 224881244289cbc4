"""The numerics, in plain PyTorch: what every operation of this project computes, to the bit."""

from mxfp4_rl.quant.decomposition import (
    ErrorPartition,
    ErrorParts,
    ErrorStats,
    decompose,
    error_stats,
    partition,
    precision_sweep,
    rel_mse,
    scale_ratios,
)
from mxfp4_rl.quant.quantizer import backend_for, fake_quantize, quantize
from mxfp4_rl.quant.tensor import MXFP4Tensor, NVFP4Tensor, QuantizedTensor, StackedTensor

__all__ = [
    "ErrorPartition",
    "ErrorParts",
    "ErrorStats",
    "MXFP4Tensor",
    "NVFP4Tensor",
    "QuantizedTensor",
    "StackedTensor",
    "backend_for",
    "decompose",
    "error_stats",
    "fake_quantize",
    "partition",
    "precision_sweep",
    "quantize",
    "rel_mse",
    "scale_ratios",
]
