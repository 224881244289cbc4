"""The products of a layer and the quantisation of their operands: for one weight, or for one weight an expert.

`linear.QuantizedMatmul` says which operands meet in which product. Here is how: a layer of experts is, expert by expert, what a
Linear layer is for the tokens routed to it. Tokens come sorted by expert, so that whatever treats rows apart treats all experts
at once, and so are blocks along an expert's tokens; the rest (a scale for a whole tensor, tiles) goes expert by expert.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from mxfp4_rl.nn.operand import looks_at_other_rows, operand
from mxfp4_rl.recipe import QuantRecipe


class OneWeight:
    """Every token (..., features) meets the same weight (out, in)."""

    def quantized_rows(self, t: torch.Tensor, recipe: QuantRecipe | None) -> torch.Tensor:
        """Tokens, quantised along their features."""
        return operand(t, recipe)

    def quantized_columns(self, t: torch.Tensor, recipe: QuantRecipe | None) -> torch.Tensor:
        """Tokens (tokens, features), quantised along the tokens."""
        return operand(t, recipe, axis=0)

    def quantized_weight(self, w: torch.Tensor, recipe: QuantRecipe | None, axis: int) -> torch.Tensor:
        """The weight, quantised along its inputs (axis -1) or outputs (axis -2)."""
        return operand(w, recipe, axis)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Y = x w^T."""
        return nn.functional.linear(x, w)

    def dgrad(self, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """dX = g w."""
        return g @ w

    def wgrad(self, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """dW = g^T x, of (tokens, out) and (tokens, in)."""
        return g.t() @ x


class WeightPerExpert:
    """Tokens (T, features) sorted by expert, weights (E, out, in). An expert without tokens gets a gradient of zeros.

    On CUDA, products of 16-bit operands run in the grouped kernels (`mxfp4_kernels.matmul.grouped`), which read the offsets on
    the device; everywhere else an expert's products are those of `OneWeight`, one after the other.

    Args:
        offsets: int32 (E + 1,): expert e has the tokens from offsets[e] to offsets[e + 1]. Results for tokens behind the last
            expert's are zero.
    """

    def __init__(self, offsets: torch.Tensor):
        self.offsets = offsets
        self._known_places: dict[int, tuple[torch.Tensor, int]] = {}

    @functools.cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last token of every expert, on the host."""
        return list(itertools.pairwise(self.offsets.tolist()))

    def quantized_rows(self, t: torch.Tensor, recipe: QuantRecipe | None) -> torch.Tensor:
        """Each expert's tokens, quantised along their features."""
        if recipe is None or not looks_at_other_rows(recipe):
            return operand(t, recipe)
        return self._by_expert(t, lambda own: operand(own, recipe))

    def quantized_columns(self, t: torch.Tensor, recipe: QuantRecipe | None) -> torch.Tensor:
        """Each expert's tokens, quantised along them."""
        if recipe is None:
            return t
        if looks_at_other_rows(recipe) or recipe.hadamard or recipe.rounding != "nearest":
            return self._by_expert(t, lambda own: operand(own, recipe, axis=0))
        # All experts at once, without a word from the device: each begins with a new block, after rows of zeros.
        unit = math.lcm(recipe.block_size, recipe.macro_size if recipe.macro_block else 1)
        place, rows = self._places(unit, t.shape[0])
        apart = t.new_zeros(rows, t.shape[1]).index_copy_(0, place, t)
        return operand(apart, recipe, axis=0).index_select(0, place)

    def _places(self, unit: int, tokens: int) -> tuple[torch.Tensor, int]:
        """A row for each token, so that experts (and what is behind the last) begin at multiples of `unit`; how many rows."""
        if unit not in self._known_places:
            starts = (self.offsets.diff() + unit - 1).div(unit, rounding_mode="floor").mul(unit).cumsum(0)
            shifts = torch.cat((starts.new_zeros(1), starts)) - self.offsets
            token = torch.arange(tokens, device=self.offsets.device, dtype=self.offsets.dtype)
            place = token + shifts[torch.searchsorted(self.offsets[1:], token, right=True)]
            self._known_places[unit] = place.long(), tokens + unit * (len(self.offsets) - 1)
        return self._known_places[unit]

    def quantized_weight(self, w: torch.Tensor, recipe: QuantRecipe | None, axis: int) -> torch.Tensor:
        """Every expert's weight, quantised along its inputs (axis -1) or outputs (axis -2)."""
        return operand_of_experts(w, recipe, axis)

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Y[t] = w[e(t)] x[t], (T, out)."""
        if (kernels := _grouped_kernels(x, w)) is not None:
            return kernels.grouped_product(x, w, self.offsets, x.dtype)
        y = x.new_zeros(x.shape[0], w.shape[1])
        for own, (first, last) in zip(w, self.ranges, strict=True):
            if first < last:
                y[first:last] = nn.functional.linear(x[first:last], own)
        return y

    def dgrad(self, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """dX[t] = w[e(t)]^T g[t], (T, in)."""
        return self.forward(g, w.transpose(1, 2))

    def wgrad(self, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """dW[e] = g_e^T x_e, (E, out, in)."""
        if (kernels := _grouped_kernels(g, x)) is not None:
            return kernels.grouped_wgrad(g, x, self.offsets, g.dtype)
        dw = g.new_zeros(len(self.ranges), g.shape[1], x.shape[1])
        for own, (first, last) in zip(dw, self.ranges, strict=True):
            if first < last:
                torch.mm(g[first:last].t(), x[first:last], out=own)
        return dw

    def _by_expert(self, t: torch.Tensor, quantized: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        out = torch.zeros_like(t)
        for first, last in self.ranges:
            if first < last:
                out[first:last] = quantized(t[first:last])
        return out


ONE_WEIGHT = OneWeight()


def operand_of_experts(w: torch.Tensor, recipe: QuantRecipe | None, axis: int = -1) -> torch.Tensor:
    """Weights (E, rows, columns), every expert's quantised by itself along `axis`, -1 or -2, and dequantised."""
    if recipe is None or recipe.tile or not looks_at_other_rows(recipe):  # a tile is of one expert's matrix
        return operand(w, recipe, axis)
    return torch.stack([operand(own, recipe, axis) for own in w]) if len(w) else w


def _grouped_kernels(a: torch.Tensor, b: torch.Tensor):
    """The module of the grouped kernels where they multiply `a` and `b`: on CUDA, in 16 bits, widths in steps of 16."""
    widths = (*a.shape[1:], *b.shape[1:])
    if not a.is_cuda or a.dtype not in (torch.bfloat16, torch.float16) or any(width % 16 for width in widths):
        return None
    try:
        from mxfp4_kernels.matmul import grouped
    except ImportError:  # without Triton
        return None
    return grouped
