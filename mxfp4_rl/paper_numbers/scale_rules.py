"""Scale rules: absolute errors as regression constants, the family s = 2^ceil(log2(amax / c)), what OAS and search change.

Every rule but search is that family for one c (floor 8, oas and even 7, rceil 6, ceil 4, nearest power of two 6 sqrt 2), so its
squared error is a curve over c with one minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mxfp4_rl.paper_numbers.components import real_scale_rel_mse
from mxfp4_rl.paper_numbers.data import Size, channel_outliers, sample, scattered_outliers
from mxfp4_rl.paper_numbers.estimate import Estimate, over_seeds
from mxfp4_rl.quant import error_stats, quantize, rel_mse
from mxfp4_rl.recipe import QuantRecipe

NEAREST_LOG2 = 6 * math.sqrt(2)
_RULES = {"floor": "floor", "rceil": "rceil", "ceil": "ceil", "even": "even", "oas": "oas", "nearest log2": NEAREST_LOG2}
_RULES |= {"search": "search", "real scale": None}
# Squared error on Gaussian data of sigma 1, by an independent NumPy simulation: format -> rule -> value.
CONSTANTS = {
    "MXFP4, blocks of 32": {
        "floor": 0.013218,
        "rceil": 0.013306,
        "ceil": 0.020802,
        "even": 0.012510,
        "oas": 0.012510,
        "nearest log2": 0.014773,
        "search": 0.012448,
        "real scale": 0.010229,
    },
    "MXFP4, blocks of 16": {
        "floor": 0.013869,
        "rceil": 0.012716,
        "ceil": 0.017924,
        "even": 0.012114,
        "oas": 0.012114,
        "nearest log2": 0.016335,
        "search": 0.012083,
        "real scale": 0.008875,
    },
    "NVFP4": {"static": 0.009059, "static4": 0.009673, "four_over_six": 0.007562, "search": 0.006600},
}
C_GRID = tuple(sorted({5.5 + k / 8 for k in range(29)} | {7 + k / 20 for k in range(11)}))
C_COARSE = (6.0, 6.5, 7.0, 7.25, 7.5, 8.0)  # the values that arXiv 2607.24377's optimum was checked among
C_LAWS = ("gaussian", "t5", "laplace")
CHANGED_LAWS = ("gaussian", "t12", "laplace")
DECIBEL_DATA = {
    "Gaussian": lambda seed, rows: sample("gaussian", seed, rows),
    "t(12)": lambda seed, rows: sample("t12", seed, rows),
    "Laplace": lambda seed, rows: sample("laplace", seed, rows),
    "t(3)": lambda seed, rows: sample("t3", seed, rows),
    "Gaussian, 0.1 % of elements x10": lambda seed, rows: scattered_outliers(seed, rows, 0.001),
    "Gaussian, 0.3 % of elements x10": lambda seed, rows: scattered_outliers(seed, rows, 0.003),
    "t(6), 4 of 1024 channels x20": channel_outliers,
}


@dataclass
class ScaleRules:
    """What was measured.

    Attributes:
        constants: (format, rule) -> squared error at sigma 1.
        curve: law -> c -> relative MSE over the smallest of the curve; best: law -> the c of the smallest.
        coarse_best: law -> the best of C_COARSE.
        changed: (block size, law, spread) -> "oas" or "search" -> fraction of blocks with another scale than rceil's.
        decibels: data -> "oas" (over floor), "static", "dynamic" (OAS with MBS 128 over OAS), blocks of 16, in dB.
        rounding: spread -> "nearest", "stochastic" (relative MSE, rceil), "misalignment" (1 - slope).
        prescale: 3/4 pre-scale with floor, and with the scale of floor but no clipping: change of the MSE against floor.
        octave: rule -> relative MSE, Gaussian rows over one octave, blocks of 32.
    """

    constants: dict[tuple[str, str], Estimate]
    curve: dict[str, dict[float, Estimate]]
    best: dict[str, float]
    coarse_best: dict[str, float]
    changed: dict[tuple[int, str, str], dict[str, Estimate]]
    decibels: dict[str, dict[str, Estimate]]
    rounding: dict[str, dict[str, Estimate]]
    prescale: dict[str, Estimate]
    octave: dict[str, Estimate]


def measure(size: Size) -> ScaleRules:
    curve = {law: over_seeds(lambda seed, law=law: _curve(law, seed, size.few_rows), size.seeds) for law in C_LAWS}
    changed = {
        (block, law, spread): over_seeds(lambda seed, k=(block, law, spread): _changed(*k, seed, size.few_rows), size.seeds)
        for block in (32, 16)
        for spread in ("fixed", "octave")
        for law in CHANGED_LAWS
    }
    return ScaleRules(
        constants=constants(size),
        curve={law: _over_smallest(values) for law, values in curve.items()},
        best={law: min(values, key=lambda c: values[c].value) for law, values in curve.items()},
        coarse_best={law: min(C_COARSE, key=lambda c: values[c].value) for law, values in curve.items()},
        changed=changed,
        decibels={
            name: over_seeds(lambda seed, draw=draw: _decibels(draw(seed, size.few_rows)), size.seeds)
            for name, draw in DECIBEL_DATA.items()
        },
        rounding={
            spread: over_seeds(lambda seed, spread=spread: _rounding(spread, seed, size.rows), size.seeds)
            for spread in ("fixed", "octave")
        },
        prescale=over_seeds(lambda seed: _prescale(seed, size.rows), size.seeds),
        octave=over_seeds(
            lambda seed: {
                rule: rel_mse(sample("gaussian", seed, size.rows), QuantRecipe(scale_rule=rule))
                for rule in ("floor", "rceil", "oas", "search")
            },
            size.seeds,
        ),
    )


def constants(size: Size) -> dict[tuple[str, str], Estimate]:
    """Squared error of every format and rule of CONSTANTS on Gaussian data of sigma 1."""

    def one(seed: int) -> dict[tuple[str, str], float]:
        x = sample("gaussian", seed, size.rows, spread="fixed")
        power = x.double().square().mean().item()
        errors = {}
        for name, block in (("MXFP4, blocks of 32", 32), ("MXFP4, blocks of 16", 16)):
            for rule in CONSTANTS[name]:
                key = _RULES[rule]
                recipe = None if key is None else QuantRecipe(scale_rule=key, block_size=block)
                errors[name, rule] = power * (real_scale_rel_mse(x, block) if recipe is None else rel_mse(x, recipe))
        for rule in CONSTANTS["NVFP4"]:
            errors["NVFP4", rule] = power * rel_mse(x, QuantRecipe(format="nvfp4", scale_rule=rule))
        return errors

    return over_seeds(one, size.constant_seeds)


def decibels(before: float, after: float) -> float:
    """How much smaller an error energy became, in dB."""
    return 10 * math.log10(before / after)


def _curve(law: str, seed: int, rows: int) -> dict[float, float]:
    x = sample(law, seed, rows)
    return {c: rel_mse(x, QuantRecipe(scale_rule=c)) for c in C_GRID}


def _over_smallest(values: dict[float, Estimate]) -> dict[float, Estimate]:
    smallest = min(v.value for v in values.values())
    return {c: v * (1 / smallest) for c, v in values.items()}


def _changed(block: int, law: str, spread: str, seed: int, rows: int) -> dict[str, float]:
    x = sample(law, seed, rows, spread=spread)
    base = quantize(x, QuantRecipe(block_size=block)).scales
    found = {rule: quantize(x, QuantRecipe(scale_rule=rule, block_size=block)).scales for rule in ("oas", "search")}
    return {rule: (scales != base).double().mean().item() for rule, scales in found.items()}


def _decibels(x) -> dict[str, float]:
    error = {
        words: rel_mse(x, QuantRecipe.parse("mxfp4+b16+" + words)) for words in ("floor", "oas", "oas+mbs", "oas+mbs-dynamic")
    }
    return {
        "oas": decibels(error["floor"], error["oas"]),
        "static": decibels(error["oas"], error["oas+mbs"]),
        "dynamic": decibels(error["oas"], error["oas+mbs-dynamic"]),
    }


def _rounding(spread: str, seed: int, rows: int) -> dict[str, float]:
    x = sample("gaussian", seed, rows, spread=spread)
    nearest = error_stats(x).metrics()
    found = {"nearest": nearest["rel_mse"], "misalignment": 1 - nearest["slope"]}
    for name, words in (("stochastic", "sr"), ("stochastic prescale", "sr+prescale")):
        metrics = error_stats(x, QuantRecipe.parse("mxfp4+" + words), seed=seed).metrics()
        found |= {name: metrics["rel_mse"], name + " slope": metrics["slope"]}
    return found


def _prescale(seed: int, rows: int) -> dict[str, float]:
    x = sample("gaussian", seed, rows)
    floor = rel_mse(x, QuantRecipe(scale_rule="floor"))
    # 3/4 x with rceil has s = 2^ceil(log2(amax / 8)): floor's scale (powers of two apart), at which 3/4 x does not clip.
    return {
        "before": rel_mse(x, QuantRecipe.parse("mxfp4+floor+prescale")) / floor - 1,
        "after": rel_mse(x, QuantRecipe.parse("mxfp4+rceil+prescale")) / floor - 1,
    }
