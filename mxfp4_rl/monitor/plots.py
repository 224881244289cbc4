"""The plots of a run report: one function a figure, from a run's metrics to a matplotlib figure.

Each function takes the run and, if there is one, a second run that is drawn dashed in the same axes. It returns a
``Drawing``: the figure, or none where the run lacks the metrics, and sentences on what it had to leave out. Figures are
built with matplotlib's object interface, so that drawing a report changes no state of the calling program.
"""

# ruff: noqa: RUF001  (the Greek letters are meant)

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mxfp4_rl.monitor.experts import EXPERTS_FILE, read_table
from mxfp4_rl.monitor.run_log import RunLog, layer_map, parse_layer_name

WIDTH_INCHES = 10.0
NARROW_INCHES = 4.6
COMPONENTS = {  # metric name -> label and colour, the same in every plot
    "scale_bias": ("scale bias", "#4477aa"),
    "deadzone": ("deadzone", "#ee6677"),
    "grid_noise": ("grid noise", "#228833"),
    "fallback": ("fallback α·x̂₂", "#aa3377"),
    "rel_mse": ("rel_mse (final)", "#999999"),
}
SHARES = ("scale_bias", "deadzone", "grid_noise")
OPERANDS = {"weights": "", "activations": "activation/", "gradients": "grad/"}
PHASES = {  # phases that verl times inside timing_s/step; what they leave over is drawn as "other"
    "gen": ("generation", "#4477aa"),
    "old_log_prob": ("old log-probs", "#ccbb44"),
    "update_actor": ("actor update", "#ee6677"),
    "update_weights": ("weight sync", "#228833"),
}
MISMATCH = {
    "rollout_corr/k3_kl": "k3 estimate of the KL",
    "rollout_corr/kl": "direct estimate of the KL",
    "training/rollout_probs_diff_mean": "mean |Δ token probability|",
}
_BLUE, _ORANGE, _GREY = "#4477aa", "#cc6611", "#999999"


@dataclass
class Drawing:
    """A figure, or None where the run lacks its metrics, and plain sentences on what is not in it."""

    figure: Figure | None = None
    notes: list[str] = field(default_factory=list)


def draw_reward(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """Training reward per step with its moving average, and validation accuracy."""
    if run.reward_metric() is None:
        return Drawing()
    drawing = Drawing(_new_figure(4.0))
    axes = _new_axes(drawing.figure, "step", "training reward")
    if overlay is not None and overlay.reward_metric() is None:
        overlay = None
        drawing.notes.append("The overlay logged no reward.")
    sources = dict.fromkeys(source for run_ in _runs(run, overlay) for source in run_.validation_metrics())
    shown = [[run_.reward_metric(), *run_.validation_metrics().values()] for run_ in _runs(run, overlay)]
    series = [run_.series(name)[1] for run_, names in zip(_runs(run, overlay), shown) for name in names]
    in_unit_range = all(np.nanmin(values) >= 0 and np.nanmax(values) <= 1 for values in series)
    # A reward in [0, 1] shares its axis with the accuracy; another scale (a length penalty, say) gets its own.
    validation_axes = axes if in_unit_range else _twin(axes, "validation accuracy")
    markers = dict(zip(sources, itertools.cycle("osD^vP")))
    for run_, dash in _styled(run, overlay):
        _plot_with_mean(axes, *run_.series(run_.reward_metric()), dash)
        for source, metric in run_.validation_metrics().items():
            steps, values = run_.series(metric)
            finite = np.isfinite(values)
            line = {"color": _ORANGE, "marker": markers[source], "markersize": 5, "linewidth": 1.5}
            validation_axes.plot(steps[finite], values[finite], linestyle=dash, **line)
    handles = [
        Line2D([], [], color=_BLUE, alpha=0.35, label="training reward"),
        Line2D([], [], color=_BLUE, linewidth=2, label=f"its mean over {moving_average_window(len(series[0]))} steps"),
    ]
    for source, marker in markers.items():
        label = f"validation: {_short(source)}"
        handles.append(Line2D([], [], color=_ORANGE, marker=marker, markersize=5, label=label))
    if in_unit_range:
        axes.set_ylabel("reward, accuracy")
        axes.set_ylim(-0.02, 1.02)
    if not run.validation_metrics():
        drawing.notes.append(
            "No val-core/*/acc/mean@1 was logged: the run did not validate (trainer.test_freq, "
            "trainer.val_before_train), or its data source returns neither acc nor reward."
        )
    _legend(drawing.figure, handles, run, overlay)
    return drawing


def draw_entropy(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """Token entropy of the policy, and the standard deviation of the adaptive quantisation noise on a log axis."""
    if not run.has("actor/entropy"):
        return Drawing()
    drawing = Drawing(_new_figure(3.6))
    overlay = _comparable(overlay, ["actor/entropy"], drawing.notes)
    axes = _new_axes(drawing.figure, "step", "entropy (nats per token)")
    sigma_metric = "mxfp4/aqn_sigma"
    sigmas = [_positive(run_, sigma_metric) for run_ in _runs(run, overlay)]
    has_sigma = any(np.isfinite(values).any() for _, values in sigmas)
    sigma_axes = _twin(axes, "AQN σ") if has_sigma else None
    for run_, dash in _styled(run, overlay):
        steps, values = run_.series("actor/entropy")
        axes.plot(steps, values, color=_BLUE, linewidth=1.8, linestyle=dash, **_dots(values))
        if sigma_axes:
            steps, values = _positive(run_, sigma_metric)
            sigma_axes.plot(steps, values, color=_ORANGE, linestyle=dash, drawstyle="steps-mid", **_dots(values))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    handles = [Line2D([], [], color=_BLUE, label="entropy")]
    if sigma_axes:
        _log_scale(sigma_axes)
        handles.append(Line2D([], [], color=_ORANGE, label="AQN σ (right axis, log)"))
    if not np.isfinite(sigmas[0][1]).any():
        drawing.notes.append("No AQN σ above 0 was logged (mxfp4/aqn_sigma): adaptive quantisation noise was off.")
    _legend(drawing.figure, handles, run, overlay)
    return drawing


def draw_components(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """Energy of each error component over the operand's energy, a panel for each kind of operand."""
    drawing = _operand_panels(run, overlay, "mxfp4/", tuple(COMPONENTS), "energy / energy of the operand")
    if drawing.figure and run.has("mxfp4/fallback") and not np.nansum(run.series("mxfp4/fallback")[1]):
        drawing.notes.append("fallback is 0 for the weights: their recipe has no outlier fallback (fallback_alpha).")
    return drawing


def draw_shares(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """Each component of the first pass's error over that error's energy, a panel for each kind of operand."""
    return _operand_panels(run, overlay, "mxfp4_share/", SHARES, "energy / energy of the first pass's error", unit=True)


def draw_layers(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """Heat maps of the components, layer by projection, at the last step that logged them. One run only."""
    found = layer_map(run)
    panels = {name: grid for name, grid in found.values.items() if np.nanmax(np.abs(grid)) > 0} if found else {}
    if not panels:
        return Drawing()
    notes = [f"Values of step {found.step}; experts of a layer are averaged."]
    if found.unplaced:
        notes.append(
            f"{len(found.unplaced)} module names hold no layer index and are not on the map: "
            + ", ".join(found.unplaced[:5]) + (", …" if len(found.unplaced) > 5 else "") + "."
        )  # fmt: skip
    if overlay is not None and layer_map(overlay):
        notes.append("A heat map cannot be drawn over another: the overlay's layers are in its own report.")
    height = float(np.clip(2.3 + 0.13 * len(found.layers), 3.2, 14.0))
    figure = _new_figure(height)
    figure.get_layout_engine().set(wspace=0.06)
    colours = colormaps["YlGnBu"].with_extremes(bad="#eeeeee")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (component, grid) in zip(all_axes, panels.items(), strict=True):
        high = float(np.nanmax(grid))
        # At least a quarter of the largest value: otherwise differences of a percent would look like structure.
        middle = (np.nanmin(grid) + high) / 2
        reach = max(high - middle, 0.125 * high)
        low, high = float(middle - reach), float(middle + reach)
        image = axes.imshow(grid, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(COMPONENTS[component][0], fontsize=10)
        axes.set_xticks(range(len(found.projections)), found.projections, rotation=90, fontsize=8)
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=12, pad=0.02)
        bar.set_ticks([low, high], labels=[f"{low:.2g}", f"{high:.2g}"], fontsize=8)
        for tick, side in zip(bar.ax.get_xticklabels(), ("left", "right")):
            tick.set_horizontalalignment(side)  # within the bar: labels of neighbouring panels must not meet
        bar.outline.set_visible(False)
    row_ticks = range(0, len(found.layers), max(1, len(found.layers) // 15))
    all_axes[0].set_yticks(row_ticks, [str(found.layers[row]) for row in row_ticks])
    all_axes[0].set_ylabel("decoder layer", fontsize=9)
    return Drawing(figure, notes)


def draw_experts(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """Maps of experts by layer at the last measured step: error of weights and of activations, and tokens. One run only."""
    table = read_table(run.path)
    if table is None:
        return Drawing()
    chosen = [
        ("weights: rel_mse", table.components.get(("weight", "rel_mse"))),
        ("weights: deadzone", table.components.get(("weight", "deadzone"))),
        ("activations: rel_mse", table.components.get(("activation", "rel_mse"))),
        ("activations: deadzone", table.components.get(("activation", "deadzone"))),
        ("tokens over the layer's mean", _over_mean(table.tokens)),
    ]
    panels = [(title, grid) for title, grid in chosen if grid is not None]
    projection = table.layers[0].rpartition(".")[2]
    notes = [f"Values of step {table.step}, of {projection}; grey: no value, an expert without tokens has no activations."]
    if overlay is not None and (overlay.path / EXPERTS_FILE).is_file():
        notes.append("A heat map cannot be drawn over another: the overlay's experts are in its own report.")
    figure = _new_figure(float(np.clip(2.3 + 0.13 * len(table.layers), 3.2, 14.0)))
    figure.get_layout_engine().set(wspace=0.06)
    colours = colormaps["YlGnBu"].with_extremes(bad="#eeeeee")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, grid) in zip(all_axes, panels, strict=True):
        image = axes.imshow(grid, aspect="auto", cmap=colours, vmin=0, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("expert", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=12, pad=0.02)
        bar.ax.tick_params(labelsize=7)
        bar.locator = MaxNLocator(3)
        bar.update_ticks()
        bar.outline.set_visible(False)
    places = [parse_layer_name(name) for name in table.layers]
    labels = [str(row if place is None else place[0]) for row, place in enumerate(places)]
    ticks = range(0, len(labels), max(1, len(labels) // 15))
    all_axes[0].set_yticks(ticks, [labels[row] for row in ticks])
    all_axes[0].set_ylabel("decoder layer", fontsize=9)
    return Drawing(figure, notes)


def _over_mean(tokens: np.ndarray) -> np.ndarray:
    mean = np.nanmean(tokens, axis=1, keepdims=True)
    return np.divide(tokens, mean, out=np.zeros_like(tokens), where=mean > 0)


def draw_mismatch(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """How far the trainer's token probabilities are from the rollout's, one panel a measure."""
    panels = {metric: label for metric, label in MISMATCH.items() if run.has(metric)}
    if not panels:
        return Drawing()
    drawing = Drawing(_new_figure(3.6))
    overlay = _comparable(overlay, list(panels), drawing.notes)
    for index, (metric, label) in enumerate(panels.items()):
        axes = _new_axes(drawing.figure, "step", "", position=(1, len(panels), index + 1))
        axes.set_title(label, fontsize=10)
        drawn = []
        for run_, dash in _styled(run, overlay):
            steps, values = run_.series(metric)
            _plot_with_mean(axes, steps, values, dash)
            drawn.append(values[np.isfinite(values)])
        if np.concatenate(drawn).min() > 0:
            _log_scale(axes)
        else:  # the direct estimator is a mean of signed terms, a small KL can come out below zero
            axes.axhline(0, color=_GREY, linewidth=0.8)
    missing = [metric for metric in MISMATCH if metric not in panels]
    if missing:
        drawing.notes.append(f"Not logged: {', '.join(missing)}.")
    _legend(drawing.figure, [], run, overlay)
    return drawing


def draw_time(run: RunLog, overlay: RunLog | None = None) -> Drawing:
    """Seconds a step, stacked by phase; the overlay's total as a dashed line."""
    steps, total = run.series("timing_s/step")
    if not np.isfinite(total).any():
        return Drawing()
    drawing = Drawing(_new_figure(3.8))
    overlay = _comparable(overlay, ["timing_s/step"], drawing.notes)
    axes = _new_axes(drawing.figure, "step", "seconds")
    base = np.zeros(len(steps))
    handles = []
    bar = {"width": 0.85, "linewidth": 0} if len(steps) <= 80 else {"width": 1.0, "linewidth": 0, "antialiased": False}
    for phase, (label, colour) in PHASES.items():
        if not run.has(f"timing_s/{phase}"):
            drawing.notes.append(f"timing_s/{phase} was not logged; its time, if any, is in “other”.")
            continue
        seconds = np.array([np.nan_to_num(run.records[step].get(f"timing_s/{phase}", 0.0)) for step in steps])
        axes.bar(steps, seconds, bottom=base, color=colour, **bar)
        base += seconds
        handles.append(Line2D([], [], color=colour, linewidth=6, label=label))
    other = np.clip(np.nan_to_num(total) - base, 0, None)
    axes.bar(steps, other, bottom=base, color="#cccccc", **bar)
    handles.append(Line2D([], [], color="#cccccc", linewidth=6, label="other"))
    if overlay is not None:
        overlay_steps, overlay_total = overlay.series("timing_s/step")
        axes.plot(overlay_steps, overlay_total, color="#222222", linewidth=1.5, linestyle="--")
        handles.append(Line2D([], [], color="#222222", linestyle="--", label=f"whole step of {_short(overlay.name)}"))
    _legend(drawing.figure, handles, run)
    return drawing


def make_narrow(figure: Figure) -> None:
    """Lay a figure of this module out anew for a narrow window: panels below each other, fewer columns in the legend."""
    panels = [axes for axes in figure.axes if axes.get_subplotspec() is not None and not hasattr(axes, "_colorbar")]
    columns = sorted({axes.get_subplotspec().num1 for axes in panels})  # a twin shares its panel's
    grid = figure.add_gridspec(len(columns), 1)
    for axes in panels:
        axes.set_subplotspec(grid[columns.index(axes.get_subplotspec().num1), 0])
        axes.tick_params(labelleft=axes.yaxis.get_ticks_position() != "right")
        if not axes.images:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    growth = 0.45 if any(axes.images for axes in panels) else 0.75
    figure.set_size_inches(NARROW_INCHES, figure.get_figheight() * (1 + growth * (len(columns) - 1)))
    for legend in list(figure.legends):
        handles = legend.legend_handles
        for handle, text in zip(handles, legend.get_texts(), strict=True):
            handle.set_label(text.get_text())
        legend.remove()
        _place_legend(figure, handles, NARROW_INCHES)


def moving_average_window(points: int) -> int:
    """Steps that the moving average covers: a tenth of the run, between 3 and 25."""
    return int(np.clip(points // 10, 3, 25))


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among each position's last ``window`` ones (fewer at the start); NaN where none is."""
    averages = np.full(len(values), np.nan)
    for i in range(len(values)):
        recent = values[max(0, i + 1 - window) : i + 1]
        if np.isfinite(recent).any():
            averages[i] = np.nanmean(recent)
    return averages


def _operand_panels(
    run: RunLog, overlay: RunLog | None, prefix: str, parts: tuple[str, ...], ylabel: str, unit: bool = False
) -> Drawing:
    def is_drawn(metric: str) -> bool:
        # A component that is exactly 0 (fallback without a second pass) has no place on a log axis.
        return bool(np.isfinite(_positive(run, metric)[1]).any())

    panels = [(name, prefix + sub) for name, sub in OPERANDS.items() if any(is_drawn(prefix + sub + p) for p in parts)]
    if not panels:
        return Drawing()
    drawing = Drawing(_new_figure(4.0))
    overlay = _comparable(overlay, [operand_prefix + p for _, operand_prefix in panels for p in parts], drawing.notes)
    first = None
    for index, (operand, operand_prefix) in enumerate(panels):
        position = (1, len(panels), index + 1)
        axes = _new_axes(drawing.figure, "step", "" if index else ylabel, position, sharey=first)
        first = first or axes
        if len(panels) > 1 or operand != "weights":
            axes.set_title(operand, fontsize=10)
        for part in parts:
            for run_, dash in _styled(run, overlay):
                steps, values = _positive(run_, operand_prefix + part)
                axes.plot(steps, values, **_dots(values) | _line(part), linestyle=dash)
        if unit:
            axes.axhline(1, color=_GREY, linewidth=0.8)
    _log_scale(first)
    shown = [part for part in parts if any(is_drawn(operand_prefix + part) for _, operand_prefix in panels)]
    handles = [Line2D([], [], **_line(part), label=COMPONENTS[part][0]) for part in shown]
    _legend(drawing.figure, handles, run, overlay)
    return drawing


def _line(part: str) -> dict:
    # At alpha = 0.5 fallback and rel_mse are almost equal: a wide line stays visible under a narrow one.
    wide = {"linewidth": 4.5, "markersize": 4.5, "zorder": 1} if part == "rel_mse" else {"linewidth": 1.5}
    return {"color": COMPONENTS[part][1], **wide}


def _comparable(overlay: RunLog | None, metrics: list[str], notes: list[str]) -> RunLog | None:
    """The overlay if it has one of the metrics; otherwise None, and a note that says so."""
    if overlay is not None and not any(overlay.has(metric) for metric in metrics):
        notes.append("The overlay logged none of these metrics, so no dashed line is drawn.")
        return None
    return overlay


def _runs(run: RunLog, overlay: RunLog | None) -> list[RunLog]:
    return [run] if overlay is None else [run, overlay]


def _styled(run: RunLog, overlay: RunLog | None) -> list[tuple[RunLog, str]]:
    return list(zip(_runs(run, overlay), ("-", "--"), strict=False))


def _positive(run: RunLog, metric: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = run.series(metric)
    return steps, np.where(values > 0, values, np.nan)


def _plot_with_mean(axes: Axes, steps: np.ndarray, values: np.ndarray, dash: str) -> None:
    axes.plot(steps, values, color=_BLUE, alpha=0.35, linewidth=1, linestyle=dash, **_dots(values))
    mean = moving_average(values, moving_average_window(len(values)))
    axes.plot(steps, mean, color=_BLUE, linewidth=2, linestyle=dash)


def _dots(values: np.ndarray) -> dict:
    """Markers for short series, where a value between two gaps would otherwise be invisible."""
    return {"marker": "o", "markersize": 2.5} if len(values) <= 60 else {}


def _new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height), layout="constrained")


def _new_axes(
    figure: Figure, xlabel: str, ylabel: str, position: tuple[int, int, int] = (1, 1, 1), sharey: Axes | None = None
) -> Axes:
    axes = figure.add_subplot(*position, sharey=sharey)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(which="both", labelsize=9, length=3, color=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    return axes


def _twin(axes: Axes, ylabel: str) -> Axes:
    twin = axes.twinx()
    twin.set_ylabel(ylabel, fontsize=9, color=_ORANGE)
    twin.tick_params(labelsize=9, length=3, colors=_ORANGE, which="both")
    twin.spines[["top", "left", "bottom"]].set_visible(False)
    twin.spines["right"].set_color(_ORANGE)
    return twin


def _log_scale(axes: Axes) -> None:
    """A log axis that ends on ticks at 1, 2 or 5 times a power of ten and labels them as plain numbers."""
    axes.set_yscale("log")
    values = np.concatenate([line.get_ydata() for sibling in _sharing_y(axes) for line in sibling.lines])
    values = values[values > 0]
    low, high = _tick_below(values.min()), _tick_above(values.max())
    axes.set_ylim(low, high)
    subs = range(1, 10) if high / low <= 5 else (1, 2, 5) if high / low < 1000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _sharing_y(axes: Axes) -> list[Axes]:
    return axes.get_shared_y_axes().get_siblings(axes)


def _tick_below(value: float) -> float:
    decade = 10.0 ** np.floor(np.log10(value))
    return float(max(tick for tick in (decade * m for m in (0.5, 1, 2, 5)) if tick < value))


def _tick_above(value: float) -> float:
    decade = 10.0 ** np.floor(np.log10(value))
    return float(min(tick for tick in (decade * m for m in (1, 2, 5, 10, 20)) if tick > value))


def _short(text: str, limit: int = 40) -> str:
    """Text from a run for a legend: shortened, and with $ escaped, which would start a formula."""
    return (text if len(text) <= limit else text[: limit - 1] + "…").replace("$", r"\$")


def _legend(figure: Figure, handles: list[Line2D], run: RunLog, overlay: RunLog | None = None) -> None:
    """Above the axes, where it covers no data; with an overlay it also says which line style is which run."""
    if overlay is not None:
        for (run_, dash), word in zip(_styled(run, overlay), ("solid", "dashed"), strict=True):
            handles = [*handles, Line2D([], [], color="#555555", linestyle=dash, label=f"{word}: {_short(run_.name)}")]
    if handles:
        _place_legend(figure, handles, WIDTH_INCHES)


def _place_legend(figure: Figure, handles: list[Line2D], room: float) -> None:
    def width(columns: int) -> float:  # inches, estimated from the number of characters
        return sum(0.65 + 0.067 * max(len(h.get_label()) for h in handles[c::columns]) for c in range(columns))

    columns = max((c for c in range(1, min(6, len(handles)) + 1) if width(c) < room), default=1)
    # A legend fills its columns first; dealt out like this, it reads row by row.
    handles = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(handles=handles, ncols=columns, loc="outside upper left", frameon=False, fontsize=9)
