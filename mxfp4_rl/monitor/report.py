"""The report of a run: one HTML file that needs no network, and its plots as PNG files beside it.

It opens with a table that sums the run up, then shows each plot with a caption that says what to read off it and what
would be a bad sign. A plot whose metrics the run did not log is left out, and the report says which they are and why
that may be. A second run, the BF16 one say, can be drawn dashed into the same axes and gets a column of the table.
"""

# ruff: noqa: RUF001  (the Greek letters are meant)

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mxfp4_rl.monitor import plots
from mxfp4_rl.monitor.alerts import PREFIX as ALERT_PREFIX
from mxfp4_rl.monitor.run_log import CONFIG_FILE, METRICS_FILE, RunLog
from mxfp4_rl.recipe import ModelRecipe, RecipeError

REPORT_DIR = "report"
REPORT_FILE = "report.html"
_DPI = 150
_ABSENT = "n/a"


@dataclass(frozen=True)
class Section:
    """One plot of the report: its file, its words, what it is drawn from and why that may be missing."""

    file: str
    title: str
    caption: str
    metrics: tuple[str, ...]  # names, or prefixes ending in "/"; one of them is enough
    draw: Callable[[RunLog, RunLog | None], plots.Drawing]
    why_absent: str | Callable[[RunLog], str]
    optional: bool = False  # left out without a word where the run has nothing to draw


def write_report(run_dir: str | Path, overlay: str | Path | None = None, out_dir: str | Path | None = None) -> Path:
    """Write the report of ``run_dir`` and return the path of its ``report.html``.

    Args:
        run_dir: a directory with ``metrics.jsonl`` and, if the run wrote it, ``config.yaml``.
        overlay: a second run directory, drawn dashed in the same axes and summed up in a second column.
        out_dir: where the report goes; ``run_dir/report`` by default. Created if missing.

    Every file is written beside its place and moved there when complete, the page last, so an interrupted call leaves
    the earlier report readable. PNG files of an earlier report that this one does not draw are removed.

    Raises:
        FileNotFoundError, ValueError: a run cannot be read (see ``RunLog.load``).
    """
    run = RunLog.load(run_dir)
    other = None if overlay is None else RunLog.load(overlay)
    target = Path(run_dir) / REPORT_DIR if out_dir is None else Path(out_dir)
    target.mkdir(parents=True, exist_ok=True)
    body = []
    for section in SECTIONS:
        drawing = section.draw(run, other)
        png = None
        if drawing.figure is not None:
            png = png_of(drawing.figure)
            _write_whole(target / section.file, png)
        else:
            (target / section.file).unlink(missing_ok=True)
            if section.optional:
                continue
        body.append(section_html(section, png and _embedded(png, section.title), drawing.notes, run, other))
    page = _page_html(run, other, "\n".join(body))
    _write_whole(target / REPORT_FILE, page.encode("utf-8"))
    return target / REPORT_FILE


def png_of(figure: Figure) -> bytes:
    """A figure as PNG, at the report's resolution."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def quarter_means(values: np.ndarray) -> tuple[float, float]:
    """Mean of the finite values in the first and in the last quarter of a series (one value at least each).

    NaN for a quarter without a finite value.
    """
    quarter = max(1, len(values) // 4)
    parts = (values[:quarter], values[-quarter:])
    first, last = (float(np.mean(p[np.isfinite(p)])) if np.isfinite(p).any() else math.nan for p in parts)
    return first, last


def describe_recipe(config: dict) -> str:
    """One line on what the ``mxfp4`` block of a run's configuration quantises and how, or why nothing is."""
    if not config:
        return f"unknown (the run has no {CONFIG_FILE})"
    if not _mxfp4_enabled(config):
        return "not quantised (mxfp4.enable is false)" if config.get("mxfp4") else "not quantised (no mxfp4 block)"
    values = config["mxfp4"].get("recipe")
    try:
        recipe = ModelRecipe.from_dict(values)
    except (RecipeError, TypeError) as error:  # a run of another version still gets its report
        return f"{values} (not a recipe of this version: {error})"
    text = recipe.describe()
    if recipe.overrides:
        text += "; overrides: " + ", ".join(f"{pattern} {own}" for pattern, own in recipe.overrides.items())
    if recipe.exclude:
        text += "; excluded: " + ", ".join(recipe.exclude)
    aqn = config["mxfp4"].get("aqn")
    if isinstance(aqn, dict) and aqn.get("enable", False):
        text += "; AQN: " + ", ".join(f"{key} {value}" for key, value in aqn.items() if key != "enable")
    return text


def summary(run: RunLog) -> dict[str, str]:
    """The rows of the table at the report's head: label -> text. Metrics that the run lacks have no row."""
    rows = {
        "Model": str(run.config_value("actor_rollout_ref.model.path", _ABSENT)),
        "Recipe": describe_recipe(run.config),
        "Steps": _describe_steps(run),
    }
    reward = run.reward_metric()
    if reward:
        first, last = quarter_means(run.series(reward)[1])
        rows["Mean training reward, first → last quarter"] = f"{_change(first, last)} ({last - first:+.3f})"
    sources = run.validation_metrics()
    for source, metric in sources.items():
        (step, first), (last_step, last) = _ends(run, metric)
        label = "Validation accuracy, first → last" + (f" ({source})" if len(sources) > 1 else "")
        rows[label] = f"{_change(first, last)} (steps {step} and {last_step})"
    if run.has("actor/entropy"):
        (_, first), (_, last) = _ends(run, "actor/entropy")
        rows["Entropy, first → last"] = _change(first, last)
    for operand, sub in plots.OPERANDS.items():
        last = {part: f"mxfp4/{sub}{part}" for part in plots.COMPONENTS if run.has(f"mxfp4/{sub}{part}")}
        last = {part: _number(_ends(run, metric)[1][1]) for part, metric in last.items()}
        if "rel_mse" in last:
            rows[f"Last rel_mse of the {operand}"] = last.pop("rel_mse")
        if last:
            rows[f"Last components of the {operand}"] = ", ".join(f"{part} {value}" for part, value in last.items())
    for label, metric in (
        ("Mean k3 KL, rollout to trainer", "rollout_corr/k3_kl"),
        ("Mean seconds a step", "timing_s/step"),
        ("Mean seconds a weight sync", "mxfp4_sync/seconds"),
        ("Mean bytes a weight sync", "mxfp4_sync/bytes"),
    ):
        if run.has(metric):
            mean = float(np.nanmean(run.series(metric)[1]))
            rows[label] = f"{mean:,.0f}" if metric.endswith("bytes") else _number(mean)
    if alerts := _describe_alerts(run):
        rows["Alerts"] = alerts
    return rows


def _describe_alerts(run: RunLog) -> str:
    """Which metrics left their bands and when, "entropy (steps 3 to 7, since step 12)"; "none", or "" if none was watched."""
    watched = [name for name in run.names() if name.startswith(ALERT_PREFIX)]
    told = []
    for metric in watched:
        steps, active = run.series(metric)
        edges = np.flatnonzero(np.diff(active == 1, prepend=False, append=False))
        spans = []
        for first, after in zip(edges[::2], edges[1::2], strict=True):
            if after == len(steps):
                spans.append(f"since step {steps[first]}")
            else:
                spans.append(f"step {steps[first]}" if after == first + 1 else f"steps {steps[first]} to {steps[after - 1]}")
        if spans:
            told.append(f"{metric.removeprefix(ALERT_PREFIX)} ({', '.join(spans)})")
    return "; ".join(told) or ("none" if watched else "")


def _describe_steps(run: RunLog) -> str:
    # Validation before training logs a step 0, which trains nothing.
    evidence = {"timing_s/step", run.reward_metric()}
    trained = [step for step, record in run.records.items() if not evidence.isdisjoint(record)]
    if not trained:
        return "none trained"
    planned = run.config_value("trainer.total_training_steps")
    return f"{len(trained)} ({min(trained)} to {max(trained)})" + (f" of {planned} planned" if planned else "")


def _ends(run: RunLog, metric: str) -> tuple[tuple[int, float], tuple[int, float]]:
    """(step, value) of the first and of the last finite value; the metric must have one (``run.has``)."""
    steps, values = run.series(metric)
    finite = np.flatnonzero(np.isfinite(values))
    first, last = finite[0], finite[-1]
    return (int(steps[first]), float(values[first])), (int(steps[last]), float(values[last]))


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else _ABSENT


def _change(first: float, last: float) -> str:
    return f"{_number(first)} → {_number(last)}"


def _mxfp4_enabled(config: dict) -> bool:
    block = config.get("mxfp4")
    return isinstance(block, dict) and bool(block) and block.get("enable", True) is not False


def _why_no_mxfp4(run: RunLog) -> str:
    if not run.config:
        return f"A BF16 run logs none, nor one with the monitor off; there is no {CONFIG_FILE} to tell which it was."
    if not _mxfp4_enabled(run.config):
        return f"{CONFIG_FILE} says that this run was not quantised, so there is no error to split."
    return "The run was quantised: its monitor (mxfp4.monitor) was off, does not cover this, or had not run yet."


SECTIONS = (
    Section(
        "reward.png",
        "Reward",
        "Blue is the mean reward of each step's sampled answers, thin, and its trailing mean, thick; orange is the "
        "accuracy on the validation set. Both should rise: reward that rises while validation stands still is "
        "over-fitting or reward hacking, and reward stuck at 0 from the start gives GRPO nothing to learn from.",
        ("critic/score/mean", "critic/rewards/mean"),
        plots.draw_reward,
        "The run ended before its first training step, or only validated (trainer.val_only).",
    ),
    Section(
        "entropy.png",
        "Entropy and quantisation noise",
        "Entropy says how undecided the policy is at each token; σ is the strength of the adaptive quantisation "
        "noise (AQN) that is added for exploration, and is not drawn where it is 0. A slow fall is what learning "
        "looks like; a drop to almost 0 within a few steps means that exploration is over, a steep rise that the "
        "policy falls apart.",
        ("actor/entropy",),
        plots.draw_entropy,
        "verl computes it with the old log-probs, which algorithm.rollout_correction.bypass_mode=true skips.",
    ),
    Section(
        "components.png",
        "Components of the quantisation error",
        "Energy (sum of squares) of each part of the error over the operand's energy: scale bias (scales are powers "
        "of two), deadzone (small values become 0) and grid noise (rounding to 4 bits) split the first pass's "
        "error, rel_mse is what remains in the end; scale bias and grid noise are anticorrelated, so their sum "
        "exceeds the first pass's error. Outlier fallback adds a second pass α·x̂₂ (“fallback”) that cancels most "
        "of that error, three quarters of its energy at α = 0.5, and rel_mse then lies well below the parts. Plain "
        "MXFP4 on bell-shaped weights has a rel_mse near 0.013; a climb during training is the bad sign.",
        ("mxfp4/rel_mse", "mxfp4/scale_bias", "mxfp4/deadzone", "mxfp4/grid_noise", "mxfp4/activation/", "mxfp4/grad/"),
        plots.draw_components,
        _why_no_mxfp4,
    ),
    Section(
        "shares.png",
        "Shares of the first pass's error",
        "The same three parts over the energy of the first pass's whole error; the negative product of scale bias "
        "and grid noise is what brings their sum, above 1, back to 1. Bell-shaped weights in plain MXFP4 (scales "
        "rounded up, blocks of 32) have shares of about 1.7, 0.02 and 0.7. A growing deadzone share says that "
        "outliers stretch the blocks' scales and more small values are lost.",
        ("mxfp4_share/",),
        plots.draw_shares,
        _why_no_mxfp4,
    ),
    Section(
        "layers.png",
        "Error by layer",
        "Each cell is one projection of one decoder layer, its error over its own energy; each panel has its own "
        "colours, which span a quarter of its largest value at least. A row or column that stands out is the place "
        "for a stronger recipe or an exemption (recipe overrides and exclude); an even picture asks for neither.",
        ("mxfp4_layers/",),
        plots.draw_layers,
        _why_no_mxfp4,
    ),
    Section(
        "experts.png",
        "Experts",
        "Each cell is one expert of one layer: the error of its weights, of the activations that its own tokens brought, and "
        "its tokens over the mean of its layer's. A column or cell that stands out by its error is an expert for a stronger "
        "recipe; an expert without tokens learns nothing, and one with many times the mean is a router that collapses.",
        ("mxfp4_experts/",),
        plots.draw_experts,
        "Only mixtures whose experts are in fused tensors have it.",
        optional=True,
    ),
    Section(
        "mismatch.png",
        "Mismatch of rollout and trainer",
        "How far the trainer's probabilities of the sampled tokens are from those they were sampled with (thin; "
        "thick is the trailing mean); 0 is a perfect match, and the direct estimate may fall below 0 by chance. "
        "With 4-bit activations a floor above BF16's is normal, as one bit in another kernel can flip a code; a "
        "rise during training, or a jump before the reward falls, is the bad sign and calls for importance-sampling "
        "correction (algorithm.rollout_correction).",
        tuple(plots.MISMATCH),
        plots.draw_mismatch,
        "verl compares only where the rollout returns its log-probs "
        "(actor_rollout_ref.rollout.calculate_log_probs=true), and logs rollout_corr/* only with an "
        "algorithm.rollout_correction block.",
    ),
    Section(
        "time.png",
        "Time of a step",
        "Seconds of each training step by phase as verl times them; validation comes on top. The first step is "
        "often longer (compilation, caches). Generation that grows follows longer answers; growth without them, or "
        "a weight sync that rivals generation, is worth a look.",
        ("timing_s/step",),
        plots.draw_time,
        "The run ended before its first training step.",
    ),
)

STYLE = """
:root { color-scheme: light; }
body { max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15em; margin: 0 0 .4em; }
section { margin: 2.4em 0; break-inside: avoid; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; margin: 1.4em 0;
        font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3em .8em .3em 0; border-bottom: 1px solid #e6e6e6;
         overflow-wrap: anywhere; }
th { font-weight: 500; color: #555; } th:first-child { width: 19em; } tr { break-inside: avoid; }
img { width: 100%; height: auto; display: block; }
p { margin: .5em 0; } .lead, .note { color: #555; } .note { font-size: .9em; }
.absent { border-left: 3px solid #ddd; padding-left: .8em; color: #555; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } section { margin: 1.4em 0; } }
"""


def _page_html(run: RunLog, other: RunLog | None, body: str) -> str:
    lead = f"Compared with {escape(other.name)}, drawn dashed." if other else "Summary and plots of one training run."
    warnings = "".join(
        f'<p class="note">{r.unreadable_lines} incomplete line(s) of {escape(r.name)}/{METRICS_FILE} skipped; '
        "an interrupted run leaves such lines.</p>\n"
        for r in (run, other)
        if r is not None and r.unreadable_lines
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)}: run report</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(run.name)}</h1>
<p class="lead">{lead}</p>
{warnings}{table_html(run, other)}
{body}
</body>
</html>
"""


def table_html(run: RunLog, other: RunLog | None) -> str:
    """The rows of `summary`, a column a run."""
    columns = [summary(r) for r in (run, other) if r is not None]
    # Starting from the longer column keeps rows that only one run has at their place among the others.
    labels = list(dict.fromkeys(label for column in sorted(columns, key=len, reverse=True) for label in column))
    head = ""
    if other is not None:
        names = "".join(f"<th>{escape(r.name)}</th>" for r in (run, other))
        head = f"<thead><tr><th></th>{names}</tr></thead>\n"
    rows = ""
    for label in labels:
        cells = "".join(f"<td>{escape(column.get(label, _ABSENT))}</td>" for column in columns)
        rows += f"<tr><th>{escape(label)}</th>{cells}</tr>\n"
    return f"<table>\n{head}<tbody>\n{rows}</tbody>\n</table>"


def _embedded(png: bytes, title: str) -> str:
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def section_html(section: Section, image: str | None, notes: list[str], run: RunLog, other: RunLog | None) -> str:
    """A plot with its words.

    Args:
        image: the element that shows it; None where the run lacks its metrics, which is then said instead.
    """
    if image is not None:
        content = f"{image}\n"
        content += f"<p>{escape(section.caption)}</p>\n"
        content += "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)
    else:
        why = section.why_absent if isinstance(section.why_absent, str) else section.why_absent(run)
        names = ", ".join(f"{m}*" if m.endswith("/") else m for m in section.metrics)
        text = f"Not drawn: {METRICS_FILE} has no usable value of {names}. {why}"
        if other is not None and any(name.startswith(section.metrics) for name in other.names()):
            text += f" {other.name} has them: see its own report, or swap the two runs."
        content = f'<p class="absent">{escape(text)}</p>\n'
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{content}</section>"


def _write_whole(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file that is complete: a reader sees the old content or the new, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
