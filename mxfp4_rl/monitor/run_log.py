"""What a run directory says: its metrics as series over steps, and its configuration.

A run writes ``metrics.jsonl`` while it goes on, one JSON object a line: ``{"step": int, "data": {metric: float}}``.
Reading it must work at any moment: the last line may be half written, a resumed run writes some steps a second time
(the later value wins), and a value that is not finite arrives as ``NaN``, ``Infinity`` or ``null``, depending on the
JSON encoder. All three become NaN, which every plot draws as a gap.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"

LAYER_PREFIX = "mxfp4_layers/"
LAYER_COMPONENTS = ("scale_bias", "deadzone", "grid_noise", "fallback", "rel_mse")

# Wrappers put themselves into a module's path without saying where it is in the model.
_WRAPPER_PARTS = {"module", "base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_PROJECTION_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class RunLog:
    """The metrics and configuration of one run.

    Attributes:
        path: the run directory.
        config: the resolved hydra configuration, or ``{}`` where the run has no ``config.yaml``.
        records: step -> {metric: value}; values are finite or NaN.
        unreadable_lines: lines of ``metrics.jsonl`` that hold no complete record and were skipped.
    """

    path: Path
    config: dict = field(default_factory=dict)
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    unreadable_lines: int = 0

    @classmethod
    def load(cls, run_dir: str | Path) -> RunLog:
        """Read ``run_dir``.

        Raises:
            FileNotFoundError: the directory or its ``metrics.jsonl`` does not exist.
            ValueError: ``metrics.jsonl`` holds no complete record, or ``config.yaml`` is not a YAML mapping.
        """
        path = Path(run_dir)
        if not path.is_dir():
            raise FileNotFoundError(f"no run directory at {path}: give the directory that holds {METRICS_FILE}")
        metrics_path = path / METRICS_FILE
        if not metrics_path.is_file():
            raise FileNotFoundError(f"{path} has no {METRICS_FILE}: did the run log anything? expected {metrics_path}")
        records, unreadable = _read_records(metrics_path)
        if not records:
            raise ValueError(
                f"{metrics_path} holds no complete record: the run ended before its first step, or the file is not one "
                'JSON object {"step": ..., "data": {...}} a line'
            )
        return cls(path=path, config=read_config(path / CONFIG_FILE), records=records, unreadable_lines=unreadable)

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    def names(self) -> list[str]:
        """Every metric that occurs at some step, sorted."""
        return sorted({name for record in self.records.values() for name in record})

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """``(steps, values)`` of one metric: int64 and float64 of equal length, by rising step.

        Only steps that logged the metric are in it; values are finite or NaN. Both are empty for an unknown metric.
        """
        steps = [step for step in sorted(self.records) if name in self.records[step]]
        values = [self.records[step][name] for step in steps]
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)

    def has(self, name: str) -> bool:
        """Whether the metric has a finite value at some step."""
        return any(math.isfinite(record.get(name, math.nan)) for record in self.records.values())

    def config_value(self, dotted_key: str, default=None):
        """The value at ``"a.b.c"`` of the configuration; ``default`` where a part of the path is missing or null."""
        value = self.config
        for part in dotted_key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def reward_metric(self) -> str | None:
        """The metric that holds the mean training reward, or None."""
        return next((name for name in ("critic/score/mean", "critic/rewards/mean") if self.has(name)), None)

    def validation_metrics(self) -> dict[str, str]:
        """Data source -> the metric of its validation accuracy; empty where the run never validated.

        verl names it ``val-core/<source>/acc/mean@1`` where the reward function returns ``acc``, and
        ``val-core/<source>/reward/mean@1`` otherwise; each source takes the first of the two that it has.
        """
        found: dict[str, str] = {}
        for variable in ("acc", "reward"):
            pattern = re.compile(rf"val-core/(.+)/{variable}/mean@\d+")
            for name in self.names():
                match = pattern.fullmatch(name)
                if match and self.has(name):
                    found.setdefault(match.group(1), name)
        return found


@dataclass(frozen=True)
class LayerMap:
    """One value per decoder layer and projection, for each error component, at one step.

    Attributes:
        step: the step the values were logged at.
        layers: decoder layer indices, rising (rows).
        projections: column labels, in the order the data flows through a layer.
        values: component -> float64 (rows, columns); experts of a layer are averaged, absent cells are NaN.
        unplaced: module names that hold no layer index.
    """

    step: int
    layers: list[int]
    projections: list[str]
    values: dict[str, np.ndarray]
    unplaced: list[str]


def parse_layer_name(module_name: str) -> tuple[int, tuple[str, ...]] | None:
    """``(layer index, parts of the path below the layer)``; None where the name holds no layer index.

    ``model.layers.3.self_attn.q_proj`` -> ``(3, ("self_attn", "q_proj"))``. Numbers further down number experts; they
    are dropped, so that all experts of a layer get the same answer.
    """
    parts = [part for part in module_name.split(".") if part and part not in _WRAPPER_PARTS]
    layer_at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if layer_at is None:
        return None
    below = tuple(part for part in parts[layer_at + 1 :] if not part.isdecimal() and part != "weight")
    return (int(parts[layer_at]), below) if below else None


def layer_map(run: RunLog) -> LayerMap | None:
    """The per-layer components of the last step that logged any; None where no name can be placed on the map."""
    steps = [step for step, record in run.records.items() if any(name.startswith(LAYER_PREFIX) for name in record)]
    if not steps:
        return None
    step = max(steps)
    cells: dict[tuple[str, int, tuple[str, ...]], list[float]] = {}
    unplaced = set()
    for name, value in run.records[step].items():
        module, _, component = name.removeprefix(LAYER_PREFIX).rpartition("/")
        if not name.startswith(LAYER_PREFIX) or component not in LAYER_COMPONENTS:
            continue
        place = parse_layer_name(module)
        if place is None:
            unplaced.add(module)
        else:
            cells.setdefault((component, *place), []).append(value)
    if not cells:
        return None
    layers = sorted({layer for _, layer, _ in cells})
    labels = _column_labels({below for _, _, below in cells})
    columns = sorted(labels, key=lambda below: _column_rank(below, labels[below]))
    values = {}
    for component in LAYER_COMPONENTS:
        grid = np.full((len(layers), len(columns)), np.nan)
        for (cell_component, layer, below), found in cells.items():
            finite = [value for value in found if math.isfinite(value)]
            if cell_component == component and finite:
                grid[layers.index(layer), columns.index(below)] = float(np.mean(finite))
        if np.isfinite(grid).any():
            values[component] = grid
    return LayerMap(step, layers, [labels[below] for below in columns], values, sorted(unplaced))


def _column_labels(paths: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The shortest label for each path: ``q`` for ``self_attn.q_proj``, with parents in front where labels clash."""

    def label(path: tuple[str, ...], parts: int) -> str:
        return ".".join(path[-parts:]).removesuffix("_proj")

    longest = max(len(path) for path in paths)
    labels = {}
    for path in paths:
        others = [other for other in paths if other != path]
        lengths = range(1, longest + 1)
        unique = (n for n in lengths if all(label(other, n) != label(path, n) for other in others))
        labels[path] = label(path, next(unique, longest))
    return labels


def _column_rank(path: tuple[str, ...], label: str) -> tuple[int, str]:
    projection = path[-1].removesuffix("_proj")
    order = _PROJECTION_ORDER.index(projection) if projection in _PROJECTION_ORDER else len(_PROJECTION_ORDER)
    return order, label


def _read_records(path: Path) -> tuple[dict[int, dict[str, float]], int]:
    records: dict[int, dict[str, float]] = {}
    unreadable = 0
    # errors="replace": a line cut inside a multi-byte character must not make the whole file unreadable.
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            record, whole = read_record(line)
            unreadable += not whole
            if record is not None:
                step, data = record
                records.setdefault(step, {}).update(data)
    return records, unreadable


def read_record(line: str) -> tuple[tuple[int, dict[str, float]] | None, bool]:
    """The (step, metrics) in a line of `metrics.jsonl`, if any, and whether the line was nothing but that."""
    record = _parse_record(line)
    if record is not None:
        return record, True
    # A resumed run that appends to a torn line glues its first record to the torn one's end.
    return _parse_record(line[max(line.rfind('{"step"'), 0) :]), False


def _parse_record(line: str) -> tuple[int, dict[str, float]] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("data"), dict):
        return None
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not float(step).is_integer():
        return None
    data = {}
    for name, value in record["data"].items():
        if value is None:
            value = math.nan
        if isinstance(value, (int, float)):
            data[name] = float(value) if math.isfinite(value) else math.nan
    return int(step), data


def read_config(path: Path) -> dict:
    """A run's `config.yaml`; {} where there is none. Raises ValueError if it is not a YAML mapping."""
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not readable as YAML, repair or remove it: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected the run's configuration as a mapping")
    return config or {}
