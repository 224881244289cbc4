"""The ladder's page: `python recipes/ladder/report.py runs/ladder --out docs/results.md`. It reads stored runs only.

Runs of one seed saw the same problems in the same order and drew with the same random numbers, so a rung is compared with BF16
seed by seed and problem by problem. Of the difference d[seed, problem] the page shows two 90 % intervals: Student's over the
seeds' means, and a bootstrap that draws seeds and problems anew, both with replacement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.recipe import QuantRecipe
from recipes.ladder.options import Options, free_reply
from recipes.ladder.rungs import GROUPS, RUNGS, chosen

BASELINE = "bf16"
RESAMPLES = 10_000
_T95 = (
    6.314,
    2.920,
    2.353,
    2.132,
    2.015,
    1.943,
    1.895,
    1.860,
    1.833,
)  # one-sided 95 % of Student's t, degrees of freedom 1 to 9


@dataclass
class StoredRun:
    """One run's folder, read."""

    folder: Path
    config: dict
    log: RunLog | None
    result: dict | None  # done.json
    sessions: list[dict]

    @classmethod
    def load(cls, folder: Path) -> StoredRun:
        def read(name: str):
            file = folder / name
            return json.loads(file.read_text()) if file.is_file() else None

        try:
            log = RunLog.load(folder)
        except (FileNotFoundError, ValueError):  # nothing logged yet
            log = None
        return cls(folder, read("config.json"), log, read("done.json"), list((read("sessions.json") or {}).values()))

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def scores(self) -> np.ndarray | None:
        """The final score of each problem; None if the run is not at its end, or diverged."""
        return np.array(self.result["scores"]) if self.result and "scores" in self.result else None

    @property
    def state(self) -> str:
        if self.result is None:
            step = max(self.log.records) if self.log else 0
            return f"at step {step} of {self.config['options']['steps']}"
        return f"diverged at step {self.result['diverged']}: {self.result['why']}" if "diverged" in self.result else "done"

    def start(self) -> float | None:
        """Accuracy before the first step, as the final one; None if it was not measured."""
        for metric in (self.log.validation_metrics() if self.log else {}).values():
            return self.log.records.get(0, {}).get(metric)
        return None

    def untrained(self) -> float | None:
        """Accuracy of the model before its supervised start, in BF16; None if there was none, or it was not measured."""
        return self.log.records.get(0, {}).get("ladder/val_untrained") if self.log else None

    def steps_left_out(self) -> int:
        """Steps without an update, because the gradient was not finite."""
        return int(np.sum(~np.isfinite(self.log.series("actor/grad_norm")[1]))) if self.log else 0

    def seconds_a_step(self) -> list[float]:
        """Of the steps after the first that measure nothing beside training."""
        every = self.config["options"]["measure_every"]
        steps, seconds = self.log.series("timing_s/step") if self.log else ((), ())
        return [v for s, v in zip(steps, seconds) if s > 1 and (not every or (s - 1) % every)]


def load_runs(out: Path) -> dict[str, list[StoredRun]]:
    """Rung -> its runs by seed.

    Raises:
        ValueError: there are none, or they were made with different options.
    """
    runs = [StoredRun.load(file.parent) for file in sorted(out.glob("*/seed*/config.json"))]
    if not runs:
        raise ValueError(f"{out} holds no runs (RUNG/seedN/config.json): start some with recipes/ladder/run.py")
    # By way of Options: a run from before there was an option had its default.
    other = [r.folder for r in runs if Options.from_dict(r.config["options"]) != Options.from_dict(runs[0].config["options"])]
    if other:
        raise ValueError(f"{other[0]} and {runs[0].folder} were made with different options: they cannot be compared")
    known = list(RUNGS)
    by_rung = defaultdict(list)
    for run in sorted(runs, key=lambda r: (known.index(r.config["rung"]) if r.config["rung"] in known else 99, r.seed)):
        by_rung[run.config["rung"]].append(run)
    return dict(by_rung)


def paired_difference(rung: list[StoredRun], baseline: list[StoredRun]) -> np.ndarray:
    """d[seed, problem] over the seeds that both have finished; no rows if there are none.

    Raises:
        ValueError: the runs were validated on different problems.
    """
    base = {run.seed: run for run in baseline if run.scores is not None}
    rows = []
    for run in rung:
        if run.scores is None or run.seed not in base:
            continue
        if run.result["problems"] != base[run.seed].result["problems"]:
            raise ValueError(f"{run.folder} and {base[run.seed].folder} were validated on different problems")
        rows.append(run.scores - base[run.seed].scores)
    return np.array(rows)


def student_interval(d: np.ndarray) -> tuple[float, float] | None:
    """90 % interval of the mean over seeds; None for a single one."""
    means = d.mean(axis=1)
    n = len(means)
    if n < 2:
        return None
    half = _T95[min(n - 1, len(_T95)) - 1] * means.std(ddof=1) / n**0.5
    return means.mean() - half, means.mean() + half


def bootstrap_interval(d: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """90 % interval of the mean, seeds and problems drawn anew with replacement."""
    rng = np.random.default_rng(0)
    seeds, problems = d.shape
    means = np.empty(resamples)
    for i in range(resamples):
        # Weights of how often each problem was drawn: the same problems for every seed that is drawn.
        weights = np.bincount(rng.integers(problems, size=problems), minlength=problems)
        means[i] = (d[rng.integers(seeds, size=seeds)].mean(axis=0) * weights).sum() / problems
    return tuple(np.quantile(means, (0.05, 0.95)))


def bits_of(config: dict) -> tuple[str, str]:
    """Bits a value of weights and activations."""
    if config["fp8"]:
        return ("8 + 32 a row",) * 2
    operands = (config["recipe"] or {}).get("weight"), (config["recipe"] or {}).get("activation")
    weight, activation = (f"{QuantRecipe.from_dict(o).bits_per_element:.4g}" if o else "16" for o in operands)
    return weight, activation


def device_seconds(runs: list[StoredRun]) -> dict[str, tuple[float, float, float]]:
    """Device -> (seconds on which any process held it, seconds of all processes together, CPU seconds of these)."""
    sessions = defaultdict(list)
    for run in runs:
        for session in run.sessions:
            sessions[session["device"]].append(session)
    out = {}
    for device, own in sessions.items():
        busy, until = 0.0, 0.0
        for begin, end in sorted((s["began"], s["began"] + s["wall_s"]) for s in own):
            busy += max(0.0, end - max(begin, until))
            until = max(until, end)
        out[device] = busy, sum(s["wall_s"] for s in own), sum(s["cpu_s"] for s in own)
    return out


def _row(name: str, runs: list[StoredRun], baseline: list[StoredRun]) -> list[str]:
    ended = [run for run in runs if run.scores is not None]
    weight, activation = bits_of(runs[0].config)
    seconds = [v for run in runs for v in run.seconds_a_step()]
    timing = f"{np.median(seconds):.3g}" if seconds else ""
    numbers = [""] * 5
    if ended:
        means = [run.scores.mean() for run in ended]
        plain = [np.mean(run.result["scores_unquantised"]) for run in ended if "scores_unquantised" in run.result]
        spread = f" ± {np.std(means, ddof=1):.3f}" if len(means) > 1 else ""
        numbers[0], numbers[4] = f"{np.mean(means):.3f}{spread}", f"{np.mean(plain):.3f}" if plain else ""
        d = paired_difference(runs, baseline)
        if name != BASELINE and len(d):
            student = student_interval(d)
            numbers[1:4] = f"{d.mean():+.3f}", _interval(student) if student else "one seed", _interval(bootstrap_interval(d))
    seeds = ", ".join(str(run.seed) for run in ended) or "none at its end"
    starts = [start for run in runs if (start := run.start()) is not None]
    start = f"{np.mean(starts):.3f}" if starts else ""
    return [runs[0].config["label"], seeds, start, *numbers, f"{weight} / {activation}", timing]


def _on_the_way(by_rung: dict[str, list[StoredRun]]) -> list[str]:
    """Validation accuracy at the steps where it was measured, mean over the seeds that got there."""
    series = {
        name: [run.log.series(m) for run in runs if run.log for m in run.log.validation_metrics().values()]
        for name, runs in by_rung.items()
    }
    steps = sorted({int(step) for all_seeds in series.values() for own, _ in all_seeds for step in own})

    def cell(all_seeds, step):
        values = [value for own, scores in all_seeds for s, value in zip(own, scores) if s == step]
        return f"{np.mean(values):.3f} ({len(values)})" if values else ""

    rows = [[runs[0].config["label"], *(cell(series[name], step) for step in steps)] for name, runs in by_rung.items()]
    return _table(["rung", *(f"step {step}" for step in steps)], rows)


_MECHANISM = {  # what a correction is said to repair: title -> metric
    "gradient's cosine with BF16's": "ladder/grad_cosine",
    "its norm over BF16's": "ladder/grad_norm_ratio",
    "k3 KL of rollout and trainer": "rollout_corr/k3_kl",
    "groups without signal": "critic/groups_without_signal",
    "activations: scale bias": "mxfp4/activation/scale_bias",
    "deadzone": "mxfp4/activation/deadzone",
    "grid noise": "mxfp4/activation/grid_noise",
    "error left": "mxfp4/activation/rel_mse",
}


def _mechanism(by_rung: dict[str, list[StoredRun]]) -> list[str]:
    """Means over steps and seeds of what the corrections are to repair; entropy of the first and of the last quarter."""

    def mean(runs: list[StoredRun], metric: str, part: slice = slice(None)) -> str:
        values = [v for run in runs if run.log for v in run.log.series(metric)[1][part] if np.isfinite(v)]
        return f"{np.mean(values):.3g}" if values else ""

    rows = []
    for runs in by_rung.values():
        quarter = runs[0].config["options"]["steps"] // 4
        ended = [run for run in runs if run.scores is not None]
        entropy = f"{mean(runs, 'actor/entropy', slice(0, quarter))}, {mean(ended, 'actor/entropy', slice(3 * quarter, None))}"
        rows.append([runs[0].config["label"], *(mean(runs, metric) for metric in _MECHANISM.values()), entropy])
    return _table(["rung", *_MECHANISM, "entropy, first and last quarter"], rows)


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def missing_runs(by_rung: dict[str, list[StoredRun]], rungs: list[str], seeds: Collection[int]) -> list[str]:
    """One line for each run that should be there and is not at its end."""
    out = []
    for name in rungs:
        stored = {run.seed: run for run in by_rung.get(name, [])}
        for seed in sorted({*seeds, *stored} or {0}):
            state = stored[seed].state if seed in stored else "not started"
            if state != "done":
                out.append(f"{name}, seed {seed}: {state}")
    return out


def write_report(
    out: Path, page: Path, rungs: list[str] | None = None, seeds: Collection[int] = (), preface: Path | None = None
) -> Path:
    """Write the page of the runs in `out`, and its figures to a folder of the page's name beside it; returns the page.

    Args:
        rungs, seeds: what should be there beside the runs that are; the ladder by default.
        preface: Markdown that the page begins with, in place of the title.

    Raises:
        ValueError: as `load_runs`.
    """
    from recipes.ladder.figures import draw_components, draw_curves

    by_rung = load_runs(out)
    everything = [run for runs in by_rung.values() for run in runs]
    rungs = [*dict.fromkeys((rungs or [r.name for r in GROUPS["ladder"]]) + list(by_rung))]
    baseline = by_rung.get(BASELINE, [])
    options = everything[0].config["options"]
    missing = missing_runs(by_rung, rungs, seeds)

    lines = preface.read_text().splitlines() if preface else ["# The ladder: RL from BF16 to MXFP4"]
    lines += ["", "Tables and figures are written by `python recipes/ladder/report.py`; do not edit.", ""]
    lines += [
        f"Model {Path(options['model']).name}, task {json.dumps(options['task'])}, {options['steps']} steps of "
        f"{options['prompts']} prompts x {options['samples']} samples{_days(everything)}. "
        f"All options: `{json.dumps(options)}`.", "",
    ]  # fmt: skip
    lines += [f"**Missing: {len(missing)} runs.** Numbers below are of those that are at their end.", ""] if missing else []
    lines += [f"* {line}" for line in missing] + [""] * bool(missing)
    header = ["rung", "seeds", "accuracy at step 0", "final accuracy ± sd over seeds", "minus BF16", "90 % over seeds"]
    header += ["90 % over seeds and problems", "accuracy without quantiser", "bits W / A", "s a step"]
    rows = [_row(name, by_rung[name], baseline) for name in rungs if name in by_rung]
    lines += ["## Final validation", "", *_table(header, rows), ""]
    shared = max((s["jobs"] for run in everything for s in run.sessions), default=1)
    lines += [
        "Accuracy: greedy, held-out problems, rollout's quantiser on, no noise. Differences are paired by seed and problem "
        "(Student's t over seeds; bootstrap of seeds and problems, "
        f"{RESAMPLES} resamples). Seconds: median of steps that only train, up to {shared} runs at once on the device.", "",
    ]  # fmt: skip
    untrained = {value for run in everything if (value := run.untrained()) is not None}
    if untrained:
        told = ", ".join(f"{value:.3f}" for value in sorted(untrained))
        text = f"Before the supervised start, which all runs share, the model's accuracy in BF16 is {told}"
        lines += [f"{text} (replies of up to {free_reply(Options.from_dict(options))} tokens).", ""]
    left_out = [f"{r.config['rung']}/seed{r.seed} {count}" for r in everything if (count := r.steps_left_out())]
    if left_out:
        lines += ["Steps without an update, because the gradient was not finite: " + ", ".join(left_out) + ".", ""]
    stored = {name: by_rung[name] for name in rungs if name in by_rung}
    lines += ["## On the way", "", *_on_the_way(stored), "", "Mean over seeds, their number in brackets.", ""]
    lines += ["## What each correction did", "", *_mechanism(stored), ""]
    lines += [
        "Means over all steps (those that were measured) and seeds, cut-off runs included. Gradients are compared on the same "
        "samples and weights; an operand's components are those of its first pass, in parts of its energy, and the error left "
        "is that of all passes.", "",
    ]  # fmt: skip
    figures = page.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    for group, members in {**GROUPS, "other": []}.items():
        names = [rung.name for rung in members] or [name for name in by_rung if name not in RUNGS]
        drawn = {name: by_rung[name] for name in names if name in by_rung and any(r.log for r in by_rung[name])}
        if not drawn:
            continue
        references = () if group == "ladder" else (BASELINE, "w4a4+mbs+of", "w4a4+mbs+of1")
        drawn = {name: by_rung[name] for name in references if name in by_rung} | drawn
        for kind, draw in (("curves", draw_curves), ("components", draw_components)):
            figure = draw(drawn)
            if figure is None:
                continue
            file = figures / f"{group}_{kind}.png"
            figure.savefig(file, dpi=110)
            lines += [f"## {group.capitalize()}: {kind}", "", f"![{group}, {kind}]({figures.name}/{file.name})", ""]
            lines += [
                "Mean over seeds, band from the lowest to the highest. From " + ", ".join(drawn) + ", all seeds stored.",
                "",
            ]
    lines += ["## Time", "", "Held is the time in which any run was on a device of that name, of one or of several.", ""]
    for device, (busy, together, cpu) in device_seconds(everything).items():
        text = f"held {busy / 3600:.2f} h in all, {together / 3600:.2f} h of processes, {cpu / 3600:.2f} h of CPU time"
        lines += [f"* {device}: {text}"]
    lines += ["", "## Runs", "", "Every number of a row comes from these folders (config.json, metrics.jsonl, done.json).", ""]
    header = ["rung", "folders", "state", "revision", "device", "versions"]
    lines += [*_table(header, [_provenance(by_rung[name]) for name in rungs if name in by_rung]), ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines))
    return page


def _days(runs: list[StoredRun]) -> str:
    began = sorted(s["began"] for run in runs for s in run.sessions)
    days = dict.fromkeys(datetime.fromtimestamp(t, timezone.utc).date().isoformat() for t in began)
    return f", run on {', '.join(days)}" if days else ""


def _provenance(runs: list[StoredRun]) -> list[str]:
    config = runs[0].config
    revisions = {s["git"] for run in runs for s in run.sessions} or {config["git"]}
    devices = {s["device"] for run in runs for s in run.sessions} or {config["device"]}
    versions = " ".join(f"{k} {v}" for k, v in config["versions"].items())
    states = ", ".join(run.state for run in runs)
    folders = ", ".join(f"{run.config['rung']}/seed{run.seed}" for run in runs)
    return [config["label"], folders, states, ", ".join(sorted(revisions)), ", ".join(sorted(devices)), versions]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the runner's --out")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--seeds", type=int, default=0, help="seeds that each rung should have; default: those it has")
    parser.add_argument("--first-seed", type=int, default=0, help="of them")
    parser.add_argument("--rungs", nargs="+", help="what should be there, names or groups; default: the ladder")
    parser.add_argument("--preface", type=Path, help="Markdown that the page begins with")
    a = parser.parse_args(arguments)
    rungs = [rung.name for rung in chosen(a.rungs)] if a.rungs else None
    print(write_report(a.runs, a.out, rungs, range(a.first_seed, a.first_seed + a.seeds), a.preface))


if __name__ == "__main__":
    main()
