"""Recipes: what is quantised, and how.

A `QuantRecipe` says how ONE tensor becomes 4-bit; a `ModelRecipe` says which tensors of a model's Linear layers are
quantised with which recipe, and which operands the two backward products use. Both are frozen, validated when built,
and are the schema of the `mxfp4.recipe` block of a run's configuration: a wrong value never reaches a training step.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BLOCK_SIZE = 32  # elements that share one E8M0 scale (OCP Microscaling v1.0)

SCALE_RULES = ("floor", "rceil", "ceil", "even", "oas")
MACRO_BLOCKS = (None, "static", "dynamic")
FORMATS = ("mxfp4",)
ROUNDINGS = ("nearest",)
BACKWARD_OPERANDS = ("ste", "bf16", "mx")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the value and the fix."""


@dataclass(frozen=True)
class QuantRecipe:
    """How one tensor is quantised to MXFP4: E2M1 elements, one E8M0 scale per 32 along the contraction axis.

    Args:
        format: "mxfp4".
        scale_rule: how the block's largest magnitude becomes a power of two: "floor" (OCP), "rceil" (never clips; what
            arXiv 2605.20402 uses), "ceil", "even" or "oas" (overflow-aware, arXiv 2603.08713).
        macro_block: macro-block scaling (MBS): one 8-bit mantissa for `macro_size` elements, chosen from the largest
            magnitude ("static") or by the smallest squared error of 16 candidates ("dynamic"). None switches it off.
        macro_size: elements of a macro block, a multiple of 32.
        fallback_alpha: outlier fallback (OF), x = Q(x) + alpha * Q(x - Q(x)), alpha in (0, 1]. None switches it off.
        rounding: "nearest" (ties to even code).

    Raises:
        RecipeError: a value outside the above.
    """

    format: str = "mxfp4"
    scale_rule: str = "rceil"
    macro_block: str | None = None
    macro_size: int = 128
    fallback_alpha: float | None = None
    rounding: str = "nearest"

    def __post_init__(self):
        _one_of("format", self.format, FORMATS)
        _one_of("scale_rule", self.scale_rule, SCALE_RULES)
        _one_of("macro_block", self.macro_block, MACRO_BLOCKS)
        _one_of("rounding", self.rounding, ROUNDINGS)
        size = self.macro_size
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % BLOCK_SIZE:
            raise RecipeError(f"macro_size={size!r} is not a positive multiple of {BLOCK_SIZE}; try {_near(size)}")
        alpha = self.fallback_alpha
        if alpha is not None:
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
                raise RecipeError(
                    f"fallback_alpha={alpha!r} is outside (0, 1]; use 0.5 (the paper's), 1.0, or null to switch it off"
                )
            object.__setattr__(self, "fallback_alpha", float(alpha))

    @property
    def bits_per_element(self) -> float:
        """Storage cost, scales included: 4.25 for plain MXFP4, twice that with the fallback, plus MBS's byte."""
        bits = (4 + 8 / BLOCK_SIZE) * (2 if self.fallback_alpha is not None else 1)
        return bits + (8 / self.macro_size if self.macro_block else 0)

    def describe(self) -> str:
        """One short human-readable line, e.g. "mxfp4 rceil + MBS static 128 + OF 0.5"."""
        parts = [f"{self.format} {self.scale_rule}"]
        if self.macro_block:
            parts.append(f"MBS {self.macro_block} {self.macro_size}")
        if self.fallback_alpha is not None:
            parts.append(f"OF {self.fallback_alpha:g}")
        return " + ".join(parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | QuantRecipe | None, where: str = "recipe") -> QuantRecipe:
        """Build from a mapping, e.g. a config block; an unknown key is an error that names the nearest key."""
        if isinstance(values, QuantRecipe):
            return values
        return _build(cls, dict(values or {}), where)


@dataclass(frozen=True)
class ModelRecipe:
    """Which operands of a model's Linear layers are quantised, and how.

    Args:
        weight, activation: recipe of the forward product's two operands; None leaves that operand unquantised.
        grad: recipe of the output gradient in both backward products; None keeps gradients in the compute dtype.
        dgrad, wgrad: the other operand of each backward product. "ste": the forward's dequantised operand (what
            quantise-dequantise emulation with a straight-through estimator computes); "bf16": the unquantised operand;
            "mx": both operands quantised again along that product's own contraction axis (needs `grad`).
        overrides: pattern -> QuantRecipe keys to change, for every quantised operand of the layers it matches; where several
            match, the later one wins key by key. A plain string matches a whole dotted name or its last parts, "re:..." is a
            regular expression searched in the dotted name.
        exclude: patterns of further layers left alone. lm_head, embeddings, routers and norms always are.

    Raises:
        RecipeError: unknown keys or values, or "mx" without a `grad` recipe.
    """

    weight: QuantRecipe | None = field(default_factory=QuantRecipe)
    activation: QuantRecipe | None = field(default_factory=QuantRecipe)
    grad: QuantRecipe | None = None
    dgrad: str = "ste"
    wgrad: str = "ste"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        _one_of("dgrad", self.dgrad, BACKWARD_OPERANDS)
        _one_of("wgrad", self.wgrad, BACKWARD_OPERANDS)
        for name in ("weight", "activation", "grad"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, QuantRecipe):
                object.__setattr__(self, name, QuantRecipe.from_dict(value, f"recipe.{name}"))
        if self.grad is None and "mx" in (self.dgrad, self.wgrad):
            raise RecipeError("dgrad/wgrad='mx' quantises both operands: give a `grad` recipe too, or use 'ste'")
        if self.weight is None and self.activation is None and self.grad is None:
            raise RecipeError("nothing is quantised: weight, activation and grad are all null; use enable=false instead")
        if isinstance(self.exclude, str):
            raise RecipeError(f"exclude={self.exclude!r} must be a list of patterns, e.g. [{self.exclude!r}]")
        object.__setattr__(self, "exclude", tuple(_pattern(p, "recipe.exclude") for p in self.exclude))
        overrides = {}
        for pattern, over in self.overrides.items():
            where = f"recipe.overrides[{pattern!r}]"
            overrides[_pattern(pattern, where)] = _plain_override(over, where)
            for operand in (self.weight, self.activation, self.grad):
                if operand is not None:
                    _build(QuantRecipe, {**dataclasses.asdict(operand), **overrides[pattern]}, where)
        object.__setattr__(self, "overrides", overrides)

    def for_layer(self, patterns: list[str]) -> ModelRecipe:
        """The recipe of one layer: its matching overrides, in order, on top of each operand's own recipe."""
        operands = {name: getattr(self, name) for name in ("weight", "activation", "grad")}
        for pattern in patterns:
            operands = {n: r and dataclasses.replace(r, **self.overrides[pattern]) for n, r in operands.items()}
        return dataclasses.replace(self, overrides={}, exclude=(), **operands)

    def describe(self) -> str:
        """One line for logs: what each operand gets."""
        named = {"W": self.weight, "A": self.activation, "G": self.grad}
        parts = [f"{k}: {r.describe()}" for k, r in named.items() if r is not None]
        return "; ".join(parts) + f"; dgrad {self.dgrad}, wgrad {self.wgrad}"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict that `from_dict` turns back into an equal recipe; what checkpoints store."""
        out = dataclasses.asdict(self)
        out["exclude"] = list(self.exclude)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | ModelRecipe | None, where: str = "recipe") -> ModelRecipe:
        """Build from the `mxfp4.recipe` block.

        Keys of a QuantRecipe at the top level apply to every operand; `weight`, `activation` and `grad` override them
        for one operand (or switch it off with null). `grad` stays unquantised unless it is given.
        """
        if isinstance(values, ModelRecipe):
            return values
        values = plain(values or {})
        shared_names = {f.name for f in dataclasses.fields(QuantRecipe)}
        own_names = {f.name for f in dataclasses.fields(cls)}
        check_keys(values, shared_names | own_names, where)
        shared = {k: v for k, v in values.items() if k in shared_names}
        own = {k: v for k, v in values.items() if k in own_names}
        for operand, default in (("weight", {}), ("activation", {}), ("grad", None)):
            given = own.get(operand, default)
            if isinstance(given, QuantRecipe) or given is None:
                own[operand] = given
            elif isinstance(given, Mapping):
                own[operand] = _build(QuantRecipe, {**shared, **given}, f"{where}.{operand}")
            else:
                raise RecipeError(f"{where}.{operand}={given!r} must be a block of recipe keys, or null")
        if not isinstance(own.get("overrides") or {}, Mapping):
            raise RecipeError(f"{where}.overrides={own['overrides']!r} must map a pattern to recipe keys")
        own["overrides"] = own.get("overrides") or {}
        own["exclude"] = own.get("exclude") or ()
        return cls(**own)


def _build(cls, values: dict[str, Any], where: str):
    check_keys(values, {f.name for f in dataclasses.fields(cls)}, where)
    try:
        return cls(**values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def check_keys(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise RecipeError(f"unknown key {key!r} in {where}; {hint}")


def _pattern(pattern: Any, where: str) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise RecipeError(f"{where}: {pattern!r} is not a layer name, or an expression that begins with 're:'")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise RecipeError(f"{where}: {pattern!r} is not a regular expression ({error})") from None
    return pattern


def _plain_override(over: Any, where: str) -> dict[str, Any]:
    if not isinstance(over, QuantRecipe) and not hasattr(over, "items"):
        raise RecipeError(f"{where}={over!r} must be a block of recipe keys")
    over = plain(over)
    check_keys(over, {f.name for f in dataclasses.fields(QuantRecipe)}, where)
    return over


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        shown = ", ".join("null" if a is None else repr(a) for a in allowed)
        raise RecipeError(f"{name}={value!r} is not one of {shown}")


def _near(size: Any) -> int:
    return max(BLOCK_SIZE, round(size / BLOCK_SIZE) * BLOCK_SIZE) if isinstance(size, int | float) else 128


def plain(values: Any) -> dict[str, Any]:
    """A mapping (DictConfig and dataclass included) as a plain dict of plain values."""
    if dataclasses.is_dataclass(values):
        return dataclasses.asdict(values)
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise RecipeError(f"expected a block of recipe keys, got {values!r}")
    return {k: plain(v) if hasattr(v, "items") else (list(v) if _is_list(v) else v) for k, v in values.items()}


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__iter__") and not hasattr(value, "items")
