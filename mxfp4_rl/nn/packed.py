"""The rollout's Linear: packed MXFP4 weights that are never stored dequantised.

With few tokens, as in decoding, a product is bound by the bytes of the weight: a kernel reads 4.25 bits an element and decodes
them on their way to the tensor cores (`mxfp4_kernels.matmul.decode`). With many, as in a prefill, the weight is dequantised for
the call. Where those kernels do not run, the dequantised weight is kept instead.
"""

from __future__ import annotations

import torch
from torch import nn

from mxfp4_rl.nn.linear import MXFP4Linear, compute_dtype, quantized_input
from mxfp4_rl.quant import QuantizedTensor
from mxfp4_rl.recipe import ModelRecipe


class PackedLinear(MXFP4Linear):
    """The rollout's side of an MXFP4Linear: no parameter, only the codes last shipped. Forward only.

    Made by `mxfp4_rl.nn.convert_for_rollout`; its codes are the actor's, bit for bit, and so are dequantised operands (those of
    BF16 products). The decode product multiplies the codes themselves: for plain recipes the same operand; with macro blocks or
    a fallback the recipe's own value, which a BF16 operand rounds, by up to 2^-9 of it.
    """

    @classmethod
    def swap(cls, linear: nn.Linear, name: str, recipe: ModelRecipe) -> None:
        """Turn `linear` into a PackedLinear in place; its weight is dropped."""
        super().swap(linear, name, recipe)
        linear.weight = None

    def hold(self, packed: QuantizedTensor, dtype: torch.dtype) -> None:
        """Take over a weight (out, in) for products in `dtype`; not a copy.

        Raises:
            ValueError: it has another shape.
        """
        if tuple(packed.shape) != self.shape:
            raise ValueError(f"{self.layer_name} holds {self.shape}, not {tuple(packed.shape)}: ship those of the same model")
        if decodes(packed, dtype):
            self._held, self._held_key = {"packed": packed}, dtype
        else:
            super().hold(packed, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weights it holds."""
        return self.out_features, self.in_features

    def release(self) -> None:
        """Nothing: the layer has no weight to quantise again."""

    @property
    def path(self) -> str:
        """What multiplies the weights it holds, for logs."""
        if "packed" in self._held:
            return "packed weights by the decode kernel (for many tokens: dequantised for the call)"
        return "dequantised weights" if self._held else "no weights yet"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(compute_dtype(x))
        x_hat = quantized_input(x, self.recipe.activation)
        packed = self._held.get("packed")
        if packed is not None and x.dtype == self._held_key:
            from mxfp4_kernels.matmul.decode import MOST_ROWS, decode_product

            tokens = x_hat.reshape(-1, x_hat.shape[-1])
            if tokens.shape[0] <= MOST_ROWS:
                return decode_product(tokens, packed, self.bias).reshape(*x.shape[:-1], self.out_features)
        y = nn.functional.linear(x_hat, self.weight_operand(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def weight_operand(self, dtype: torch.dtype) -> torch.Tensor:
        if self._held_key != dtype:
            raise RuntimeError(f"{self.layer_name} has no weights in {dtype}: load them with hold() first")
        packed = self._held.get("packed")
        return self._held["operand"] if packed is None else packed.dequantize(dtype)

    def _key(self, dtype):
        return dtype


def decodes(packed: QuantizedTensor, dtype: torch.dtype) -> bool:
    """Whether the decode product multiplies this weight: MXFP4, not rotated or pre-scaled, in BF16 on a GPU since Ampere."""
    device = packed.codes.device
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from mxfp4_kernels.matmul.decode import why_not
    except ImportError:  # without Triton
        return False
    return why_not(packed) is None
