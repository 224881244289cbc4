"""The ladder's FP8 rung: W8A8 quantise-dequantise in E4M3 with one float32 scale a row.

A weight's row is an output feature, an activation's row a token: x_hat = s * E4M3(x / s), s = amax / 448. The package's recipes
are 4-bit, so this layer lives here; products, straight-through gradients and kept operands are MXFP4Linear's.
"""

from __future__ import annotations

import torch

from mxfp4_rl import ModelRecipe
from mxfp4_rl.nn import plan
from mxfp4_rl.nn.linear import MXFP4Linear, QuantizedMatmul, _shared_input, compute_dtype

_LARGEST = 448.0


def e4m3_rows(t: torch.Tensor) -> torch.Tensor:
    """`t` quantised and dequantised along its last axis, in its own dtype (BF16 rounds the product with the scale)."""
    scale = t.abs().amax(-1, keepdim=True).float() / _LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return ((t.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(t.dtype)


class W8A8Linear(MXFP4Linear):
    """A Linear layer whose weight and input are rounded to E4M3; its `recipe` only says "straight-through"."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(compute_dtype(x))
        x_hat = _shared_input(x, "e4m3 rows", e4m3_rows)
        y = QuantizedMatmul.apply(x, self.weight, x_hat, self.weight_operand(x.dtype), self.recipe, None)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def weight_operand(self, dtype: torch.dtype) -> torch.Tensor:
        return self._kept("e4m3", dtype, e4m3_rows)


def convert_to_w8a8(model: torch.nn.Module) -> int:
    """Swap the Linear layers that MXFP4 would quantise; returns how many.

    Raises:
        ValueError: the model has experts, which would stay in BF16.
    """
    report = plan(model, ModelRecipe())
    if report.experts:
        raise ValueError(f"the rung fp8 has no experts ({next(iter(report.experts))}): leave it out, or take a dense model")
    for name, recipe in report.converted.items():
        W8A8Linear.swap(model.get_submodule(name), name, recipe)
    return len(report.converted)
