"""The parts of the error on known distributions: shares, cosine, deadzone, delta, and the error against scale precision.

Shares are energies over the error's energy, as in arXiv 2605.20402's table: S of the scale bias, D of the deadzone, G of the
grid noise. They identify what the paper measured: rceil scales, blocks of 32, nearly Gaussian weights of many scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxfp4_rl.paper_numbers.data import Size, sample
from mxfp4_rl.paper_numbers.estimate import Estimate, over_seeds
from mxfp4_rl.quant import error_stats, precision_sweep, scale_ratios
from mxfp4_rl.recipe import QuantRecipe

# (law, spread) -> relMSE, floor, S, D, G, cosine, dead, mean delta in an independent NumPy simulation of 4 M samples.
REFERENCE = {
    ("gaussian", "fixed"): (0.01331, 0.01022, 1.772, 0.0205, 0.748, -0.669, 0.078, 0.451),
    ("gaussian", "octave"): (0.01358, 0.01022, 1.744, 0.0201, 0.732, -0.662, 0.078, 0.501),
    ("t30", "octave"): (0.01397, 0.01019, 1.721, 0.0223, 0.707, -0.657, 0.082, 0.500),
    ("t15", "octave"): (0.01442, 0.01016, 1.699, 0.0251, 0.680, -0.653, 0.087, 0.501),
    ("t10", "octave"): (0.01499, 0.01016, 1.669, 0.0284, 0.649, -0.647, 0.092, 0.501),
    ("t5", "octave"): (0.01757, 0.01038, 1.569, 0.0456, 0.545, -0.627, 0.113, 0.497),
    ("t3", "octave"): (0.02239, 0.01086, 1.406, 0.101, 0.384, -0.606, 0.157, 0.503),
    ("laplace", "octave"): (0.01744, 0.01051, 1.577, 0.051, 0.552, -0.632, 0.153, 0.510),
}
# Scale rule -> the error on t(12), fixed sigma: shares of the elements that became zero, of the rest, of those that clipped.
PARTITION_REFERENCE = {"rceil": (0.089, 0.911, 0.0), "floor": (0.039, 0.814, 0.147), "oas": None}
ORTHOGONALITY_RULES = ("rceil", "ceil", "floor", "even", "oas")
SWEEP_REFERENCE = (1.333, 1.286, 1.245, 1.085, 1.031, 1.013, 1.006, 1.003, 1.001)  # k = 0..8, over the floor


@dataclass
class Components:
    """What was measured.

    Attributes:
        table: (law, spread) -> name -> Estimate: rel_mse, floor, S, D, G, cos, dead (elements in the deadzone), zero (elements
            that become 0), delta, ratio (mean of 2^delta), slope.
        orthogonality: rule -> cosine between scale bias and deadzone, on Gaussian rows over one octave.
        partition: rule -> "deadzone", "grid_noise", "clipping": shares of the error by what became of the element, t(12) with
            fixed sigma.
        sweep: mantissa bits of the scale -> error over the real-valued scale's, Gaussian rows over one octave.
    """

    table: dict[tuple[str, str], dict[str, Estimate]]
    orthogonality: dict[str, Estimate]
    partition: dict[str, dict[str, Estimate]]
    sweep: dict[int, Estimate]


def measure(size: Size) -> Components:
    table = {key: over_seeds(lambda seed, key=key: parts(*key, seed, size.rows), size.seeds) for key in REFERENCE}

    def cosines(seed: int) -> dict[str, float]:
        x = sample("gaussian", seed, size.few_rows)
        return {r: error_stats(x, QuantRecipe(scale_rule=r)).metrics()["cos_scale_deadzone"] for r in ORTHOGONALITY_RULES}

    def sweep(seed: int) -> dict[int, float]:
        errors = precision_sweep(sample("gaussian", seed, size.rows))
        return {bits: error / errors[None] for bits, error in errors.items() if bits is not None}

    def partition(seed: int, rule: str) -> dict[str, float]:
        return error_stats(sample("t12", seed, size.few_rows, spread="fixed"), QuantRecipe(scale_rule=rule)).partition()

    return Components(
        table=table,
        orthogonality=over_seeds(cosines, size.seeds),
        partition={rule: over_seeds(lambda seed, rule=rule: partition(seed, rule), size.seeds) for rule in PARTITION_REFERENCE},
        sweep=over_seeds(sweep, size.seeds),
    )


def parts(law: str, spread: str, seed: int, rows: int) -> dict[str, float]:
    """One sample's entries of `Components.table`."""
    x = sample(law, seed, rows, spread=spread)
    stats = error_stats(x)
    metrics, shares = stats.metrics(), stats.shares()
    return {
        "rel_mse": metrics["rel_mse"],
        "floor": real_scale_rel_mse(x),
        "S": shares["scale_bias"],
        "D": shares["deadzone"],
        "G": shares["grid_noise"],
        "cos": metrics["cos_scale_grid"],
        "dead": metrics["deadzone_fraction"],
        "zero": metrics["zero_fraction"],
        "delta": metrics["delta_mean"],
        "ratio": torch.exp2(scale_ratios(x)).double().mean().item(),
        "slope": metrics["slope"],
    }


def real_scale_rel_mse(x: torch.Tensor, block_size: int = 32) -> float:
    """Relative MSE with the real-valued scale amax / 6: the floor of all scales that put the maximum on the grid's end."""
    return precision_sweep(x, bits=(), block_size=block_size)[None] / x.double().square().sum().item()
