"""A run's files: what is written must survive the power going off, and is read while it grows.

Logs are JSON lines, an object {"step": int, ...} each; the last line may be torn by the end of a run.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut_at_step(path: Path, step: int, content: str) -> int:
    """Take the lines of later steps, and what is no record, out of a log: a run resumed at `step` writes them again.

    The file is replaced as a whole; lines that stay are as they were. Without a file there is nothing to do.

    Args:
        content: the field that every record has beside its step.

    Returns:
        How many steps went.
    """
    if not path.is_file():
        return 0
    dropped, part = set(), path.with_name(path.name + ".writing")
    with path.open(encoding="utf-8", errors="replace") as lines, part.open("w", encoding="utf-8") as kept:
        for line in lines:
            try:
                record = json.loads(line)
                stays, _ = record["step"] <= step, record[content]
            except (ValueError, TypeError, KeyError):  # torn by the end of the run
                continue
            if stays:
                kept.write(line.rstrip("\n") + "\n")
            else:
                dropped.add(record["step"])
    part.replace(path)
    return len(dropped)


def lines_from_end(path: Path, chunk: int = 1 << 20) -> Iterator[str]:
    """A file's lines, the last one first, without reading what comes before those that are taken."""
    with path.open("rb") as file:
        begin, first = file.seek(0, os.SEEK_END), b""
        while begin > 0:
            end, begin = begin, max(0, begin - chunk)
            file.seek(begin)
            first, *whole = (file.read(end - begin) + first).split(b"\n")
            for line in reversed(whole):
                yield line.decode("utf-8", errors="replace")
        yield first.decode("utf-8", errors="replace")
