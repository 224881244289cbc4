"""How a run ended: its report, a summary of a few lines, and what went wrong."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from mxfp4_rl import checkpoints
from mxfp4_rl.launch.failure import find_failure
from mxfp4_rl.launch.run_dir import METRICS_FILE


class Reporter:
    """Writes the report and the summary in a thread, so that it can go on while the run's processes end."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._thread: threading.Thread | None = None
        self._lines: list[str] = []

    def start(self) -> None:
        """Start, once; does nothing if the run logged no metrics."""
        if self._thread is None and (self.directory / METRICS_FILE).exists():
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()

    def finish(self, give_up: Callable[[], bool], patience: float) -> None:
        """Wait until it is written or `give_up()`, then print the summary; say so after `patience` seconds."""
        if self._thread is None:
            return
        self._thread.join(patience)
        if self._thread.is_alive():
            print("the run has ended; writing the report", flush=True)
        while self._thread.is_alive() and not give_up():
            self._thread.join(0.1)
        print("\n".join(self._lines), flush=True)

    def _write(self) -> None:
        try:
            from mxfp4_rl.monitor.report import write_report

            path = write_report(self.directory)
            lines = [*summary_lines(self.directory), f"   report  {path}", *view_lines(self.directory)]
        except Exception as error:  # a report that fails must not hide how the run ended
            lines = [f"   report  not written: {type(error).__name__}: {error}"]
        self._lines = lines


def summary_lines(directory: Path) -> list[str]:
    """Reward, validation and error of a run, a line each; a line whose metric was not logged is left out."""
    from mxfp4_rl.monitor.report import quarter_means
    from mxfp4_rl.monitor.run_log import RunLog

    run = RunLog.load(directory)
    lines = []
    reward = run.reward_metric()
    if reward:
        first, last = quarter_means(run.series(reward)[1])
        lines.append(f"   reward  {first:.3f} -> {last:.3f} (mean of the first and of the last quarter)")
    sources = run.validation_metrics()
    for source, metric in sources.items():
        steps, values = run.series(metric)
        label = f"{source}: " if len(sources) > 1 else ""
        lines.append(f"validated  {label}{values[0]:.3f} (step {steps[0]}) -> {values[-1]:.3f} (step {steps[-1]})")
    if run.has("mxfp4/rel_mse"):
        values = run.series("mxfp4/rel_mse")[1]
        lines.append(f"  rel_mse  {values[0]:.3g} -> {values[-1]:.3g} (weights)")
    return lines


def view_lines(directory: Path) -> list[str]:
    """How to look at the run with the tools that logged it."""
    lines = []
    if (directory / "tensorboard").is_dir():
        lines.append(f"     view  tensorboard --logdir {directory / 'tensorboard'}")
    # Each part of a resumed run is one, also a part that was killed.
    parts = sorted((directory / "wandb").glob("offline-run-*"))
    return lines + ([f"     view  wandb sync {' '.join(map(str, parts))}"] if parts else [])


def print_failure(log: Path, start: int, code: int, root: str) -> None:
    """A box with what the log, from byte `start` on, says of a failed run, the log's path, and how to go on; on stderr.

    Args:
        code: of the run's first process; negative if a signal ended it.
        root: the run's folder of checkpoints.
    """
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    text = find_failure(lines)
    if code < 0:
        reason = " (out of memory?)" if -code == signal.SIGKILL else ""
        text = f"the run was ended by {signal.Signals(-code).name}{reason}; the last the log says:\n{text}"
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title="the run failed", expand=False))
    print(f"full log: {log}", file=sys.stderr)
    print(resume_hint(log.parent, Path(root)), file=sys.stderr, flush=True)


def resume_hint(run_dir: Path, root: Path, command: str | None = None) -> str:
    """What is kept of a run that ended early, and how to go on from there.

    Args:
        command: that goes on from there (`records.resume_command`); None to speak of the same command.
    """
    last, _ = checkpoints.latest_whole(root)
    if last is not None:
        again = f":\n{command}" if command else f", the same command with trainer.resume_mode=auto mxfp4.run_dir={run_dir}"
        return f"last checkpoint: {last}; to go on from there{again}"
    if (run_dir / METRICS_FILE).exists():
        return (
            "no checkpoint was written (trainer.save_freq says how often): once the cause is mended, the same command starts "
            "anew, in a run directory of its own"
        )
    # The same command would end in the same way.
    return "no checkpoint was written, and no step was done: mend the cause first"
