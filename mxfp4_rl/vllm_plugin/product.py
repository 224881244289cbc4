"""The product of a vLLM layer as one operator, which torch.compile and CUDA graphs see as a whole.

Few tokens, as in decoding, are multiplied by the packed codes (`mxfp4_kernels.matmul.decode`); for more, as in a prefill, and
on a CPU, the weight is dequantised for the call and multiplied by PyTorch. Activations are quantised first where the recipe
says so, by the trainer's own kernel: on equal inputs the operands are equal bit for bit.

The operator gets tensors and numbers, no layer: what vLLM compiled for one layer then serves all of its kind.
"""

from __future__ import annotations

import functools
import json

import torch

from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import QuantRecipe

library = torch.library.Library("mxfp4_rl", "DEF")
library.define(
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor? macro, Tensor? residual_codes, Tensor? residual_scales, "
    "Tensor? bias, int macro_size, float alpha, str activation) -> Tensor"
)
library.define("quantized(Tensor x, str activation) -> Tensor")


def as_text(recipe: QuantRecipe | None) -> str:
    """A recipe as the operators take it: a string, which a compiled graph can hold."""
    return "" if recipe is None else json.dumps(vars(recipe), sort_keys=True)


@functools.cache
def recipe_from(text: str) -> QuantRecipe | None:
    return QuantRecipe.from_dict(json.loads(text)) if text else None


def kernels_run_on(x: torch.Tensor) -> bool:
    """Whether Triton's kernels do: on a GPU; on a CPU only where its interpreter runs them."""
    if x.is_cuda:
        return True
    try:
        from mxfp4_kernels.device import INTERPRETED
    except ImportError:  # without Triton
        return False
    return bool(INTERPRETED.value)


def _linear(x, codes, scales, macro, residual_codes, residual_scales, bias, macro_size, alpha, activation):
    shape = torch.Size((codes.shape[0], x.shape[-1]))
    residual = None if residual_codes is None else MXFP4Tensor(residual_codes, residual_scales, shape, 1)
    weight = MXFP4Tensor(codes, scales, shape, 1, macro=macro, macro_size=macro_size, residual=residual, alpha=alpha)
    tokens = x.reshape(-1, shape[1])
    recipe = recipe_from(activation)
    if recipe is not None:
        tokens = fake_quantize(tokens, recipe)
    return _product(tokens, weight, bias).view(*x.shape[:-1], shape[0])


def _product(tokens: torch.Tensor, weight: MXFP4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if kernels_run_on(tokens):
        from mxfp4_kernels.matmul.decode import MOST_ROWS, decode_product

        if tokens.shape[0] <= MOST_ROWS:
            return decode_product(tokens, weight, bias, out_dtype=tokens.dtype)
    return torch.nn.functional.linear(tokens, weight.dequantize(tokens.dtype), bias)


def _linear_shape(x, codes, *_):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _quantized(x, activation):
    return fake_quantize(x, recipe_from(activation)).view(x.shape)


for _key in ("CUDA", "CPU"):
    library.impl("linear", _linear, _key)
    library.impl("quantized", _quantized, _key)
torch.library.register_fake("mxfp4_rl::linear", _linear_shape, lib=library)
torch.library.register_fake("mxfp4_rl::quantized", lambda x, activation: torch.empty_like(x), lib=library)
