"""Recipes: what is quantised, and how.

A `QuantRecipe` says how ONE tensor becomes 4-bit; a `ModelRecipe` says which tensors of a model's Linear layers are
quantised with which recipe, and which operands the two backward products use. Both are frozen, validated when built,
and are the schema of the `mxfp4.recipe` block of a run's configuration: a wrong value never reaches a training step.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BLOCK_SIZES = {"mxfp4": (32, 16), "nvfp4": (16,)}  # elements that share one scale; the format's own size comes first
FORMATS = tuple(BLOCK_SIZES)
SCALE_RULES = {  # by format; the default comes first
    "mxfp4": ("rceil", "floor", "ceil", "even", "oas", "search"),
    "nvfp4": ("static", "static4", "four_over_six", "search", "soar"),
}
SEARCH_WINDOWS = {"mxfp4": (-1, 0), "nvfp4": (-2, 6)}  # offsets to the scale's code that "search" tries
SHORT_WORDS = {  # what `QuantRecipe.parse` knows beside the format, for messages and help
    "mxfp4": "rceil (the default), floor, ceil, even, oas, search, c7.25; mbs, mbs32, mbs64, mbs256, mbs-dynamic, "
    "mbs32-dynamic; of, of1, of0.5, and top5% to mask it; prescale; b16; tile; hadamard64; sr",
    "nvfp4": "static (the default), static4, four-over-six, search, soar; tile; hadamard64; sr",
}
MACRO_BLOCKS = (None, "static", "dynamic")
MACRO_SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
HADAMARD_SIZES = (None, 32, 64, 128, 256)
ROUNDINGS = ("nearest", "stochastic")
_OF_ONE_FORMAT = ("scale_rule", "block_size", "search_window")  # these start anew in another format
BACKWARD_OPERANDS = ("ste", "bf16", "mx")
PRODUCTS = ("bf16", "fp8", "fp8_fast")
_PRODUCT_NAMES = {"bf16": "BF16", "fp8": "FP8", "fp8_fast": "FP8 with fast accumulation"}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the value and the fix."""


@dataclass(frozen=True)
class QuantRecipe:
    """How one tensor is quantised: E2M1 elements, and a scale per block along the contraction axis.

    Args:
        format: "mxfp4" (a power-of-two E8M0 scale per 32) or "nvfp4" (an E4M3 scale per 16, and a float32 per tensor).
        scale_rule: how a block gets its scale. mxfp4: "rceil" (never clips; what arXiv 2605.20402 uses), "floor" (OCP), "ceil",
            "even", "oas" (overflow-aware, arXiv 2603.08713), "search" (the exponent of least squared error), or a number
            c in [4, 12] for s = 2^ceil(log2(amax / c)), the family that all but "search" belong to (7.25 has the least
            squared error). nvfp4: "static" (amax to 6), "static4" (amax to 4), "four_over_six" (arXiv 2512.02010), "search"
            (ScaleSearch, arXiv 2605.12464), "soar" (arXiv 2605.12245). None: "rceil" or "static".
        search_window: first and last offset to the scale's code that "search" tries. None: (-1, 0) or (-2, 6).
        block_size: elements that share a scale: 32 or 16 for mxfp4, 16 for nvfp4. None: the format's own.
        tile: 2-D blocks: one scale for block_size x block_size elements of the last two axes (the quantised one and the one
            before it), so that a weight quantised once serves the forward and dgrad alike.
        macro_block: macro-block scaling (MBS, mxfp4): one 8-bit mantissa for `macro_size` elements, chosen from the largest
            magnitude ("static") or by the least squared error of 16 candidates ("dynamic"). None switches it off. In
            `ModelRecipe.from_dict` (a run's configuration) also "hybrid": dynamic for weights, static for the others.
        macro_size: elements of a macro block, a multiple of 32 up to 256.
        fallback_alpha: outlier fallback (OF, mxfp4), x = Q(x) + alpha * Q(x - Q(x)), alpha in (0, 1]. None switches it off.
        fallback_fraction: masked OF: only this fraction of the tensor's blocks, those with the largest magnitudes (and all
            that equal the smallest of them), get the second pass. A token's result then depends on the whole batch.
        fallback_threshold: masked OF: only blocks whose largest magnitude is above this. (arXiv 2503.08040's criterion.)
        pre_scale: quantise pre_scale * x and divide after (mxfp4; 0.75 is arXiv 2601.09555's). 1 is off.
        rounding: "nearest" (ties to even code) or "stochastic" (unbiased where the scale does not clip, for gradients).
        hadamard: rotate blocks of this many elements along the contraction axis before (a random-sign Hadamard transform),
            and back after; 32, 64, 128 or 256. None is off.

    Raises:
        RecipeError: a value outside the above, or a correction that the format does not have.
    """

    format: str = "mxfp4"
    scale_rule: str | float | None = None
    search_window: tuple[int, int] | None = None
    block_size: int | None = None
    tile: bool = False
    macro_block: str | None = None
    macro_size: int = 128
    fallback_alpha: float | None = None
    fallback_fraction: float | None = None
    fallback_threshold: float | None = None
    pre_scale: float = 1.0
    rounding: str = "nearest"
    hadamard: int | None = None

    def __post_init__(self):
        _one_of("format", self.format, FORMATS)
        rules = SCALE_RULES[self.format]
        if self.scale_rule is None:
            object.__setattr__(self, "scale_rule", rules[0])
        if _is_number(self.scale_rule):
            self._check_constant()
        else:
            self._check_rule(rules)
        if self.block_size is None:
            object.__setattr__(self, "block_size", BLOCK_SIZES[self.format][0])
        _one_of("block_size", self.block_size, BLOCK_SIZES[self.format], f" (format {self.format})")
        _one_of("tile", self.tile, (False, True))
        if self.macro_block == "hybrid":
            raise RecipeError(
                "macro_block='hybrid' is for a whole model (ModelRecipe.from_dict): give 'dynamic' or 'static' here"
            )
        _one_of("macro_block", self.macro_block, MACRO_BLOCKS)
        if type(self.macro_size) is not int or self.macro_size not in MACRO_SIZES:
            raise RecipeError(f"macro_size={self.macro_size!r} is not a multiple of 32 up to 256; try {_near(self.macro_size)}")
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("hadamard", self.hadamard, HADAMARD_SIZES)
        self._check_window()
        self._number("pre_scale", lambda v: 0.5 <= v <= 2, "outside [0.5, 2]; use 0.75 (arXiv 2601.09555's), or 1 for none")
        self._number(
            "fallback_alpha",
            lambda v: 0 < v <= 1,
            "outside (0, 1]; use 0.5 (the paper's), 1.0, or null to switch it off",
            optional=True,
        )
        self._number("fallback_fraction", lambda v: 0 < v <= 1, "outside (0, 1]; null is every block", optional=True)
        self._number(
            "fallback_threshold", lambda v: 0 <= v < float("inf"), "not a magnitude; null is every block", optional=True
        )
        self._check_combinations()

    def _check_rule(self, rules: tuple[str, ...]):
        if isinstance(self.scale_rule, str):
            if self.scale_rule.replace("-", "_") in rules:  # as in short names
                object.__setattr__(self, "scale_rule", self.scale_rule.replace("-", "_"))
            elif re.fullmatch(r"c\d+\.?\d*", self.scale_rule):
                raise RecipeError(f"scale_rule={self.scale_rule!r} is a short name: give the number, {self.scale_rule[1:]}")
            elif others := [f for f in FORMATS if f != self.format and self.scale_rule in SCALE_RULES[f]]:
                raise RecipeError(
                    f"scale_rule={self.scale_rule!r} is a rule of {others[0]}; {self.format} has {', '.join(rules)} "
                    f"(null: {rules[0]})"
                )
        _one_of("scale_rule", self.scale_rule, rules, f" (format {self.format})")

    def _check_constant(self):
        if not 4 <= self.scale_rule <= 12:
            raise RecipeError(
                f"scale_rule={self.scale_rule!r} is not in [4, 12]: s = 2^ceil(log2(amax / c)); c = 6 is rceil, 7.25 has the "
                "least squared error"
            )
        if self.format != "mxfp4":
            raise RecipeError(
                f"scale_rule={self.scale_rule!r} is a constant of E8M0 scales; {self.format} has {SCALE_RULES[self.format]}"
            )
        object.__setattr__(self, "scale_rule", float(self.scale_rule))

    def _check_window(self):
        window = self.search_window
        if window is None:
            return
        if self.scale_rule != "search":
            raise RecipeError(f"search_window={window!r} needs scale_rule='search', not {self.scale_rule!r}; give null")
        ends = list(window) if isinstance(window, list | tuple) else []
        if len(ends) != 2 or not all(isinstance(e, int) and not isinstance(e, bool) for e in ends):
            raise RecipeError(f"search_window={window!r} is not a pair of whole numbers such as {SEARCH_WINDOWS[self.format]}")
        if not -16 <= ends[0] <= 0 <= ends[1] <= 16:
            raise RecipeError(f"search_window={window!r} must hold 0 and stay within [-16, 16]")
        object.__setattr__(self, "search_window", tuple(ends))

    def _check_combinations(self):
        if self.fallback_alpha is None:
            for name in ("fallback_fraction", "fallback_threshold"):
                if getattr(self, name) is not None:
                    raise RecipeError(
                        f"{name}={getattr(self, name)} masks the outlier fallback: give fallback_alpha too (in a short name, "
                        "+of), or null"
                    )
        if self.fallback_fraction is not None and self.fallback_threshold is not None:
            raise RecipeError("fallback_fraction and fallback_threshold are two ways to choose the blocks: give one of them")
        if self.tile and self.macro_block:
            raise RecipeError("tile=true has one scale for several rows, macro_block one factor per row: use one of them")
        if self.tile and self.hadamard:
            raise RecipeError("hadamard rotates along one axis, tile=true is to serve both: use one of them")
        if self.tile and self.scale_rule == "soar":
            raise RecipeError("scale_rule='soar' is defined for 1-D blocks; use tile=false or scale_rule='search'")
        if self.format != "mxfp4":
            wrong = {n: "null" for n in ("macro_block", "fallback_alpha") if getattr(self, n) is not None}
            wrong |= {"pre_scale": "1"} if self.pre_scale != 1 else {}
            if wrong:
                fix = ", ".join(f"{name}={value}" for name, value in wrong.items())
                raise RecipeError(
                    f"{' and '.join(wrong)} is defined for format='mxfp4' only: with format={self.format!r} give {fix}"
                )

    def _number(self, name: str, valid, problem: str, optional: bool = False):
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_number(value) or not valid(value):
            raise RecipeError(f"{name}={value!r} is {problem}")
        object.__setattr__(self, name, float(value))

    @property
    def window(self) -> range:
        """The offsets that "search" tries, in order."""
        first, last = self.search_window or SEARCH_WINDOWS[self.format]
        return range(first, last + 1)

    @property
    def tile_rows(self) -> int:
        """Neighbouring rows that share their scales."""
        return self.block_size if self.tile else 1

    @property
    def bits_per_element(self) -> float:
        """Storage cost, scales included: 4.25 for plain MXFP4, twice that with the fallback, plus MBS's byte; 4.5 for NVFP4."""
        scale = 8 / self.block_size / (self.block_size if self.tile else 1)
        share = 1.0 if self.fallback_fraction is None else self.fallback_fraction
        bits = 4 + scale
        if self.fallback_alpha is not None:  # a masked fallback also stores which blocks have one
            bits += bits * share + (1 / self.block_size if share < 1 else 0)
        return bits + (8 / self.macro_size if self.macro_block else 0)

    def why_not_weighed(self) -> str | None:
        """Why an importance of elements (`quantize`) has no meaning for this recipe; None if it weighs errors with it."""
        if self.hadamard:
            return "it rotates, and the importance is that of elements as they were"
        if self.macro_block == "dynamic":
            return "its macro-block factors compare errors that are not weighed"
        if self.scale_rule not in ("search", "four_over_six"):
            return f"its scale rule, {self.scale_rule}, does not choose scales by squared error (search and four_over_six do)"
        return None

    def describe(self) -> str:
        """One short human-readable line, e.g. "mxfp4 rceil + MBS static 128 + OF 0.5"."""
        rule = f"c={self.scale_rule:g}" if _is_number(self.scale_rule) else self.scale_rule
        if self.search_window:
            rule += f" [{self.search_window[0]}, {self.search_window[1]}]"
        parts = [f"{self.format} {rule}"]
        if self.block_size != BLOCK_SIZES[self.format][0] or self.tile:
            parts.append(f"{self.block_size}x{self.block_size} tiles" if self.tile else f"blocks of {self.block_size}")
        if self.macro_block:
            parts.append(f"MBS {self.macro_block} {self.macro_size}")
        if self.fallback_alpha is not None:
            mask = f" on {self.fallback_fraction:.0%} of the blocks" if self.fallback_fraction is not None else ""
            mask = f" above {self.fallback_threshold:g}" if self.fallback_threshold is not None else mask
            parts.append(f"OF {self.fallback_alpha:g}{mask}")
        if self.pre_scale != 1:
            parts.append(f"pre-scale {self.pre_scale:g}")
        if self.hadamard:
            parts.append(f"Hadamard {self.hadamard}")
        if self.rounding != "nearest":
            parts.append(self.rounding)
        return " + ".join(parts)

    @classmethod
    def parse(cls, text: str) -> QuantRecipe:
        """A recipe from its short name: a format and words joined by "+", e.g. "mxfp4+oas+mbs32-dynamic+of1", "nvfp4+search".

        The words are in SHORT_WORDS; "-" may stand for "_" in a scale rule.
        """
        format, *words = (word.strip() for word in text.lower().split("+"))
        _one_of("format", format, FORMATS, f" (in {text!r})")
        given: dict[str, Any] = {"format": format}
        for word in words:
            new = _parse_word(word, format)
            if new is None:
                others = [f for f in FORMATS if f != format and _parse_word(word, f) is not None]
                belongs = f" (it belongs to {others[0]})" if others else ""
                raise RecipeError(f"{word!r} in {text!r} is none of: {SHORT_WORDS[format]}{belongs}")
            twice = sorted(given.keys() & new.keys())
            if twice:
                raise RecipeError(f"{word!r} in {text!r} sets {twice[0]} a second time; name one of them")
            given |= new
        return _build(cls, given, repr(text))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | QuantRecipe | None, where: str = "recipe") -> QuantRecipe:
        """Build from a mapping, e.g. a config block; an unknown key is an error that names the nearest key."""
        if isinstance(values, QuantRecipe):
            return values
        return _build(cls, plain(values or {}), where)


@dataclass(frozen=True)
class ModelRecipe:
    """Which operands of a model's Linear layers are quantised, and how.

    Args:
        weight, activation: recipe of the forward product's two operands; None leaves that operand unquantised.
        grad: recipe of the output gradient in both backward products; None keeps gradients in the compute dtype.
        dgrad, wgrad: the other operand of each backward product. "ste": the forward's dequantised operand (what
            quantise-dequantise emulation with a straight-through estimator computes); "bf16": the unquantised operand;
            "mx": both operands quantised again along that product's own contraction axis (needs `grad`).
        product: what multiplies. "bf16": the dequantised operands, in the compute dtype. "fp8": FP8 tensor cores on the same
            operands, bit for bit (with macro blocks, before they are rounded to the compute dtype), in the forward product and
            in "mx" backward products; needs a fixed scale rule, static macro blocks or none, no fallback, and a GPU of compute
            capability 8.9 or later. "fp8_fast": the same without macro blocks, sums left to the tensor core's accumulator
            (about 14 bits), as FP8 training libraries do in the forward product.
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
    product: str = "bf16"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        _one_of("dgrad", self.dgrad, BACKWARD_OPERANDS)
        _one_of("wgrad", self.wgrad, BACKWARD_OPERANDS)
        _one_of("product", self.product, PRODUCTS)
        for name in ("weight", "activation", "grad"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, QuantRecipe):
                object.__setattr__(self, name, QuantRecipe.from_dict(value, f"recipe.{name}"))
        if self.grad is None and "mx" in (self.dgrad, self.wgrad):
            raise RecipeError("dgrad/wgrad='mx' quantises both operands: give a `grad` recipe too, or use 'ste'")
        for name in ("weight", "activation"):
            recipe = getattr(self, name)
            if recipe is not None and recipe.rounding == "stochastic":
                raise RecipeError(
                    f"{name}.rounding='stochastic': trainer and rollout would round differently; it is for `grad` "
                    "(grad.rounding=stochastic)"
                )
        if self.weight is None and self.activation is None and self.grad is None:
            raise RecipeError("nothing is quantised: weight, activation and grad are all null; use enable=false instead")
        if not _is_list(self.exclude):
            raise RecipeError(f"exclude={self.exclude!r} must be a list of patterns, e.g. [{str(self.exclude)!r}]")
        object.__setattr__(self, "exclude", tuple(_pattern(p, "recipe.exclude") for p in self.exclude))
        overrides = {}
        for pattern, over in self.overrides.items():
            where = f"recipe.overrides[{pattern!r}]"
            overrides[_pattern(pattern, where)] = _plain_override(over, where)
            for name in ("weight", "activation", "grad"):
                operand = getattr(self, name)
                if operand is not None:
                    _build(QuantRecipe, _overridden(operand, overrides[pattern], name), where)
        object.__setattr__(self, "overrides", overrides)

    def for_layer(self, patterns: list[str]) -> ModelRecipe:
        """The recipe of one layer: its matching overrides, in order, on top of each operand's own recipe."""
        operands = {name: getattr(self, name) for name in ("weight", "activation", "grad")}
        for pattern in patterns:
            over = self.overrides[pattern]
            operands = {n: r and QuantRecipe(**_overridden(r, over, n)) for n, r in operands.items()}
        return dataclasses.replace(self, overrides={}, exclude=(), **operands)

    def in_backward(self, operand: str) -> QuantRecipe | None:
        """Recipe of "weight" or "activation" in an "mx" backward product: its own, but rotated and rounded as the gradient."""
        own = getattr(self, operand)
        return own and _in_step_with(own, self.grad)

    @property
    def in_fp8(self) -> bool:
        """Whether products run on FP8 tensor cores, where there are any."""
        return self.product != "bf16"

    def describe(self) -> str:
        """One line for logs: what each operand gets."""
        named = {"W": self.weight, "A": self.activation, "G": self.grad}
        parts = [f"{k}: {r.describe()}" for k, r in named.items() if r is not None]
        return "; ".join(parts) + f"; dgrad {self.dgrad}, wgrad {self.wgrad}; products in {_PRODUCT_NAMES[self.product]}"

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
            if isinstance(given, Mapping):
                if given.get("macro_block") == "hybrid":
                    raise RecipeError(
                        f"{where}.{operand}.macro_block='hybrid' is for a whole model: give it at {where}.macro_block, or "
                        "'dynamic' or 'static' here"
                    )
                inherited = {key: value for key, value in shared.items() if key not in given}
                given = _resolve_hybrid({**_for_format(shared, given), **given}, operand)
            if isinstance(given, QuantRecipe) or given is None:
                own[operand] = given
            elif isinstance(given, Mapping):
                own[operand] = _build(QuantRecipe, given, f"{where}.{operand}", inherited, where)
            else:
                raise RecipeError(f"{where}.{operand}={given!r} must be a block of recipe keys, or null")
        if not isinstance(own.get("overrides") or {}, Mapping):
            raise RecipeError(f"{where}.overrides={own['overrides']!r} must map a pattern to recipe keys")
        own["overrides"] = own.get("overrides") or {}
        own["exclude"] = own.get("exclude") or ()
        return cls(**own)


@functools.cache  # asked for at every step
def _in_step_with(own: QuantRecipe, grad: QuantRecipe) -> QuantRecipe:
    return dataclasses.replace(own, hadamard=grad.hadamard, rounding=grad.rounding)


def _build(cls, values: dict[str, Any], where: str, inherited: Mapping[str, Any] | None = None, above: str = ""):
    """A recipe of `values`; a wrong one is told with its whole key: that of the block `above` for those `inherited` from it."""
    check_keys(values, {f.name for f in dataclasses.fields(cls)}, where)
    try:
        return cls(**values)
    except RecipeError as error:
        key = re.match(r"(\w+)=", str(error))
        where = above if key and key[1] in (inherited or {}) else where
        joined = key and re.fullmatch(r"[A-Za-z]\w*(\.\w+)*", where)
        raise RecipeError(f"{where}{'.' if joined else ': '}{error}") from None


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


def _resolve_hybrid(values: Mapping[str, Any], operand: str) -> dict[str, Any]:
    """MBS-Hybrid (arXiv 2603.08713): dynamic factors for weights, which are quantised once a step, static for the rest."""
    values = dict(values)
    if values.get("macro_block") == "hybrid":
        values["macro_block"] = "dynamic" if operand == "weight" else "static"
    return values


def _overridden(recipe: QuantRecipe, over: Mapping[str, Any], operand: str) -> dict[str, Any]:
    """The keys of `recipe` with those of `over` on top; another format starts from its own scale rule and block size."""
    return _for_format(dataclasses.asdict(recipe), over) | _resolve_hybrid(over, operand)


def _for_format(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without what belongs to their format alone, if `over` names another one."""
    values = dict(values)
    own = values.get("format", "mxfp4")
    return values if over.get("format", own) == own else {k: v for k, v in values.items() if k not in _OF_ONE_FORMAT}


def _parse_word(word: str, format: str) -> dict[str, Any] | None:
    """The recipe keys that one word of `QuantRecipe.parse` sets; None for an unknown word."""
    rule = word.replace("-", "_")
    if rule in SCALE_RULES[format]:
        return {"scale_rule": rule}
    fixed = {"tile": {"tile": True}, "prescale": {"pre_scale": 0.75}, "sr": {"rounding": "stochastic"}}
    if word in fixed:
        return fixed[word]
    if match := re.fullmatch(r"c(\d+\.?\d*)", word):
        return {"scale_rule": float(match[1])}
    if match := re.fullmatch(r"mbs(\d*)(?:-(static|dynamic))?", word):
        return {"macro_block": match[2] or "static"} | ({"macro_size": int(match[1])} if match[1] else {})
    if match := re.fullmatch(r"of(\d+\.?\d*|\.\d+)?", word):
        return {"fallback_alpha": float(match[1] or 0.5)}
    if match := re.fullmatch(r"top(\d+\.?\d*)%", word):
        return {"fallback_fraction": float(match[1]) / 100}
    if match := re.fullmatch(r"b(\d+)", word):
        return {"block_size": int(match[1])}
    if match := re.fullmatch(r"hadamard(\d+)", word):
        return {"hadamard": int(match[1])}
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(name: str, value: Any, allowed: tuple, where: str = "") -> None:
    # 1 == True and 1.0 == 1: only a value of the listed kind is that value.
    if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
        shown = ", ".join("null" if a is None else repr(a) for a in allowed)
        raise RecipeError(f"{name}={value!r} is not one of {shown}{where}")


def _near(size: Any) -> int:
    return min(256, max(32, round(size / 32) * 32)) if _is_number(size) else 128


def plain(values: Any) -> dict[str, Any]:
    """A mapping (DictConfig and dataclass included) as a plain dict of plain values."""
    if dataclasses.is_dataclass(values):
        return dataclasses.asdict(values)
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise RecipeError(f"expected a block of recipe keys, got {values!r}")
    return {k: plain(v) if hasattr(v, "items") else (list(v) if _is_list(v) else v) for k, v in values.items()}


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__iter__") and not hasattr(value, "items")
