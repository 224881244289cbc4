"""What went wrong, from a failed run's log: what the run's own watch says, then the innermost exception, without Ray's prefixes
and wrappers, then the last alarm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mxfp4_rl.monitor.alerts import ALARM_MARK  # what a run goes on with

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# "(TaskRunnerV1 pid=123) ", "(WorkerDict pid=123, ip=10.0.0.2) ", "(raylet) "
_RAY_PREFIX = re.compile(r"^\((?:[\w.:<>]+ )?pid=\d+(?:, ip=[\d.]+)?\)\s?|^\(\w+\) ")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Failure|OutOfMemory|Timeout)(?::|$)")
# Ray's wrappers name the real exception further on; the last two are how a stopped process ends.
_WRAPPERS = re.compile(
    r"^(?:ray\.exceptions\.)?(?:RayTaskError|RayActorError|ActorDiedError|ActorUnavailableError|SystemExit)\b"
)
MESSAGE_LINES = 6
FAULT_MARK = "[mxfp4] fault: "  # why a run cannot go on: a process that died, a wait without end
LAUNCHER_GONE = "[mxfp4] the launcher is gone: ending the run"  # its child's last word; what follows are consequences


# What follows an exception's message: the rest of a traceback, another one, or an ordinary line of the log.
_NEXT_THING = re.compile(r"Traceback|The above exception|During handling|Exception ignored|\[|\d{4}-|  File |\s*$")


def strip_prefix(line: str) -> str:
    """A log line without colours and without the prefix that names the Ray process it comes from."""
    return _split(line)[1]


def find_failure(lines: Sequence[str]) -> str:
    """The most useful lines of a failed run's log.

    Faults that the run itself reported come first. Then the last exception that is no wrapper, with its message; else the
    last wrapper; else, if there is no fault, the log's last lines. The last alarm may tell how it came to that. Of a run whose
    launcher was killed that is said, and nothing that its processes printed while they were being ended.
    """
    split = [_split(line) for line in lines]
    gone = next((i for i, (_, text) in enumerate(split) if LAUNCHER_GONE in text), None)
    faults, alarms = (list(_marked(split[:gone], mark)) for mark in (FAULT_MARK, ALARM_MARK))
    killed = "the launcher was killed (SIGKILL, perhaps for want of memory), and the run's other processes ended with it"
    last = _last_exception(split) if gone is None else killed
    parts = ["\n".join(dict.fromkeys(faults)), last]
    if "samples failed" in last:  # the guard's; why, only the process that asked for the sample knows
        asker = [(prefix, text) for prefix, text in split if "AgentLoopWorker" in prefix]
        if reason := _last_exception(asker):
            parts.append(f"a sample's error: {reason}")
    if not any(parts):
        parts.append("\n".join([text for _, text in split if text.strip()][-MESSAGE_LINES:]) or "the log is empty")
    if alarms:
        parts.append(f"last alarm: {alarms[-1]}")
    return "\n".join(filter(None, parts))


def _marked(split: Sequence[tuple[str, str]], mark: str) -> Iterator[str]:
    for _, text in split:
        if mark in text:
            yield text.split(mark, 1)[1]


def _last_exception(split: Sequence[tuple[str, str]]) -> str:
    found = [i for i, (_, text) in enumerate(split) if _EXCEPTION.match(text)]
    useful = [i for i in found if not _WRAPPERS.match(split[i][1])]
    # What the first process itself printed, without a prefix, tells the end; workers may still complain after it.
    own = [i for i in useful if not split[i][0]]
    for candidates in (own, useful, found):
        if candidates:
            return "\n".join(_with_message(split, candidates[-1]))
    return ""


def _split(line: str) -> tuple[str, str]:
    """(prefix that names the process, text)."""
    plain = _ANSI.sub("", line).rstrip("\n")
    text = _RAY_PREFIX.sub("", plain)
    return plain[: len(plain) - len(text)], text


def _with_message(split: Sequence[tuple[str, str]], first: int) -> list[str]:
    """The exception's line and the further lines of its message, which come from the same process."""
    kept = [split[first][1]]
    for prefix, text in split[first + 1 : first + MESSAGE_LINES]:
        if prefix != split[first][0] or _NEXT_THING.match(text):
            break
        kept.append(text)
    return kept
