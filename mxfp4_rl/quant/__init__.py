"""The numerics, in plain PyTorch: what every operation of this project computes, to the bit."""

from mxfp4_rl.quant.decomposition import ErrorParts, ErrorStats, decompose, error_stats
from mxfp4_rl.quant.mxfp4 import MXFP4Tensor, fake_quantize, quantize

__all__ = ["ErrorParts", "ErrorStats", "MXFP4Tensor", "decompose", "error_stats", "fake_quantize", "quantize"]
