"""An operand of a matrix product: a tensor quantised and dequantised as its recipe says, or as it is."""

import torch

from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.recipe import QuantRecipe


def operand(t: torch.Tensor, recipe: QuantRecipe | None, axis: int = -1) -> torch.Tensor:
    """x_hat of `t` along `axis`, in its dtype; `t` itself where `recipe` is None."""
    return t if recipe is None else fake_quantize(t, recipe, axis)


def looks_at_other_rows(recipe: QuantRecipe) -> bool:
    """Whether a row's codes depend on other rows: tiles, a fraction of the tensor's blocks, NVFP4's scale of a tensor."""
    return recipe.tile or recipe.fallback_fraction is not None or recipe.format != "mxfp4"
