"""The preflight's part on what a run reads: its model and its data.

A named model or task is made on first use and replaced in the configuration by what verl understands, a path; what the
user gives is looked at before any worker does.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, ListConfig, open_dict

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.recipe import RecipeError
from mxfp4_rl.settings import VLLM_ROLLOUT, Settings

MODEL_KEY = "actor_rollout_ref.model.path"
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def prepare_model(config: DictConfig, say: Callable[[str], None]) -> None:
    """Make sure the model is there; the embedded model's name becomes its path, a relative path an absolute one.

    Raises:
        LaunchError: no such folder, a folder without a model, or a hub model that cannot be had.
    """
    from mxfp4_rl.tasks.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model

    given = config.actor_rollout_ref.model.path
    if not isinstance(given, str) or not given:
        raise LaunchError(f"{MODEL_KEY}={given!r}: give a folder, a hub id such as Qwen/Qwen2.5-3B, or {EMBEDDED_MODEL_NAME}")
    if given == EMBEDDED_MODEL_NAME:
        say(f"model {given}: from the cache, or converted once (about 25 s)")
        try:
            config.actor_rollout_ref.model.path = str(Path(ensure_embedded_model()).absolute())
        except (ImportError, OSError, RuntimeError) as error:
            raise LaunchError(f"{MODEL_KEY}={given}: {error}") from error
        return
    folder = Path(given).expanduser()
    if folder.is_dir():
        _check_model_folder(folder)
        config.actor_rollout_ref.model.path = str(folder.absolute())
    elif given.startswith("hdfs://"):
        pass  # verl copies it
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", given):
        say(f"model {given}: asking the model hub")
        _check_hub_model(given, _trust_remote_code(config))
    else:
        near = difflib.get_close_matches(given.lower(), [EMBEDDED_MODEL_NAME], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"give a folder, a hub id (organisation/name), or {EMBEDDED_MODEL_NAME}"
        raise LaunchError(f"{MODEL_KEY}={given} does not exist; {hint}")


def _check_model_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise LaunchError(
            f"{MODEL_KEY}={folder} has no config.json: give the folder of a transformers checkpoint "
            "(of a verl checkpoint what `verl.model_merger` wrote, or its actor/huggingface where "
            "actor_rollout_ref.actor.checkpoint.save_contents holds hf_model)"
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise LaunchError(f"{MODEL_KEY}={folder} has no weights (*.safetensors or *.bin): is the download complete?")


def _check_hub_model(name: str, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub's client raise many kinds, ValueError for an unknown type too
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LaunchError(
            f"{MODEL_KEY}={name} is no local folder and cannot be had from the model hub ({reason[0]}): check the name "
            "and the network, or download it and give its folder"
        ) from error


def check_quantisable(config: DictConfig, settings: Settings) -> str:
    """What the recipe would quantise in this model, in one line; the model is built without memory.

    Raises:
        LaunchError: nothing would be quantised, a pattern of the recipe matches nothing, the model cannot be built, or the
            vLLM rollout cannot hold what would be quantised.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mxfp4_rl.launch.experts import check_experts
    from mxfp4_rl.nn import plan

    path = config.actor_rollout_ref.model.path
    if path.startswith("hdfs://"):
        return "checked by the workers"
    trust = _trust_remote_code(config)
    try:
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LaunchError(f"{MODEL_KEY}={path} is not a causal language model that can be built: {reason[0]}") from error
    try:
        report = plan(model, settings.recipe)
    except RecipeError as error:
        raise LaunchError(f"mxfp4.recipe does not fit {path}: {error}") from error
    try:
        if settings.kv_cache is not None:
            settings.kv_cache.check_model(model_config)
    except RecipeError as error:
        raise LaunchError(f"mxfp4.kv_cache does not fit {path}: {error}") from error
    if config.actor_rollout_ref.rollout.name == VLLM_ROLLOUT:
        check_experts(config, model, report)
        _check_tensor_parallel(config.actor_rollout_ref.rollout.tensor_model_parallel_size, model, report.converted)
    return report.describe().splitlines()[0]


def _check_tensor_parallel(workers: int, model, converted) -> None:
    """Raise LaunchError where vLLM would cut a layer's inputs inside a block. (It is asked again as it builds its layers.)"""
    import torch

    from mxfp4_rl.vllm_plugin.layout import check_cut

    for name, recipe in converted.items():
        if name.rsplit(".", 1)[-1] in ("o_proj", "down_proj"):  # those that the likes of Llama, Qwen and Mistral cut so
            owner, _, own = name.rpartition(".")
            layer = getattr(model.get_submodule(owner), own)  # a Linear layer, or the fused weights (E, out, in) of experts
            inputs = layer.in_features if isinstance(layer, torch.nn.Module) else layer.shape[-1]
            try:
                check_cut(recipe, inputs, workers, name)
            except ValueError as error:
                raise LaunchError(f"actor_rollout_ref.rollout.tensor_model_parallel_size={workers}: {error}") from error


def prepare_data(config: DictConfig, settings: Settings) -> int | None:
    """Make a task's data, or check the Parquet files given; returns the number of training rows, None where unknown.

    Raises:
        LaunchError: unknown task or option, or a file that verl could not train on.
    """
    if settings.task is not None:
        _resolve_task(config, settings.task)
    elif _has_own_dataset(config):
        return None
    rows, wrong = 0, []
    for key in ("train_files", "val_files"):
        paths = _paths(config.data[key])
        if not paths:
            wrong.append(f"data.{key} is empty: give Parquet files, or a built-in task with mxfp4.task.name=arithmetic")
        for path in paths:
            try:
                count = _check_file(key, path)
            except LaunchError as error:  # those of the other files too: all are mended at once
                wrong.append(str(error))
                continue
            if key == "train_files":
                rows = None if count is None or rows is None else rows + count
    if wrong:
        raise LaunchError("; ".join(text.removesuffix(".") for text in dict.fromkeys(wrong)))
    limit = config.data.get("train_max_samples", -1)
    return min(rows, limit) if rows is not None and limit and limit > 0 else rows


def _resolve_task(config: DictConfig, task) -> None:
    from mxfp4_rl.tasks.data import resolve_task
    from mxfp4_rl.tasks.embedded_model import default_cache_dir

    if not hasattr(task, "items") or not task.get("name"):
        raise LaunchError(f"mxfp4.task={task!r} must be a block with a name: write mxfp4.task.name=arithmetic")
    options = dict(task)
    name = options.pop("name")
    try:
        train, val, module, function = resolve_task(name, default_cache_dir() / "tasks", **options)
    except TypeError as error:  # an unknown option
        raise LaunchError(f"mxfp4.task: {error}; see mxfp4_rl.tasks.{name} for its options") from error
    except (ValueError, OSError) as error:
        raise LaunchError(f"mxfp4.task: {error}") from error
    with open_dict(config):
        config.data.train_files, config.data.val_files = str(train), str(val)
        config.reward.custom_reward_function.path = f"pkg://{module}"
        config.reward.custom_reward_function.name = function


def _check_file(key: str, path: str) -> int | None:
    from mxfp4_rl.tasks.data import check_parquet

    if path.startswith("hdfs://"):
        return None
    try:
        check_parquet(path)
    except (OSError, ValueError) as error:
        raise LaunchError(f"data.{key}: {error}") from error
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(os.path.expanduser(path)).num_rows


def _has_own_dataset(config: DictConfig) -> bool:
    return bool((config.data.get("custom_cls") or {}).get("path"))


def _paths(files) -> list[str]:
    if files is None:
        return []
    return [str(f) for f in files] if isinstance(files, ListConfig | list | tuple) else [str(files)]


def _trust_remote_code(config: DictConfig) -> bool:
    return bool(config.actor_rollout_ref.model.get("trust_remote_code", False))
