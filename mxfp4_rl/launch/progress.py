"""What is shown while a run goes on: start-up phases, then a line of numbers a step.

On a terminal a live bar, elsewhere (a CI log, a file) plain lines: both say the same.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from mxfp4_rl.launch.failure import strip_prefix
from mxfp4_rl.monitor.alerts import ALARM_MARK, OVER_MARK

STATUS_MARK = "[mxfp4] "
# What the log says -> what is going on from there. Our own lines start with STATUS_MARK and are shown as they are.
PHASES = (
    (re.compile(r"Started a local Ray instance|Connected to Ray cluster"), "Ray is up, starting the trainer"),
    (re.compile(r"train and validate dataloader initialized"), "data loaded, loading the model"),
    (re.compile(r"Training from scratch"), "model loaded, training starts"),
    # verl's line, while the workers load; the trainer's own says when it goes on, and from which step.
    (re.compile(r"Resuming from ([^\s,]+)"), r"loading the checkpoint \1"),
)
COMPONENTS = ("mxfp4/scale_bias", "mxfp4/deadzone", "mxfp4/grid_noise")
_VALIDATION = re.compile(r"val-core/(.+)/(acc|reward)/mean@\d+")


class Tail:
    """The lines that a growing file gets. A line counts when it is complete; the file need not exist yet.

    Args:
        path: the file.
        from_end: skip what is there now.
    """

    def __init__(self, path: Path, from_end: bool = False):
        self.path = path
        self.offset = path.stat().st_size if from_end and path.exists() else 0

    def new_lines(self) -> list[str]:
        """The lines completed since the last call."""
        try:
            with open(self.path, "rb") as file:
                self.offset = min(self.offset, file.seek(0, os.SEEK_END))  # a resumed run drops what it does again
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole.decode("utf-8", errors="replace").splitlines()


def phase_of(line: str) -> str | None:
    """The start-up phase that a line of the log announces."""
    line = strip_prefix(line)
    if STATUS_MARK in line:
        return line.split(STATUS_MARK, 1)[1].strip()
    for pattern, phase in PHASES:
        match = pattern.search(line)
        if match:
            return match.expand(phase)
    return None


def alarm_of(line: str) -> str | None:
    """The alarm that a line of the log raises or ends."""
    line = strip_prefix(line)
    return line if line.startswith((ALARM_MARK, OVER_MARK)) else None


def is_training_step(data: Mapping[str, float]) -> bool:
    """Whether a record is of a training step; validation before the first one logs a record of its own."""
    return "timing_s/step" in data or "critic/score/mean" in data


def validation_text(data: Mapping[str, float]) -> str | None:
    """Validation results in a record, e.g. "arithmetic acc 0.594"; the accuracy where a task has both."""
    found: dict[str, str] = {}
    for name, value in sorted(data.items(), reverse=True):  # .../reward before .../acc, so that acc stays
        match = _VALIDATION.fullmatch(name)
        if match:
            found[match[1]] = f"{match[1]} {match[2]} {value:.3f}"
    return ", ".join(found.values()) or None


def step_text(data: Mapping[str, float]) -> str:
    """The numbers of a step in one line; a metric that was not logged is left out."""
    parts = [
        _part("reward {:.3f}", data.get("critic/score/mean")),
        _part("entropy {:.3f}", data.get("actor/entropy")),
    ]
    components = [data.get(name) for name in COMPONENTS]
    if all(value is not None for value in components):
        parts.append("scale/deadzone/grid " + "/".join(f"{1e3 * value:.2f}" for value in components) + " e-3")
    parts.append(_part("{:.1f} s", data.get("timing_s/step")))
    return "  ".join(filter(None, parts))


def _part(template: str, value: float | None) -> str | None:
    return None if value is None else template.format(value)


class Display:
    """Plain lines. `RichDisplay` overrides how things are shown, not what.

    Args:
        total_steps: of the run, or None.
    """

    def __init__(self, total_steps: int | None):
        self.total_steps = total_steps
        self._began = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=5)
        self._phase = None
        self.trained = False

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        pass

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, flush=True)

    def phase(self, text: str) -> None:
        """A start-up phase, until the first step ends."""
        if text != self._phase and not self.trained:
            self._phase = text
            self._show_phase(f"[{time.monotonic() - self._began:4.0f} s] {text}")

    def record(self, step: int, data: Mapping[str, float]) -> None:
        """A record of the metrics."""
        if is_training_step(data):
            self.trained = True
            if "timing_s/step" in data:
                self._seconds.append(data["timing_s/step"])
            self._show_step(step, step_text(data), self._eta(step))
        validation = validation_text(data)
        if validation:
            self.line(f"validation after step {step}: {validation}")

    def _eta(self, step: int) -> str:
        if not self.total_steps or not self._seconds:
            return ""
        left = (self.total_steps - step) * sum(self._seconds) / len(self._seconds)
        if not math.isfinite(left):
            return ""
        minutes, seconds = divmod(round(max(0.0, left)), 60)
        return f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"ETA {minutes}:{seconds:02d}"

    def _show_phase(self, text: str) -> None:
        self.line(text)

    def _show_step(self, step: int, text: str, eta: str) -> None:
        of = f"/{self.total_steps}" if self.total_steps else ""
        self.line(f"step {step}{of}  {text}  {eta}".rstrip())


class RichDisplay(Display):
    """A status line, then a progress bar with the numbers of the last step beside it."""

    def __init__(self, total_steps: int | None):
        super().__init__(total_steps)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self._progress = Progress(
            SpinnerColumn(),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=Console(highlight=False, soft_wrap=True),
            refresh_per_second=4,
        )
        self._bar = self._progress.add_task("starting", total=total_steps)

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def _show_phase(self, text: str) -> None:
        self._progress.update(self._bar, description=_escaped(text))

    def _show_step(self, step: int, text: str, eta: str) -> None:
        self._progress.update(self._bar, completed=step, description=_escaped(f"{text}  {eta}"))


def make_display(total_steps: int | None) -> Display:
    """A live display on a terminal, plain lines elsewhere."""
    live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return (RichDisplay if live else Display)(total_steps)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
