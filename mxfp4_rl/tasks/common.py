"""What the built-in tasks share: rows in verl's schema, Parquet files that are either whole or absent, small checks.

A task makes its problems from options and a seed; everything here is what comes after, so that the tasks differ in their
problems and their score alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

__all__ = ["CONTROL_TOKEN", "NUMERAL", "is_int", "make_row", "take_turns", "write_once"]

CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|</?s>|<(?:eos|pad|bos|assistant)>")
# An integer without its sign in its usual notation, thousands separators where they belong.
NUMERAL = r"(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]*)"


def is_int(value) -> bool:
    """Whether ``value`` is an integer and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def take_turns(lists: Sequence[list]) -> list:
    """One item of each list in turn, until all are empty."""
    longest = max((len(items) for items in lists), default=0)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def make_row(data_source: str, text: str, answer: int, split: str, index: int, **extra) -> dict:
    """One problem in verl's schema; ``extra`` goes to ``extra_info``, beside ``index`` and ``split``."""
    # No system message: SmolLM2's chat template then adds its own, with which it was tuned and answers best.
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(answer)},
        "extra_info": {"index": index, "split": split, **extra},
    }


def write_once(out_dir: str | os.PathLike, name: str, identity: list, train: list[dict], val: list[dict]) -> tuple[Path, Path]:
    """Writes rows as ``train.parquet`` and ``val.parquet`` to ``out_dir/<name>-<hash of identity>``, unless they are there.

    The folder appears by a rename when both files are written, so a folder that is there is whole. Any number of processes
    may call this.

    Args:
        identity: what the rows follow from, as JSON can hold it; other rows need another identity.

    Returns:
        (path of the training file, path of the validation file).

    Raises:
        OSError: ``out_dir`` cannot be written.
    """
    folder = Path(out_dir).expanduser() / f"{name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
    paths = (folder / "train.parquet", folder / "val.parquet")
    if all(path.is_file() for path in paths):
        return paths

    import pyarrow
    import pyarrow.parquet

    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    try:
        for path, rows in zip(paths, (train, val), strict=True):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), staging / path.name)
        if folder.exists() and not all(path.is_file() for path in paths):
            shutil.rmtree(folder)  # someone deleted one of the files
        try:
            os.replace(staging, folder)
        except OSError:
            if not all(path.is_file() for path in paths):  # else another process was faster with the same rows
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return paths
