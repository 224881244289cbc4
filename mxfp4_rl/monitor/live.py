"""What can be said of a run while it goes on: how far it is, whether it lives, which alerts last, its plots.

Everything is read from the run's directory, so a run can be watched that was started by somebody else, in another way, or
that ended long ago. `metrics.jsonl` and `verl.log` are read on from where the last look ended; half a line waits for its
other half; a file that became shorter is read anew. Whether the run lives is what the launcher wrote (`run_state.json`) and
whether its process is there; without that, only when something was last written.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from mxfp4_rl.launch import run_state
from mxfp4_rl.launch.failure import find_failure
from mxfp4_rl.launch.outcome import resume_hint
from mxfp4_rl.launch.progress import Tail, alarm_of, is_training_step, phase_of, validation_text
from mxfp4_rl.launch.records import LOG_FILE, resume_command
from mxfp4_rl.monitor.alerts import PREFIX, WATCHED
from mxfp4_rl.monitor.run_log import CONFIG_FILE, METRICS_FILE, RunLog, read_config, read_record

QUIET_SECONDS = 300.0  # without the launcher's word: a run that wrote nothing for so long is taken for ended
LOG_BYTES = 1_000_000  # of the end of a log: enough for a phase, a failure
INTERRUPTED = {129: "SIGHUP", 130: "Ctrl-C", 143: "SIGTERM"}


@dataclass(frozen=True)
class AlertEvent:
    """An alert began or ended at a step, with the metric's value there (NaN if it was not logged)."""

    step: int
    name: str
    active: bool
    value: float


class LiveRun:
    """A run directory, read again and again.

    Args:
        path: need not hold anything yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._start_over()
        self._log = Tail(self.path / LOG_FILE)
        self._began: float | None = None  # when the part that is shown of a resumed run began
        self._log_start = 0
        self._log.offset = self._log_from()
        self._config: tuple[float, dict] = (0.0, {})
        self.phase: str | None = None
        self.config_error: str | None = None

    def _start_over(self) -> None:
        self._metrics = Tail(self.path / METRICS_FILE)
        self._records: dict[int, dict[str, float]] = {}
        self._unreadable = 0
        self._seconds: deque[float] = deque(maxlen=5)
        self.lines = 0
        self.step: int | None = None
        self.validation: str | None = None
        self.active: dict[str, AlertEvent] = {}
        self.events: list[AlertEvent] = []
        self._latest: dict[str, float] = {}  # of each watched metric

    def read(self) -> None:
        """Take in what was written since the last call."""
        if _size(self._metrics.path) < self._metrics.offset:
            self._start_over()
        self._read_state()
        if _size(self._log.path) < self._log.offset:
            self._log.offset = 0
        for line in self._log.new_lines():
            self.phase = (None if alarm_of(line) else phase_of(line)) or self.phase
        for line in self._metrics.new_lines():
            self._take(line)
        changed = _modified(self.path / CONFIG_FILE)
        if changed is not None and changed != self._config[0]:
            try:
                self._config, self.config_error = (changed, read_config(self.path / CONFIG_FILE)), None
            except ValueError as error:  # being written, or broken: the page says so and goes on
                self._config, self.config_error = (changed, {}), str(error)

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        record, whole = read_record(line)
        self._unreadable += not whole
        self.lines += 1
        if record is None:
            return
        step, data = record
        self._records.setdefault(step, {}).update(data)
        if text := validation_text(data):
            self.validation = f"{text} (step {step})"
        if is_training_step(data):
            self.step = step
            if math.isfinite(seconds := data.get("timing_s/step", math.nan)):
                self._seconds.append(seconds)
        for name, (metric, _) in WATCHED.items():
            if metric in data:
                self._latest[name] = data[metric]
            active = bool(data.get(PREFIX + name, name in self.active))
            if active != (name in self.active):
                event = AlertEvent(step, name, active, data.get(metric, math.nan))
                self.events.append(event)
                if active:
                    self.active[name] = event
                else:
                    del self.active[name]

    def run_log(self) -> RunLog | None:
        """What the report's plots are drawn from; None while nothing was logged."""
        if not self._records:
            return None
        return RunLog(path=self.path, config=self._config[1], records=self._records, unreadable_lines=self._unreadable)

    def status(self, now: float | None = None) -> dict:
        """The state of the run as plain values; see the page (`watch.py`) for what each is.

        Args:
            now: seconds since the epoch.
        """
        now = time.time() if now is None else now
        state = self._read_state()
        logged, heard = _modified(self.path / METRICS_FILE), _modified(self.path / LOG_FILE)
        last_sign = max((t for t in (logged, heard) if t is not None), default=None)
        word, why = self._condition(state, last_sign, now)
        running = word in ("running", "stalled")
        # A run that was resumed has the steps of its earlier part, but none of its own yet.
        own_steps = self.step is not None and not (state and logged is not None and logged < state.began)
        if running and own_steps and self._is_stalled(logged, now):
            word, why = "stalled", f"no step for {duration(now - logged)}; they took {duration(self._mean_seconds())} each"
        total = self._config[1].get("trainer", {}).get("total_training_steps")
        return {
            "name": self.path.resolve().name,
            "state": word,
            "why": why,
            "running": running,
            "step": self.step,
            "total": total if isinstance(total, int) else None,
            "phase": (self.phase if not own_steps else "training") if running else None,
            "eta": self._eta(total, logged, now) if running and own_steps else None,
            "seconds_a_step": duration(self._mean_seconds()) if self._seconds else None,
            "elapsed": duration((state.ended or (now if running else last_sign or now)) - state.began) if state else None,
            "last_record": f"{duration(now - logged)} ago" if logged is not None and self._records else None,
            "validation": self.validation,
            "alerts": [self._alert(event) for event in self.active.values()],
            "history": [self._alert(event) for event in reversed(self.events[-20:])],
            "failure": self._failure() if word in ("failed", "died") else None,
            "resume": self._resume() if word in ("failed", "died", "interrupted") else None,
            "notes": self._notes(),
        }

    def _condition(self, state: run_state.RunState | None, last_sign: float | None, now: float) -> tuple[str, str]:
        """(a word for how the run is, why that is said)."""
        if state is not None and state.ended is not None:
            if state.exit_code == 0:
                return "finished", "to its end"
            if state.exit_code in INTERRUPTED:
                return "interrupted", f"by {INTERRUPTED[state.exit_code]}"
            return "failed", f"exit code {state.exit_code}"
        alive = state.is_alive() if state is not None else None
        if alive:
            return "running", f"process {state.pid}"
        if alive is False:
            return "died", "its process is gone and left no word: killed (out of memory?), or the machine went down"
        if last_sign is None:
            return "waiting", f"nothing in {self.path} yet"
        quiet = now - last_sign
        total = self._config[1].get("trainer", {}).get("total_training_steps")
        if self.step is not None and self.step == total:
            return "finished", "its last step is there"
        whose = f"its launcher is on {state.host}" if state else "mxfp4-rl did not start it"
        if quiet < max(QUIET_SECONDS, 10 * self._mean_seconds()):
            return "running", f"{whose}; last written {duration(quiet)} ago"
        return "stopped", f"{whose}; nothing was written for {duration(quiet)}"

    def _is_stalled(self, logged: float | None, now: float) -> bool:
        return logged is not None and now - logged > 60 + 10 * self._mean_seconds()

    def _mean_seconds(self) -> float:
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def _eta(self, total, logged: float | None, now: float) -> str | None:
        if not isinstance(total, int) or not self._seconds or self.step is None or logged is None:
            return None
        return duration(max(0.0, (total - self.step) * self._mean_seconds() - (now - logged)))

    def _alert(self, event: AlertEvent) -> dict:
        metric, meaning = WATCHED[event.name]
        text = f"{metric} was {_value(event.value)} at step {event.step}"
        return {
            "name": event.name,
            "step": event.step,
            "active": event.active,
            "text": text,
            "now": _value(self._latest.get(event.name, math.nan)),
            "meaning": meaning,
        }

    def _read_state(self) -> run_state.RunState | None:
        state = run_state.read(self.path)
        if state is not None and state.began != self._began:
            self._began, self._log_start, self.phase = state.began, state.log_start, None
            self._log.offset = self._log_from()
        return state

    def _log_from(self) -> int:
        """Where to read the log from: its end, but nothing of an earlier part of the run."""
        size = _size(self._log.path)
        return max(self._log_start if self._log_start <= size else 0, size - LOG_BYTES, 0)

    def _resume(self) -> str | None:
        root = self._config[1].get("trainer", {}).get("default_local_dir")
        return resume_hint(self.path, Path(root), resume_command(self.path)) if isinstance(root, str) else None

    def _failure(self) -> str | None:
        try:
            with open(self._log.path, "rb") as log:
                log.seek(self._log_from())
                return find_failure(log.read().decode("utf-8", errors="replace").splitlines())
        except OSError:
            return None

    def _notes(self) -> list[str]:
        notes = [self.config_error] if self.config_error else []
        if self._unreadable:
            notes.append(
                f"{self._unreadable} incomplete line(s) of {METRICS_FILE} skipped; an interrupted run leaves such lines."
            )
        return notes


def _value(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def duration(seconds: float) -> str:
    """A time as people say it: 0.8 s, 45 s, 3:05 min, 2:03:04 h."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
