"""Does the scale's bias multiply along 48 layers? Random sums of delta, and real chains of backward products.

arXiv 2605.20402 argues log(|g_q| / |g|) = sum over layers of delta, with a spread of sqrt(48 / 12) = 2.0, "[0.18x, 5.6x]".
Two things are measured: the spread of such sums along random paths through the blocks of 48 layers, and the gradient that 48
products g <- W_q^T g really give (256 x 256 weights, sigma 1/16, blocks along the forward's contraction axis), beside the same
chain with the codes frozen at those of the ideal scale, where nothing but the scale changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from mxfp4_rl.paper_numbers.corrections import real_scale
from mxfp4_rl.paper_numbers.data import Size, sample
from mxfp4_rl.paper_numbers.estimate import Estimate
from mxfp4_rl.quant import fake_quantize, scale_ratios
from mxfp4_rl.quant.elements import round_e2m1
from mxfp4_rl.quant.scales import exp2_byte, scale_byte
from mxfp4_rl.recipe import QuantRecipe

LAYERS, WIDTH = 48, 256
PRINTED_RANGE = (0.18, 5.6)
REFERENCE = {"rceil": (-0.41, 0.26), "floor": (-0.90, 0.35), "oas": (-0.21, 0.34), "real scale": (0.02, 0.32)}  # mean, spread
FROZEN = "frozen codes"
RULES = (*REFERENCE, FROZEN)


@dataclass
class Chain:
    """Chains of one scale rule.

    Attributes:
        ratios: log2(|g_q| / |g|) of every draw. cosine: between g_q and g, mean over draws.
        slope: <Q(W), W> / <W, W>. energy: |Q(W)|^2 / |W|^2. Both pooled over layers, a value a draw.
    """

    ratios: list[float]
    cosine: Estimate
    slope: Estimate
    energy: Estimate

    @property
    def mean(self) -> Estimate:
        return Estimate.of(self.ratios)

    @property
    def spread(self) -> float:
        """Standard deviation over draws."""
        return float(np.std(self.ratios, ddof=1))

    @property
    def predicted(self) -> float:
        """What the energy ratio alone predicts: half an octave per octave of energy, in every layer."""
        return LAYERS / 2 * math.log2(self.energy.value)


@dataclass
class Gradient:
    """What was measured.

    Attributes:
        sums: sum of delta along each path, minus its mean, float64 (paths,).
        sum_mean, sum_std: over paths, from several sets of layers.
        chains: rule -> Chain.
    """

    sums: np.ndarray
    sum_mean: Estimate
    sum_std: Estimate
    chains: dict[str, Chain]

    @property
    def range(self) -> tuple[float, float]:
        """One standard deviation of the sums, as factors."""
        return 2**-self.sum_std.value, 2**self.sum_std.value


def measure(size: Size) -> Gradient:
    sums = [path_sums(seed, size.paths) for seed in range(size.seeds)]
    return Gradient(
        sums=sums[0] - sums[0].mean(),
        sum_mean=Estimate.of(s.mean() for s in sums),
        sum_std=Estimate.of(s.std() for s in sums),
        chains=chains(size.chains),
    )


def path_sums(seed: int, paths: int) -> np.ndarray:
    """Sum of delta over one random block of each of 48 layers, float64 (paths,)."""
    rng = np.random.default_rng([LAYERS, seed])
    total = np.zeros(paths)
    for layer in range(LAYERS):
        delta = scale_ratios(sample("gaussian", LAYERS * seed + layer, WIDTH, WIDTH)).numpy()
        total += delta[rng.integers(len(delta), size=paths)]
    return total


def chains(draws: int) -> dict[str, Chain]:
    """Gradients through 48 random layers, `draws` times; every rule sees the same weights and gradients."""
    found = {rule: {"ratio": [], "cosine": [], "slope": [], "energy": []} for rule in RULES}
    for draw in range(draws):
        w = sample("gaussian", draw, LAYERS * WIDTH, WIDTH, spread="fixed") / math.sqrt(WIDTH)
        start = sample("gaussian", 1_000_000 + draw, 1, WIDTH, spread="fixed").double().squeeze(0)
        exact = w.double()
        reference, energy = _back(exact, start), exact.square().sum()
        for rule, one in found.items():
            w_hat = _quantised(w, rule).double()
            g = _back(w_hat, start)
            one["ratio"].append(math.log2(g.norm() / reference.norm()))
            one["cosine"].append((g @ reference / (g.norm() * reference.norm())).item())
            one["slope"].append(((w_hat * exact).sum() / energy).item())
            one["energy"].append((w_hat.square().sum() / energy).item())
    return {
        rule: Chain(one["ratio"], *(Estimate.of(one[name]) for name in ("cosine", "slope", "energy")))
        for rule, one in found.items()
    }


def _quantised(w: torch.Tensor, rule: str) -> torch.Tensor:
    if rule == "real scale":
        return real_scale(w)
    if rule == FROZEN:
        blocks = w.unflatten(-1, (-1, 32))
        amax = blocks.abs().amax(-1, keepdim=True)
        return (round_e2m1(blocks * 6 / amax) * exp2_byte(scale_byte(amax, "rceil"))).flatten(-2)
    return fake_quantize(w, QuantRecipe(scale_rule=rule))


def _back(weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """W_48^T ... W_1^T g for the stacked weights, float64 (48 * 256, 256)."""
    for w in weights.view(LAYERS, WIDTH, WIDTH):
        gradient = w.T @ gradient
    return gradient
