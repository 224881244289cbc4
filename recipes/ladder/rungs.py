"""The rungs, the sweeps around them and the presets, as data.

The ladder is the paper's: BF16, FP8, W4A16, plain W4A4, and W4A4 with each correction and with several, at the paper's alpha
of 0.5; and with the alpha of 1 that `configs/mxfp4.yaml` has. A sweep changes one value, or goes beyond the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mxfp4_rl import ModelRecipe, QuantRecipe


@dataclass(frozen=True)
class Rung:
    """One kind of run.

    Args:
        name: of its folder. label: in tables.
        words: short name of the weights' recipe (`QuantRecipe.parse`); None leaves the model in BF16, or in FP8 if `fp8`.
        activation: quantise activations with it too. grad: short name of the output gradients' recipe.
        aqn: values of `AQNSchedule` other than its defaults; None is off.
    """

    name: str
    label: str
    words: str | None = None
    activation: bool = True
    grad: str | None = None
    aqn: dict[str, float] | None = None
    fp8: bool = False

    def recipe(self) -> dict[str, Any] | None:
        if self.words is None:
            return None
        quant = QuantRecipe.parse(self.words)
        grad = QuantRecipe.parse(self.grad) if self.grad else None
        return ModelRecipe(weight=quant, activation=quant if self.activation else None, grad=grad).to_dict()

    def config(self) -> dict[str, Any]:
        """What config.json says of the rung."""
        return {"rung": self.name, "label": self.label, "recipe": self.recipe(), "fp8": self.fp8, "aqn": self.aqn}


_ALL = "mxfp4+mbs+of"
GROUPS: dict[str, list[Rung]] = {
    "ladder": [
        Rung("bf16", "BF16"),
        Rung("fp8", "FP8 W8A8 (E4M3, float32 row scales)", fp8=True),
        Rung("w4a16", "W4A16", "mxfp4", activation=False),
        Rung("w4a4", "W4A4 plain", "mxfp4"),
        Rung("w4a4+mbs", "W4A4 + MBS", "mxfp4+mbs"),
        Rung("w4a4+of", "W4A4 + OF", "mxfp4+of"),
        Rung("w4a4+aqn", "W4A4 + AQN", "mxfp4", aqn={}),
        Rung("w4a4+mbs+of", "W4A4 + MBS + OF", _ALL),
        Rung("w4a4+mbs+of1", "W4A4 + MBS + OF, alpha 1", "mxfp4+mbs+of1"),
        Rung("w4a4+mbs+of+aqn", "W4A4 + MBS + OF + AQN", _ALL, aqn={}),
    ],
    "alpha": [Rung(f"w4a4+mbs+of{a:g}", f"W4A4 + MBS + OF, alpha {a:g}", f"mxfp4+mbs+of{a:g}") for a in (0.25, 0.75)],
    "sigma": [
        Rung(f"w4a4+mbs+of+aqn{s:g}", f"W4A4 + MBS + OF + AQN, sigma {s:g}", _ALL, aqn={"sigma_start": s, "sigma_end": s / 10})
        for s in (0.0025, 0.005, 0.02, 0.05)
    ],
    "macro": [Rung(f"w4a4+mbs{n}", f"W4A4 + MBS {n}", f"mxfp4+mbs{n}") for n in (32, 64, 256)],
    "beyond": [
        Rung("w4a4+mbs32+of", "W4A4 + MBS 32 + OF", "mxfp4+mbs32+of"),
        Rung("w4a4+oas+mbs-dynamic", "W4A4 oas + MBS dynamic", "mxfp4+oas+mbs-dynamic"),
        Rung("w4a4+oas+mbs-dynamic+of", "W4A4 oas + MBS dynamic + OF", "mxfp4+oas+mbs-dynamic+of"),
        Rung("w4a4+mbs+of-top10", "W4A4 + MBS + OF on the top 10 % of blocks", "mxfp4+mbs+of+top10%"),
        Rung("w4a4+of1", "W4A4 + OF, alpha 1", "mxfp4+of1"),
        Rung("w4a4+mbs+of1-top10", "W4A4 + MBS + OF on the top 10 % of blocks, alpha 1", "mxfp4+mbs+of1+top10%"),
        Rung("w4a4g4+mbs+of1", "W4A4G4 + MBS + OF, alpha 1, gradients to nearest", "mxfp4+mbs+of1", grad="mxfp4"),
        Rung("w4a4g4+mbs+of", "W4A4G4 + MBS + OF, gradients to nearest", _ALL, grad="mxfp4"),
        Rung("w4a4g4sr+mbs+of", "W4A4G4 + MBS + OF, gradients stochastic", _ALL, grad="mxfp4+sr"),
    ],
}
RUNGS = {rung.name: rung for group in GROUPS.values() for rung in group}
SELECTIONS = {  # rungs of the groups above that belong together; FP8 W8A8 is for Linear layers only
    "moe": [RUNGS[name] for name in ("bf16", "w4a4", "w4a4+mbs", "w4a4+of", "w4a4+mbs+of1")],
}

PRESETS: dict[str, dict[str, Any]] = {  # options of `grpo.py` other than its defaults
    "gpu": {  # the supervised start makes replies bare numbers, three tokens long
        "task": {"name": "arithmetic", "ops": ["+", "-"], "ranges": {"+": [10, 99], "-": [10, 99]}, "val_size": 5000},
        "warmup_steps": 60, "warmup_lr": 5e-5, "steps": 150, "validate_every": 50, "measure_every": 15, "checkpoint_every": 50,
        "rollout_batch": 1024,
    },
    "moe": {  # the task and the steps of "gpu", of the mixture that recipes/upcycle makes of the model: 8 experts, 4 a token
        "task": {"name": "arithmetic", "ops": ["+", "-"], "ranges": {"+": [10, 99], "-": [10, 99]}, "val_size": 5000},
        "upcycle": {"slices": 4, "copies": 2, "expert_noise": 0.05, "router_std": 0.1},
        "warmup_steps": 60, "warmup_lr": 5e-5, "steps": 150, "validate_every": 50, "measure_every": 15, "checkpoint_every": 50,
        "rollout_batch": 1024,
    },
    "word-problems": {  # harder: BF16 ends below a half
        "task": {"name": "word_problems", "levels": [1, 2, 3], "val_size": 5000},
        "warmup_steps": 60, "warmup_lr": 5e-5, "steps": 200, "micro_batch": 64, "validate_every": 50, "checkpoint_every": 50,
    },
    "cpu": {"prompts": 8, "samples": 4, "steps": 20, "micro_batch": 16, "validate_every": 10, "checkpoint_every": 5},
}  # fmt: skip


def chosen(names: list[str]) -> list[Rung]:
    """The rungs of these groups and names, each once; "all" is every one.

    Raises:
        ValueError: a name is neither.
    """
    found: dict[str, Rung] = {}
    for name in names:
        groups = GROUPS | SELECTIONS
        if name not in (*groups, *RUNGS, "all"):
            raise ValueError(f"no rung {name!r}; groups: {', '.join(groups)}, all; rungs: {', '.join(RUNGS)}")
        rungs = RUNGS.values() if name == "all" else groups.get(name) or [RUNGS[name]]
        found |= {rung.name: rung for rung in rungs}
    return list(found.values())
