"""MXFP4: from blocks of float32 to E2M1 values and E8M0 scales, with macro blocks and the outlier fallback.

For a block of 32 elements along the contraction axis, with f the factor that the block is multiplied by (its macro block's,
times the pre-scale; 1 without either) and s the power of two that the scale rule gives for f * max|x|,

    q1    = s * E2M1(f * x / s)                     first pass
    q2    = s2 * E2M1((f * x - q1) / s2)            outlier fallback (OF), a second pass over the residual with scales s2
    x_hat = (q1 + alpha * q2) / f                   what a matrix product sees

(arXiv 2605.20402; the residual is taken in the scaled domain, so both passes share one f.) Everything runs in float32 on the
bits of x. Divisions by s are exact multiplications, and f * x - q1 is exact, so the result is defined to the bit: this module
is the specification that kernels are tested against.

Rule "search" tries the scales s 2^o of a window of offsets o and keeps the one with the smallest squared error, the first of
equals (ScaleSearch, arXiv 2605.12464). Dynamic macro blocks compare squared errors too. Both sum in the order of
`blocks.fold_sum`, so that the choice is the same on every device.
"""

from __future__ import annotations

import torch

from mxfp4_rl.quant.blocks import fold_sum, over_groups, over_tiles, per_block
from mxfp4_rl.quant.elements import round_e2m1
from mxfp4_rl.quant.macro_blocks import DYNAMIC_CANDIDATES, static_factor
from mxfp4_rl.quant.passes import Chunk, Scratch, largest_blocks_threshold, round_elements
from mxfp4_rl.quant.scales import MAX_BYTE, MIN_BYTE, NAN_BYTE, divided, exp2_byte, inverse_scale, scale_byte
from mxfp4_rl.recipe import QuantRecipe

_LARGEST = torch.finfo(torch.float32).max


class MXFP4Quantizer:
    """Quantises the rows of one tensor, chunk by chunk.

    `error_weights`, float32 (blocks, block_size), multiply the squared errors by which "search" chooses.
    """

    def __init__(self, recipe: QuantRecipe, rows, seed: int | None, error_weights: torch.Tensor | None = None):
        self.recipe, self.seed, self._error_weights = recipe, seed, error_weights
        self.tile_rows = recipe.tile_rows
        self.threshold = None  # of the masked fallback: blocks with a largest magnitude of at least this
        if recipe.fallback_threshold is not None:
            self.threshold = torch.nextafter(torch.tensor(recipe.fallback_threshold), torch.tensor(torch.inf)).item()
        elif recipe.fallback_fraction is not None:
            self.threshold = largest_blocks_threshold(rows, recipe.fallback_fraction)

    def chunk(self, b: Scratch, start: int) -> Chunk:
        """Quantise b.x, (R, blocks, block_size), whose first element is element `start`; overwrites all buffers."""
        recipe = self.recipe
        largest = over_tiles(torch.abs(b.x, out=b.first).amax(-1), self.tile_rows, "amax")
        macro = factor = None
        amax = largest
        if recipe.macro_block or recipe.pre_scale != 1:
            macro, factor = self._factors(b.x, largest)
            # Rounding is monotone: this is the largest magnitude of f * x. Finite stays finite.
            amax = torch.where(largest.isfinite(), (largest * factor).clamp_(max=_LARGEST), largest)
        byte = scale_byte(amax, recipe.scale_rule)
        # f / s is exact, so one multiplication rounds like f * x does and divides exactly.
        to_grid = inverse_scale(byte)
        t = b.x.mul_((to_grid * factor if factor is not None else to_grid).unsqueeze(-1))
        if recipe.scale_rule == "search":
            byte, shift = self._search(t, byte, b)
            t.mul_(inverse_scale(shift).unsqueeze(-1))
        round_elements(t, b.first, b.scratch, recipe, self.seed, start)
        done = Chunk([b.first], [byte], [exp2_byte(byte)], factor, macro, recipe.fallback_alpha)
        if recipe.fallback_alpha is not None:
            rest = t.sub_(b.first)  # in units of s: exact
            if self.threshold is not None:
                rest.masked_fill_((largest < self.threshold).unsqueeze(-1), 0)
            byte2 = self._second_pass(rest, byte, b, start)
            done.values.append(b.second)
            done.scale_codes.append(byte2)
            done.scales.append(exp2_byte(byte2))
        return done

    def _second_pass(self, rest: torch.Tensor, byte: torch.Tensor, b: Scratch, start: int) -> torch.Tensor:
        """Quantise the residual, in units of the first scale, into b.second; its power of two is found there and moved."""
        amax = over_tiles(torch.abs(rest, out=b.scratch).amax(-1), self.tile_rows, "amax")
        relative = scale_byte(amax, self.recipe.scale_rule)
        if self.recipe.scale_rule == "search":
            in_units = rest * inverse_scale(torch.where(relative == NAN_BYTE, 127, relative)).unsqueeze(-1)
            relative, _ = self._search(in_units, relative, Scratch(b.x, b.second, b.second, b.scratch))  # b.first is the result
        nothing = amax == 0  # a zero block's canonical scale
        byte2 = (relative + (byte - 127)).clamp_(MIN_BYTE, MAX_BYTE)
        shift = torch.where(nothing, 127, byte2 - byte + 127)  # clamped at an end, byte2 shifts less
        byte2 = torch.where(nothing, MIN_BYTE, byte2)
        invalid = byte == NAN_BYTE
        rest.mul_(inverse_scale(torch.where(invalid, 127, shift)).unsqueeze(-1))
        round_elements(rest, b.second, b.scratch, self.recipe, self.seed, start, stream=1)
        return torch.where(invalid, NAN_BYTE, byte2)

    def _search(self, t: torch.Tensor, byte: torch.Tensor, b: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
        """The best byte near `byte` for t, in units of its scale: (byte, 127 + offset), both (R, blocks).

        The squared errors are compared in units of the scale, where multiplying by powers of two changes no rounding.
        """
        best, best_error = byte, torch.full_like(byte, torch.inf, dtype=torch.float32)
        for offset in self.recipe.window:
            candidate = (byte + offset).clamp_(MIN_BYTE, MAX_BYTE)
            shift = exp2_byte(candidate - byte.clamp(max=MAX_BYTE) + 127)
            error = _squared_error(t / shift.unsqueeze(-1), b, self._error_weights)
            error = over_tiles(error * shift.square(), self.tile_rows, "sum")
            better = error < best_error  # False for NaN: such blocks keep byte 255
            best = torch.where(better, candidate, best)
            best_error = torch.where(better, error, best_error)
        return best, best - byte + 127

    def _factors(self, x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """MBS factors (R, macros) or None, and pre-scale times factor for every block, (R, blocks)."""
        recipe = self.recipe
        if recipe.macro_block is None:
            return None, torch.full_like(amax, recipe.pre_scale)
        group = recipe.macro_size // recipe.block_size
        amax = torch.where(amax.isfinite(), amax, 0)  # a broken block does not touch its neighbours
        if recipe.macro_block == "static":
            macro = static_factor(over_groups(amax * recipe.pre_scale, group, "amax"))
        else:
            macro = self._dynamic_factors(x, amax, group)
        return macro, per_block(macro, group, amax.shape[-1]) * recipe.pre_scale

    def _dynamic_factors(self, x: torch.Tensor, amax: torch.Tensor, group: int) -> torch.Tensor:
        recipe = self.recipe
        blocks = amax.shape[-1]
        # Summed in units of the macro block's own scale: the squared errors of tiny blocks may vanish there, none overflows.
        unit = per_block(scale_byte(over_groups(amax, group, "amax"), 6.0), group, blocks)
        best = torch.ones_like(over_groups(amax, group, "amax"))
        best_error = torch.full_like(best, torch.inf)
        b = Scratch.like(x)
        for candidate in DYNAMIC_CANDIDATES:
            factor = candidate * recipe.pre_scale
            byte = scale_byte((amax * factor).clamp_(max=_LARGEST), recipe.scale_rule)
            t = torch.mul(x, (inverse_scale(byte) * factor).unsqueeze(-1), out=b.x)
            if recipe.scale_rule == "search":
                byte, shift = self._search(t, byte, b)
                t.mul_(inverse_scale(shift).unsqueeze(-1))
            worth = divided(exp2_byte((byte - unit + 127).clamp_(1, 254)), candidate)
            error = _squared_error(t, b) * worth.square()
            error = over_groups(torch.where(error.isfinite(), error, 0), group, "sum")  # broken blocks have no say
            better = error < best_error
            best = torch.where(better, candidate, best)
            best_error = torch.where(better, error, best_error)
        return best


def _squared_error(t: torch.Tensor, b: Scratch, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of (E2M1(t) - t)^2 per block, (R, blocks, block_size) -> (R, blocks); overwrites b.first and b.scratch.

    weights: what the squares are multiplied by, (blocks, block_size).
    """
    squares = round_e2m1(t, out=b.first, scratch=b.scratch).sub_(t).square_()
    return fold_sum(squares if weights is None else squares.mul_(weights))
