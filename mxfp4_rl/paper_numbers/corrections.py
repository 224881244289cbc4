"""The corrections beside macro blocks: outlier fallback, 2-D tiles, and all of them in a W4A4 product; activations' SQNR.

The product Y = A W^T has activations of t(6) elements with 4 of 1024 channels 20 times larger, Gaussian weights, both operands
quantised along K = 1024 with the same recipe; its error is against the unquantised product, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mxfp4_rl.paper_numbers.data import Size, channel_outliers, sample
from mxfp4_rl.paper_numbers.estimate import Estimate, over_seeds
from mxfp4_rl.quant import fake_quantize, rel_mse
from mxfp4_rl.quant.elements import round_e2m1
from mxfp4_rl.recipe import QuantRecipe

ALPHAS = (0.25, 0.5, 0.75, 1.0)
ALPHA_REFERENCE = {0.25: 0.561, 0.5: 0.250, 0.75: 0.068, 1.0: 0.014}
FALLBACK_LAWS = ("gaussian", "laplace", "t5")
MASKS = (0.05, 0.1, 0.2, 0.3, 1.0)
MASK_REFERENCE = {None: 0.0236, 0.05: 0.0088, 0.1: 0.0061, 0.2: 0.0047, 0.3: 0.0040, 1.0: 0.00044}
PRODUCTS = {  # recipe of both operands: (name, relMSE of Y in an independent simulation)
    "mxfp4": ("rceil", 0.0377),
    "mxfp4+oas": ("oas", 0.0334),
    "mxfp4+mbs": ("MBS static 128", 0.0256),
    "mxfp4+of": ("OF 0.5", 0.0095),
    "mxfp4+mbs+of": ("MBS + OF 0.5", 0.0065),
    "mxfp4+of1": ("OF 1", 0.0007),
    "real": ("real-valued scale", 0.0219),
}
TILE_REFERENCE = {
    "fixed": {"tile": "0.0225", "one_d": "0.0133", "mismatch": "0.0032", "twice": "0.0136"},
    "octave": {"mismatch": "0.0044", "differ": "13 %"},
}
SQNR_DATA = {
    "Gaussian": lambda seed, rows: sample("gaussian", seed, rows, spread="fixed"),
    "Laplace": lambda seed, rows: sample("laplace", seed, rows, spread="fixed"),
    "t(5)": lambda seed, rows: sample("t5", seed, rows, spread="fixed"),
    "t(3)": lambda seed, rows: sample("t3", seed, rows, spread="fixed"),
    "t(6), 4 of 1024 channels x20": channel_outliers,
}


@dataclass
class Corrections:
    """What was measured.

    Attributes:
        alpha: (law, scale rule) -> alpha -> MSE over that without the fallback.
        zeros: "plain", "fallback" -> fraction of elements that become 0 (Gaussian, alpha 0.5).
        masked: fraction of the blocks with a second pass (None: no fallback), alpha 1 -> relMSE of activations with outliers.
        products: recipe -> relMSE of Y.
        tiles: spread -> "tile", "one_d" (relMSE), "mismatch" and "differ" (between the operands quantised along rows and
            columns: relMSE, fraction of elements), "twice" (along rows, then columns, against the weight).
        sqnr: data -> "decibels", "zeros", "relative" (mean of error over magnitude), floor scales.
    """

    alpha: dict[tuple[str, str], dict[float, Estimate]]
    zeros: dict[str, Estimate]
    masked: dict[float | None, Estimate]
    products: dict[str, Estimate]
    tiles: dict[str, dict[str, Estimate]]
    sqnr: dict[str, dict[str, Estimate]]


def measure(size: Size) -> Corrections:
    return Corrections(
        alpha={
            (law, rule): over_seeds(lambda seed, k=(law, rule): _alphas(*k, seed, size.few_rows), size.seeds)
            for law in FALLBACK_LAWS
            for rule in ("rceil", "oas")
        },
        zeros=over_seeds(lambda seed: _zeros(seed, size.rows), size.seeds),
        masked=over_seeds(lambda seed: _masked(seed, size.rows), size.seeds),
        products=over_seeds(lambda seed: product_errors(seed, size.tokens), 2 * size.seeds),
        tiles={
            spread: over_seeds(lambda seed, spread=spread: _tiles(seed, size.side, spread), size.seeds)
            for spread in ("fixed", "octave")
        },
        sqnr={
            name: over_seeds(lambda seed, draw=draw: _sqnr(draw(seed, size.rows)), size.seeds)
            for name, draw in SQNR_DATA.items()
        },
    )


def real_scale(x: torch.Tensor, block_size: int = 32) -> torch.Tensor:
    """x quantised with the real-valued scale amax / 6: float32 (R, K) -> (R, K), K a multiple of the block size."""
    blocks = x.unflatten(-1, (-1, block_size))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6).clamp(min=2.0**-120)
    return (round_e2m1(blocks / scale) * scale).flatten(-2)


def product_errors(seed: int, tokens: int) -> dict[str, float]:
    """relMSE of Y for every recipe of PRODUCTS, on one draw of (tokens, 1024) x (tokens, 1024)."""
    a, w = channel_outliers(seed, tokens), sample("gaussian", seed, tokens, spread="fixed")
    exact = a.double() @ w.double().T
    errors = {}
    for name in PRODUCTS:
        a_hat, w_hat = (real_scale(t) if name == "real" else fake_quantize(t, QuantRecipe.parse(name)) for t in (a, w))
        error = a_hat.double() @ w_hat.double().T - exact
        errors[name] = (error.square().sum() / exact.square().sum()).item()
    return errors


def _alphas(law: str, rule: str, seed: int, rows: int) -> dict[float, float]:
    x = sample(law, seed, rows)
    plain = rel_mse(x, QuantRecipe(scale_rule=rule))
    return {alpha: rel_mse(x, QuantRecipe(scale_rule=rule, fallback_alpha=alpha)) / plain for alpha in ALPHAS}


def _zeros(seed: int, rows: int) -> dict[str, float]:
    x = sample("gaussian", seed, rows)
    recipes = {"plain": QuantRecipe(), "fallback": QuantRecipe(fallback_alpha=0.5)}
    return {name: (fake_quantize(x, recipe) == 0).double().mean().item() for name, recipe in recipes.items()}


def _masked(seed: int, rows: int) -> dict[float | None, float]:
    x = channel_outliers(seed, rows)
    found = {None: rel_mse(x)}
    for fraction in MASKS:
        mask = None if fraction == 1 else fraction
        found[fraction] = rel_mse(x, QuantRecipe(fallback_alpha=1.0, fallback_fraction=mask))
    return found


def _tiles(seed: int, side: int, spread: str) -> dict[str, float]:
    w = sample("gaussian", seed, side, side, spread=spread)
    by_row, by_column = fake_quantize(w), fake_quantize(w, axis=0)

    def distance(a, b):
        return ((a - b).double().square().sum() / w.double().square().sum()).item()

    return {
        "tile": rel_mse(w, QuantRecipe(tile=True)),
        "one_d": distance(by_row, w),
        "mismatch": distance(by_row, by_column),
        "differ": (by_row != by_column).double().mean().item(),
        "twice": distance(fake_quantize(by_row, axis=0), w),
    }


def _sqnr(x: torch.Tensor) -> dict[str, float]:
    x_hat = fake_quantize(x, QuantRecipe(scale_rule="floor"))
    nonzero = x != 0
    return {
        "decibels": -10 * math.log10(rel_mse(x, QuantRecipe(scale_rule="floor"))),
        "zeros": (x_hat == 0).double().mean().item(),
        "relative": ((x_hat - x).abs() / x.abs())[nonzero].double().mean().item(),
    }
