"""Tasks by name, and a look at a user's Parquet file before verl gets it.

A task is its data and its reward: :func:`resolve_task` makes the files and says where the reward function is. A file
that a user brings is checked for the columns that verl reads, because verl itself finds out late, in a worker.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import arithmetic, word_problems

__all__ = ["REQUIRED_COLUMNS", "TASKS", "Task", "check_parquet", "resolve_task"]

REQUIRED_COLUMNS = ("prompt", "data_source", "reward_model")


class Task(NamedTuple):
    """What verl needs of a task; the reward is ``pkg://<reward_module>`` and ``<reward_function>`` in verl's config."""

    train_path: Path
    val_path: Path
    reward_module: str
    reward_function: str


# name -> (writer of the data, module and name of the reward function)
TASKS: dict[str, tuple[Callable[..., tuple[Path, Path]], str, str]] = {
    "arithmetic": (arithmetic.write_parquet, arithmetic.__name__, arithmetic.compute_score.__name__),
    "word_problems": (word_problems.write_parquet, word_problems.__name__, word_problems.compute_score.__name__),
}


def resolve_task(name: str, out_dir: str | os.PathLike, **options) -> Task:
    """Makes the data of task ``name`` under ``out_dir`` (nothing to do if it is there) and says where its reward is.

    Args:
        name: one of :data:`TASKS`.
        out_dir: folder for the data; made if missing.
        **options: the task's own, see e.g. :func:`mxfp4_rl.tasks.arithmetic.make_problems`.

    Raises:
        ValueError: unknown name (the message has the nearest valid ones) or option value.
        TypeError: unknown option.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"unknown task {name!r}: {hint}Valid names: {', '.join(sorted(TASKS))} (data of your own: data.train_files and "
            "data.val_files with mxfp4.task=null)."
        )
    write, module, function = TASKS[name]
    return Task(*write(out_dir, **options), module, function)


def check_parquet(path: str | os.PathLike) -> None:
    """Passes if ``path`` is a Parquet file with at least one row and verl's columns; reads its footer only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not Parquet, has no row, or lacks some of :data:`REQUIRED_COLUMNS` (all are named).
    """
    import pyarrow
    import pyarrow.parquet

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}: check data.train_files and data.val_files.")
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({error}): write one, e.g. with pandas' to_parquet.") from error
    with file:
        present, rows = file.schema_arrow.names, file.metadata.num_rows
    missing = [column for column in REQUIRED_COLUMNS if column not in present]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)} (it has: {', '.join(present)}). verl needs prompt (list of "
            '{"role", "content"}), data_source (str) and reward_model ({"style": "rule", "ground_truth": ...}): add or '
            "rename columns."
        )
    if rows == 0:
        raise ValueError(f"{path} has no rows: write at least one batch of prompts into it.")
