"""The ladder's figures, in the run report's style: a line a rung, its mean over seeds, with a band from lowest to highest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mxfp4_rl.monitor.plots import WIDTH_INCHES, _log_scale, moving_average, moving_average_window

if TYPE_CHECKING:
    from recipes.ladder.report import StoredRun

_COLOURS = ("#222222", "#999999", "#66ccee", "#ee6677", "#4477aa", "#228833", "#ccbb44", "#aa3377", "#cc6611", "#882255")
_COMPONENTS = {"scale_bias": "scale bias", "deadzone": "deadzone", "grid_noise": "grid noise", "rel_mse": "rel_mse (final)"}


def draw_curves(by_rung: dict[str, list[StoredRun]]) -> Figure:
    """Reward, validation, entropy, mismatch, and the gradient's norm and direction against BF16's."""
    logs = [run.log for runs in by_rung.values() for run in runs if run.log]
    validation = next(iter(m for log in logs for m in log.validation_metrics().values()), "val")
    panels = [
        ("critic/score/mean", "training reward (moving mean)", "linear"),
        (validation, "validation accuracy", "linear"),
        ("actor/entropy", "entropy (nats per token)", "linear"),
        ("rollout_corr/k3_kl", "k3 KL of rollout and trainer", "log"),
        ("ladder/grad_norm_ratio", "gradient norm / BF16's on the same batch", "linear"),
        ("ladder/grad_cosine", "gradient's cosine with BF16's on the same batch", "linear"),
    ]
    figure = Figure(figsize=(WIDTH_INCHES, 9.0), layout="constrained")
    for index, (metric, title, scale) in enumerate(panels):
        axes = _axes(figure, (3, 2, index + 1), title)
        _draw(axes, by_rung, metric, smooth=metric == "critic/score/mean", log=scale == "log")
    _legend(figure, by_rung)
    return figure


def draw_components(by_rung: dict[str, list[StoredRun]]) -> Figure | None:
    """Energy of each error component over the operand's energy; weights above, activations below. None without any."""
    operands = {"weights": "mxfp4/", "activations": "mxfp4/activation/"}
    logs = [run.log for runs in by_rung.values() for run in runs if run.log]
    if not any(log.has("mxfp4/rel_mse") for log in logs):
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 5.5), layout="constrained")
    for row, (operand, prefix) in enumerate(operands.items()):
        for column, (part, label) in enumerate(_COMPONENTS.items()):
            axes = _axes(figure, (2, 4, row * 4 + column + 1), f"{label}, {operand}")
            _draw(axes, by_rung, prefix + part, log=True)
    _legend(figure, by_rung)
    return figure


def series_of(runs: list[StoredRun], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values[seed, step]) of the steps that any run has; NaN where one lacks it."""
    records = [run.log.records for run in runs if run.log]
    steps = sorted({step for record in records for step, values in record.items() if metric in values})
    values = [[record.get(step, {}).get(metric, np.nan) for step in steps] for record in records]
    return np.array(steps), np.array(values, dtype=float).reshape(len(records), len(steps))


def _draw(axes: Axes, by_rung: dict[str, list[StoredRun]], metric: str, smooth: bool = False, log: bool = False) -> None:
    series = [series_of(runs, metric) for runs in by_rung.values()]
    log = log and any((values > 0).any() for _, values in series)  # on one machine k3 can be exactly 0
    for index, (steps, values) in enumerate(series):
        if log:
            values = np.where(values > 0, values, np.nan)
        keep = np.isfinite(values).any(axis=0)
        if not keep.any() or (log and keep.mean() < 0.5 and np.nanmax(values) < 1e-2):  # as good as zero: no line
            continue
        steps, values = steps[keep], values[np.isfinite(values).any(axis=1)][:, keep]
        if smooth:
            values = np.array([moving_average(row, moving_average_window(len(steps))) for row in values])
        colour = _COLOURS[index % len(_COLOURS)]
        marker = {"marker": "o", "markersize": 2.5} if len(steps) <= 60 else {}
        axes.plot(steps, np.nanmean(values, axis=0), color=colour, linewidth=1.5, **marker)
        if len(values) > 1:
            low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    if log and axes.lines:
        _log_scale(axes)
    elif log:
        axes.text(0.5, 0.5, "zero in most steps", ha="center", transform=axes.transAxes, color="#999999")


def _axes(figure: Figure, position: tuple[int, int, int], title: str) -> Axes:
    axes = figure.add_subplot(*position)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(which="both", labelsize=8, length=3, color="#999999")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    return axes


def _legend(figure: Figure, by_rung: dict[str, list[StoredRun]]) -> None:
    labels = [runs[0].config["label"] for runs in by_rung.values()]
    handles = [Line2D([], [], color=_COLOURS[i % len(_COLOURS)], linewidth=2, label=label) for i, label in enumerate(labels)]
    figure.legend(handles=handles, ncols=_columns(labels), loc="outside upper left", frameon=False, fontsize=9)


def _columns(labels: list[str]) -> int:
    """As many columns, up to four, as fit into the figure's width; a legend is filled column by column."""
    for columns in range(min(4, len(labels)), 1, -1):
        rows = -(-len(labels) // columns)
        longest = [max(map(len, labels[first : first + rows])) for first in range(0, len(labels), rows)]
        if sum(0.5 + 0.075 * letters for letters in longest) <= WIDTH_INCHES:
            return columns
    return 1
