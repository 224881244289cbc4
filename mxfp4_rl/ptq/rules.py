"""Names of scale rules, and the recipes that they are.

    name          mxfp4                              nvfp4
    static        rceil                              static (the largest element to 6)
    oas           overflow-aware (2603.08713)        -
    4over6        -                                  the better of two scales (2512.02010)
    soar          -                                  CJSO and DSS, all scales together (2605.12245)
    scalesearch   exponents -1 and 0 (2605.12464)    E4M3 codes -2 to +6 (2605.12464)

After 4over6 and scalesearch, `+inputs` weighs the squared errors with the mean squares of the inputs on the calibration text.

Any other scale rule of the format goes by its own name (floor, even, c7.25, static4, ...; `recipe.SHORT_WORDS`), and a
correction may follow it: oas+mbs-dynamic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.recipe import SCALE_RULES, QuantRecipe, RecipeError

BY_DEFAULT = {"nvfp4": ("static", "4over6", "soar", "scalesearch"), "mxfp4": ("static", "oas", "scalesearch")}
_WORDS = {"4over6": "four-over-six", "4/6": "four-over-six", "scalesearch": "search"}
_WHY_NOT = {
    ("mxfp4", "four-over-six"): "the two scales of 4over6 differ by a factor of 1.5, which powers of two do not hold",
    (
        "mxfp4",
        "soar",
    ): "MXFP4 has no scale of the tensor to solve for, and its block scales alone are what scalesearch searches",
    ("nvfp4", "oas"): "oas rounds powers of two, and NVFP4's scales are E4M3 numbers",
}


BY_INPUTS = "inputs"


@dataclass(frozen=True)
class Rule:
    """A recipe, and whether the squared errors that it compares are weighed with the inputs' mean squares."""

    recipe: QuantRecipe
    by_inputs: bool = False


def rules_of(
    formats: Sequence[str], scales: Sequence[str] | None, calibrated: bool = False
) -> tuple[dict[str, Rule], list[str]]:
    """Rules by their short names, in the order of `formats` and `scales`, and sentences on pairs that do not exist.

    Args:
        formats: "nvfp4", "mxfp4" or both. scales: names as above; None: each format's default ones, with scalesearch+inputs
            if there is a calibration text.
        calibrated: there is one.

    Raises:
        LaunchError: an unknown name, one given twice, one that none of the formats has, or `+inputs` without a text.
    """
    found: dict[str, Rule] = {}
    missing: list[str] = []
    for format in formats:
        defaults = [*BY_DEFAULT[format], *([f"scalesearch+{BY_INPUTS}"] if calibrated else [])]
        for scale in defaults if scales is None else scales:
            rule, *corrections = (part.strip() for part in scale.lower().split("+"))
            rule = _WORDS.get(rule, rule)
            if why := _WHY_NOT.get((format, rule)):
                missing.append(f"{format} has no {scale}: {why}")
                continue
            if rule == "static":
                rule = SCALE_RULES[format][0]
            by_inputs = BY_INPUTS in corrections
            if by_inputs:
                corrections.remove(BY_INPUTS)
                if not calibrated:
                    raise LaunchError(f"--scales {scale} weighs errors with a layer's inputs: give --calibration FILE too")
            words = "+".join([format, *([rule] if rule != SCALE_RULES[format][0] else []), *corrections])
            try:
                recipe = QuantRecipe.parse(words)
            except RecipeError as error:
                raise LaunchError(f"--scales {scale}: {error}; also {', '.join(BY_DEFAULT[format])}") from error
            if recipe.rounding != "nearest":
                raise LaunchError(f"--scales {scale}: weights round to nearest; leave sr out")
            if by_inputs:
                words += f"+{BY_INPUTS}"
                if why := recipe.why_not_weighed():
                    raise LaunchError(f"--scales {scale}: {why}")
            if Rule(recipe, by_inputs) in found.values():
                raise LaunchError(f"--scales names {words} twice; leave one of them out")
            found[words] = Rule(recipe, by_inputs)
    if not found:
        raise LaunchError(f"--scales: {'; '.join(missing)}")
    for scale in scales or ():
        if sum(f" has no {scale}: " in sentence for sentence in missing) == len(formats):
            raise LaunchError(f"--scales: {next(s for s in missing if f' has no {scale}: ' in s)}")
    return found, missing
