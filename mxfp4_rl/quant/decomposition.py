"""What 4 bits do to a tensor: the quantisation error, split into three parts (arXiv 2605.20402).

For a block with largest magnitude m, s* = m / 6 is the real-valued scale that E8M0 rounds to s, Q* quantises with s*, and
D = {Q*(x) = 0} is the deadzone. The first pass's error telescopes exactly:

    Q1(x) - x  =  Q1(x) - Q*(x)                 scale bias: the scale is a power of two
               +  (Q*(x) - x) on D              deadzone:   small elements become zero
               +  (Q*(x) - x) off D             grid noise: the grid has eight magnitudes
    Q(x) - Q1(x)  =  alpha * q2 / f             fallback:   what the outlier fallback adds back (0 without it)

Where s >= s* (rules rceil and ceil) the deadzone part is orthogonal to the other two, element by element. Scale bias and
grid noise overlap (their cosine is about -0.66 on weights), so the three energies do not add up to the error's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from mxfp4_rl.quant.elements import E2M1_MAX, round_e2m1
from mxfp4_rl.quant.macro_blocks import per_block
from mxfp4_rl.quant.mxfp4 import MXFP4Tensor, quantize
from mxfp4_rl.quant.scales import exp2_byte
from mxfp4_rl.recipe import BLOCK_SIZE, QuantRecipe


@dataclass
class ErrorParts:
    """The four parts of Q(x) - x, float64, each of the shape of x; their sum is Q(x) - x exactly for float32 x.

    A block with NaN or Inf is NaN in every part but none of the others is touched.
    """

    scale_bias: torch.Tensor
    deadzone: torch.Tensor
    grid_noise: torch.Tensor
    fallback: torch.Tensor

    def total(self) -> torch.Tensor:
        """Q(x) - x."""
        return self.scale_bias + self.deadzone + self.grid_noise + self.fallback


def decompose(x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1) -> ErrorParts:
    """Split the error of quantising `x` along `axis` into its parts. Args and errors as `quantize`."""
    return _decompose(x, quantize(x, recipe, axis))[0]


def _decompose(x: torch.Tensor, q: MXFP4Tensor) -> tuple[ErrorParts, torch.Tensor, torch.Tensor]:
    """Parts, the deadzone mask, and m per block (..., blocks) with the quantised axis last."""
    exact = x.detach().double()
    final = q.dequantize().double()
    first = dataclasses.replace(q, residual=None).dequantize().double() if q.residual is not None else final

    rows = exact.movedim(q.axis, -1)
    tail = -rows.shape[-1] % BLOCK_SIZE
    blocks = torch.nn.functional.pad(rows, (0, tail)).unflatten(-1, (-1, BLOCK_SIZE))
    amax = blocks.abs().amax(-1, keepdim=True)
    on_grid = round_e2m1(torch.where(amax > 0, blocks * E2M1_MAX / amax, blocks))
    # Rounded to float32, so that every difference below is exact in float64 and the sum telescopes to the bit.
    ideal = (on_grid * amax / E2M1_MAX).float().double()
    ideal, dead = (t.flatten(-2)[..., : rows.shape[-1]].movedim(-1, q.axis) for t in (ideal, on_grid == 0))

    remainder = ideal - exact
    parts = ErrorParts(
        scale_bias=first - ideal,
        deadzone=torch.where(dead, remainder, 0.0),
        grid_noise=torch.where(dead, 0.0, remainder),
        fallback=final - first,
    )
    return parts, dead, amax.squeeze(-1)


@dataclass
class ErrorStats:
    """Sums over one or many tensors; adding two of them pools the tensors, so every ratio is a ratio of sums."""

    energy: float = 0.0  # of x
    scale_bias: float = 0.0
    deadzone: float = 0.0
    grid_noise: float = 0.0
    fallback: float = 0.0
    cross: float = 0.0  # <scale bias, grid noise>
    first_error: float = 0.0  # of Q1(x) - x
    error: float = 0.0  # of Q(x) - x
    dead_elements: float = 0.0
    elements: float = 0.0
    delta: float = 0.0  # sum over non-zero blocks of log2(s / s*)
    blocks: float = 0.0

    def __add__(self, other: ErrorStats) -> ErrorStats:
        return ErrorStats(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def metrics(self) -> dict[str, float]:
        """Energy ratios to x: scale_bias, deadzone, grid_noise, fallback, rel_mse; and deadzone_fraction (of elements),
        cos_scale_grid, delta_mean (octaves). Empty if nothing was added."""
        if not self.energy > 0:
            return {}
        ratios = {n: getattr(self, n) / self.energy for n in ("scale_bias", "deadzone", "grid_noise", "fallback")}
        return ratios | {
            "rel_mse": self.error / self.energy,
            "deadzone_fraction": self.dead_elements / self.elements,
            "cos_scale_grid": self.cross / max((self.scale_bias * self.grid_noise) ** 0.5, 1e-300),
            "delta_mean": self.delta / max(self.blocks, 1),
        }

    def shares(self) -> dict[str, float]:
        """The paper's table: energy of each part of the first pass over that pass's error energy."""
        if not self.first_error > 0:
            return {}
        return {n: getattr(self, n) / self.first_error for n in ("scale_bias", "deadzone", "grid_noise")}


def error_stats(x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1) -> ErrorStats:
    """Energies of the error parts of `x`, pooled over its finite blocks. Args and errors as `quantize`."""
    q = quantize(x, recipe, axis)
    parts, dead, amax = _decompose(x, q)
    total = parts.total()
    finite = total.isfinite()
    if not finite.all():
        parts = ErrorParts(*(torch.where(finite, t, 0.0) for t in vars(parts).values()))
        total, dead, x = torch.where(finite, total, 0.0), dead & finite, torch.where(finite, x, 0)

    def energy(t):
        return t.double().square().sum().item()

    scale = exp2_byte(q.scales).double()
    if q.macro is not None:
        scale = scale / per_block(q.macro, q.macro_size, scale.shape[-1])
    delta = torch.log2(scale * E2M1_MAX / amax)
    delta = delta[(amax > 0) & delta.isfinite()]
    return ErrorStats(
        energy=energy(x),
        scale_bias=energy(parts.scale_bias),
        deadzone=energy(parts.deadzone),
        grid_noise=energy(parts.grid_noise),
        fallback=energy(parts.fallback),
        cross=(parts.scale_bias * parts.grid_noise).sum().item(),
        first_error=energy(total - parts.fallback),
        error=energy(total),
        dead_elements=dead.sum().item(),
        elements=finite.sum().item(),
        delta=delta.sum().item(),
        blocks=delta.numel(),
    )
