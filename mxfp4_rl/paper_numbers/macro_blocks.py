"""What macro blocks close of the gap to real-valued scales, by their size, and what closes the rest.

The gap is between rceil's error and the "floor", the error with the real-valued scale amax / 6. A static factor fits the scale
of the one 32-block that holds the macro block's maximum; the others keep a scale that is off by a random part of an octave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mxfp4_rl.paper_numbers.components import real_scale_rel_mse
from mxfp4_rl.paper_numbers.data import Size, sample
from mxfp4_rl.paper_numbers.estimate import Estimate, over_seeds
from mxfp4_rl.quant import error_stats, rel_mse
from mxfp4_rl.quant.elements import round_e2m1
from mxfp4_rl.recipe import QuantRecipe

LAWS = ("gaussian", "t12", "laplace")
SIZES = (32, 64, 128, 256)
KINDS = {"mbs{}": "static", "mbs{}-dynamic": "dynamic", "oas+mbs{}": "OAS + static", "oas+mbs{}-dynamic": "OAS + dynamic"}
# Share of the gap that static factors close, Gaussian / t(12) / Laplace in an independent simulation: lowest and highest.
STATIC_REFERENCE = {32: (1.0, 1.0), 64: (0.72, 0.74), 128: (0.52, 0.54), 256: (0.36, 0.38)}
GAUSSIAN_REFERENCE = {"static": 0.01182, "dynamic": 0.01095, "OAS + static": 0.01173, "OAS + dynamic": 0.01008}  # at 128


@dataclass
class MacroBlocks:
    """What was measured, on rows over one octave.

    Attributes:
        base: law -> "rceil", "oas", "floor", "nvfp4" (static), "nvfp4 search": relMSE, "optimal": relMSE with each block's best
            real-valued scale over the floor, and "bias": rceil's scale component.
        error: law -> (kind, macro size) -> relMSE. closed: the same -> share of the gap that is closed.
        bias: the same -> energy of the scale component over the tensor's.
    """

    base: dict[str, dict[str, Estimate]]
    error: dict[str, dict[tuple[str, int], Estimate]]
    closed: dict[str, dict[tuple[str, int], Estimate]]
    bias: dict[str, dict[tuple[str, int], Estimate]]


def bits(size: int) -> float:
    """Bits per element with macro blocks of that size."""
    return QuantRecipe(macro_block="static", macro_size=size).bits_per_element


def measure(size: Size) -> MacroBlocks:
    result = MacroBlocks({}, {}, {}, {})
    for law in LAWS:
        found = over_seeds(lambda seed, law=law: _one(law, seed, size.few_rows), size.seeds)
        for what in ("base", "error", "closed", "bias"):
            getattr(result, what)[law] = {key[1]: value for key, value in found.items() if key[0] == what}
    return result


def _one(law: str, seed: int, rows: int) -> dict[tuple, float]:
    x = sample(law, seed, rows)
    plain = error_stats(x).metrics()
    floor = real_scale_rel_mse(x)
    found: dict[tuple, float] = {("base", "rceil"): plain["rel_mse"], ("base", "bias"): plain["scale_bias"]}
    found |= {("base", "floor"): floor, ("base", "oas"): rel_mse(x, QuantRecipe(scale_rule="oas"))}
    found |= {("base", "nvfp4"): rel_mse(x, QuantRecipe(format="nvfp4"))}
    found |= {("base", "nvfp4 search"): rel_mse(x, QuantRecipe(format="nvfp4", scale_rule="search"))}
    found |= {("base", "optimal"): optimal_scale_error(x[: max(rows // 4, 1)])}
    for size in SIZES:
        for words, kind in KINDS.items():
            metrics = error_stats(x, QuantRecipe.parse("mxfp4+" + words.format(size))).metrics()
            found["error", (kind, size)] = metrics["rel_mse"]
            found["closed", (kind, size)] = (plain["rel_mse"] - metrics["rel_mse"]) / (plain["rel_mse"] - floor)
            found["bias", (kind, size)] = metrics["scale_bias"]
    return found


def optimal_scale_error(x: torch.Tensor, steps: int = 64) -> float:
    """Squared error with each block's best real-valued scale, 0.6 to 1.6 times amax / 6, over that with amax / 6."""
    blocks = x.view(-1, 32)
    ideal = (blocks.abs().amax(-1, keepdim=True) / 6).clamp(min=2.0**-120)

    def error(factor: float) -> torch.Tensor:
        scale = ideal * factor
        return (round_e2m1(blocks / scale).mul_(scale).sub_(blocks)).square_().sum(-1)

    floor = error(1.0)
    best = floor
    for factor in torch.logspace(math.log10(0.6), math.log10(1.6), steps).tolist():
        best = torch.minimum(best, error(factor))
    return (best.double().sum() / floor.double().sum()).item()
