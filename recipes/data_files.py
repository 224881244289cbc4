"""Rows in and out for the recipes' data scripts: local parquet or JSON lines or a dataset of the hub in, verl's parquet out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet


class DataError(Exception):
    """The input cannot be used; the message says what and where."""


def check_files(*files: Path | None) -> None:
    """Every local file that is to be read is there.

    Raises:
        DataError: naming all that are not.
    """
    missing = list(dict.fromkeys(str(file) for file in files if file is not None and not file.is_file()))
    if missing:
        raise DataError(f"{' and '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist")


def read_rows(file: Path | None, dataset: str, config: str | None = None, split: str = "train") -> list[dict]:
    """Rows of `file`, or of the hub's dataset where it is None.

    Raises:
        DataError: there is no such file, it is neither parquet nor JSON lines, it is empty, or the hub cannot be reached.
    """
    if file is None:
        return _from_hub(dataset, config, split)
    check_files(file)
    try:
        if file.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except (pyarrow.ArrowInvalid, ValueError) as error:
        raise DataError(f"{file} is neither parquet (by its name) nor JSON lines: {error}") from error
    if not rows:
        raise DataError(f"{file} holds no rows")
    return rows


def _from_hub(dataset: str, config: str | None, split: str) -> list[dict]:
    try:
        from datasets import load_dataset

        return list(load_dataset(dataset, config, split=split))
    except Exception as error:  # a missing package, no network, a renamed dataset: all end the same way
        raise DataError(
            f"cannot load {dataset} from the hub ({type(error).__name__}: {str(error)[:200]}): give local files instead"
        ) from error


def write_rows(rows: list[dict], path: Path) -> Path:
    """Write verl's parquet file, whole or not at all; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
    os.replace(part, path)
    return path
