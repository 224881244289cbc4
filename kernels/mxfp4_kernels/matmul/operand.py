"""One side of an FP8 product: a container, and the matrix that it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mxfp4_rl.recipe import QuantRecipe


class Operand:
    """A matrix (rows, K) quantised along K.

    Attributes:
        source: the matrix before it was quantised: what a product reads where the container could not hold a row. It must not
            change while the operand lives.
        recipe: how it was quantised.
        container: a dataclass with `payload` float8_e4m3fn, its float32 `scale`, the flags `wide`.
    """

    def __init__(self, source: torch.Tensor, recipe: QuantRecipe, container: Any):
        self.source, self.recipe, self.container = source, recipe, container

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What autograd has to save."""
        return self.source, *(getattr(self.container, name) for name in self._names())

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Operand:
        """The same operand over other tensors, in the order of `tensors`."""
        source, *others = tensors
        return Operand(
            source, self.recipe, dataclasses.replace(self.container, **dict(zip(self._names(), others, strict=True)))
        )

    def template(self) -> Operand:
        """An operand for `with_tensors` that keeps no memory."""
        return self.with_tensors([torch.empty(0)] * len(self.tensors()))

    def _names(self) -> list[str]:
        fields = (field.name for field in dataclasses.fields(self.container))
        return [name for name in fields if isinstance(getattr(self.container, name), torch.Tensor)]
