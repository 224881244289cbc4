"""An operand of a matrix product: a tensor quantised and dequantised as its recipe says, or as it is."""

import torch

from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.recipe import QuantRecipe


def operand(t: torch.Tensor, recipe: QuantRecipe | None, axis: int = -1) -> torch.Tensor:
    """x_hat of `t` along `axis`, in its dtype; `t` itself where `recipe` is None."""
    return t if recipe is None else fake_quantize(t, recipe, axis)
