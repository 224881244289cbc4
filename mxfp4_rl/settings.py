"""The `mxfp4:` block of a run's configuration, checked: what the plugin's parts in every process read.

enable: true
recipe: {...}              a QuantRecipe for every operand; weight, activation, grad over it; ModelRecipe's fields
quantize_reference: false  quantise the reference policy too
kv_cache: {...}            a KVCacheRecipe for the rollout's past tokens, or null for BF16
aqn: {enable, sigma_start, sigma_end, stages, seed}
monitor: {every, max_rows, layers}
mismatch: {k3_kl, stop}    when trainer and rollout are too far apart
alerts: {calm, entropy, ...}  bands whose leaving is told of
guards: {...}              when a run that cannot learn, or waits without end, is ended
run_dir: where metrics, checkpoints and the report go
task: {name, ...}          a built-in task, or null for the parquet files of `data.*`
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mxfp4_rl.kv_cache.recipe import KVCacheRecipe
from mxfp4_rl.monitor.alerts import Band
from mxfp4_rl.recipe import ModelRecipe, RecipeError, check_keys, plain

HF_ROLLOUT, VLLM_ROLLOUT = "mxfp4_hf", "vllm"
ROLLOUTS = (HF_ROLLOUT, VLLM_ROLLOUT)  # values of `rollout.name` that hold MXFP4 weights
RECIPE_FILE = "mxfp4_recipe.json"  # in a checkpoint: the recipe it was trained with, null for BF16


@dataclass(frozen=True)
class MonitorSettings:
    """How often and how closely the error components are measured.

    Args:
        every: training steps between two measurements; 0 switches the monitor off.
        max_rows: rows of each weight (and tokens of each activation) measured, evenly spaced; null measures all.
        layers: log the components of every layer under `mxfp4_layers/` too.
    """

    every: int = 1
    max_rows: int | None = 64
    layers: bool = True

    def __post_init__(self):
        _is_bool("mxfp4.monitor.layers", self.layers)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 0:
            raise RecipeError(f"mxfp4.monitor.every={self.every!r} must be an integer of at least 0 (0: never)")
        if self.max_rows is not None and (not isinstance(self.max_rows, int) or self.max_rows < 1):
            raise RecipeError(f"mxfp4.monitor.max_rows={self.max_rows!r} must be a positive integer, or null for all")


@dataclass(frozen=True)
class AQNSettings:
    """The `mxfp4.aqn` block; see `mxfp4_rl.noise.AQNSchedule`, which adds the run's length."""

    enable: bool = False
    sigma_start: float = 0.01
    sigma_end: float = 0.001
    stages: int = 10
    seed: int = 0

    def __post_init__(self):
        _is_bool("mxfp4.aqn.enable", self.enable)
        for name in ("sigma_start", "sigma_end", "stages", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError(
                    f"mxfp4.aqn.{name}={value!r} must be a number, such as mxfp4.aqn.{name}={getattr(type(self), name)}"
                )

    def schedule(self, total_steps: int):
        """The schedule for a run of `total_steps`, or None when switched off. Raises RecipeError on wrong values, also then."""
        from mxfp4_rl.noise import AQNSchedule

        values = {k: v for k, v in vars(self).items() if k != "enable"}
        schedule = AQNSchedule(total_steps=total_steps, **values)
        return schedule if self.enable else None


@dataclass(frozen=True)
class MismatchSettings:
    """When the rollout's probabilities are too far from the trainer's on the tokens that it sampled.

    Args:
        k3_kl: limit for verl's `rollout_corr/k3_kl`. null: 2 where activations are quantised (their codes flip with the last
            bit of another attention kernel, so a small model has a high floor of its own), and where the KV cache is; else
            0.02, and 2000 sigma^2 for the noise that the rollout alone has (AQN; SmolLM2-135M in FP32 measured 530 to 650
            sigma^2).
        stop: end the run at the limit instead of printing an alarm.
    """

    k3_kl: float | None = None
    stop: bool = False

    def __post_init__(self):
        _is_bool("mxfp4.mismatch.stop", self.stop)
        if self.k3_kl is not None and (isinstance(self.k3_kl, bool) or not self.k3_kl > 0):
            raise RecipeError(f"mxfp4.mismatch.k3_kl={self.k3_kl!r} must be a positive number, or null for the default")

    def limit(self, quantises_activations: bool, sigma: float = 0.0) -> float:
        """The limit of a step whose rollout had noise of `sigma`; a quantised KV cache counts as activations."""
        if self.k3_kl is not None:
            return self.k3_kl
        return 2.0 if quantises_activations else 0.02 + 2000 * sigma**2


@dataclass(frozen=True)
class AlertSettings:
    """The bands of `mxfp4_rl.monitor.alerts`: [low, high] each, null for an open end; null in place of a band is no alert.

    A value that is not finite is outside of every band. The alert `mismatch` takes its limit from `mxfp4.mismatch`.

    Args:
        calm: steps back inside the band, in a row, after which an alert is over.
        deadzone_fraction: of `mxfp4/deadzone_fraction`, the weights that round to zero; bell-shaped ones are near 0.085.
        entropy: of `actor/entropy`, nats a token.
        grad_norm: of `actor/grad_norm`; the default asks only that it is finite.
        response_clip: of `response_length/clip_ratio`, the part of the answers that was cut off.
        no_signal: of `training/steps_without_signal`, steps in a row in which all advantages were equal.
    """

    calm: int = 5
    deadzone_fraction: Band | None = (None, 0.2)
    entropy: Band | None = (0.01, None)
    grad_norm: Band | None = (None, None)
    response_clip: Band | None = (None, 0.95)
    no_signal: Band | None = (None, 9)

    def __post_init__(self):
        if isinstance(self.calm, bool) or not isinstance(self.calm, int) or self.calm < 1:
            raise RecipeError(f"mxfp4.alerts.calm={self.calm!r} must be a positive integer")
        for name, band in self.bands().items():
            object.__setattr__(self, name, _band(f"mxfp4.alerts.{name}", band))

    def bands(self) -> dict[str, Band]:
        """Name -> band of those that are switched on."""
        return {name: band for name, band in vars(self).items() if name != "calm" and band is not None}


def _band(name: str, given: Any) -> Band:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise RecipeError(f"{name}={given!r} must be a band [low, high], null for an open end; null alone switches it off")
    for end in given:
        if end is not None and (isinstance(end, bool) or not isinstance(end, int | float) or end != end):
            raise RecipeError(f"{name}={given!r} has an end {end!r}, which is neither a number nor null")
    low, high = given
    if low is not None and high is not None and low > high:
        raise RecipeError(f"{name}={given!r} has its ends the wrong way round: nothing is inside")
    return low, high


@dataclass(frozen=True)
class GuardSettings:
    """When a run raises an alarm, and when it ends; see `mxfp4_rl.verl_plugin.guards`. null switches a guard off.

    Args:
        nonfinite_steps: end after so many steps in a row whose loss or gradient norm is NaN or infinite.
        empty_gen_batches: with `algorithm.filter_groups`: end a step that generated so many batches of prompts and found no
            group with two different rewards.
        failed_samples: end a step of whose samples more than this fraction failed.
        reward_timeout_s: seconds that the reward of one sample may take; a sample that takes longer counts as failed.
        stall_s: seconds without any progress (a finished sample, a next phase of a step) after which the run ends.
    """

    nonfinite_steps: int | None = 3
    empty_gen_batches: int | None = 10
    failed_samples: float | None = 0.5
    reward_timeout_s: float | None = 300
    stall_s: float | None = 3600

    def __post_init__(self):
        for name in ("nonfinite_steps", "empty_gen_batches"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RecipeError(f"mxfp4.guards.{name}={value!r} must be a positive integer, or null for no guard")
        for name, most in (("failed_samples", 1), ("reward_timeout_s", None), ("stall_s", None)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= (most or math.inf)):
                span = f"in (0, {most}]" if most else "above 0"
                raise RecipeError(f"mxfp4.guards.{name}={value!r} must be a number {span}, or null for no guard")


@dataclass(frozen=True)
class Settings:
    """The whole block. Build it with `from_config`; with `enable` false the model is plain verl's, and of the rest
    `alerts`, `guards` and `run_dir` count."""

    enable: bool = False
    recipe: ModelRecipe = field(default_factory=ModelRecipe)
    quantize_reference: bool = False
    kv_cache: KVCacheRecipe | None = None
    aqn: AQNSettings = field(default_factory=AQNSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    mismatch: MismatchSettings = field(default_factory=MismatchSettings)
    alerts: AlertSettings = field(default_factory=AlertSettings)
    guards: GuardSettings = field(default_factory=GuardSettings)
    run_dir: str | None = None
    task: Mapping[str, Any] | None = None

    @classmethod
    def from_config(cls, block: Any) -> Settings:
        """Check a mapping (or DictConfig, interpolations allowed).

        Raises:
            RecipeError: an unknown key (with the nearest known one), or a value that cannot be used.
        """
        if block is None:
            return cls()
        if type(block).__name__ == "DictConfig":
            from omegaconf import OmegaConf

            block = OmegaConf.to_container(block, resolve=True)
        values = plain(block)
        check_keys(values, {f.name for f in dataclasses.fields(cls)}, "mxfp4")
        for name in ("enable", "quantize_reference"):
            _is_bool(f"mxfp4.{name}", values.get(name, False))
        for name, kind in _BLOCKS.items():
            given = values.get(name) or {}
            if not isinstance(given, Mapping):
                raise RecipeError(f"mxfp4.{name}={given!r} must be a block of keys")
            check_keys(given, {f.name for f in dataclasses.fields(kind)}, f"mxfp4.{name}")
            values[name] = kind(**given)
        if not isinstance(values.get("run_dir"), str | None):
            raise RecipeError(f"mxfp4.run_dir={values['run_dir']!r} must be a path (quote one that is a number), or null")
        values["kv_cache"] = KVCacheRecipe.from_dict(values.get("kv_cache"), "mxfp4.kv_cache")
        values["recipe"] = ModelRecipe.from_dict(values.get("recipe"), "mxfp4.recipe")
        return cls(**values)


_BLOCKS = {
    "aqn": AQNSettings,
    "monitor": MonitorSettings,
    "mismatch": MismatchSettings,
    "alerts": AlertSettings,
    "guards": GuardSettings,
}


def _is_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RecipeError(f"{name}={value!r} must be true or false")
