"""The configuration of a run, through hydra's Compose API.

Search path: the user's directory if given, then the configurations in this package, then verl's own. hydra is strict
about keys, and its messages speak of structs and appending; here every failure becomes one sentence that names the key
and the nearest one that exists. Keys under `mxfp4.` need no `+`: the block's schema (`mxfp4_rl.settings`) checks them.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mxfp4_rl.launch import LaunchError

BASE_CONFIG = "ppo_trainer"  # verl's


def packaged_config_dir() -> Path:
    """The folder of this package's configurations."""
    return Path(str(importlib.resources.files("mxfp4_rl.configs")))


def verl_config_dir() -> Path:
    """The folder of verl's configurations; verl is located, not imported, because importing it takes seconds."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError("verl is not installed: pip install 'verl>=0.9.1,<0.10'")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


class _PackagedConfigs(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("mxfp4_rl", f"file://{packaged_config_dir()}")
        search_path.append("verl", f"file://{verl_config_dir()}")


def list_configs(config_dir: str | Path | None = None) -> dict[str, str]:
    """Name -> first comment line of every configuration that can be run (that builds on another one)."""
    found = {}
    for folder in filter(None, (config_dir, packaged_config_dir())):
        for path in sorted(Path(folder).glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            if re.search(r"^defaults:", text, re.MULTILINE):
                first = text.lstrip().splitlines()[0]
                found.setdefault(path.stem, first.lstrip("# ") if first.startswith("#") else "")
    return found


def compose_config(name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> DictConfig:
    """The composed configuration, interpolations unresolved.

    Args:
        name: of a yaml file in `config_dir`, in this package, or of verl's.
        overrides: hydra's `key=value`, `+key=value`, `~key`.

    Raises:
        LaunchError: unknown configuration, key or choice, or an override that cannot be read.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise LaunchError(f"--config-dir {config_dir} is not a directory: give the folder that holds {name}.yaml")
    nameless = next((override for override in overrides if override.startswith("=")), None)
    if nameless:  # hydra takes it for a group of configurations
        raise LaunchError(f"cannot read the override {nameless!r}: write key=value, quoted for the shell")
    overrides = [_lenient(override) for override in overrides]
    try:
        return _compose(name, overrides, config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        raise LaunchError(_reword(error, name, overrides, config_dir)) from error
    except Exception as error:  # yaml's errors, mostly
        raise LaunchError(f"configuration {name!r} cannot be read: {one_line(error)}") from error


def added_keys(overrides: Sequence[str]) -> list[str]:
    """The dotted keys that a command line adds on purpose, with `+key=value` or `++key=value`."""
    return [override.lstrip("+").split("=", 1)[0] for override in overrides if override.startswith("+")]


@functools.cache
def verl_defaults() -> dict:
    """verl's own configuration, with nothing of ours; resolved, plain containers, for reading only."""
    return resolved(_compose(BASE_CONFIG, [], None))


def resolved(config: DictConfig) -> dict:
    """The configuration with every interpolation resolved, as plain containers.

    Raises:
        LaunchError: an interpolation that leads nowhere.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise LaunchError(f"{where}{one_line(error)}") from error


def nearest_keys(key: str, config: DictConfig) -> list[str]:
    """Up to three existing dotted keys that `key` may stand for, the likeliest first."""
    parts, node, prefix = key.split("."), config, []
    for part in parts:  # a typing error in one part of the path
        if not isinstance(node, DictConfig):
            break
        if part not in node:
            near = difflib.get_close_matches(part, map(str, node.keys()), n=3)
            if near:
                return [".".join([*prefix, name, *parts[len(prefix) + 1 :]]) for name in near]
            break
        prefix.append(part)
        node = node._get_node(part)
    keys = [known for known in _dotted_keys(config) if not key.startswith(f"{known}.")]
    same_name = [known for known in keys if known.rsplit(".", 1)[-1] == parts[-1]]  # right name, wrong place
    if same_name:  # most people mean the policy
        return sorted(same_name, key=lambda k: (not k.endswith(key), not k.startswith("actor_rollout_ref.actor"), k))[:3]
    return difflib.get_close_matches(key, keys, n=3)


def _compose(name: str, overrides: Sequence[str], config_dir: str | Path | None) -> DictConfig:
    Plugins.instance().register(_PackagedConfigs)
    GlobalHydra.instance().clear()
    folder = Path(config_dir) if config_dir is not None else packaged_config_dir()
    with initialize_config_dir(str(folder.resolve()), version_base=None, job_name="mxfp4-rl"):
        return compose(name, overrides=list(overrides))


@functools.cache
def _unchanged(name: str, config_dir: str | Path | None) -> DictConfig:
    return _compose(name, [], config_dir)


def _lenient(override: str) -> str:
    """`mxfp4.recipe.weight.macro_size=64` needs no `+`: the block is checked by its own schema."""
    return f"++{override}" if override.startswith("mxfp4.") else override


def _reword(error: Exception, name: str, overrides: Sequence[str], config_dir) -> str:
    text = str(error)
    if isinstance(error, OverrideParseException):
        first = one_line(error)
        return f"cannot read the override {error.override!r} ({first}): write key=value, quoted for the shell"
    unknown = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and unknown:
        key = unknown.group(1)
        near = nearest_keys(key, _unchanged(name, config_dir))
        hint = f"did you mean {' or '.join(near)}?" if near else "--print-config shows all keys."
        adding = f" To add a new key on purpose, write +{key}=..." if "override" in text.split("'")[0] else ""
        return f"unknown key {key} in configuration {name!r}; {hint}{adding}"
    if isinstance(error, MissingConfigException):
        choice = re.search(r"Could not find '([^']+)'.*?Available options in '[^']*':\n(.*?)Config search", text, re.DOTALL)
        if choice:
            return f"{choice.group(1)!r} does not exist; available: {', '.join(choice.group(2).split())}"
        if error.missing_cfg_file in (name, f"{name}.yaml"):
            known = list_configs(config_dir)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            return f"no configuration {name!r}; {hint}Available: {', '.join(known)} (or --config-dir DIR)"
    return one_line(error)


def one_line(error: Exception) -> str:
    """hydra's and omegaconf's messages without their structure dump, search path and links."""
    kept = []
    for line in str(error).splitlines():
        if re.match(r"\s*(full_key:|object_type=|reference_type=|See https?://|Config search path)", line):
            break
        kept.append(line.strip())
    return " ".join(filter(None, kept)) or type(error).__name__


def _dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in config:
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            yield from _dotted_keys(node, f"{prefix}{key}.")
