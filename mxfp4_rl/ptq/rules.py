"""Names of scale rules, and the recipes that they are.

    name          mxfp4                              nvfp4
    static        rceil                              static (the largest element to 6)
    oas           overflow-aware (2603.08713)        -
    4over6        -                                  the better of two scales (2512.02010)
    soar          -                                  CJSO and DSS, all scales together (2605.12245)
    scalesearch   exponents -1 and 0 (2605.12464)    E4M3 codes -2 to +6 (2605.12464)

Any other scale rule of the format goes by its own name (floor, even, c7.25, static4, ...; `recipe.SHORT_WORDS`), and a
correction may follow it: oas+mbs-dynamic.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def recipes_of(formats: Sequence[str], scales: Sequence[str] | None) -> tuple[dict[str, QuantRecipe], list[str]]:
    """Recipes by their short names, in the order of `formats` and `scales`, and sentences on pairs that do not exist.

    Args:
        formats: "nvfp4", "mxfp4" or both. scales: names as above; None: each format's default ones.

    Raises:
        LaunchError: an unknown name, one given twice, or one that none of the formats has.
    """
    found: dict[str, QuantRecipe] = {}
    missing: list[str] = []
    for format in formats:
        for scale in BY_DEFAULT[format] if scales is None else scales:
            rule, *corrections = (part.strip() for part in scale.lower().split("+"))
            rule = _WORDS.get(rule, rule)
            if why := _WHY_NOT.get((format, rule)):
                missing.append(f"{format} has no {scale}: {why}")
                continue
            if rule == "static":
                rule = SCALE_RULES[format][0]
            words = "+".join([format, *([rule] if rule != SCALE_RULES[format][0] else []), *corrections])
            try:
                recipe = QuantRecipe.parse(words)
            except RecipeError as error:
                raise LaunchError(f"--scales {scale}: {error}; also {', '.join(BY_DEFAULT[format])}") from error
            if recipe.rounding != "nearest":
                raise LaunchError(f"--scales {scale}: weights round to nearest; leave sr out")
            if recipe in found.values():
                raise LaunchError(f"--scales names {words} twice; leave one of them out")
            found[words] = recipe
    if not found:
        raise LaunchError(f"--scales: {'; '.join(missing)}")
    for scale in scales or ():
        if sum(f" has no {scale}: " in sentence for sentence in missing) == len(formats):
            raise LaunchError(f"--scales: {next(s for s in missing if f' has no {scale}: ' in s)}")
    return found, missing
