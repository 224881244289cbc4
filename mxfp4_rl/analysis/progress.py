"""How far a measurement is: a live bar on a terminal, elsewhere a line every ten seconds.

On stderr, so that what the command prints can be piped.
"""

from __future__ import annotations

import sys
import time

_LINE_SECONDS = 10.0


class Lines:
    """Plain lines, for logs."""

    def __init__(self, total: int):
        self.total = total
        self._done = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc) -> None:
        pass

    def advance(self, elements: int) -> None:
        """So many more elements are done with."""
        self._done += elements
        now = time.monotonic()
        if now - self._said >= _LINE_SECONDS:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self.total - self._done) / rate if rate else 0.0
            print(
                f"{self._done / 1e6:.0f} of {self.total / 1e6:.0f} M elements, {rate / 1e6:.1f} M/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


class Bar:
    """A rich progress bar, gone when done."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("measuring"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %  {task.fields[rate]}  ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, rate="")
        self._done = 0
        self._began = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self._progress.stop()

    def advance(self, elements: int) -> None:
        """So many more elements are done with."""
        self._done += elements
        rate = self._done / max(time.monotonic() - self._began, 1e-3)
        done = f"{self._done / 1e6:,.0f} M elements, {rate / 1e6:.1f} M/s"
        self._progress.update(self._task, completed=self._done, rate=done)


def make_progress(total: int) -> Lines | Bar:
    """A progress display for `total` elements, to be used as a context manager."""
    return (Bar if sys.stderr.isatty() else Lines)(total)
