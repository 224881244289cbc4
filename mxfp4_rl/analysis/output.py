"""What a decomposition leaves in its directory: JSON, CSV, figures and the page, all of them or none.

Everything is rendered first, then written to a directory of another name, then renamed: an interrupted command leaves what
was there before, or all of the new. A directory that exists keeps its other files.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mxfp4_rl.analysis.measure import DELTA_BINS, DELTA_RANGE, SWEEP_BITS, DeltaSums, Errors, TensorErrors
from mxfp4_rl.analysis.results import Results, metrics, sweep_rel_mse

JSON_FILE = "decompose.json"
CSV_FILE = "layers.csv"
PAGE_FILE = "report.html"
SCHEMA = 1  # of the JSON: raised when a key changes its meaning

_CSV_KEYS = ("name", "kind", "layer", "shape", "elements", "nan", "inf", "all_zero", "recipe", "bits_per_element")
_SUMS = ("energy", "error", "first_error")


def render(results: Results, figures: bool = True) -> dict[str, bytes]:
    """File name -> content of everything that a decomposition writes, the page last."""
    from mxfp4_rl.analysis.page import page_html

    files = {JSON_FILE: (to_json(results) + "\n").encode(), CSV_FILE: to_csv(results).encode()}
    drawn: dict[str, bytes] = {}
    if figures:
        from mxfp4_rl.analysis.figures import FIGURES

        for section in FIGURES:
            figure = section.draw(results)
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=150)
                drawn[section.file] = buffer.getvalue()
    return files | drawn | {PAGE_FILE: page_html(results, drawn if figures else None).encode()}


def write_files(files: dict[str, bytes], out: Path, stale: set[str] = frozenset()) -> None:
    """Put `files` into the directory `out`, all or none; made if missing. `stale` names files of an earlier call that go.

    Raises:
        OSError: `out` cannot be written; nothing has changed then.
    """
    fresh = not out.exists()
    stage = (out.parent if fresh else out) / f".{out.name}.{os.getpid()}.part"
    made = _make_directories(stage)
    try:
        for name, content in files.items():
            (stage / name).write_bytes(content)
        if fresh:
            os.rename(stage, out)
            return
        try:
            _move(files, stage, out)
        except KeyboardInterrupt:  # between two renames: half of the old and half of the new would contradict each other
            _move(files, stage, out)
            raise
        finally:
            for name in stale - files.keys():
                (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        for directory in made:
            try:
                directory.rmdir()  # only if it stayed empty
            except OSError:
                break


def to_dict(results: Results) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values; a number that cannot be had (0 / 0) is None."""
    base = results.base
    sweep = sweep_rel_mse(results.total, base)
    low, high = DELTA_RANGE
    data = {
        "schema": SCHEMA,
        "model": results.model,
        "note": results.note,
        **results.facts,
        "base": base,
        "recipes": {
            name: {"describe": recipe.describe(), "bits_per_element": recipe.bits_per_element, "fields": asdict(recipe)}
            for name, recipe in results.recipes.items()
        },
        "total": _errors_dict(results.total, base),
        "types": {kind: _errors_dict(errors, base) for kind, errors in results.by_type.items()},
        "layers": {str(index): _errors_dict(errors, base) for index, errors in results.by_layer.items()},
        "scale_precision": {
            "mantissa_bits": list(SWEEP_BITS),
            "rel_mse": [sweep.get(bits) for bits in SWEEP_BITS],
            "real_scale_rel_mse": sweep.get(None),
        },
        "delta_histogram": {
            "low": low,
            "high": high,
            "bin_width": (high - low) / DELTA_BINS,
            "counts": results.total.delta.counts.tolist(),  # those outside are in the bins at the ends
        },
        "tensors": [_tensor_dict(tensor, base) for tensor in results.tensors],
        "broken": [tensor.weight.name for tensor in results.broken],
        "left_out": results.left_out,
    }
    return _plain(data)


def to_json(results: Results) -> str:
    """`to_dict` as JSON text: indented, but one line a tensor."""
    data = to_dict(results)
    lines = [json.dumps(tensor, allow_nan=False, ensure_ascii=False) for tensor in data["tensors"]]
    data["tensors"] = []
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)
    return text.replace('\n "tensors": []', '\n "tensors": [\n  ' + ",\n  ".join(lines) + "\n ]", 1) if lines else text


def to_csv(results: Results) -> str:
    """One row for each tensor and recipe; of a broken tensor one row, with no recipe and no numbers."""
    rows = []
    for tensor in results.tensors:
        about = {
            "name": tensor.weight.name,
            "kind": tensor.weight.kind,
            "layer": tensor.weight.layer,
            "shape": "x".join(map(str, tensor.weight.info.shape)),
            "elements": tensor.errors.elements,
            "nan": tensor.nan,
            "inf": tensor.inf,
            "all_zero": tensor.all_zero,
        }
        for name, recipe in results.recipes.items() if not tensor.broken else ():
            numbers = _stats_dict(tensor.errors, name)
            flat = {k: v for k, v in numbers.items() if not isinstance(v, dict)}
            for group in ("shares", "partition"):
                flat |= {f"{group}_{key}": value for key, value in numbers[group].items()}
            rows.append(about | {"recipe": name, "bits_per_element": recipe.bits_per_element} | _plain(flat))
        if tensor.broken:
            rows.append(about)
    columns = list(dict.fromkeys([*_CSV_KEYS, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _tensor_dict(tensor: TensorErrors, base: str) -> dict[str, Any]:
    weight = tensor.weight
    about = {
        "name": weight.name,
        "tensor": weight.info.name,
        "file": weight.info.file.name,
        "dtype": weight.info.dtype,
        "kind": weight.kind,
        "layer": weight.layer,
        "shape": list(weight.info.shape),
        "axis": weight.axis,
        "nan": tensor.nan,
        "inf": tensor.inf,
        "all_zero": tensor.all_zero,
    }
    return about | ({} if tensor.broken else _errors_dict(tensor.errors, base))


def _errors_dict(errors: Errors, base: str) -> dict[str, Any]:
    sweep = sweep_rel_mse(errors, base)
    return {
        "tensors": errors.tensors,
        "elements": errors.elements,
        "recipes": {name: _stats_dict(errors, name) for name in errors.stats},
        "scale_precision_rel_mse": [sweep.get(bits) for bits in SWEEP_BITS] + [sweep.get(None)],  # the real scale last
        "delta": _delta_dict(errors.delta),
    }


def _stats_dict(errors: Errors, recipe: str) -> dict[str, Any]:
    stats = errors.stats[recipe]
    sums = {name: getattr(stats, name) for name in _SUMS}
    return {**metrics(errors, recipe), "shares": stats.shares(), "partition": stats.partition(), **sums}


def _delta_dict(delta: DeltaSums) -> dict[str, Any]:
    return {"blocks": delta.blocks, "mean": delta.mean, "std": math.sqrt(delta.variance), "mean_ratio": delta.mean_ratio}


def _plain(value: Any) -> Any:
    """JSON has no NaN: None instead. Ten digits are more than the sums are good for; all of them would double the files."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    return value


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            os.replace(source / name, target / name)


def _make_directories(path: Path) -> list[Path]:
    """Make `path` and its parents; returns those parents that were missing, the innermost first."""
    missing = []
    parent = path.parent
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    path.mkdir(parents=True)
    return missing
