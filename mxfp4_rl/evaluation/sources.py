"""Where an evaluation's model, recipe, questions and reward come from; what is wrong with them is a LaunchError.

A checkpoint of verl is a folder ``global_step_N`` with the recipe of its run (`mxfp4_recipe.json`) and the model in
``actor/huggingface``, or in ``merged`` where verl's merger was told so: any of these folders stands for the checkpoint.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.inputs import WEIGHT_PATTERNS
from mxfp4_rl.recipe import ModelRecipe, QuantRecipe, RecipeError
from mxfp4_rl.settings import RECIPE_FILE

if TYPE_CHECKING:
    from mxfp4_rl.evaluation.measure import Question

DEFAULT_TASK = "arithmetic"
DEFAULT_RESPONSE_TOKENS = 256  # of a user's own data
MERGED = "merged"  # beside actor/, where the line below puts the whole model
_MERGE = "python -m verl.model_merger merge --backend fsdp --local_dir {actor} --target_dir {target}"


def find_model(given: str) -> str:
    """What transformers is to load: a folder, or a name on the hub as it was given.

    Raises:
        LaunchError: there is no such folder, or it holds no model.
    """
    from mxfp4_rl.tasks.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model

    folder = Path(given).expanduser()
    if not folder.exists():
        if given == EMBEDDED_MODEL_NAME:
            try:
                return str(ensure_embedded_model())
            except (ImportError, OSError, RuntimeError) as error:
                raise LaunchError(f"{given}: {error}") from error
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", given):
            return given
        raise LaunchError(f"checkpoint {given} does not exist; give a folder, a name on the hub or {EMBEDDED_MODEL_NAME}")
    here = folder.absolute()
    top = {"actor": here.parent, "huggingface": here.parent.parent}.get(folder.name, folder)
    parts = [folder, folder / "huggingface", folder / "actor" / "huggingface", top / MERGED]
    parts = [part for part in parts if (part / "config.json").is_file()]
    for part in parts:
        if any(next(part.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
            return str(part)
    for part in parts:
        hint = "is the download complete?"
        if part.name == "huggingface":
            merge = _MERGE.format(actor=part.parent, target=part.parent.parent / MERGED)
            hint = (
                f"verl saved them in parts: `{merge}` merges them, where this command then finds them; or train with "
                "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
            )
        raise LaunchError(f"checkpoint {part} has no weights (*.safetensors or *.bin): {hint}")
    raise LaunchError(f"checkpoint {given} has no config.json: give the folder of a transformers checkpoint, or global_step_N")


def find_recipe(options, model: str) -> tuple[ModelRecipe | None, str]:
    """The recipe to quantise with, None for none, and where it is from.

    Raises:
        LaunchError: it is no recipe.
    """
    given = {name: getattr(options, name) for name in ("recipe", "weight", "activation")}
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if options.bf16:
        if named:
            raise LaunchError(f"--bf16 leaves the quantiser out, {named[0]} asks for it: give one of them")
        return None, "--bf16"
    if options.recipe is not None and len(named) > 1:
        raise LaunchError(f"--recipe is for both operands: leave {named[1]} out, or give --weight and --activation alone")
    try:
        if options.recipe is not None and options.recipe.endswith(".json"):
            return _read_recipe(Path(options.recipe).expanduser()), options.recipe
        if named:
            words = {"weight": options.recipe or options.weight, "activation": options.recipe or options.activation}
            parsed = {name: QuantRecipe.parse(text) if text not in (None, "none") else None for name, text in words.items()}
            return ModelRecipe(**parsed), " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    except RecipeError as error:
        raise LaunchError(f"{' '.join(named)}: {error}") from error
    folder = Path(model).absolute()
    for above in (folder, *list(folder.parents)[:2]) if folder.is_dir() else ():
        if (above / RECIPE_FILE).is_file():
            return _read_recipe(above / RECIPE_FILE), str(above / RECIPE_FILE)
    return None, "none given or stored"


def _read_recipe(path: Path) -> ModelRecipe | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return None if stored is None else ModelRecipe.from_dict(stored, str(path))  # null: a run in BF16
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise LaunchError(f"{path} is no recipe: {error}") from error


def find_data(options) -> tuple[Path, Callable, str, int, str]:
    """The Parquet file, its reward function, that one's name, the length of a reply, and what to call it all.

    Raises:
        LaunchError: an unknown task or option, an unusable file, a reward function that cannot be had.
    """
    from mxfp4_rl.tasks.data import check_parquet, resolve_task
    from mxfp4_rl.tasks.embedded_model import default_cache_dir

    if options.data is None:
        if options.reward is not None:
            raise LaunchError("--reward is for --data: a task has its own")
        name = options.task or DEFAULT_TASK
        try:
            task = resolve_task(name, default_cache_dir() / "tasks", **_task_options(options.task_option))
        except (TypeError, ValueError, OSError) as error:
            raise LaunchError(f"--task {name}: {error}") from error
        module = importlib.import_module(task.reward_module)
        where = f"pkg://{task.reward_module}:{task.reward_function}"
        return task.val_path, getattr(module, task.reward_function), where, module.RECOMMENDED_RESPONSE_TOKENS, name
    if options.task is not None or options.task_option:
        raise LaunchError(f"--data {options.data} and --task are two sources of questions: give one of them")
    try:
        check_parquet(options.data)
    except (OSError, ValueError) as error:
        raise LaunchError(f"--data: {error}") from error
    path, where = Path(options.data).expanduser(), options.reward or "verl's default_compute_score"
    return path, _reward_function(options.reward), where, DEFAULT_RESPONSE_TOKENS, str(path)


def _task_options(given: list[str]) -> dict[str, Any]:
    out = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not key or not sign:
            raise LaunchError(f"--task-option {text!r} is not KEY=VALUE, e.g. val_size=512")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
        if isinstance(out[key], dict):  # JSON's keys are texts, a level's is a number
            out[key] = {int(k) if k.isdigit() else k: v for k, v in out[key].items()}
    return out


def _reward_function(given: str | None) -> Callable:
    if given is None:
        from verl.utils.reward_score import default_compute_score

        return default_compute_score
    path, sign, name = given.rpartition(":")
    if not sign or not path or path == "pkg" or not name.isidentifier():
        raise LaunchError(f"--reward {given!r} is not FILE.py:FUNCTION or pkg://MODULE:FUNCTION")
    from verl.utils.import_utils import load_extern_object

    try:
        function = load_extern_object(module_path=path, object_name=name)
    except Exception as error:  # whatever the user's file raises
        raise LaunchError(f"--reward {given}: {type(error).__name__}: {error}") from error
    if inspect.iscoroutinefunction(function):
        raise LaunchError(f"--reward {given} is asynchronous: give a plain function")
    return function


def read_questions(path: Path, tokenizer, limit: int | None) -> list[Question]:
    """The first `limit` rows of a file in verl's schema, prompts as the rollout gets them.

    Raises:
        LaunchError: the model has no chat template, or a row is not in verl's schema.
    """
    import pyarrow.parquet

    from mxfp4_rl.evaluation.measure import Question

    if not tokenizer.chat_template:
        raise LaunchError(
            "the checkpoint's tokenizer has no chat template, which prompts are written with: copy the tokenizer over"
        )
    rows = pyarrow.parquet.read_table(path).slice(0, limit).to_pylist()
    out = []
    for number, row in enumerate(rows):
        try:
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            truth = row["reward_model"]["ground_truth"]
        except Exception as error:  # templates raise kinds of their own
            raise LaunchError(f"{path}, row {number} is not in verl's schema: {type(error).__name__}: {error}") from error
        out.append(Question(list(ids), str(row["data_source"]), truth, row.get("extra_info") or {}))
    return out


def scorer(function: Callable, where: str) -> Callable[[Question, str], float]:
    """The accuracy that a reward function gives a reply: its "acc" where it has one, else its score.

    Raises:
        LaunchError: (when called) it failed, or returned something else than verl takes.
    """

    def score(question: Question, text: str) -> float:
        try:
            result = function(
                data_source=question.data_source,
                solution_str=text,
                ground_truth=question.ground_truth,
                extra_info=dict(question.extra_info),
            )
            if isinstance(result, dict):
                result = result.get("acc", result.get("score"))
            return float(result[0] if isinstance(result, tuple | list) else result)
        except Exception as error:  # whatever the user's function raises
            raise LaunchError(
                f"the reward {where} failed for data source {question.data_source!r}: {type(error).__name__}: {error}"
            ) from error

    return score
