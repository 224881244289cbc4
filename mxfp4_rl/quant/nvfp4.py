"""NVFP4: E2M1 elements, an E4M3 scale per 16 of them, a float32 scale for the tensor.

    g = amax(tensor) / (6 * 448)          s = E4M3(amax(block) / 6 / g)          x_hat = E2M1(x / (g s)) * (g s)

    rule            scale of a block
    static          as above: the block's largest element goes to 6
    static4         E4M3(amax / 4 / g): to 4; g = amax(tensor) / (6 * 256), so that 1.5 times a scale still fits E4M3
    four_over_six   whichever of the two has the smaller squared error, 6 if they are equal (arXiv 2512.02010)
    search          the E4M3 codes s - 2 .. s + 6 (a window of offsets to the code): the smallest squared error, the first of
                    equals (ScaleSearch, arXiv 2605.12464)
    soar            g and all s together, by alternating closed-form updates (arXiv 2605.12245; see `soar.py`)

Operations and their order in float32 are torchao's: amax / 6, divided by g, rounded; x * ((1 / g) / s). Scales go down to
E4M3's smallest subnormal here, where torchao stops at its smallest normal number.
"""

from __future__ import annotations

import torch

from mxfp4_rl.quant.blocks import fold_sum, over_tiles
from mxfp4_rl.quant.elements import E2M1_MAX, round_e2m1
from mxfp4_rl.quant.passes import Chunk, Rows, Scratch, round_elements
from mxfp4_rl.quant.scales import divided
from mxfp4_rl.recipe import QuantRecipe

E4M3_MAX = 448.0
MIN_CODE, MAX_CODE, NAN_CODE = 1, 126, 127  # 2^-9, 448, NaN
# g = amax / (6 * this); soar only starts from it.
TARGET = {"static": E4M3_MAX, "static4": 256.0, "four_over_six": 256.0, "search": E4M3_MAX}
# Below 2^-112 the reciprocal of g times the smallest block scale would overflow; above 1.9e38 a largest element that rounds up.
SMALLEST_TENSOR_SCALE, LARGEST_AMAX = 2.0**-112, 1.9e38


def e4m3_code(values: torch.Tensor) -> torch.Tensor:
    """Positive float32 (...) -> bits of the nearest E4M3 number (ties to even, saturating), int32 (...), 1..126."""
    codes = values.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).int()
    return codes.clamp_(MIN_CODE, MAX_CODE)


def e4m3_value(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 bits (any integer dtype, 0..127) -> float32 of the same shape; 127 is NaN."""
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def tensor_scale(amax: torch.Tensor, rule: str) -> torch.Tensor:
    """Largest magnitudes of all blocks, float32 (any shape) -> g, float32 (); NaN and Inf blocks do not count."""
    finite = amax[amax.isfinite()]
    largest = finite.amax() if finite.numel() else amax.new_zeros(())
    return divided(largest.clamp(max=LARGEST_AMAX), E2M1_MAX * TARGET.get(rule, E4M3_MAX)).clamp_(min=SMALLEST_TENSOR_SCALE)


class NVFP4Quantizer:
    """Quantises the rows of one tensor, chunk by chunk, with the tensor's scale `tensor_scale` (float32 ()).

    `fixed_scale` takes the place of the scale that the tensor would get; `error_weights`, float32 (blocks, block_size),
    multiply the squared errors that are compared.
    """

    def __init__(
        self,
        recipe: QuantRecipe,
        rows: Rows,
        seed: int | None,
        fixed_scale: float | None = None,
        error_weights: torch.Tensor | None = None,
    ):
        self.recipe, self.seed, self._error_weights = recipe, seed, error_weights
        self.tile_rows = recipe.tile_rows
        self._blocks = rows.blocks * recipe.block_size
        self._chosen = None  # codes (rows, blocks) that were chosen for the tensor as a whole
        if fixed_scale is not None:
            self.tensor_scale = torch.full((), fixed_scale, device=rows.flat.device)
            return
        amax = rows.block_amax()
        self.tensor_scale = tensor_scale(amax, recipe.scale_rule)
        if recipe.scale_rule == "soar":
            from mxfp4_rl.quant.soar import soar_scales

            self.tensor_scale, self._chosen = soar_scales(rows, amax)

    def chunk(self, b: Scratch, start: int) -> Chunk:
        """Quantise b.x, (R, blocks, block_size), whose first element is element `start`; overwrites all buffers."""
        amax = over_tiles(torch.abs(b.x, out=b.first).amax(-1), self.tile_rows, "amax")
        if self._chosen is not None:
            row = start // self._blocks if self._blocks else 0
            code = self._chosen[row : row + amax.shape[0]]
        else:
            code = self._codes(b, amax)
        code = torch.where(amax.isfinite(), code, NAN_CODE)
        t = b.x.mul_(self._to_grid(code))
        round_elements(t, b.first, b.scratch, self.recipe, self.seed, start)
        return Chunk([b.first], [code], [e4m3_value(code) * self.tensor_scale])

    def _codes(self, b: Scratch, amax: torch.Tensor) -> torch.Tensor:
        rule = self.recipe.scale_rule
        six = e4m3_code(divided(amax, E2M1_MAX) / self.tensor_scale)
        if rule == "static":
            return six
        four = e4m3_code(amax / 4.0 / self.tensor_scale)
        if rule == "static4":
            return four
        if rule == "four_over_six":
            return self._best(b, [six, four])
        return self._best(b, [(six + offset).clamp_(MIN_CODE, MAX_CODE) for offset in self.recipe.window])

    def _best(self, b: Scratch, candidates: list[torch.Tensor]) -> torch.Tensor:
        """Of several codes for every block, (R, blocks) each, the one with the smallest squared error; the first of equals."""
        best, best_error = candidates[0], torch.full_like(b.x[..., 0], torch.inf)
        for code in candidates:
            torch.mul(b.x, self._to_grid(code), out=b.second)
            values = round_e2m1(b.second, out=b.first, scratch=b.scratch)
            values.mul_((e4m3_value(code) * self.tensor_scale).unsqueeze(-1)).sub_(b.x)
            # In units of g, so that squares neither overflow nor vanish.
            values.div_(self.tensor_scale).square_()
            if self._error_weights is not None:
                values.mul_(self._error_weights)
            error = over_tiles(fold_sum(values), self.tile_rows, "sum")
            better = error < best_error
            best = torch.where(better, code, best)
            best_error = torch.where(better, error, best_error)
        return best

    def _to_grid(self, code: torch.Tensor) -> torch.Tensor:
        return ((1.0 / self.tensor_scale) / e4m3_value(code)).unsqueeze(-1)
