"""The preflight's part on values: numbers that cannot be meant, and names that nothing in verl answers to.

The lists of names are verl's own: its registries, the comparisons in the functions that read a value, and what the dataclasses
assert. Bounds it has none of: a number that is not finite is refused, a negative one where verl's default is not negative,
and `BOUNDS` says the rest by the last parts of a key, so that one line serves actor, reference and critic alike.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.schema import OWN_BLOCKS, RAY_INIT, load_class

MAY_BE_NEGATIVE = ("entropy_coeff", "seed", "resume_from_path", "log_prob_min_clamp")
COUNT = (1, math.inf, "must be a positive integer")
EVERY = (-1, math.inf, "must be a number of steps, or -1 for never")
SHARE = (0, 1, "must be between 0 and 1")
BOUNDS = {  # last parts of a key: smallest, largest, what to say; null is left to the schema
    **dict.fromkeys(
        [
            *("train_batch_size", "val_batch_size", "gen_batch_size", "max_prompt_length", "max_response_length"),
            *("ppo_mini_batch_size", "ppo_micro_batch_size_per_gpu", "log_prob_micro_batch_size_per_gpu", "ppo_epochs"),
            *("ppo_max_token_len_per_gpu", "log_prob_max_token_len_per_gpu", "rollout.n", "val_kwargs.n", "max_num_seqs"),
            *("max_num_batched_tokens", "max_model_len", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("data_parallel_size", "expert_parallel_size", "ulysses_sequence_parallel_size", "agent.num_workers"),
            *("reward.num_workers", "update_weights_bucket_megabytes", "trainer.nnodes", "trainer.n_gpus_per_node"),
            *("trainer.total_epochs", "trainer.total_training_steps", "num_data_storage_units", "total_storage_size"),
        ],
        COUNT,
    ),
    **dict.fromkeys(["trainer.save_freq", "trainer.test_freq"], EVERY),
    **dict.fromkeys(
        [
            *("lr_warmup_steps_ratio", "min_lr_ratio", "clip_ratio_low", "clip_cov_ratio", "kl_cov_ratio", "over_sample_rate"),
            *("gamma", "lam", "dropout", "betas"),
        ],
        SHARE,
    ),
    **dict.fromkeys(["gpu_memory_utilization", "top_p"], (math.ulp(0.0), 1, "must be above 0 and at most 1")),
    **dict.fromkeys(
        ["rollout.temperature", "repetition_penalty", "clip_grad", "grad_clip", "clip_ratio_c", "rollout_is_threshold"],
        (math.ulp(0.0), math.inf, "must be above 0"),
    ),
}


def check_numbers(config: Mapping[str, Any], defaults: Mapping[str, Any], copies: Collection[str] = ()) -> None:
    """Check the numbers of a configuration whose names and kinds are right; arguments as for `schema.check_schema`.

    Raises:
        LaunchError: a number that is not finite, or out of bounds.
    """

    def is_copy(leaf) -> bool:
        return any(f"{leaf[0]}.".startswith(f"{copy}.") for copy in copies)

    for key, value, _ in sorted(_leaves(config), key=is_copy):  # a mistake is told of its origin
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                declared = _get(defaults, key, _MISSING) is not _MISSING
                _check_number(key, number, _get(defaults, key), declared)


def check_names(config: Mapping[str, Any]) -> None:
    """Check the names that a configuration (plain containers) gives for verl's parts, and let verl check what goes together.

    Raises:
        LaunchError: a name that verl does not know, or a combination that verl's classes refuse.
    """
    for key, value, block in _leaves(config):
        if isinstance(value, str) and isinstance(block.get("_target_"), str):
            name = key.rsplit(".", 1)[-1]
            _check_name(key, value, asserted(load_class(block["_target_"], key), name))
    for key, names in CHOICES.items():
        value = _get(config, key)
        for name in value if isinstance(value, list) else [value]:
            if name is not None:
                _check_name(key, name, names(config))
    _check_rejection(_get(config, "algorithm.rollout_correction.rollout_rs"))
    _ask_verl(OmegaConf.create(config))


def asserted(cls: type, name: str) -> tuple[str, ...]:
    """The names that a dataclass's `__post_init__` takes for a field: what it asserts, or raises an error about otherwise."""
    return _asserted(cls).get(name, ()) if dataclasses.is_dataclass(cls) else ()


def compared(function: Callable, name: str) -> tuple[str, ...]:
    """The words that a function compares a variable or attribute with, `name == "a"` and `name in ("b", "c")`."""
    found: list[str] = []
    tree = _tree(function)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and _named(node.left) == name:
            found += _words(node.comparators[0], tree)
    return tuple(dict.fromkeys(found))


@functools.cache
def _asserted(cls: type) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for base in cls.__mro__:
        function = vars(base).get("__post_init__")
        if not inspect.isfunction(function) or dataclasses.fields(cls) == ():
            continue
        tree = _tree(function)
        for node in ast.walk(tree):
            test = node.test if isinstance(node, ast.Assert | ast.If) else None
            if not isinstance(test, ast.Compare):
                continue
            raises = isinstance(node, ast.If) and any(isinstance(line, ast.Raise) for line in node.body)
            wanted = ast.NotIn if raises else ast.In if isinstance(node, ast.Assert) else None
            if wanted and isinstance(test.ops[0], wanted) and isinstance(test.left, ast.Attribute):
                words = _words(test.comparators[0], tree)
                if words:
                    found.setdefault(test.left.attr, words)
    return found


def _tree(function: Callable) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, SyntaxError, TypeError):  # no source: nothing is known, and nothing refused
        return ast.Module([], [])


def _words(node: ast.AST, tree: ast.AST) -> tuple[str, ...]:
    if isinstance(node, ast.Name):  # a list a few lines above
        node = next((a.value for a in ast.walk(tree) if isinstance(a, ast.Assign) and _named(a.targets[0]) == node.id), node)
    items = node.elts if isinstance(node, ast.List | ast.Tuple | ast.Set) else [node]
    values = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return tuple(values) if len(values) == len(items) else ()


def _named(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _estimators(config) -> Collection[str]:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    return list(ADV_ESTIMATOR_REGISTRY)


def _policy_losses(config) -> Collection[str]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    return list(POLICY_LOSS_REGISTRY)


def _penalties(config) -> Collection[str]:
    from verl.trainer.ppo.core_algos import kl_penalty_forward

    names = compared(kl_penalty_forward, "kl_penalty")
    return [*names, *(f"{name}+" for name in names)]  # "+": the straight-through gradient


def _controllers(config) -> Collection[str]:
    from verl.trainer.ppo.core_algos import get_kl_controller

    return compared(get_kl_controller, "type")


def _weights(config) -> Collection[str]:
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    return compared(compute_rollout_correction_weights, "rollout_is")


def _rollouts(config) -> Collection[str]:
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    from mxfp4_rl.settings import ROLLOUTS

    return list(dict.fromkeys([*ROLLOUTS, *(name for name, _ in _ROLLOUT_REGISTRY)]))


def _loggers(config) -> Collection[str]:
    from verl.utils.tracking import Tracking

    return Tracking.supported_backend


def _trainers(config) -> Collection[str]:
    mode, own = config["trainer"]["v1"]["trainer_mode"], "mxfp4_sync"
    if mode == own:  # known without verl's, which take a second to import
        return [own]
    import verl.trainer.ppo.v1  # noqa: F401  (registers them)
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return [own, *TRAINER_REGISTRY]


def _optimizers(config) -> Collection[str]:
    import importlib

    from torch.optim import Optimizer

    name = config["actor_rollout_ref"]["actor"]["optim"].get("optimizer_impl") or "torch.optim"
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise LaunchError(
            f"actor_rollout_ref.actor.optim.optimizer_impl={name} cannot be imported ({type(error).__name__}): install it, or "
            "use torch.optim"
        ) from error
    return [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Optimizer) and v is not Optimizer]


def _reward_managers(config) -> Collection[str]:
    manager = config["reward"]["reward_manager"]
    if manager.get("source") != "register":
        return [manager["name"]]
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    return list(REWARD_MANAGER)


def _truncations(config) -> Collection[str]:
    from verl.utils.torch_functional import postprocess_data

    return compared(postprocess_data, "truncation")


def _contents(config) -> Collection[str]:
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    tests = [node for node in ast.walk(_tree(BaseCheckpointManager)) if isinstance(node, ast.Compare)]
    tests = [test for test in tests if _named(test.comparators[0]) == "checkpoint_save_contents"]  # "model" in self.check...
    return [test.left.value for test in tests if isinstance(test.left, ast.Constant)]


def _precisions(config) -> Collection[str]:
    from verl.utils import torch_dtypes

    lists = (torch_dtypes.HALF_LIST, torch_dtypes.FLOAT_LIST, torch_dtypes.BFLOAT_LIST)
    return [name for names in lists for name in names if isinstance(name, str)]


def _attentions(config) -> Collection[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked = config["actor_rollout_ref"]["model"]["override_config"].get("attn_implementation")
    kernels = [asked] if "/" in str(asked) else []  # a kernel from the hub
    return ["eager", *ALL_ATTENTION_FUNCTIONS.keys(), *kernels]


def _devices(config) -> Collection[str]:
    from verl.plugin.platform import PlatformRegistry

    return sorted({"cpu", *(PlatformRegistry.get(name)().device_name for name in PlatformRegistry.registered_names())})


CHOICES: dict[str, Callable[[Mapping], Collection[str]]] = {
    "algorithm.adv_estimator": _estimators,
    "algorithm.kl_penalty": _penalties,
    "algorithm.kl_ctrl.type": _controllers,
    "algorithm.rollout_correction.rollout_is": _weights,
    "actor_rollout_ref.actor.kl_loss_type": _penalties,
    "actor_rollout_ref.actor.policy_loss.loss_mode": _policy_losses,
    "actor_rollout_ref.actor.optim.optimizer": _optimizers,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": _precisions,
    "actor_rollout_ref.actor.fsdp_config.dtype": _precisions,
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": _precisions,
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype": _precisions,
    "actor_rollout_ref.actor.checkpoint.save_contents": _contents,
    "actor_rollout_ref.actor.checkpoint.load_contents": _contents,
    "actor_rollout_ref.model.override_config.attn_implementation": _attentions,
    "actor_rollout_ref.rollout.name": _rollouts,
    "actor_rollout_ref.rollout.dtype": _precisions,
    "data.truncation": _truncations,
    "reward.reward_manager.name": _reward_managers,
    "trainer.device": _devices,
    "trainer.logger": _loggers,
    "trainer.v1.trainer_mode": _trainers,
}


def _check_number(key: str, value: float, usual: Any, declared: bool) -> None:
    if not math.isfinite(value):
        raise LaunchError(f"{key}={value} is not a finite number")
    if value == usual:
        return
    name = next((name for name in _suffixes(key) if name in BOUNDS), None)
    if name is not None:
        low, high, wanted = BOUNDS[name]
        if not low <= value <= high:
            raise LaunchError(f"{key}={value} {wanted}{', or null' if usual is None else ''}")
    usual_number = isinstance(usual, int | float) and not isinstance(usual, bool)
    whole = declared and isinstance(value, int) and usual is None  # what a key of the user's own means, only the user knows
    if value < 0 and key.rsplit(".", 1)[-1] not in MAY_BE_NEGATIVE and (whole or (usual_number and usual >= 0)):
        default = "" if usual is None else f" (verl's default is {usual})"
        raise LaunchError(f"{key}={value} must not be negative{default}")


def _check_name(key: str, value: Any, names: Collection[str]) -> None:
    if names and value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LaunchError(f"{key}={value} is not known; {hint}There are: {', '.join(names)}")


def _check_rejection(value: Any) -> None:
    from verl.trainer.ppo.rollout_corr_helper import SUPPORTED_ROLLOUT_RS_OPTIONS

    for name in str(value or "").split(","):
        if name.strip():
            _check_name("algorithm.rollout_correction.rollout_rs", name.strip(), sorted(SUPPORTED_ROLLOUT_RS_OPTIONS))


def _ask_verl(config: DictConfig) -> None:
    """verl's own checks of combinations, which it would come to after Ray's start: its classes' and `validate_config`."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    with contextlib.redirect_stdout(io.StringIO()):
        for key in ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm"):
            with _refused(key):
                omega_conf_to_dataclass(OmegaConf.select(config, key))
        with _refused("the configuration"):
            validate_config(config, need_reference_policy(config), need_critic(config))


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # assertions, ValueErrors, and hydra's around them
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or " ".join(str(error).split()) or type(cause).__name__
        raise LaunchError(f"verl refuses {what}: {reason}") from error


def _leaves(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for key, value in block.items():
        here = f"{prefix}{key}"
        if here in OWN_BLOCKS or here == RAY_INIT:
            continue
        if isinstance(value, Mapping):
            if key != "mxfp4":  # the copies of the block in the actor's and the rollout's
                yield from _leaves(value, f"{here}.")
        elif key != "_target_":
            yield here, value, block


def _suffixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[-n:]) for n in (3, 2, 1) if n <= len(parts))


_MISSING = object()


def _get(config: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return missing
        config = config[part]
    return config
