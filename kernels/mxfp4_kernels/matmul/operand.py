"""One side of an FP8 product: a container, and the matrix that it was made from."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mxfp4_rl.recipe import QuantRecipe


class Operand:
    """A matrix (rows, K) quantised along K.

    Attributes:
        source: the matrix before it was quantised: what a product reads where the container could not hold a row. It must not
            change while the operand lives.
        recipe: how it was quantised.
        container: `payload` float8_e4m3fn, its float32 `scale`, the flags `wide`.
    """

    def __init__(self, source: torch.Tensor, recipe: QuantRecipe, container: Any):
        self.source, self.recipe, self.container = source, recipe, container

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What autograd has to save."""
        return self.source, self.container.payload, self.container.scale, self.container.wide

    def with_tensors(self, tensors: tuple[torch.Tensor | None, ...]) -> Operand:
        """The same operand over other tensors, or over none: a template that keeps no memory."""
        source, payload, scale, wide = tensors
        return Operand(source, self.recipe, dataclasses.replace(self.container, payload=payload, scale=scale, wide=wide))
