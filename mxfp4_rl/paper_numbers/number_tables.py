"""The numbers behind the main table, beside those of the independent simulation: a function a group of tables."""

from __future__ import annotations

import math

from mxfp4_rl.paper_numbers import components as components_section
from mxfp4_rl.paper_numbers import corrections as corrections_section
from mxfp4_rl.paper_numbers import nvfp4 as nvfp4_section
from mxfp4_rl.paper_numbers import scale_rules as scale_rules_section
from mxfp4_rl.paper_numbers.components import Components
from mxfp4_rl.paper_numbers.corrections import Corrections
from mxfp4_rl.paper_numbers.data import COLUMNS, Size, label
from mxfp4_rl.paper_numbers.estimate import Estimate
from mxfp4_rl.paper_numbers.markdown import percent, table, text
from mxfp4_rl.paper_numbers.nvfp4 import NVFP4Numbers
from mxfp4_rl.paper_numbers.scale_rules import ScaleRules

_SPREADS = {"fixed": "fixed sigma", "octave": "octave"}


def components(c: Components) -> list[str]:
    names = ("rel_mse", "floor", "S", "D", "G", "cos", "dead", "zero", "delta")
    headings = ("relMSE", "floor", "S", "D", "G", "cos", "dead", "zero", "mean delta")

    def simulated(key: tuple[str, str]) -> str:
        rel_mse, floor, s, d, g, cos, dead, delta = components_section.REFERENCE[key]
        return f"{rel_mse:.5f}, {floor:.5f}; {s:.3f} / {d:.4f} / {g:.3f} / {cos:.3f}; {dead:.3f}; {delta:.3f}"

    cells = [
        (f"{label(law)}, {_SPREADS[spread]}", *(e[name] for name in names), simulated((law, spread)))
        for (law, spread), e in c.table.items()
    ]
    shares = [
        (
            rule,
            *(e[part].short(3) for part in ("deadzone", "grid_noise", "clipping")),
            " / ".join(f"{v:.3f}" for v in components_section.PARTITION_REFERENCE[rule] or ()),
        )
        for rule, e in c.partition.items()
    ]
    return [
        "### Components of the error by distribution",
        text(
            """rceil, blocks of 32. S, D and G are the energies of scale bias, deadzone and grid noise over the error's,
            cos is the cosine of scale bias and grid noise; "dead" is the fraction of elements in the deadzone of the
            ideal scale, "zero" of those that become 0. The paper has 1.726 / .022 / .712 / -.658 and 1.725 / .026 / .703
            / -.657. (t(3) has no fourth moment: its standard errors are themselves uncertain.)"""
        ),
        table(
            (
                "distribution",
                *headings,
                "independent simulation: relMSE, floor; S / D / G / cos; dead; mean delta",
            ),
            cells,
        ),
        text(
            """The same error by what became of each element, which works for every rule and sums to 1; t(12),
            fixed sigma:"""
        ),
        table(("scale rule", "became 0", "on the grid", "clipped", "independent simulation"), shares),
    ]


def constants(rules: ScaleRules, size: Size) -> list[str]:
    reference = scale_rules_section.CONSTANTS
    deviation = {(name, rule): e.value / reference[name][rule] - 1 for (name, rule), e in rules.constants.items()}
    worst = max(abs(d) for d in deviation.values())
    return [
        "### Absolute errors",
        text(
            f"""Mean squared error on Gaussian data with sigma 1, {size.constant_seeds * size.rows * COLUMNS:,} elements.
            The largest deviation from the independent simulation is {percent(worst, 2)}; the bar is 0.5 %. (NVFP4's
            tensor scale follows the largest of all elements, so its error depends a little on the tensor's size.)"""
        ),
        table(
            ("format", "scale rule", "ours", "independent simulation", "deviation"),
            [
                (name, f"`{rule}`", e, f"{reference[name][rule]:.6f}", percent(deviation[name, rule], 2, "+"))
                for (name, rule), e in rules.constants.items()
            ],
        ),
    ]


def scale_rules(rules: ScaleRules) -> list[str]:
    fixed = {rule: rules.constants["MXFP4, blocks of 32", rule].value for rule in ("floor", "rceil", "oas", "search")}
    laws = scale_rules_section.CHANGED_LAWS
    named = {"6 (rceil)": 6.0, "7 (oas, even)": 7.0, "7.25": 7.25, "7.5": 7.5, "8 (floor)": 8.0, "8.5": 8.5}
    return [
        "### Scale rules",
        text(
            """All rules but search are s = 2^ceil(log2(amax / c)) for one c. The squared error over c, rows over an
            octave, as a ratio to the smallest of the curve:"""
        ),
        "![squared error against the constant c](paper_numbers/scale_constant.png)",
        table(
            ("c", *named), [(label(law), *(curve[c].short(3) for c in named.values())) for law, curve in rules.curve.items()]
        ),
        text(
            f"""Exponent search tries rceil's exponent and the one below:
            {percent(fixed["search"] / fixed["rceil"] - 1, 1)} squared error against rceil and
            {percent(fixed["search"] / fixed["floor"] - 1, 1)} against floor (independent simulation: -6.4 %, -5.8 %), of
            which oas has {percent(fixed["oas"] / fixed["rceil"] - 1, 1)} against rceil without any search. Whether floor
            or rceil is better depends on sigma when it is fixed; over an octave they have {rules.octave["floor"]} and
            {rules.octave["rceil"]}, and oas {rules.octave["oas"]} (independent simulation: 0.01345, 0.01361, 0.01264).
            Blocks with another scale than rceil's:"""
        ),
        table(
            (
                "blocks of",
                "rows",
                *(f"{rule}, {label(law)}" for rule in ("oas", "search") for law in laws),
            ),
            [
                (
                    block,
                    _SPREADS[spread],
                    *(percent(rules.changed[block, law, spread][rule]) for rule in ("oas", "search") for law in laws),
                )
                for block in (16, 32)
                for spread in _SPREADS
            ],
        ),
        text(
            """What OAS gains over floor, and what MBS 128 gains over OAS (all with blocks of 16, rows over an octave),
            in dB of squared error; published 0.5, 1.1 and 1.6 on real tensors (AMD's port of 2603.08713):"""
        ),
        table(
            ("data", "OAS over floor", "OAS + MBS static over OAS", "OAS + MBS dynamic over OAS"),
            [(name, e["oas"], e["static"], e["dynamic"]) for name, e in rules.decibels.items()],
        ),
        text(
            f"""Pre-scaling by 3/4 (2601.09555) changes floor's squared error by
            {percent(rules.prescale["before"], sign="+")} when it is applied before the scale is computed, and by
            {percent(rules.prescale["after"], sign="+")} after it, where nothing clips any more (independent simulation:
            -1.4 %, +2.1 %): it repairs a bias, not the error."""
        ),
    ]


def nvfp4(n: NVFP4Numbers) -> list[str]:
    offsets, dss = nvfp4_section.OFFSET_REFERENCE, n.dss
    soar = [(stage, n.soar[stage], f"{value:.5f}") for stage, value in nvfp4_section.SOAR_REFERENCE.items()]
    return [
        "### NVFP4: ScaleSearch, four-over-six, SOAR",
        text(
            """ScaleSearch (2605.12464) against static scales, Gaussian with sigma 1, by the window of E4M3 codes it
            tries:"""
        ),
        table(
            ("window", *(str(list(window)) for window in n.windows)),
            [
                ("change of the squared error", *(percent(e) for e in n.windows.values())),
                ("independent simulation", *(f"{nvfp4_section.WINDOW_REFERENCE[w]} %" for w in n.windows)),
            ],
        ),
        text(
            """(Its last value is an exhaustive search.) Offsets of the codes chosen in [-2, 6]; the second mode is
            four-over-six's "scale to 4", at 1.5 times the scale:"""
        ),
        table(
            ("offset", *(f"{o:+d}" if o else "0" for o in n.offsets)),
            [
                ("blocks", *(percent(e) for e in n.offsets.values())),
                ("independent simulation", *(f"{offsets[o]} %" if o in offsets else "" for o in n.offsets)),
            ],
        ),
        text("Four-over-six (2512.02010) against static scales:"),
        table(
            ("", *(label(law) for law in n.four_over_six)),
            [
                ("change of the squared error", *(percent(e["change"]) for e in n.four_over_six.values())),
                ("independent simulation", *(f"{v} %" for v in nvfp4_section.FOUR_OVER_SIX_LAWS.values())),
                ("blocks that choose 4", *(percent(e["four"]) for e in n.four_over_six.values())),
                ("independent simulation", "45 %", *[""] * (len(n.four_over_six) - 1)),
            ],
        ),
        text(
            """SOAR (2605.12245), relMSE on the Gaussian. It moves all scales together, but each by small steps from
            where it stands, and ends above a search over a window:"""
        ),
        table(("", "ours", "independent simulation"), [*soar, ("ScaleSearch [-2, 6]", n.soar["ScaleSearch"], "0.00660")]),
        text(
            f"""DSS under the squared error: over {dss.blocks:,} blocks, all {dss.codes} E4M3 codes and {dss.betas}
            betas, {dss.improved} blocks are better with a beta other than 1. Inside SOAR such a beta won {dss.soar_wins}
            times, and SOAR ends at {dss.soar_full:.6f} with all betas and at {dss.soar_plain:.6f} with beta 1 only; the
            exhaustive search on the same blocks has {dss.exhaustive:.6f}."""
        ),
    ]


def corrections(c: Corrections, size: Size) -> list[str]:
    draws = 2 * size.seeds
    scatter = max(e.error / e.value for e in c.products.values()) * math.sqrt(draws)
    masks = corrections_section.MASK_REFERENCE
    return [
        "### Outlier fallback",
        text(
            """Squared error with OF over that without, rows over an octave: (1 - alpha)^2 plus a little, whatever the
            law and the scale rule."""
        ),
        table(
            ("law, scale rule", *(f"alpha = {a:g}" for a in corrections_section.ALPHAS)),
            [
                *((f"{label(law)}, {rule}", *values.values()) for (law, rule), values in c.alpha.items()),
                ("independent simulation", *(f"{v:.3f}" for v in corrections_section.ALPHA_REFERENCE.values())),
            ],
        ),
        text(
            f"""Elements that become 0: {percent(c.zeros["plain"])} without, {percent(c.zeros["fallback"])} with OF
            (independent simulation: 11.1 %, 1.5 %). Masked OF, alpha 1, only the blocks with the largest magnitudes;
            relMSE on t(6) elements with 4 of 1024 channels 20 times larger:"""
        ),
        table(
            ("blocks with a second pass", *("none" if f is None else "all" if f == 1 else percent(f) for f in c.masked)),
            [("ours", *c.masked.values()), ("independent simulation", *(f"{masks[f]:g}" for f in c.masked))],
        ),
        "### A W4A4 product",
        text(
            f"""Y = A W^T, K = 1024: activations as in the last table, Gaussian weights, both operands with the same
            recipe; relMSE of Y against the unquantised product. Where the outlier channels fall decides how many blocks
            they spoil, so single draws scatter by up to {percent(scatter)} (standard deviation); ours is the mean of
            {draws}. The simulation's values have four decimals."""
        ),
        table(
            ("both operands", "ours", "independent simulation", "deviation"),
            [
                (name, c.products[recipe], f"{value:.4f}", percent(c.products[recipe].value / value - 1, sign="+"))
                for recipe, (name, value) in corrections_section.PRODUCTS.items()
            ],
        ),
    ]


def rounding(rules: ScaleRules, c: Corrections) -> list[str]:
    tiles = {
        "tile": "32 x 32 tiles, relMSE",
        "one_d": "blocks along the rows, relMSE",
        "twice": "blocks along the rows, then along the columns, relMSE",
        "mismatch": "along the rows against along the columns: relMSE between the two",
        "differ": "the same: elements that differ",
    }
    fixed, octave = rules.rounding["fixed"], rules.rounding["octave"]
    reference = corrections_section.TILE_REFERENCE
    nearest_slope = Estimate(1 - octave["misalignment"].value, octave["misalignment"].error)

    def shown(name: str, value: Estimate) -> str:
        return percent(value) if name == "differ" else str(value)

    return [
        "### Tiles, stochastic rounding, activations",
        text("""A square Gaussian weight, quantised once for forward and dgrad in 2-D tiles, or along one axis for each:"""),
        table(
            ("", "fixed sigma", "independent simulation", "octave", "independent simulation"),
            [
                (
                    words,
                    shown(name, c.tiles["fixed"][name]),
                    reference["fixed"].get(name, ""),
                    shown(name, c.tiles["octave"][name]),
                    reference["octave"].get(name, ""),
                )
                for name, words in tiles.items()
            ],
        ),
        text(
            """Stochastic rounding on Gaussian data is unbiased, at twice the error of rounding to nearest. "With
            pre-scale" is 2502.20586's: floor's scale and 3/4 of the value, so that nothing clips."""
        ),
        table(
            ("", "relMSE, fixed sigma", "relMSE, octave", "slope Q.x / x.x, octave", "relMSE elsewhere"),
            [
                ("to nearest", fixed["nearest"], octave["nearest"], nearest_slope, "0.0137 (2505.14669)"),
                (
                    "stochastic",
                    fixed["stochastic"],
                    octave["stochastic"],
                    octave["stochastic slope"],
                    "0.0277 (2505.14669)",
                ),
                (
                    "stochastic, with pre-scale",
                    fixed["stochastic prescale"],
                    octave["stochastic prescale"],
                    octave["stochastic prescale slope"],
                    "0.0281 (independent simulation)",
                ),
            ],
        ),
        text("SQNR with floor scales, elements that become 0, and the mean of error over magnitude (row 20):"),
        table(
            ("data", "SQNR in dB", "zeros", "mean relative error"),
            [(name, e["decibels"], percent(e["zeros"]), percent(e["relative"])) for name, e in c.sqnr.items()],
        ),
    ]
