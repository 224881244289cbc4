"""What went wrong, from a failed run's log: the innermost exception, without Ray's prefixes and wrappers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# "(TaskRunnerV1 pid=123) ", "(WorkerDict pid=123, ip=10.0.0.2) ", "(raylet) "
_RAY_PREFIX = re.compile(r"^\((?:[\w.:<>]+ )?pid=\d+(?:, ip=[\d.]+)?\)\s?|^\(\w+\) ")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Failure|OutOfMemory|Timeout)(?::|$)")
# Ray's wrappers name the real exception further on; the last two are how a stopped process ends.
_WRAPPERS = re.compile(
    r"^(?:ray\.exceptions\.)?(?:RayTaskError|RayActorError|ActorDiedError|ActorUnavailableError|SystemExit)\b"
)
_CONTINUATION_LINES = 5


def strip_prefix(line: str) -> str:
    """A log line without colours and without the prefix that names the Ray process it comes from."""
    return _RAY_PREFIX.sub("", _ANSI.sub("", line).rstrip("\n"))


def find_failure(lines: Sequence[str]) -> str:
    """The most useful lines of a failed run's log: the last exception that is not a wrapper with its message, else the
    last wrapper, else the log's last lines."""
    clean = [strip_prefix(line) for line in lines]
    found = [i for i, line in enumerate(clean) if _EXCEPTION.match(line)]
    useful = [i for i in found if not _WRAPPERS.match(clean[i])]
    # What the first process itself printed without a prefix is the end of the story; workers may complain after it.
    driver = [i for i in useful if not _RAY_PREFIX.match(_ANSI.sub("", lines[i]))]
    for candidates in (driver, useful, found):
        if candidates:
            return "\n".join(_with_message(clean, candidates[-1]))
    return "\n".join([line for line in clean if line.strip()][-_CONTINUATION_LINES:]) or "the log is empty"


def _with_message(lines: Sequence[str], first: int) -> list[str]:
    """The exception's line and the lines of its message that follow, up to the next thing the log says."""
    kept = [lines[first]]
    for line in lines[first + 1 : first + 1 + _CONTINUATION_LINES]:
        if not line.strip() or re.match(
            r"Traceback|The above exception|During handling|\[|\d{4}-|  File |Exception ignored", line
        ):
            break
        kept.append(line)
    return kept
