"""The page's figures: one function a figure, from a section's results to a matplotlib figure, in the run report's colours."""

# ruff: noqa: RUF001  (the Greek letters are meant)

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from mxfp4_rl.monitor.plots import WIDTH_INCHES
from mxfp4_rl.paper_numbers import gradient as gradient_section
from mxfp4_rl.paper_numbers import macro_blocks as macro_section
from mxfp4_rl.paper_numbers import temperature as temperature_section
from mxfp4_rl.paper_numbers.data import label
from mxfp4_rl.paper_numbers.gradient import Gradient
from mxfp4_rl.paper_numbers.macro_blocks import MacroBlocks
from mxfp4_rl.paper_numbers.scale_rules import NEAREST_LOG2, ScaleRules
from mxfp4_rl.paper_numbers.temperature import Temperature

DPI = 110
_BLUE, _RED, _GREEN, _PURPLE, _ORANGE, _GREY, _DARK = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#aa3377",
    "#cc6611",
    "#999999",
    "#444444",
)
_KIND_STYLE = {  # macro-block recipe -> colour, marker
    "static": (_BLUE, "o"),
    "dynamic": (_RED, "s"),
    "OAS + static": (_GREEN, "^"),
    "OAS + dynamic": (_PURPLE, "D"),
}
_LAW_STYLE = {"gaussian": (_BLUE, "o"), "t5": (_RED, "s"), "laplace": (_GREEN, "^")}


def draw_constant(rules: ScaleRules) -> Figure:
    """Error against the constant c of s = 2^ceil(log2(amax / c))."""
    figure = _figure(4.0)
    axes = _axes(figure.add_subplot(), "c in  scale = 2^ceil(log2(amax / c))", "relative MSE / smallest of the curve")
    top = 1.32
    for law, curve in rules.curve.items():
        colour, marker = _LAW_STYLE[law]
        axes.plot(list(curve), [e.value for e in curve.values()], color=colour, linewidth=1.8)
        best = rules.best[law]
        axes.plot([best], [curve[best].value], color=colour, marker=marker, markersize=8)
    for c, name in {6: "rceil", 7: "oas, even", 8: "floor", NEAREST_LOG2: "nearest log2"}.items():
        axes.axvline(c, color=_GREY, linewidth=0.9, linestyle=":", zorder=0)
        left = c == 7  # 7.25's line is close on its right
        style = {"xytext": (-3 if left else 3, -3), "ha": "right" if left else "left", "va": "top", "fontsize": 9}
        axes.annotate(name, (c, top), textcoords="offset points", color=_DARK, **style)
    axes.axvline(7.25, color=_DARK, linewidth=1.2, linestyle="--", zorder=0)
    axes.annotate("7.25", (7.25, top), xytext=(3, -3), textcoords="offset points", va="top", fontsize=9, color=_DARK)
    axes.set_xlim(5.5, 9.0)
    axes.set_ylim(0.99, top)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, label=f"{label(law)}: least at c = {rules.best[law]:g}")
        for law, (colour, marker) in _LAW_STYLE.items()
    ]
    figure.legend(handles=handles, ncols=3, loc="outside upper left", frameon=False, fontsize=9)
    return figure


def draw_macro_blocks(macro: MacroBlocks) -> Figure:
    """The scale component by macro size, and the share of the error's gap that is closed, a panel a distribution."""
    figure = _figure(6.6)
    bias_axes, *gap_axes = figure.subplots(2, 2).flatten()
    sizes = macro_section.SIZES
    _axes(bias_axes, "", "‖scale component‖² / ‖x‖²")
    bias_axes.set_title("scale component, Gaussian", fontsize=10)
    without = macro.base["gaussian"]["bias"].value
    bias_axes.axhline(without, color=_DARK, linestyle=":", linewidth=1.5)
    bias_axes.set_ylim(0, 1.13 * without)
    for kind, (colour, marker) in _KIND_STYLE.items():
        values = [macro.bias["gaussian"][kind, size].value for size in sizes]
        # Rules whose values coincide stay visible: the later one is drawn smaller, on top.
        small = kind.startswith("OAS")
        bias_axes.plot(sizes, values, color=colour, marker=marker, markersize=4.5 if small else 7.5, linewidth=1.5)
    for axes, law in zip(gap_axes, macro_section.LAWS):
        _axes(axes, "macro-block size (bits per element)" if law != "gaussian" else "", "share of the gap closed")
        axes.set_title(f"error, {label(law)}", fontsize=10)
        axes.axhline(1, color=_DARK, linestyle="--", linewidth=1.2)
        for kind, (colour, marker) in _KIND_STYLE.items():
            values = [macro.closed[law][kind, size].value for size in sizes]
            small = kind.startswith("OAS")
            axes.plot(sizes, values, color=colour, marker=marker, markersize=4.5 if small else 7.5, linewidth=1.5)
        axes.set_ylim(0, 1.75)
    for axes in (bias_axes, *gap_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size}\n({macro_section.bits(size):g})" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, label=kind) for kind, (colour, marker) in _KIND_STYLE.items()
    ]
    handles += [
        Line2D([], [], color=_DARK, linestyle=":", linewidth=1.5, label="without MBS"),
        Line2D([], [], color=_DARK, linestyle="--", linewidth=1.2, label="real-valued scale (the “floor”)"),
    ]
    figure.legend(handles=handles, ncols=6, loc="outside upper left", frameon=False, fontsize=9)
    return figure


def draw_gradient(gradient: Gradient) -> Figure:
    """Left, sums of delta along random paths; right, what the gradient's norm does."""
    figure = _figure(4.3)
    sums_axes, chain_axes = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.15]})
    _axes(sums_axes, "Σδ over 48 layers − mean (octaves)", "density over random paths")
    sums_axes.hist(gradient.sums, bins=60, density=True, color=_BLUE, alpha=0.75)
    std = gradient.sum_std.value
    low, high = (math.log2(v) for v in gradient_section.PRINTED_RANGE)
    sums_axes.set_xlim(-8, 8)
    top = 1 / (std * math.sqrt(2 * math.pi))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # keeps lines out of the words
    sums_axes.set_ylim(0, 1.62 * top)
    for left, right, height, colour, words in (
        (-std, std, 1.12, _DARK, f"one σ = {std:.2f}: [{2**-std:.2f}x, {2**std:.1f}x]"),
        (low, high, 1.34, _RED, "printed: [0.18x, 5.6x]"),
    ):
        ends = {"arrowstyle": "<->", "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        sums_axes.annotate("", (left, height * top), (right, height * top), arrowprops=ends)
        sums_axes.text(0, (height + 0.03) * top, words, ha="center", va="bottom", fontsize=9, color=colour, bbox=paper)
        for x in (left, right):
            sums_axes.plot([x, x], [0, height * top], color=colour, linewidth=0.9, linestyle=":")
    _axes(chain_axes, "", "log2(‖g_q‖ / ‖g‖) after 48 layers")
    rules = [rule for rule in gradient.chains if rule != gradient_section.FROZEN]
    for position, rule in enumerate(rules):
        chain = gradient.chains[rule]
        jitter = 0.16 * np.sin(12.9898 * np.arange(len(chain.ratios)))
        chain_axes.plot(position + jitter, chain.ratios, "o", color=_BLUE, alpha=0.35, markersize=4, markeredgewidth=0)
        chain_axes.errorbar(position, chain.mean.value, chain.spread, color=_DARK, marker="o", markersize=6, capsize=5)
        chain_axes.plot([position - 0.3, position + 0.3], [chain.predicted] * 2, color=_ORANGE, linewidth=2)
    chain_axes.axhline(0, color=_GREY, linewidth=0.8)
    chain_axes.set_xticks(range(len(rules)), rules)
    values = [v for rule in rules for v in gradient.chains[rule].ratios]
    room = max(values) - min(values)
    chain_axes.set_ylim(min(values) - 0.05 * room, max(values) + 0.05 * room)
    handles = [
        Line2D([], [], color=_BLUE, alpha=0.5, marker="o", linestyle="", markersize=4, label="a draw of 48 layers"),
        Line2D([], [], color=_DARK, marker="o", markersize=6, label="mean and standard deviation of the draws"),
        Line2D([], [], color=_ORANGE, linewidth=2, label="24 · log2(‖Q(W)‖² / ‖W‖²)"),
    ]
    figure.legend(handles=handles, ncols=3, loc="outside upper right", frameon=False, fontsize=9)
    return figure


def draw_temperature(temperature: Temperature) -> Figure:
    """Entropy-matched temperatures against the noise, for two sizes of vocabulary, beside the formula."""
    figure = _figure(4.2)
    counts = (temperature_section.LOGITS, temperature_section.SMALL_VOCABULARY)
    sigmas = temperature_section.NOISE_SIGMAS
    fine = np.linspace(0, max(sigmas), 101)
    formula = [temperature_section.formula(s) for s in fine]
    first = None
    for index, count in enumerate(counts):
        axes = figure.add_subplot(1, 2, index + 1, sharey=first)
        first = first or axes
        _axes(axes, r"$\sigma_\eta$, noise on the logits ($\sigma_l = 2$)", "" if index else "temperature T")
        axes.set_title(f"{count} logits", fontsize=10)
        axes.plot(fine, formula, color=_DARK, linestyle="--", linewidth=1.5)
        axes.plot(fine, [1 / t for t in formula], color=_DARK, linestyle=":", linewidth=1.5)
        for values, colour, marker in ((temperature.mixture, _BLUE, "o"), (temperature.draw, _RED, "s")):
            found = [values[count, sigma] for sigma in sigmas]
            bars = {"yerr": [e.error for e in found], "capsize": 3, "linewidth": 1.5, "markersize": 5}
            axes.errorbar([0, *sigmas], [1, *(e.value for e in found)], **{**bars, "yerr": [0, *bars["yerr"]]}, color=colour,
                          marker=marker)  # fmt: skip
        axes.axhline(1, color=_GREY, linewidth=0.8)
        axes.set_xlim(0, 1.03 * max(sigmas))
    first.set_ylim(0.6, 1.62)
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    handles = [
        Line2D([], [], color=_BLUE, marker="o", markersize=5, label="policy averaged over the noise"),
        Line2D([], [], color=_RED, marker="s", markersize=5, label="policy under one draw"),
        Line2D([], [], color=_DARK, linestyle="--", label="formula"),
        Line2D([], [], color=_DARK, linestyle=":", label="1 / formula"),
    ]
    figure.legend(handles=handles, ncols=4, loc="outside upper left", frameon=False, fontsize=9)
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height), layout="constrained")


def _axes(axes: Axes, xlabel: str, ylabel: str) -> Axes:
    axes.set_xlabel(xlabel, fontsize=9.5)
    axes.set_ylabel(ylabel, fontsize=9.5)
    axes.tick_params(which="both", labelsize=9.5, length=3, color=_GREY)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    return axes
