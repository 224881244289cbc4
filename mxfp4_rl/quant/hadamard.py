"""Block Hadamard rotation: spreads an outlier over its block, so that one large element no longer sets the scale for many.

For blocks of g elements along the contraction axis, y = H D x / sqrt(g), with H the Sylvester-Hadamard matrix and D fixed
random signs (a randomised Hadamard transform; arXiv 2502.20586, 2505.14669). The rotation R is orthogonal, so rotating both
operands of a product along the contraction axis changes nothing but their quantisation: (A R^T)(R B) = A B. Here each operand
is rotated back after it was quantised, x_hat = R^T Q(R x), which is the same product, and lets one operand be rotated alone.
"""

import functools
import math

import torch

from mxfp4_rl.quant.philox import random_words

_LARGEST = 2.0**120  # larger magnitudes saturate: a sum over 256 of them could overflow, and infinities would cancel to NaN
_SIGN_SEED = 0x6D786670  # every tensor and every operand of a product share the signs


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """R x for blocks of `size` along the last axis: float32 (..., n * size) -> float32 of that shape."""
    x = torch.where(x.isinf(), x, x.clamp(-_LARGEST, _LARGEST)).unflatten(-1, (-1, size))
    return _hadamard(x * (_signs(size, x.device) * (1 / math.sqrt(size)))).flatten(-2)


def rotate_back(y: torch.Tensor, size: int) -> torch.Tensor:
    """R^T y, the inverse of `rotate` up to float32 rounding."""
    return _hadamard(y.unflatten(-1, (-1, size)) * (1 / math.sqrt(size))).mul_(_signs(size, y.device)).flatten(-2)


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    """Fast Walsh-Hadamard transform over the last axis; the butterflies' order, stride 1 first, defines the rounding."""
    size, shape = x.shape[-1], x.shape
    stride = 1
    while stride < size:
        pairs = x.reshape(*shape[:-1], size // (2 * stride), 2, stride)
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).view(shape)
        stride *= 2
    return x


@functools.cache
def _signs(size: int, device: torch.device) -> torch.Tensor:
    bits = random_words(_SIGN_SEED, 0, size, device=device) >> 31
    return (1 - 2 * bits).float()
