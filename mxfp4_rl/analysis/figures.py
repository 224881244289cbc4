"""The figures of a decomposition, after Figures 1 to 3 of arXiv 2605.20402, drawn for one model.

    1  components: the energy of each part of the error by layer type, and the cosines between the parts
    2  scale precision: the error against the mantissa bits of the block scale, down to the real-valued scale
    3  scale bias: how far scales lie above the ideal ones, and how that adds up over the depth

Built with matplotlib's object interface, in the colours of the run report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mxfp4_rl.analysis.measure import DELTA_RANGE, SWEEP_BITS, Errors
from mxfp4_rl.analysis.results import Results, metric, rel_mse, share, sweep_rel_mse
from mxfp4_rl.analysis.tables import WHOLE_MODEL
from mxfp4_rl.monitor.plots import COMPONENTS, SHARES, WIDTH_INCHES

_GREY, _DARK = "#999999", "#444444"
# A BF16 maximum has 128 mantissas: bins that hold only a few of them would show how many, not the distribution.
_DRAWN_BINS_PER_OCTAVE = 8
_UNIFORM_VARIANCE = 1 / 12
_UNIFORM_RATIO = 1 / math.log(2)  # E[2^u] of a uniform u in [0, 1)


@dataclass(frozen=True)
class FigureSection:
    """One figure: its file, its title, how to read it, and how it is drawn (None where the results hold nothing of it)."""

    file: str
    title: str
    reading: str
    draw: Callable[[Results], Figure | None]


def draw_components(results: Results) -> Figure | None:
    """Figure 1: S, D and G by layer type, and the cosines between the three parts."""
    groups = {**results.by_type, WHOLE_MODEL: results.total}
    groups = {kind: e for kind, e in groups.items() if math.isfinite(share(e, results.base, "scale_bias"))}
    if not groups:
        return None
    figure = _figure(1.6 + 0.48 * len(groups))
    energies, cosines = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1.35, 1]})
    _bars(
        energies,
        groups,
        [(COMPONENTS[part][1], lambda e, part=part: share(e, results.base, part)) for part in SHARES],
        "{:.2f}",
    )
    energies.set_xlim(0, 1.12 * max(max(share(e, results.base, part) for part in SHARES) for e in groups.values()))
    energies.set_xlabel("energy / energy of the first pass's error")
    energies.axvline(1, color=_GREY, linewidth=0.8, zorder=0)
    pairs = {
        "cos(scale bias, grid noise)": ("#775599", lambda e: metric(e, results.base, "cos_scale_grid")),
        "cos(scale bias, deadzone)": ("#ddaa33", lambda e: metric(e, results.base, "cos_scale_deadzone")),
    }
    _bars(cosines, groups, list(pairs.values()), "{:.3f}")
    cosines.set_xlabel("cosine")
    cosines.axvline(0, color=_GREY, linewidth=0.8)
    values = [value(errors) for _, value in pairs.values() for errors in groups.values()]
    cosines.set_xlim(min(1.25 * min(values), -0.1), max(1.25 * max(values), 0.12))
    handles = [Patch(color=COMPONENTS[part][1], label=COMPONENTS[part][0]) for part in SHARES]
    handles += [Patch(color=colour, label=label) for label, (colour, _) in pairs.items()]
    figure.legend(handles=handles, ncols=6, loc="outside upper left", frameon=False, fontsize=8.5, columnspacing=1.2)
    return figure


def draw_scale_precision(results: Results) -> Figure | None:
    """Figure 2: relative MSE against the mantissa bits of the scale, and the recipes' own errors beside it."""
    sweep = sweep_rel_mse(results.total, results.base)
    recipes = {name: rel_mse(results.total, name) for name in results.recipes}
    recipes = {name: value for name, value in recipes.items() if math.isfinite(value)}
    if not sweep or not recipes:
        return None
    figure = _figure(max(3.8, 1.7 + 0.42 * len(recipes)))
    curve, bars = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]})
    floor, block = sweep[None], results.recipes[results.base].block_size
    values = [sweep[bits] for bits in SWEEP_BITS]
    _style(curve, "y")
    curve.plot(SWEEP_BITS, values, color="#4477aa", marker="o", markersize=4.5, linewidth=1.8)
    curve.axhline(floor, color=_DARK, linestyle="--", linewidth=1.2)
    curve.set_xticks(SWEEP_BITS, ["0\n(E8M0)", *map(str, SWEEP_BITS[1:])])
    curve.set_xlabel("mantissa bits of the block scale")
    curve.set_ylabel("relative MSE")
    span = max(max(values) - floor, 0.02 * floor)
    curve.set_ylim(floor - 0.16 * span, max(values) + 0.12 * span)
    curve.annotate(
        f"real-valued scale: {floor:.4g}",
        (SWEEP_BITS[-1], floor),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.5,
        color=_DARK,
    )
    # A grid of tenths of the floor reads as "how much of the error better scales could save".
    if floor > 0:
        ratio = curve.secondary_yaxis("right", functions=(lambda v: v / floor, lambda r: r * floor))
        ratio.set_ylabel("relative MSE / floor", fontsize=9)
        ratio.tick_params(labelsize=9, length=3, color=_GREY)
        ratio.spines["right"].set_color(_GREY)

    _style(bars, "x")
    names = list(recipes)
    # Not the components' colours, which mean something else.
    colours = ["#4477aa" if name == results.base else "#9fb8d0" for name in names]
    bars.barh(range(len(names)), [recipes[name] for name in names], height=0.62, color=colours)
    longest = max(max(recipes.values()), floor)
    for row, name in enumerate(names):
        bars.annotate(
            f"{recipes[name]:.4f}",
            (recipes[name], row),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    bars.axvline(floor, color=_DARK, linestyle="--", linewidth=1.2)
    labels = [f"{name}\n{results.recipes[name].bits_per_element:.5g} bits" for name in names]
    bars.set_yticks(range(len(names)), labels, fontsize=8.5)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.2 * longest)
    bars.xaxis.set_major_locator(MaxNLocator(5))
    bars.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bars.set_xlabel("relative MSE of each recipe")
    handles = [
        Line2D([], [], color="#4477aa", marker="o", markersize=4.5, label="scale rounded up to so many mantissa bits"),
        Line2D([], [], color=_DARK, linestyle="--", label=f"floor: real-valued scale, amax at 6, blocks of {block}"),
    ]
    figure.legend(handles=handles, ncols=2, loc="outside upper left", frameon=False, fontsize=8.5)
    return figure


def draw_scale_bias(results: Results) -> Figure | None:
    """Figure 3: distribution of delta = log2(s / s*), its mean by layer, and its sum along paths through the depth."""
    delta = results.total.delta
    if not delta.blocks:
        return None
    layers = {index: errors.delta for index, errors in results.by_layer.items() if errors.delta.blocks}
    figure = _figure(3.9)
    grid = figure.add_gridspec(1, 3, width_ratios=[1.3, 1, 1]) if len(layers) > 1 else figure.add_gridspec(1, 1)
    _draw_histogram(figure.add_subplot(grid[0]), results)
    if len(layers) > 1:
        _draw_mean_by_layer(figure.add_subplot(grid[1]), layers)
        _draw_paths(figure.add_subplot(grid[2]), layers)
    handles = [
        Line2D([], [], color="#4477aa", linewidth=6, alpha=0.75, label=f"this model, {results.base}"),
        Line2D([], [], color="#ee6677", linewidth=1.8, label="mean"),
        Line2D([], [], color=_DARK, linestyle="--", label="uniform on [0, 1)"),
    ]
    figure.legend(handles=handles, ncols=3, loc="outside upper left", frameon=False, fontsize=8.5)
    return figure


FIGURES = (
    FigureSection(
        "figure1_components.png",
        "Components of the error",
        "Left, the energies of scale bias, deadzone and grid noise over the energy of the first pass's error; right, the "
        "cosines between them. Scale bias and grid noise pull against each other (near -0.66 on bell-shaped weights), which is "
        "why they sum to more than 1; the deadzone shares no element with grid noise, nor with scale bias where scales are "
        "rounded up, so it is orthogonal to both.",
        draw_components,
    ),
    FigureSection(
        "figure2_scale_precision.png",
        "Error against the precision of the scale",
        "Left, the relative MSE that a block scale with so many mantissa bits leaves; 0 is MXFP4 with scales rounded up, the "
        "dashed floor a real-valued scale that puts the block's maximum on the grid's end. Right, the recipes with their bits "
        "per element. The floor is one for 1-D blocks of the base recipe's size whose maximum goes to 6: a search over scales, "
        "a second pass or smaller blocks go below it.",
        draw_scale_precision,
    ),
    FigureSection(
        "figure3_scale_bias.png",
        "Distribution of the scale bias",
        "Left, how many octaves block scales lie above those that put the maximum to 6; rounding them up to a power of two "
        "spreads that over [0, 1), where a uniform spread makes scales 1.44 times too large on average. Middle and right, its "
        "mean by decoder layer, and its sum along random paths through one block of each layer (mean and one standard "
        "deviation) beside the uniform law's.",
        draw_scale_bias,
    ),
)


def _draw_histogram(axes: Axes, results: Results) -> None:
    delta = results.total.delta
    low, high = DELTA_RANGE
    counts = delta.counts.reshape(round((high - low) * _DRAWN_BINS_PER_OCTAVE), -1).sum(1)
    edges = np.linspace(low, high, len(counts) + 1)
    density = counts / delta.blocks * _DRAWN_BINS_PER_OCTAVE
    # All but the rare: an outlier's bin far off would squeeze the rest into a line.
    mass = np.cumsum(counts) / delta.blocks
    first = int(np.searchsorted(mass, 5e-4, side="right"))
    last = int(np.searchsorted(mass, 1 - 5e-4))
    _style(axes, "y")
    axes.stairs(density, edges, fill=True, color="#4477aa", alpha=0.75)
    left, right = min(edges[first], 0.0), max(edges[last + 1], 1.0)
    axes.set_xlim(left - 0.06, right + 0.06)
    axes.plot([0, 0, 1, 1], [0, 1, 1, 0], color=_DARK, linestyle="--", linewidth=1.2)
    top = max(float(density[first : last + 1].max()), 1.0)
    axes.plot([delta.mean, delta.mean], [0, 1.05 * top], color="#ee6677", linewidth=1.8)
    axes.set_ylim(0, 1.3 * top)
    text = f"mean δ = {delta.mean:.3f}   E[2^δ] = {delta.mean_ratio:.3f}\nuniform: 0.500   {_UNIFORM_RATIO:.3f}"
    axes.text(0.98, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=8.5, color=_DARK)
    axes.set_xlabel("δ = log2(scale / ideal scale)")
    axes.set_ylabel("density over blocks")


def _draw_mean_by_layer(axes: Axes, layers: dict) -> None:
    _style(axes, "y")
    index = list(layers)
    means = [delta.mean for delta in layers.values()]
    axes.plot(index, means, color="#ee6677", linewidth=1.8, marker="o", markersize=2.5)
    axes.axhline(0.5, color=_DARK, linestyle="--", linewidth=1.2)
    middle, reach = (min(*means, 0.5) + max(*means, 0.5)) / 2, max(max(*means, 0.5) - min(*means, 0.5), 0.1)
    axes.set_ylim(middle - 0.75 * reach, middle + 0.75 * reach)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("mean δ")


def _draw_paths(axes: Axes, layers: dict) -> None:
    """Blocks of different layers are drawn independently, so along a path means and variances of delta add up."""
    depth = np.arange(1, len(layers) + 1)
    mean = np.cumsum([delta.mean for delta in layers.values()])
    deviation = np.sqrt(np.cumsum([delta.variance for delta in layers.values()]))
    uniform, uniform_deviation = depth / 2, np.sqrt(depth * _UNIFORM_VARIANCE)
    _style(axes, "y")
    axes.fill_between(depth, mean - deviation, mean + deviation, color="#4477aa", alpha=0.35, linewidth=0)
    axes.plot(depth, mean, color="#ee6677", linewidth=1.8)
    for sign in (-1, 1):
        axes.plot(depth, uniform + sign * uniform_deviation, color=_DARK, linestyle="--", linewidth=1.0)
    text = f"after {depth[-1]}: {mean[-1]:.1f} ± {deviation[-1]:.2f}\nuniform: {uniform[-1]:.1f} ± {uniform_deviation[-1]:.2f}"
    axes.text(0.04, 0.97, text, transform=axes.transAxes, ha="left", va="top", fontsize=8.5, color=_DARK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("layers passed")
    axes.set_ylabel("sum of δ along a path")


def _bars(axes: Axes, groups: dict[str, Errors], series: list[tuple[str, Callable]], template: str) -> None:
    """Horizontal bars, a group a row, top down; every bar carries its value."""
    _style(axes, "x")
    height = 0.8 / len(series)
    for number, (colour, value) in enumerate(series):
        rows = [row + (number - (len(series) - 1) / 2) * height for row in range(len(groups))]
        values = [value(errors) for errors in groups.values()]
        axes.barh(rows, values, height=height, color=colour)
        for row, width in zip(rows, values, strict=True):
            left = width < 0 and not math.isclose(width, 0, abs_tol=5e-4)
            axes.annotate(
                template.format(width),
                (width, row),
                xytext=(-3 if left else 3, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=7,
                color=_DARK,
            )
    axes.set_yticks(range(len(groups)), list(groups), fontsize=9)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    if len(groups) > 2:
        axes.axhline(len(groups) - 1.5, color=_GREY, linewidth=0.8)


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height), layout="constrained")


def _style(axes: Axes, grid: str) -> None:
    axes.tick_params(which="both", labelsize=9, length=3, color=_GREY)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
