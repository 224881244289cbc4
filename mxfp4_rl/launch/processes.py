"""Finding and ending every process of a run.

Ray starts daemons, these start workers in process groups of their own, and workers overwrite their title together with
their environment. So a process belongs to a run if any of these holds:

    it descends from the run's first process;
    it was orphaned and handed to us, who are the "child subreaper" (Linux), and lives in another session than ours;
    its environment holds the run's id, or its command line the run's temporary directory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable

import psutil

RUN_ID_VARIABLE = "MXFP4_RL_RUN_ID"
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Have orphaned descendants handed to this process instead of to init; does nothing where the system cannot."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class RunProcesses:
    """The processes of one run, without the calling one.

    Args:
        run_id: value of `RUN_ID_VARIABLE` in the environment of the run's first process.
        temp_dir: Ray's temporary directory, if this run has its own.
        root: id of the run's first process; left to its owner to wait for. Its own id when that process itself asks.
    """

    def __init__(self, run_id: str, temp_dir: str | None, root: int):
        self.run_id, self.temp_dir, self.root = run_id, temp_dir, root
        self._known: set[psutil.Process] = set()

    def alive(self, thorough: bool = True) -> list[psutil.Process]:
        """Processes seen now or earlier that still run. `thorough` reads every process's environment too."""
        self._known.update(self._relatives())
        if thorough:
            self._known.update(p for p in psutil.process_iter() if p.pid != os.getpid() and self._is_marked(p))
        return [p for p in self._known if is_alive(p)]

    def signal(self, number: int) -> None:
        """Send a signal to every process that still runs."""
        for process in self.alive():
            try:
                process.send_signal(number)
            except psutil.Error:  # ended meanwhile
                pass

    def wait(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Wait until none runs; False after `seconds`, or as soon as `hurry()`."""
        deadline = time.monotonic() + seconds
        while True:
            self._reap()
            if not self.alive(thorough=False):
                return not self.alive()
            if time.monotonic() >= deadline or hurry():
                return False
            time.sleep(0.1)

    def end(self, interrupt: bool, hurry: Callable[[], bool] = lambda: False) -> bool:
        """End them all: SIGINT to the first one's group if `interrupt`, then SIGTERM, then SIGKILL.

        Takes 6 s at most; `hurry()` skips the polite steps. Returns whether none is left.
        """
        self.alive()  # remember all of them before the first one ends and the family falls apart
        if interrupt and not hurry():
            try:
                os.killpg(self.root, signal.SIGINT)
            except ProcessLookupError:
                pass
            if self.wait(3, hurry):
                return True
        if not hurry():
            self.signal(signal.SIGTERM)
            if self.wait(2, hurry):
                return True
        for _ in range(3):  # one that was being started while we looked
            self.signal(signal.SIGKILL)
            if self.wait(0.5):
                return True
        return False

    def _relatives(self) -> list[psutil.Process]:
        """Descendants of the root, and orphans that were handed to us."""
        found, me = [], psutil.Process()
        for child in me.children():
            if self.root == me.pid or child.pid == self.root or _session(child) != os.getsid(0):
                try:
                    found += [child, *child.children(recursive=True)]
                except psutil.Error:
                    found.append(child)
        return found

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            if self.temp_dir and any(self.temp_dir in part for part in process.cmdline()):
                return True
            return process.environ().get(RUN_ID_VARIABLE) == self.run_id
        except (psutil.Error, OSError):  # not ours to read, or ended
            return False

    def _reap(self) -> None:
        """Collect ended orphans that were handed to us; the root is its owner's to collect."""
        for process in self._known:
            if process.pid != self.root:
                try:
                    os.waitpid(process.pid, os.WNOHANG)
                except ChildProcessError:
                    pass


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that has ended and waits to be collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None
