"""The main table: every published number that needs no large model, what this project measures, and whether they agree.

An agreement is decided by the numbers (a condition in the code below), not written down; the words after it say what the
condition is or why it fails.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from mxfp4_rl.paper_numbers.components import SWEEP_REFERENCE
from mxfp4_rl.paper_numbers.estimate import Estimate
from mxfp4_rl.paper_numbers.gradient import PRINTED_RANGE
from mxfp4_rl.paper_numbers.markdown import percent
from mxfp4_rl.paper_numbers.measure import Results

YES, NO, PARTLY, LARGE_MODEL = "yes", "no", "partly", "needs an 8B model"
NOT_COMPARABLE = "not comparable"  # another quantity was published, or none
PAPER, QUARTET = "2605.20402", "2505.14669, Table 2"


@dataclass(frozen=True)
class Row:
    """One row: `published` with its short `source` (an arXiv number where there is one), `ours`, `agreement` and why."""

    number: int
    quantity: str
    published: str
    source: str
    ours: str
    agreement: str
    why: str


def rows(results: Results) -> list[Row]:
    """All 20 rows, in order."""
    return [
        *_component_rows(results),
        *_macro_and_fallback_rows(results),
        *_nvfp4_and_rounding_rows(results),
        *_remaining_rows(results),
    ]


def verdict(*conditions: bool) -> str:
    """yes if all hold, no if none does, else partly."""
    return YES if all(conditions) else PARTLY if any(conditions) else NO


def _near(estimate: Estimate, value: float, tolerance: float) -> bool:
    return abs(estimate.value - value) <= tolerance


def _component_rows(r: Results) -> list[Row]:
    table = r.components.table
    near_gaussian, gaussian, t10 = table["t30", "octave"], table["gaussian", "octave"], table["t10", "octave"]
    fixed = table["gaussian", "fixed"]
    orthogonality, sweep, gradient = r.components.orthogonality, r.components.sweep, r.gradient
    low, high = gradient.range
    published = {"S": (1.726, 1.725), "D": (0.022, 0.026), "G": (0.712, 0.703), "cos": (-0.658, -0.657)}
    ladder = [sweep[k] for k in sorted(sweep)]
    return [
        Row(
            1,
            "S / D / G / cosine, rceil, blocks of 32, weights",
            "1.726 / .022 / .712 / -.658 and 1.725 / .026 / .703 / -.657",
            f"{PAPER}: Qwen3-30B-A3B-Base, Qwen2.5-3B",
            "t(30): " + " / ".join(str(near_gaussian[k]) for k in published),
            verdict(all(_near(near_gaussian[k], value, 0.01) for k, both in published.items() for value in both)),
            "nearly Gaussian weights of many scales are within .01 of both models",
        ),
        Row(
            2,
            "inner products of the deadzone with scale bias and grid noise",
            "0, element by element",
            PAPER,
            f"cosine with scale bias: rceil {orthogonality['rceil']}, ceil {orthogonality['ceil']}; but floor "
            f"{orthogonality['floor']}, oas {orthogonality['oas']}",
            verdict(orthogonality["rceil"].value == 0 and orthogonality["ceil"].value == 0),
            "where scales are rounded up, as the paper's are; grid noise never shares an element with the deadzone",
        ),
        Row(
            3,
            "elements in the deadzone",
            "about 9 %",
            PAPER,
            f"Gaussian {percent(gaussian['dead'])}, t(30) {percent(near_gaussian['dead'])}, t(10) {percent(t10['dead'])}; "
            f"zeros with the actual scale: Gaussian, fixed sigma, {percent(fixed['zero'])}",
            verdict(gaussian["dead"].value < 0.09 < t10["dead"].value),
            "between Gaussian and t(10)",
        ),
        Row(
            4,
            "mean delta; E[2^delta]",
            "0.546; 1.44",
            PAPER,
            f"{gaussian['delta']}; {gaussian['ratio']} (fixed sigma: {fixed['delta']}; {fixed['ratio']})",
            verdict(_near(gaussian["ratio"], 1.4427, 0.01), _near(gaussian["delta"], 0.546, 0.02)),
            "1.44 = 1 / ln 2 follows from uniform delta, whose mean is 0.5; 0.546 is that model's",
        ),
        Row(
            5,
            "standard deviation of the sum of delta over 48 layers; its range",
            f"2.0 (empirical 1.97); [{PRINTED_RANGE[0]}x, {PRINTED_RANGE[1]}x]",
            PAPER,
            f"{gradient.sum_std}; [{low:.2f}x, {high:.2f}x]",
            verdict(
                _near(gradient.sum_std, 2.0, 0.03), abs(low - PRINTED_RANGE[0]) < 0.02 and abs(high - PRINTED_RANGE[1]) < 0.2
            ),
            "2.0 octaves, but 2^2 is 4: see [the analysis](#2-the-range-of-the-gradient)",
        ),
        Row(
            6,
            "error against the scale's mantissa bits",
            "converges to the real-valued scale's error",
            f"{PAPER}, Fig. 2",
            "over that error, k = 0 to 8: " + ", ".join(e.short(3) for e in ladder),
            verdict(
                all(a.value > b.value for a, b in itertools.pairwise(ladder)) and ladder[-1].value < 1.005,
            ),
            "falls at every bit; independent simulation: " + ", ".join(f"{v:.3f}" for v in SWEEP_REFERENCE),
        ),
    ]


def _macro_and_fallback_rows(r: Results) -> list[Row]:
    macro, alpha = r.macro_blocks, r.corrections.alpha["gaussian", "rceil"]
    closed = {law: values["static", 128] for law, values in macro.closed.items()}
    left = macro.bias["gaussian"]["static", 128].value / macro.base["gaussian"]["bias"].value
    fitted = macro.closed["gaussian"]["static", 32]
    return [
        Row(
            7,
            "MBS with macro blocks of 128 removes the scale component; the error converges to the real-valued scale's",
            "the component vanishes",
            PAPER,
            f"share of the error's gap closed: {percent(closed['gaussian'])} (Gaussian), {percent(closed['t12'])} (t(12)), "
            f"{percent(closed['laplace'])} (Laplace); {percent(left)} of the component's energy is left",
            verdict(closed["gaussian"].value > 0.95 and left < 0.05),
            f"macro blocks of 32 close {percent(fitted)}: see [the analysis](#1-macro-blocks-of-128)",
        ),
        Row(
            8,
            "OF: alpha = 0.5 is better than 1",
            "final accuracy 91.58 against 90.45",
            PAPER,
            f"MSE over that without OF: {alpha[0.5]} (alpha 0.5), {alpha[1.0]} (alpha 1)",
            NOT_COMPARABLE,
            "the accuracies are RL runs of a 30B model; squared error ranks the two the other way round",
        ),
    ]


def _nvfp4_and_rounding_rows(r: Results) -> list[Row]:
    search, four = r.nvfp4.windows[-2, 6], r.nvfp4.four_over_six["gaussian"]["change"]
    fixed, octave = r.scale_rules.rounding["fixed"], r.scale_rules.rounding["octave"]
    both = "{fixed} (fixed sigma), {octave} (rows over an octave)"
    return [
        Row(
            9,
            "ScaleSearch, NVFP4, Gaussian, window [-2, 6]",
            "-27 % error",
            "2605.12464",
            percent(search),
            verdict(_near(search, -0.27, 0.005)),
            "bar: 0.5 points",
        ),
        Row(
            10,
            "four-over-six, NVFP4, Gaussian",
            "lower MSE, no public number",
            "2512.02010",
            percent(four),
            NOT_COMPARABLE,
            "no number to compare with but an independent simulation's, -16.5 %",
        ),
        Row(
            11,
            "MSE of round-to-nearest absmax MXFP4, Gaussian",
            "1.37e-2",
            QUARTET,
            both.format(fixed=fixed["nearest"], octave=octave["nearest"]),
            verdict(_near(octave["nearest"], 1.37e-2, 0.03e-2)),
            "within 2 % over an octave; a fixed sigma depends on where it lies between powers of two",
        ),
        Row(
            12,
            "MSE of stochastic rounding, absmax MXFP4, Gaussian",
            "2.77e-2",
            QUARTET,
            both.format(fixed=fixed["stochastic"], octave=octave["stochastic"]),
            verdict(_near(octave["stochastic"], 2.77e-2, 0.05e-2)),
            "within 2 % over an octave",
        ),
        Row(
            13,
            "misalignment of round-to-nearest, 1 - E[1/S]",
            "9.3e-3",
            QUARTET,
            "1 - slope: " + both.format(fixed=fixed["misalignment"], octave=octave["misalignment"]),
            verdict(_near(octave["misalignment"], 9.3e-3, 0.93e-3)),
            "within 10 %: another normalisation",
        ),
        Row(
            14,
            "gain of OAS over floor scales, blocks of 16",
            "about 0.5 dB",
            "AMD's port of 2603.08713",
            ", ".join(f"{name} {r.scale_rules.decibels[name]['oas']} dB" for name in ("Gaussian", "t(12)", "Laplace")),
            verdict(all(_near(r.scale_rules.decibels[name]["oas"], 0.5, 0.1) for name in ("Gaussian", "t(12)", "Laplace"))),
            "within 0.1 dB",
        ),
    ]


def _remaining_rows(r: Results) -> list[Row]:
    changed, decibels, dss, sqnr = r.scale_rules.changed, r.scale_rules.decibels, r.nvfp4.dss, r.corrections.sqnr
    heavy = sqnr["t(3)"]
    mild, outliers = decibels["Gaussian"], decibels["Gaussian, 0.3 % of elements x10"]
    coarse, best = r.scale_rules.coarse_best, r.scale_rules.best
    return [
        Row(
            15,
            "blocks that OAS changes",
            "about 15 %",
            "AMD's port of 2603.08713",
            "Gaussian, blocks of 16: OAS "
            + percent(changed[16, "gaussian", "fixed"]["oas"])
            + " (fixed sigma), "
            + percent(changed[16, "gaussian", "octave"]["oas"])
            + " (octave); blocks of 32: OAS "
            + percent(changed[32, "gaussian", "fixed"]["oas"])
            + ", exponent search "
            + percent(changed[32, "gaussian", "fixed"]["search"])
            + " (fixed sigma)",
            verdict(
                _near(changed[16, "gaussian", "octave"]["oas"], 0.15, 0.03),
                _near(changed[16, "gaussian", "fixed"]["oas"], 0.15, 0.03),
            ),
            "a fixed sigma decides it (15 % is the exponent search's at blocks of 32); over an octave it is log2(7/6) = 22 %, "
            "for any law and block size",
        ),
        Row(
            16,
            "gain over OAS, blocks of 16: OAS + MBS static; dynamic",
            "+1.1 dB; +1.6 dB (real tensors)",
            "AMD's port of 2603.08713",
            "; ".join(
                f"{name}: +{decibels[name]['static']}, +{decibels[name]['dynamic']}"
                for name in ("Gaussian", "Laplace", "Gaussian, 0.1 % of elements x10", "Gaussian, 0.3 % of elements x10")
            ),
            verdict(
                _near(mild["static"], 1.1, 0.2) and _near(mild["dynamic"], 1.6, 0.2),
                mild["static"].value < 1.1 < outliers["static"].value
                and mild["dynamic"].value < 1.6 < outliers["dynamic"].value,
            ),
            "the gain grows with outliers; the published pair lies between 0.1 % and 0.3 % of elements x10",
        ),
        Row(
            17,
            "perplexity of Qwen3-8B, WikiText-2: BF16, floor, OAS, OAS + MBS static, + MBS hybrid (MXFP4, blocks of 16), NVFP4",
            "12.20, 15.18, 13.65, 13.09, 13.03, 12.69",
            "2603.08713, Table 2, as cited by a third-party reproduction, which got 12.22, 15.15, 13.59, 13.08, 13.05, -",
            "not measured",
            LARGE_MODEL,
            "see [below](#row-17)",
        ),
        Row(
            18,
            "the best c of s = 2^ceil(log2(amax / c))",
            "7.25",
            "2607.24377",
            "among {6, 6.5, 7, 7.25, 7.5, 8}: "
            + ", ".join(f"{coarse[law]:g}" for law in coarse)
            + "; on a grid of 0.05: "
            + ", ".join(f"{best[law]:g}" for law in best)
            + " (Gaussian, t(5), Laplace)",
            verdict(all(c == 7.25 for c in coarse.values())),
            "the minimum is flat: 7.25 costs "
            + f"{percent(max(curve[7.25].value for curve in r.scale_rules.curve.values()) - 1, 1)} at most",
        ),
        Row(
            19,
            "DSS (rounding at beta times the stored scale) gains nothing in squared error",
            "no gain",
            "NVIDIA modelopt's tests",
            f"{dss.improved} of {dss.blocks:,} blocks improved by {dss.betas} betas x {dss.codes} codes over beta = 1; "
            f"inside SOAR {dss.soar_wins} times",
            verdict(dss.improved == 0 and dss.soar_wins == 0 and dss.soar_full == dss.soar_plain),
            "for a stored scale, nearest rounding at that scale is best element by element",
        ),
        Row(
            20,
            "SQNR of MXFP4 activations (floor), zeros, mean relative error",
            "17.0 +- 0.4 dB, 22.9 %, 36 % (Qwen2.5-1.5B)",
            "a public verl fork of one of 2605.20402's authors",
            "; ".join(
                f"{name}: {e['decibels'].short(1)} dB, {percent(e['zeros'].value, 1)}, {percent(e['relative'].value)}"
                for name, e in sqnr.items()
            ),
            verdict(_near(heavy["decibels"], 17.0, 0.4), _near(heavy["zeros"], 0.229, 0.02)),
            "t(3) has the SQNR, no law here that many zeros: real activations have more structure than independent elements",
        ),
    ]
