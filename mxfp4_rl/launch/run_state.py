"""`run_state.json` in a run's directory: which process runs it, and how it ended; for those who watch from outside.

The launcher writes it when a run begins and when it ends. A run that was killed has no time to: its file still says
"running" while the process is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

STATE_FILE = "run_state.json"


@dataclass(frozen=True)
class RunState:
    """What the launcher wrote.

    Attributes:
        host, pid, process_began: the launcher; the time tells it from a later process with its number.
        began, ended: seconds since the epoch; `ended` is None until then.
        exit_code: of `mxfp4-rl train`.
        log_start: bytes of `verl.log` that earlier parts of a resumed run had written.
    """

    host: str
    pid: int
    process_began: float
    began: float
    ended: float | None = None
    exit_code: int | None = None
    log_start: int = 0

    def is_alive(self) -> bool | None:
        """Whether the launcher still runs; None if that cannot be seen from this machine."""
        if self.ended is not None:
            return False
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_began) < 2
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def begin(directory: Path, log_start: int = 0) -> RunState:
    """Write that this process begins a run in `directory`, whose log has `log_start` bytes already."""
    process = psutil.Process()
    state = RunState(socket.gethostname(), process.pid, process.create_time(), began=time.time(), log_start=log_start)
    _write(directory, state)
    return state


def end(directory: Path, state: RunState, exit_code: int) -> None:
    """Write that the run has ended."""
    _write(directory, dataclasses.replace(state, ended=time.time(), exit_code=exit_code))


def read(directory: Path) -> RunState | None:
    """The state, or None: no launcher has written one, or this is not one of this version's."""
    try:
        return RunState(**json.loads((directory / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(directory: Path, state: RunState) -> None:
    part = directory / f".{STATE_FILE}.{os.getpid()}.part"
    with contextlib.suppress(OSError):  # a full disk must not keep a run from ending in order
        part.write_text(json.dumps(dataclasses.asdict(state)) + "\n", encoding="utf-8")
        os.replace(part, directory / STATE_FILE)
