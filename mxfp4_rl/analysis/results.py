"""What `mxfp4-rl decompose` found: the measured tensors, pooled by layer type, by decoder layer and over the model.

Tables, figures and files are all drawn from a `Results`, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mxfp4_rl.analysis.measure import Errors, Plan, TensorErrors, pool
from mxfp4_rl.recipe import QuantRecipe

_PROJECTIONS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")  # in the order in which a layer uses them


@dataclass(frozen=True)
class Results:
    """The measurement of one model.

    Attributes:
        model: what the user called it; `facts`: what else a file should say about the measurement (versions, date, ...).
        note: what the reader has to say about the checkpoint, or "".
        tensors: every Linear weight, in file order.
        left_out: other tensors of the checkpoint -> why they are not measured.
        compared: the user chose the recipes.
    """

    model: str
    plan: Plan
    tensors: list[TensorErrors]
    left_out: dict[str, str] = field(default_factory=dict)
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    compared: bool = False

    @property
    def base(self) -> str:
        """Name of the base recipe."""
        return self.plan.base

    @property
    def recipes(self) -> dict[str, QuantRecipe]:
        return dict(self.plan.recipes)

    @property
    def measured(self) -> list[TensorErrors]:
        return [tensor for tensor in self.tensors if not tensor.broken]

    @property
    def broken(self) -> list[TensorErrors]:
        """Weights with NaN or infinite elements, or all zero: in no total."""
        return [tensor for tensor in self.tensors if tensor.broken]

    @cached_property
    def total(self) -> Errors:
        return pool(self.tensors)

    @cached_property
    def by_type(self) -> dict[str, Errors]:
        """Layer type -> its weights' sums, in the order in which a decoder layer uses them."""
        kinds = sorted({tensor.weight.kind for tensor in self.measured}, key=_type_order)
        return {kind: pool(t for t in self.measured if t.weight.kind == kind) for kind in kinds}

    @cached_property
    def by_layer(self) -> dict[int, Errors]:
        """Index of a decoder layer -> its weights' sums; weights outside the decoder layers are in none."""
        layers: dict[int, Errors] = {}
        for tensor in self.measured:
            if tensor.weight.layer is not None:
                layers.setdefault(tensor.weight.layer, Errors()).add(tensor.errors)
        return dict(sorted(layers.items()))

    def worst(self, count: int = 5) -> list[TensorErrors]:
        """The weights with the largest relative MSE of the base recipe."""
        known = [(rel_mse(t.errors, self.base), t) for t in self.measured]
        known = [(value, t) for value, t in known if math.isfinite(value)]
        return [t for _, t in sorted(known, key=lambda pair: -pair[0])[:count]]

    def reasons(self) -> dict[str, int]:
        """Why tensors were left out -> how many."""
        return dict(Counter(self.left_out.values()).most_common())


def metrics(errors: Errors, recipe: str) -> dict[str, float]:
    """`ErrorStats.metrics()`: empty where there is nothing to divide by (weights that are all zero)."""
    stats = errors.stats.get(recipe)
    return stats.metrics() if stats else {}


def metric(errors: Errors, recipe: str, name: str) -> float:
    """One of `metrics`; NaN where there is nothing to divide by."""
    return metrics(errors, recipe).get(name, math.nan)


def share(errors: Errors, recipe: str, name: str) -> float:
    """One of `ErrorStats.shares()`, the paper's S, D and G; NaN where the first pass has no error."""
    stats = errors.stats.get(recipe)
    return stats.shares().get(name, math.nan) if stats else math.nan


def partition(errors: Errors, recipe: str, name: str) -> float:
    """One of `ErrorStats.partition()`; NaN where the first pass has no error."""
    stats = errors.stats.get(recipe)
    return stats.partition().get(name, math.nan) if stats else math.nan


def rel_mse(errors: Errors, recipe: str) -> float:
    """Energy of the final error over the weights' energy."""
    return metric(errors, recipe, "rel_mse")


def change(errors: Errors, recipe: str, base: str, name: str) -> float:
    """A metric's relative change from `base` to `recipe`, -0.5 for half of it; NaN where the base has none."""
    before, after = metric(errors, base, name), metric(errors, recipe, name)
    return after / before - 1 if before > 0 else math.nan


def sweep_rel_mse(errors: Errors, base: str) -> dict[int | None, float]:
    """Mantissa bits of the block scale -> relative MSE; the key None is the real-valued scale, the floor."""
    energy = errors.stats[base].energy if base in errors.stats else 0.0
    return {bits: value / energy for bits, value in errors.sweep.items()} if energy > 0 else {}


def _type_order(kind: str) -> tuple:
    projection = kind.rsplit(".", 1)[-1].removesuffix("_proj")
    known = _PROJECTIONS.index(projection) if projection in _PROJECTIONS else len(_PROJECTIONS)
    return kind.count("."), known, kind
