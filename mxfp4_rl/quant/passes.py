"""What the formats' quantisers share: the rows of a tensor as chunks of blocks, and the result for one chunk.

A tensor is cut into chunks of rows, on a CPU small enough that the scratch buffers stay in cache; a chunk is float32
(R, blocks, block_size), zero-padded to whole blocks and, where the recipe rotates, already rotated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mxfp4_rl.quant.blocks import over_tiles
from mxfp4_rl.quant.elements import round_e2m1, round_e2m1_stochastic
from mxfp4_rl.quant.hadamard import rotate
from mxfp4_rl.quant.philox import uniform
from mxfp4_rl.quant.tensor import row_chunks
from mxfp4_rl.recipe import QuantRecipe


@dataclass
class Scratch:
    """Four float32 buffers of a chunk's shape; `x` holds the chunk, the others are free."""

    x: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    scratch: torch.Tensor

    @classmethod
    def empty(cls, shape, device) -> Scratch:
        return cls(*(torch.empty(shape, device=device) for _ in range(4)))

    @classmethod
    def like(cls, x: torch.Tensor) -> Scratch:
        return cls.empty(x.shape, x.device)


@dataclass
class Chunk:
    """One chunk quantised; a list has an entry a pass. The tensors are scratch: valid until the next chunk.

    Attributes:
        values: E2M1 values in units of the scale, float32 (R, blocks, block_size).
        scale_codes: the stored scales, int32 (R, blocks).
        scales: what they are worth, float32 (R, blocks).
        factor: what x was multiplied by before, float32 (R, blocks), or None.
        macro: MBS factors (R, macros), or None.
        alpha: weight of the second pass.
    """

    values: list[torch.Tensor]
    scale_codes: list[torch.Tensor]
    scales: list[torch.Tensor]
    factor: torch.Tensor | None = None
    macro: torch.Tensor | None = None
    alpha: float | None = None

    def block_scales(self) -> torch.Tensor:
        """What one unit of E2M1 of the first pass is worth in x, float32 (R, blocks)."""
        return self.scales[0] if self.factor is None else self.scales[0] / self.factor

    def operand(self) -> torch.Tensor:
        """x_hat, float32 (R, blocks, block_size); overwrites the values."""
        x = self.values[0].mul_(self.scales[0].unsqueeze(-1))
        for values, scales in zip(self.values[1:], self.scales[1:]):
            x += values.mul_(scales.unsqueeze(-1)).mul_(self.alpha)
        if self.factor is not None:
            x /= self.factor.unsqueeze(-1)
        return x


class Rows:
    """A tensor as (rows, K) with the quantised axis last, read in chunks of blocks."""

    def __init__(self, x: torch.Tensor, axis: int, recipe: QuantRecipe):
        moved = x.movedim(axis, -1)
        self.recipe = recipe
        self.lead, self.length = moved.shape[:-1], moved.shape[-1]
        self.count = self.lead.numel()
        self.flat = moved.reshape(self.count, self.length) if moved.numel() else moved.new_empty(self.count, self.length)
        unit = recipe.hadamard or recipe.block_size
        self.width = -(-self.length // unit) * unit
        self.blocks = self.width // recipe.block_size
        # 2-D tiles span rows of one matrix: chunks start anew at each matrix and hold whole tiles.
        self._matrix = self.lead[-1] if self.lead else 1
        self._tile_rows = recipe.tile_rows

    def slices(self) -> Iterator[slice]:
        """The chunks' rows."""
        if self._tile_rows == 1:
            yield from row_chunks(self.count, self.width, self.flat.device)
            return
        for matrix in range(0, self.count, max(self._matrix, 1)):
            for r in row_chunks(self._matrix, self.width, self.flat.device, self._tile_rows):
                yield slice(matrix + r.start, matrix + r.stop)

    def chunks(self) -> Iterator[tuple[slice, Scratch]]:
        """Rows and buffers, `x` filled; the buffers are used again for the next chunk."""
        b = None
        for r in self.slices():
            shape = (r.stop - r.start, self.blocks, self.recipe.block_size)
            if b is None or b.x.shape != shape:
                b = Scratch.empty(shape, self.flat.device)
            x = b.x.view(shape[0], self.width)
            x[:, : self.length] = self.flat[r]
            x[:, self.length :] = 0
            if self.recipe.hadamard:
                x.copy_(rotate(x, self.recipe.hadamard))
            yield r, b

    def block_amax(self) -> torch.Tensor:
        """Largest magnitude of every block (of its tile, with 2-D blocks), float32 (rows, blocks)."""
        out = torch.empty(self.count, self.blocks, device=self.flat.device)
        for r, b in self.chunks():
            out[r] = over_tiles(torch.abs(b.x, out=b.first).amax(-1), self._tile_rows, "amax")
        return out


_LEAST_WEIGHT = 2.0**-40


def error_weights(importance: torch.Tensor, width: int, block_size: int) -> torch.Tensor:
    """Importance, float32 (K,) -> what squared errors are multiplied by, float32 (width / block_size, block_size).

    The largest is 1. Inputs that are always zero count by 2^-40: among themselves they choose as if none were weighed.
    """
    largest = importance.amax() if importance.numel() else importance.new_zeros(())
    weights = torch.where(largest > 0, importance / largest, 1.0).clamp_(min=_LEAST_WEIGHT)
    return torch.nn.functional.pad(weights, (0, width - len(weights))).unflatten(0, (-1, block_size))


def largest_blocks_threshold(rows: Rows, fraction: float) -> float:
    """The smallest largest-magnitude among the ceil(fraction * blocks) largest blocks; NaN and Inf blocks count as 0."""
    amax = rows.block_amax().nan_to_num_(nan=0.0, posinf=0.0).view(-1)
    if not amax.numel():
        return 0.0
    keep = max(1, math.ceil(fraction * amax.numel()))
    return amax.kthvalue(amax.numel() - keep + 1).values.item()


def round_elements(
    t: torch.Tensor,
    out: torch.Tensor,
    scratch: torch.Tensor,
    recipe: QuantRecipe,
    seed: int | None,
    start: int,
    stream: int = 0,
) -> None:
    """Round t, in units of the scale, into `out` as the recipe says; t's first element is element `start` of its tensor.

    `stream` keeps the random numbers of several passes apart.
    """
    if recipe.rounding == "nearest":
        round_e2m1(t, out=out, scratch=scratch)
    else:
        out.copy_(round_e2m1_stochastic(t, uniform(seed, start, t.numel(), stream, t.device).view_as(t)))
