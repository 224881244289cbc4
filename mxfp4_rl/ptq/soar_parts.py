"""What the parts of SOAR give, each by itself, on the weights of a model: CJSO, neighbouring codes, DSS's other scale.

DSS rounds elements at beta times the scale that is stored. Under the squared error that cannot win: for a stored scale,
rounding at that scale is the best for each element on its own. Its search over neighbouring codes can. The whole grid of 101
betas takes a hundred times as long as the rest, so a sample of rows is measured (each weight's, with a scale of their own).
"""

from __future__ import annotations

from collections.abc import Callable

from mxfp4_rl.nn.linear import spaced_rows
from mxfp4_rl.ptq.weights import Weights, squares
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.quant.passes import Rows
from mxfp4_rl.quant.soar import DSS_BETAS, optimise
from mxfp4_rl.recipe import QuantRecipe

PARTS = {
    "CJSO alone": {"dss": False},
    "CJSO and neighbouring codes (what `soar` is)": {},
    "CJSO and DSS with all 101 betas": {"betas": DSS_BETAS},
}


def soar_parts(weights: Weights, rows: int, advance: Callable[[int], None] = lambda elements: None) -> dict:
    """Relative squared errors of static, the parts and ScaleSearch, and how often a beta other than 1 won.

    Args:
        rows: evenly spaced ones of each weight, at most. advance: told of so many more elements, after each weight.
    """
    soar = QuantRecipe.parse("nvfp4+soar")
    plain = {name: QuantRecipe.parse(words) for name, words in (("static", "nvfp4"), ("ScaleSearch", "nvfp4+search"))}
    lost = dict.fromkeys(["static", *PARTS, "ScaleSearch"], 0.0)
    energy, won, blocks = 0.0, 0, 0
    for weight in weights.originals.values():
        own = spaced_rows(weight, rows, soar).float()
        energy += squares(own)
        for name, recipe in plain.items():
            lost[name] += squares(fake_quantize(own, recipe) - own)
        for name, options in PARTS.items():
            cut = Rows(own, -1, soar)
            state = optimise(cut, cut.block_amax(), **options)
            lost[name] += state.errors[-1]
            if "betas" in options:
                won += state.other_beta_won
                blocks += state.codes.numel() * (len(state.errors) - 1)
        advance(own.numel())
    return {
        "rows": rows,
        "rel_mse": {name: value / energy for name, value in lost.items()} if energy else lost,
        "other_beta_won": won,
        "blocks_and_rounds": blocks,
    }
