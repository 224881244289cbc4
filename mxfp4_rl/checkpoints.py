"""When a checkpoint is whole. It is one folder, `global_step_N`, that several processes write; any of them can be killed.

`complete.json` makes it whole: it lists every file with its size and is written last, when all of them are on the disk. A
folder without it, or with a file missing or of another size, is torn, and a resume takes the one before. Nothing here imports
torch or verl: the preflight asks the same questions as the trainer.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from mxfp4_rl.files import sync

MANIFEST = "complete.json"
REMOVING = ".removing"  # suffix of a folder that is being removed: half of it may be gone already
_NAME = re.compile(r"global_step_(\d+)")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a Ray worker's error and torch's writer (inline_container, "unexpected pos") make of those, without the number.
_FULL_DISK_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large|enforce fail at inline_container")


def folder_of(root: str | Path, step: int) -> Path:
    """The folder of a step's checkpoint, where verl puts it."""
    return Path(root) / f"global_step_{step}"


def step_of(folder: str | Path) -> int | None:
    """The step that a folder's name holds, or None."""
    match = _NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else None


def begin(folder: Path) -> None:
    """An empty folder to write into; what a killed run left there goes."""
    if folder.exists():
        _remove(folder)
    folder.mkdir(parents=True)


def seal(folder: Path) -> None:
    """Declare a checkpoint whole: every file to the disk, then the manifest under its name in one step."""
    sizes = {}
    for path in _files(folder):
        sync(path)
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        sync(path)
    temporary = folder / f"{MANIFEST}.writing"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"step": step_of(folder), "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)
    for path in (folder, folder.parent):  # the names are on the disk when their folders are
        sync(path)


def flaw(folder: str | Path) -> str | None:
    """What makes a checkpoint torn, in words; None for a whole one."""
    folder = Path(folder)
    if not folder.is_dir():
        return "it is no folder"
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
    except FileNotFoundError:
        return f"{MANIFEST}, which is written last, is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({type(error).__name__})"
    return None


def is_whole(folder: str | Path) -> bool:
    return flaw(folder) is None


def latest_whole(root: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The whole checkpoint of the highest step, or None; and every torn one past it, with what it lacks."""
    torn = []
    for _, folder in sorted(_steps(root), reverse=True):
        lacks = flaw(folder)
        if lacks is None:
            return folder, torn
        torn.append((folder, lacks))
    return None, torn


def describe_torn(folder: Path, lacks: str) -> str:
    """The line a run prints about a checkpoint that it skips."""
    return f"checkpoint {folder} is torn and skipped: {lacks}"


def prune(root: str | Path, keep: int | None, step: int) -> list[Path]:
    """Remove all but the `keep` latest whole checkpoints up to `step`; None or 0 keeps all. Returns what it removed.

    Torn ones are neither counted nor removed: they cannot push a whole one out, and one without a manifest may be another
    program's. Checkpoints past `step` are another run's.
    """
    for rest in Path(root).glob(f"global_step_*{REMOVING}"):
        shutil.rmtree(rest, ignore_errors=True)
    if not keep or keep < 0:
        return []
    whole = [folder for number, folder in sorted(_steps(root)) if number <= step and is_whole(folder)]
    old = whole[:-keep]
    for folder in old:
        _remove(folder)
    return old


def size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in _files(folder))


def free(root: str | Path) -> int:
    """Free bytes where checkpoints go; the folder need not exist yet."""
    there = next(path for path in (Path(root).absolute(), *Path(root).absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that nothing more can be written."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL_DISK) or _FULL_DISK_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def _steps(root: str | Path) -> Iterator[tuple[int, Path]]:
    root = Path(root).expanduser()
    if root.is_dir():
        for folder in root.iterdir():
            step = step_of(folder)
            if step is not None:
                yield step, folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(folder.name + REMOVING)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
