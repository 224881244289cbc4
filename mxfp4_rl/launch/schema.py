"""The preflight's part on names and kinds: every key of a configuration against what verl itself declares.

verl says what it takes in two places: the YAML files that its configuration is composed of, and the dataclasses that they
name with `_target_`. Neither is copied here. A key that both lack is a mistake: the dataclasses refuse it minutes later, in a
worker, and the blocks without one (`data`, `trainer`) ignore it. A value must be what the dataclass's annotation says, or of
the kind that verl's own default has. Blocks that are plain dictionaries in verl (`override_config`, `engine_kwargs`) take any
key but one that looks like a slip of a key that verl's own files give them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig

from mxfp4_rl.launch import LaunchError

OWN_BLOCKS = ("mxfp4",)  # checked by `mxfp4_rl.settings`
RAY_INIT = "ray_kwargs.ray_init"  # the arguments of `ray.init`; verl's YAML files name only some
REQUIRED = "???"  # OmegaConf's mark of a value that must be given
IN_USE = "actor_rollout_ref."  # a reward model's rollout, say, may stay without its name
# What verl's code reads though neither a file nor a class of verl's declares it: the keys of a block, or None for any value.
UNDECLARED: dict[str, tuple[str, ...] | None] = {
    "reward.reward_kwargs": ("overlong_buffer_cfg", "max_resp_len"),  # the DAPO reward manager
    "reward.custom_reward_function.reward_kwargs": None,
    **dict.fromkeys(("reward.max_concurrent", "reward.max_rpm", "reward.max_tpm", "reward.timeout")),  # the rate-limited one
    **dict.fromkeys(("data.need_tools_kwargs", "data.filter_prompts", "data.cache_dir", "data.chat_template_func")),
}
# What verl's readers take beside the kind of its default.
ALSO = {"data.train_files": list, "data.val_files": list, "trainer.logger": str}


def check_schema(
    config: Mapping[str, Any], defaults: Mapping[str, Any], added: Collection[str] = (), copies: Collection[str] = ()
) -> list[str]:
    """Check names and kinds; returns warnings.

    Args:
        config: resolved, plain containers.
        defaults: verl's own configuration, likewise.
        added: dotted keys that were added on purpose; verl ignores them, which is then only worth a warning.
        copies: dotted keys whose values are those of others (`interpolated`); a mistake is told of its origin.

    Raises:
        LaunchError: a key that verl does not have, or lacks, or a value of another kind.
    """
    for skipped in (set(copies), set()):
        check = _Check(set(added), skipped)
        check.block(config, defaults, None, "")
    return check.warnings


def check_blocks(config: DictConfig, defaults: Mapping[str, Any], prefix: str = "") -> None:
    """Check that what is a block of keys in verl is one here; before interpolations are resolved, which lead through blocks.

    Raises:
        LaunchError: a number, a text or a list in place of a block.
    """
    for key, default in defaults.items():
        if not isinstance(default, Mapping) or not default or key not in config:
            continue
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            check_blocks(node, default, f"{prefix}{key}.")
        elif isinstance(node, ListConfig) or not (node._is_none() or node._is_interpolation()):
            raise LaunchError(f"{prefix}{key}={node} must be a block of keys")


def interpolated(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted keys whose values are those of others, `${...}`."""
    for key in config:
        node = config._get_node(key)
        if node._is_interpolation():
            yield f"{prefix}{key}"
        elif isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from interpolated(node, f"{prefix}{key}.")


def load_class(target: str, key: str) -> type:
    """The class that a `_target_` names.

    Raises:
        LaunchError: there is none.
    """
    from hydra.utils import get_class

    try:
        return get_class(target)
    except Exception as error:  # hydra and whatever the module raises when imported
        module, _, name = str(target).rpartition(".")
        near = _nearest(name, _names_in(module))
        raise LaunchError(f"{key}={target} cannot be loaded ({error.__class__.__name__}){near}") from error


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is what an annotation says; an integer is a number, a bool is not."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if kind is None or kind is type(None):
        return value is None
    if kind is bool or (isinstance(value, bool) and kind in (int, float)):
        return kind is bool and isinstance(value, bool)
    if kind in (int, float, str):
        return isinstance(value, (int, float) if kind is float else kind)
    if (origin or kind) in (list, tuple, set):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return all(fits(item, arguments[0]) for item in value) if arguments else True
    if (origin or kind) is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    return True


def describe(kind: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if (origin or kind) in (list, tuple, set):
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)}: " + ", ".join(map(describe, arguments))
        return "a list" + (f" ({describe(arguments[0])} each)" if arguments and arguments[0] is not Any else "")
    if (origin or kind) is dict or dataclasses.is_dataclass(kind):
        return "a block of keys"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null", None: "null"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


class _Check:
    """One pass over a configuration."""

    def __init__(self, added: set[str], skipped: set[str]):
        self.added, self.skipped = added, skipped
        self.warnings: list[str] = []

    def block(self, block: Mapping, default: Mapping, declared: type | None, path: str, open_ended: bool = False) -> None:
        """One block and those below it.

        Args:
            default: verl's own block of the same name.
            declared: the class that an annotation gives it; its `_target_` goes first.
            open_ended: verl takes other keys too; only one that looks like a slip is a mistake.
        """
        target = block.get("_target_")
        cls = load_class(target, f"{path}_target_") if target else declared
        annotations = _annotations(cls) if cls else {}
        # Another engine than the default's (Megatron and so on) has other YAML files, which are not compared here.
        base = default.get("_target_")
        other_engine = bool(cls and base and not issubclass(cls, load_class(base, "_target_")))
        known = set(default) | set(annotations)
        for key, value in block.items():
            here = f"{path}{key}"
            if key == "_target_" or here in OWN_BLOCKS or here in self.skipped:
                continue
            if here in UNDECLARED:
                _check_undeclared(here, value)
                continue
            if key not in known:
                self._unknown(here, str(key), known, cls, other_engine, open_ended)
                continue
            usual, annotation = default.get(key), annotations.get(key)
            if here == RAY_INIT and isinstance(value, Mapping):
                _check_ray_init(value)
                continue
            _check_value(here, value, usual, key in default, annotation, cls)
            below = _dataclass_in(annotation)
            usual = usual if isinstance(usual, Mapping) else {}
            if isinstance(value, Mapping) and (usual or below or "_target_" in value):
                is_dictionary = annotation is not None and below is None and "_target_" not in value
                self.block(value, usual, below, f"{here}.", is_dictionary)
        if not other_engine and not open_ended:
            for key in default:
                if key not in block and key != "_target_":
                    raise LaunchError(
                        f"{path}{key} is missing, and verl reads it: do not delete it (its default is {_shown(default[key])})"
                    )

    def _unknown(self, here: str, key: str, known: set[str], cls: type | None, other_engine: bool, open_ended: bool) -> None:
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8 if open_ended else 0.6)
        hint = f"did you mean {here.removesuffix(key)}{near[0]}?" if near else "--print-config shows all keys"
        on_purpose = cls is None and any(here == given or here.startswith(f"{given}.") for given in self.added)
        if open_ended and (not near or on_purpose):
            return
        if other_engine or on_purpose:
            self.warnings.append(f"verl does not know {here} and will ignore it; {hint}")
        elif cls is None:
            purpose = f"to add it on purpose, write ++{here}=... on the command line"
            raise LaunchError(f"verl has no key {here} and would ignore it; {hint} ({purpose})")
        else:
            raise LaunchError(f"verl has no key {here} ({cls.__name__} would refuse it); {hint}")


def _check_value(key: str, value: Any, usual: Any, in_yaml: bool, annotation: Any, cls: type | None) -> None:
    if value == REQUIRED and (usual != REQUIRED or key.startswith(IN_USE)):
        raise LaunchError(f"{key} is required and not set: give it a value")
    if in_yaml and type(value) is type(usual) and value == usual:  # what verl's own configuration holds is never wrong
        return
    kinds = [ALSO[key]] if key in ALSO else []
    if annotation is not None:
        kinds.append(annotation)
    if in_yaml and usual is not None and usual != REQUIRED:
        kinds.append(type(usual))
    elif annotation is None:
        return  # null in verl's file, and no class: verl says nothing about it
    elif in_yaml or _default_of(cls, key) is None:  # `x: int = None` too
        kinds.append(None)
    if not any(fits(value, kind) for kind in kinds):
        wanted = " or ".join(dict.fromkeys(describe(kind) for kind in kinds))
        example = f"\"'{value}'\"" if wanted == "text" and isinstance(value, int | float) else _example(kinds, usual)
        raise LaunchError(f"{key}={_shown(value)} must be {wanted}" + (f", such as {key}={example}" if example else ""))


def _example(kinds: list, usual: Any) -> str:
    """A value as a command line writes it: verl's own where that is one of these kinds, else one of the first plain kind."""
    if isinstance(usual, bool):
        return str(usual).lower()
    if isinstance(usual, int | float):
        return str(usual)
    flat = [part for kind in kinds for part in (typing.get_args(kind) or (kind,))]
    return next((example for kind, example in ((int, "1"), (float, "0.5"), (bool, "true")) if kind in flat), "")


def _check_undeclared(here: str, block: Any) -> None:
    if UNDECLARED[here] is None:
        return
    if not isinstance(block, Mapping):
        raise LaunchError(f"{here}={_shown(block)} must be a block of keys: {', '.join(UNDECLARED[here])}")
    for key in block:
        if key not in UNDECLARED[here]:
            raise LaunchError(f"verl has no key {here}.{key} and would ignore it{_nearest(key, UNDECLARED[here])}")


def _check_ray_init(block: Mapping[str, Any]) -> None:
    import ray
    from ray.runtime_env import RuntimeEnv

    arguments = {name: p for name, p in inspect.signature(ray.init).parameters.items() if p.kind is not p.VAR_KEYWORD}
    for key, value in block.items():
        if key not in arguments:
            raise LaunchError(f"{RAY_INIT}.{key}: ray.init has no such argument{_nearest(key, arguments)}")
        kind = arguments[key].annotation
        if value is not None and not fits(value, kind):
            raise LaunchError(f"{RAY_INIT}.{key}={_shown(value)} must be {describe(kind)}")
    environment = block.get("runtime_env") or {}
    if not isinstance(environment, Mapping):
        raise LaunchError(f"{RAY_INIT}.runtime_env={_shown(environment)} must be a block of keys")
    for key in environment:
        if key not in RuntimeEnv.known_fields:
            raise LaunchError(f"{RAY_INIT}.runtime_env.{key}: Ray has no such field{_nearest(key, RuntimeEnv.known_fields)}")


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # an annotation that only a type checker can see
        hints = {}
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(cls)}


def _default_of(cls: type | None, key: str) -> Any:
    fields = {field.name: field.default for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    return fields.get(key.rsplit(".", 1)[-1], dataclasses.MISSING)


def _dataclass_in(annotation: Any) -> type | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _names_in(module: str) -> list[str]:
    import importlib

    try:
        return [name for name, value in vars(importlib.import_module(module)).items() if isinstance(value, type)]
    except Exception:  # the module is what is misspelt, or does not import
        return []


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
