"""Where a run's metrics go: verl's loggers, put in the run's directory, and a JSON-lines file of our own.

`metrics.jsonl` holds one line a record, {"step": int, "data": {metric: number}}, whatever other loggers are on; the progress
bar and the report read it. The console gets everything but the hundreds of per-layer values.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mxfp4_rl.files import cut_at_step
from mxfp4_rl.monitor import panels

METRICS_FILE = "metrics.jsonl"
PER_LAYER_PREFIX = "mxfp4_layers/"


def prepare_backends(run_dir: Path, backends: list[str]) -> None:
    """Point TensorBoard and wandb at the run's directory, and wandb offline unless somebody is logged in.

    Variables that the user has set win.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TENSORBOARD_DIR", str(run_dir / "tensorboard"))
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    if "wandb" in backends and "WANDB_MODE" not in os.environ:
        import wandb

        if not wandb.login(prompt=False):
            wandb.teardown()  # the check has read the environment, and later changes would go unseen
            os.environ["WANDB_MODE"] = "offline"


def attach_run_log(tracking, run_dir: Path):
    """Add the JSON-lines backend to verl's Tracking object, take the per-layer values off its console, group TensorBoard's."""
    tracking.logger["mxfp4_run_log"] = JSONLinesLog(run_dir / METRICS_FILE)
    if "tensorboard" in tracking.logger:
        tracking.logger["mxfp4_layout"] = TensorBoardLayout(tracking.logger["tensorboard"].writer)
    if "console" in tracking.logger:
        tracking.logger["console"] = _WithoutLayers(tracking.logger["console"])
    return tracking


def drop_records_past(run_dir: Path, step: int) -> tuple[list[tuple[int, dict]], int]:
    """Take the lines of later steps out of `metrics.jsonl` (`files.cut_at_step`).

    Returns the records (step, data) that stay, and how many steps went.
    """
    path = run_dir / METRICS_FILE
    dropped = cut_at_step(path, step, "data")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [(record["step"], record["data"]) for record in map(json.loads, lines)], dropped


class JSONLinesLog:
    """Appends a line a record and flushes it, so that an interrupted run loses nothing it logged."""

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (open as long as the run)

    def log(self, data: dict[str, Any], step: int) -> None:
        """Write the numbers of `data`; what is not a number (text, tables) is left to the other loggers."""
        numbers = {k: _number(v) for k, v in data.items()}
        self._file.write(json.dumps({"step": step, "data": {k: v for k, v in numbers.items() if v is not None}}) + "\n")
        self._file.flush()


class TensorBoardLayout:
    """Writes the layout of TensorBoard's custom scalars (`monitor.panels`), once: with the first training step, which names
    the layers. Validation may come later and is always in it."""

    def __init__(self, writer):
        self._writer = writer

    def log(self, data: dict[str, Any], step: int) -> None:
        """Write the layout if `data` is the first training step's."""
        if self._writer is not None and "timing_s/step" in data:
            self._writer.add_custom_scalars(tensorboard_layout(data))
            self._writer = None


def tensorboard_layout(names: Iterable[str]) -> dict[str, dict[str, list]]:
    """`panels.sections` as SummaryWriter.add_custom_scalars takes them."""
    return {
        # TensorBoard matches from a name's start on, not to its end.
        section.title: {panel.title: ["Multiline", [f"(?:{p})$" for p in panel.patterns]] for panel in section.panels}
        for section in panels.sections(names, also=[panels.VALIDATION])
    }


class _WithoutLayers:
    def __init__(self, console):
        self._console = console

    def log(self, data: dict[str, Any], step: int) -> None:
        self._console.log(data={k: v for k, v in data.items() if not k.startswith(PER_LAYER_PREFIX)}, step=step)


def _number(value: Any) -> float | int | None:
    """A JSON number for anything that is one (NumPy's and torch's scalars too); None for the rest.

    NaN and infinities stay: Python's json writes and reads them, and hiding them would hide a failure.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if math.isfinite(number) and number.is_integer() and not isinstance(value, float) else number
