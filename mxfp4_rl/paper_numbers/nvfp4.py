"""NVFP4: what ScaleSearch, four-over-six and SOAR gain over the static scale, and whether DSS gains anything.

All on Gaussian data of sigma 1 where nothing else is said. The exhaustive search takes, for every block, the best of all 126
positive E4M3 scales with the tensor's static scale: no choice of block scales can do better for that tensor scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxfp4_rl.paper_numbers.data import Size, sample
from mxfp4_rl.paper_numbers.estimate import Estimate, over_seeds
from mxfp4_rl.quant import quantize, rel_mse
from mxfp4_rl.quant.elements import round_e2m1
from mxfp4_rl.quant.nvfp4 import MAX_CODE, MIN_CODE, e4m3_value, tensor_scale
from mxfp4_rl.quant.passes import Rows
from mxfp4_rl.quant.soar import DSS_BETAS, optimise
from mxfp4_rl.recipe import QuantRecipe

WINDOWS = ((-1, 1), (-1, 6), (-2, 6), (-16, 16))
WINDOW_REFERENCE = {(-1, 1): -17.5, (-1, 6): -27.1, (-2, 6): -27.1, (-16, 16): -27.15}  # the last one: exhaustive
OFFSET_REFERENCE = {-1: 18, 0: 32, 1: 8, 4: 15, 5: 17, 6: 4}  # per cent of blocks
FOUR_OVER_SIX_LAWS = {"gaussian": -16.5, "laplace": -11.6, "t5": -11.9}
SOAR_REFERENCE = {"static": 0.00908, "CJSO": 0.00819, "CJSO + DSS": 0.00744, "exhaustive": 0.00661}
# Two float32 sums of the same squares may differ in their last bits: a gain is more than that.
_GAIN = 1 - 1e-5


@dataclass
class NVFP4Numbers:
    """What was measured.

    Attributes:
        windows: ScaleSearch window -> change of the MSE against static.
        offsets: offset of the chosen code to the static one, window [-2, 6] -> fraction of blocks.
        four_over_six: law -> "change" of the MSE against static, "four": fraction of blocks that choose 4.
        soar: stage -> relative MSE on `few_rows` rows; dss: what the search over all betas found.
    """

    windows: dict[tuple[int, int], Estimate]
    offsets: dict[int, Estimate]
    four_over_six: dict[str, dict[str, Estimate]]
    soar: dict[str, Estimate]
    dss: DssCheck


@dataclass(frozen=True)
class DssCheck:
    """DSS under the squared error, on blocks of Gaussian data.

    Attributes:
        blocks: how many. codes, betas: size of the full search, every pair for every block.
        improved: blocks where a pair with beta other than 1 beat every pair with beta 1.
        soar_wins: how often a beta other than 1 won inside SOAR's own iteration, over blocks and rounds.
        soar_full, soar_plain: SOAR's final relative MSE with all betas and with beta 1 only.
        exhaustive: relative MSE of the best code for every block.
    """

    blocks: int
    codes: int
    betas: int
    improved: int
    soar_wins: int
    soar_full: float
    soar_plain: float
    exhaustive: float


def measure(size: Size) -> NVFP4Numbers:
    return NVFP4Numbers(
        windows=over_seeds(lambda seed: windows(seed, size.few_rows), size.seeds),
        offsets=over_seeds(lambda seed: _offsets(seed, size.rows), size.seeds),
        four_over_six={
            law: over_seeds(lambda seed, law=law: four_over_six(law, seed, size.rows), size.seeds) for law in FOUR_OVER_SIX_LAWS
        },
        soar=over_seeds(lambda seed: _soar(seed, size.few_rows), size.seeds),
        dss=check_dss(size.soar_rows),
    )


def windows(seed: int, rows: int, which: tuple[tuple[int, int], ...] = WINDOWS) -> dict[tuple[int, int], float]:
    """Change of the MSE that ScaleSearch with each window brings, on one sample."""
    x = sample("gaussian", seed, rows, spread="fixed")
    static = rel_mse(x, QuantRecipe(format="nvfp4"))
    recipe = {w: QuantRecipe(format="nvfp4", scale_rule="search", search_window=w) for w in which}
    return {w: rel_mse(x, recipe[w]) / static - 1 for w in which}


def four_over_six(law: str, seed: int, rows: int) -> dict[str, float]:
    """Change of the MSE against static, and the fraction of blocks that four-over-six scales to 4, on one sample."""
    x = sample(law, seed, rows, spread="fixed")
    names = {rule: QuantRecipe(format="nvfp4", scale_rule=rule) for rule in ("static", "static4", "four_over_six")}
    chosen, four = (quantize(x, names[rule]).scales for rule in ("four_over_six", "static4"))  # one tensor scale in both
    return {
        "change": rel_mse(x, names["four_over_six"]) / rel_mse(x, names["static"]) - 1,
        "four": (chosen == four).double().mean().item(),
    }


def _offsets(seed: int, rows: int) -> dict[int, float]:
    x = sample("gaussian", seed, rows, spread="fixed")
    static, found = (quantize(x, QuantRecipe(format="nvfp4", scale_rule=rule)).scales.int() for rule in ("static", "search"))
    offset = (found - static).flatten()
    return {o: (offset == o).double().mean().item() for o in range(-2, 7)}


def _soar(seed: int, rows: int) -> dict[str, float]:
    x = sample("gaussian", seed, rows, spread="fixed")
    energy = x.double().square().sum().item()
    source, amax = _rows(x)
    local = optimise(source, amax, dss=False)
    searched = optimise(source, amax, dss=True)
    return {
        "static": local.errors[0] / energy,
        "CJSO": local.errors[-1] / energy,
        "CJSO + DSS": searched.errors[-1] / energy,
        "exhaustive": _best_codes(x, tensor_scale(amax, "static")).double().sum().item() / energy,
        "ScaleSearch": rel_mse(x, QuantRecipe(format="nvfp4", scale_rule="search")),
    }


def check_dss(rows: int, betas: tuple[float, ...] = DSS_BETAS) -> DssCheck:
    """Try every E4M3 code with every beta for every block of `rows` rows of Gaussian data."""
    x = sample("gaussian", 0, rows, spread="fixed")
    energy = x.double().square().sum().item()
    source, amax = _rows(x)
    full, plain = optimise(source, amax, dss=True, betas=betas), optimise(source, amax, dss=True)
    scale = tensor_scale(amax, "static")
    coupled = _best_codes(x, scale)
    decoupled = _best_codes(x, scale, tuple(beta for beta in betas if beta != 1))
    return DssCheck(
        blocks=coupled.numel(),
        codes=MAX_CODE - MIN_CODE + 1,
        betas=len(betas),
        improved=int((decoupled < coupled * _GAIN).sum()),
        soar_wins=full.other_beta_won,
        soar_full=full.errors[-1] / energy,
        soar_plain=plain.errors[-1] / energy,
        exhaustive=coupled.double().sum().item() / energy,
    )


def _best_codes(x: torch.Tensor, scale: torch.Tensor, betas: tuple[float, ...] = (1.0,)) -> torch.Tensor:
    """Squared error of every block, float32 (blocks,), with the best of all codes and betas for the tensor's `scale`."""
    best = []
    for blocks in x.view(-1, 16).split(8192):  # stays in cache
        least = torch.full((len(blocks),), torch.inf)
        t, rounded, scratch = (torch.empty_like(blocks) for _ in range(3))
        for code in range(MIN_CODE, MAX_CODE + 1):
            worth = (e4m3_value(torch.tensor(code)) * scale).item()
            for beta in betas:
                torch.mul(blocks, 1 / (worth * beta), out=t)
                round_e2m1(t, out=rounded, scratch=scratch).mul_(worth).sub_(blocks)
                least = torch.minimum(least, rounded.square_().sum(-1))
        best.append(least)
    return torch.cat(best)


def _rows(x: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    rows = Rows(x, -1, QuantRecipe(format="nvfp4", scale_rule="soar"))
    return rows, rows.block_amax()
