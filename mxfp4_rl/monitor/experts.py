"""Each expert's own error and its tokens: a few scalars a step, and a table of all experts of all layers in a file.

A step's metrics hold the smallest, the mean and the largest component over the experts that got tokens, of all layers, and how
the tokens were spread. Every expert's values are a line of `experts.jsonl` in the run's directory for each measured step,

    {"step": 1, "layers": {"model.layers.0.mlp.experts.gate_up_proj":
        {"tokens": [...], "weight": {"deadzone": [...], ...}, "activation": {"deadzone": [...], ...}}}}

from which the report draws its maps. Values that are not there (an expert without tokens has no activations) are null.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mxfp4_rl.files import cut_at_step, lines_from_end
from mxfp4_rl.nn.by_group import COMPONENTS, components_of

EXPERTS_FILE = "experts.jsonl"
OPERANDS = ("weight", "activation")


def imbalance(tokens: torch.Tensor) -> float:
    """Tokens of the busiest expert over the mean: 1 is even; 0 where there were no tokens at all."""
    return float(tokens.max() / tokens.double().mean()) if int(tokens.sum()) else 0.0


def metrics(errors: dict) -> dict[str, float]:
    """`mxfp4_experts/...` of pooled `LayerErrors`; {} for a model without fused experts.

    Experts without tokens are in no minimum, mean or maximum: nothing was rounded for them.
    """
    layers = [sums for sums in errors.values() if "tokens" in sums]
    if not layers:
        return {}
    spread = [imbalance(sums["tokens"]) for sums in layers]
    found = {
        "mxfp4_experts/imbalance_mean": sum(spread) / len(spread),
        "mxfp4_experts/imbalance_max": max(spread),
        "mxfp4_experts/without_tokens": float(sum(int((sums["tokens"] == 0).sum()) for sums in layers)),
    }
    for operand in OPERANDS:
        prefix = "mxfp4_experts/" + ("" if operand == "weight" else f"{operand}/")
        measured = [(components_of(sums[f"experts/{operand}"]), sums) for sums in layers if f"experts/{operand}" in sums]
        for component in COMPONENTS if measured else ():
            values = torch.cat([parts[component][sums["tokens"] > 0] for parts, sums in measured])
            values = values[values.isfinite()]
            if len(values):
                found[f"{prefix}{component}_min"] = values.min().item()
                found[f"{prefix}{component}_mean"] = values.mean().item()
                found[f"{prefix}{component}_max"] = values.max().item()
    return found


def write_table(folder: Path, step: int, errors: dict) -> None:
    """Append the step's line to the run's `experts.jsonl`; nothing for a model without fused experts."""
    layers = {}
    for name, sums in errors.items():
        if "tokens" not in sums:
            continue
        layers[name] = {"tokens": sums["tokens"].tolist()}
        for operand in OPERANDS:
            if f"experts/{operand}" in sums:
                parts = components_of(sums[f"experts/{operand}"])
                layers[name][operand] = {part: [_short(v) for v in values.tolist()] for part, values in parts.items()}
    if layers:
        with (folder / EXPERTS_FILE).open("a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step, "layers": layers}) + "\n")


def drop_past(folder: Path, step: int) -> None:
    """Take the lines of later steps out of the table: a run resumed at `step` writes them again."""
    cut_at_step(folder / EXPERTS_FILE, step, "layers")


@dataclass(frozen=True)
class ExpertsTable:
    """A step's table as maps: float64 (layers, experts) each, NaN where there is no value.

    Attributes:
        layers: names of the projections that are the rows.
        tokens: of each expert. components: (operand, component) -> map.
    """

    step: int
    layers: list[str]
    tokens: np.ndarray
    components: dict[tuple[str, str], np.ndarray]


def read_table(folder: Path, projection: str | None = None) -> ExpertsTable | None:
    """The last measured step's table; None without one.

    Args:
        projection: the last part of the names, "gate_up_proj" say; None takes the first that the file has.
    """
    path = folder / EXPERTS_FILE
    if not path.is_file():
        return None
    last = next(filter(None, map(_record, lines_from_end(path))), None)  # a line may be a megabyte: the others stay unread
    if last is None:
        return None
    projection = projection or next(iter(last["layers"])).rpartition(".")[2]
    rows = {name: values for name, values in last["layers"].items() if name.rpartition(".")[2] == projection}
    if not rows:
        return None
    experts = max(len(values["tokens"]) for values in rows.values())

    def grid(lists) -> np.ndarray:
        found = np.full((len(rows), experts), np.nan)
        for row, values in zip(found, lists, strict=True):
            row[: len(values)] = [math.nan if v is None else v for v in values]
        return found

    components = {
        (operand, part): grid([values.get(operand, {}).get(part, []) for values in rows.values()])
        for operand in OPERANDS
        for part in COMPONENTS
    }
    tokens = grid([values["tokens"] for values in rows.values()])
    return ExpertsTable(last["step"], list(rows), tokens, {k: v for k, v in components.items() if np.isfinite(v).any()})


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:  # torn by the end of the run
        return None
    return record if isinstance(record, dict) and isinstance(record.get("layers"), dict) and record["layers"] else None


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
