"""The directory that a run owns: made absolute, created, probed with a real write, and locked while the run lasts.

A directory with another run's metrics is never written to: unless the run resumes from a checkpoint of that directory,
the name gets a suffix, `-2`, `-3`, ... A run that is still going on holds a lock, so two runs that start together
(neither has metrics yet) get two directories.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mxfp4_rl.launch import LaunchError

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
TRACKER_FILE = "latest_checkpointed_iteration.txt"  # verl's pointer to the last checkpoint, beside the checkpoints


class RunDir:
    """A claimed run directory; `release` gives it up.

    Attributes:
        path: absolute.
        resumes: the directory holds metrics that this run continues.
    """

    def __init__(self, path: Path, lock: int, created: list[Path], resumes: bool):
        self.path = path
        self.resumes = resumes
        self._lock: int | None = lock
        self._created = created

    def release(self, unused: bool = False) -> None:
        """Unlock; with `unused`, also remove what claiming it created."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if unused and self._created:
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            for folder in self._created:
                try:
                    folder.rmdir()
                except OSError:  # somebody put something there
                    break


def claim_run_dir(wanted: str | Path, resumes: Callable[[Path], bool]) -> RunDir:
    """Claim `wanted`, or the first free `wanted-2`, `wanted-3`, ...

    Args:
        resumes: whether this run, if it lived in the given directory, would continue the metrics that are there.

    Raises:
        LaunchError: the directory cannot be created or written to, or is locked by the run that this one would resume.
    """
    base = Path(os.path.abspath(Path(wanted).expanduser()))
    for path in _candidates(base):
        has_metrics = (path / METRICS_FILE).exists()
        continues = has_metrics and resumes(path)
        if has_metrics and not continues:
            continue
        created = _make_writable(path)
        lock = _lock(path)
        if lock is None and continues:
            raise LaunchError(
                f"mxfp4.run_dir={path} is being written by a run that is still going on: end it before resuming it, "
                "or set another mxfp4.run_dir"
            )
        if lock is None or (not continues and (path / METRICS_FILE).exists()):  # another run was faster
            if lock is not None:
                os.close(lock)
            continue
        return RunDir(path, lock, created, continues)
    raise AssertionError("unreachable: there are infinitely many candidates")


def _candidates(base: Path):
    yield base
    number = 2
    while True:
        yield base.with_name(f"{base.name}-{number}")
        number += 1


def _make_writable(path: Path) -> list[Path]:
    """Create the directory if needed and write a file there; returns the folders it created, the innermost first."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_probe.{os.getpid()}"
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LaunchError(
            f"mxfp4.run_dir={path} cannot be written ({reason}): set mxfp4.run_dir to a folder that you can write to"
        ) from error
    return created


def _lock(path: Path) -> int | None:
    """A held lock, or None where another process holds it."""
    import fcntl

    handle = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # no locks on this file system: the metrics file alone decides
        pass
    return handle
