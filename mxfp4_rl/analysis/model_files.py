"""Which files a model consists of: a folder, a file, or a name on the Hugging Face hub.

Only names and first bytes are looked at here. Whatever is missing, pickled, empty or a Git LFS pointer is told before a header
is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CheckpointError", "ModelFiles", "few", "find_model", "read_json"]

_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pth", ".pt", ".ckpt")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.gguf)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class CheckpointError(ValueError):
    """A model cannot be read; the message says what is wrong, with which file, and what to do."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model, all of which exist.

    Attributes:
        weights: safetensors files, or GGUF files, in the order of their names.
        index: tensor name -> file name, as the shards' index promises; {} without one.
        config: config.json of the same folder; {} without one.
    """

    weights: list[Path]
    index: dict[str, str]
    config: dict[str, Any]


def find_model(model: str, revision: str | None = None) -> ModelFiles:
    """The files behind what a user calls a model; those on the hub are downloaded.

    Args:
        model: path of a folder or file, or a hub name. What exists as a path is not looked for on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: there is no such model, or its weights are missing, incomplete or of a kind that is not read.
        OSError: a file or folder cannot be read.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{model}: {error}; give the full path") from error
    if not model.strip():
        raise CheckpointError("the model's name is empty: give a folder, a file or a hub name like org/name")
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} is for models on the hub and {model} is a local path: leave it out")
    elif _HUB_NAME.fullmatch(model) and path.suffix not in (".safetensors", ".gguf", *_PICKLED):
        path = _download(model, revision)
    else:
        raise CheckpointError(f"no such file or folder: {path}; check the path, or give a hub name like org/name")
    folder, index = path, {}
    if path.is_file():
        folder, weights = path.parent, _named_file(path)
    elif (path / _INDEX).is_file():
        index = _read_index(path / _INDEX)
        weights = _indexed(path, index)
    else:
        weights = _found_in(path)
    for file in weights:
        _refuse_what_is_no_weight_file(file)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return ModelFiles(weights, index, config)


def _named_file(path: Path) -> list[Path]:
    if path.suffix == ".gguf":
        return _all_parts([path])
    if path.suffix == ".safetensors":  # one shard of several may be looked at on its own
        return [path]
    if path.suffix in _PICKLED:
        raise CheckpointError(f"{path} is a pickled file, which is not read: {_unpickle(path)}")
    raise CheckpointError(f"{path} is neither .safetensors nor .gguf: give such a file, or the model's folder")


def _found_in(folder: Path) -> list[Path]:
    """The weights of a folder without an index."""
    names = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    stored = [p for p in names if p.suffix == ".safetensors"]
    if stored:
        # As transformers chooses: some models carry a second copy of their weights beside this one (consolidated.safetensors).
        whole = [p for p in stored if p.name == "model.safetensors"]
        return whole or _all_parts([p for p in stored if re.match(r"model-\d{5}-of-\d{5}\.", p.name)] or stored)
    ggufs = [p for p in names if p.suffix == ".gguf"]
    if ggufs:
        models = {(m["stem"], m["count"]) if (m := _PART.fullmatch(p.name)) else p.name for p in ggufs}
        if len(models) > 1:
            raise CheckpointError(f"{folder} holds {len(models)} GGUF models: give one of {few(p.name for p in ggufs)}")
        return _all_parts(ggufs)
    pickled = [p for p in names if p.suffix in _PICKLED]
    if pickled:
        raise CheckpointError(f"{folder} holds pickled weights only ({few(p.name for p in pickled)}): {_unpickle(pickled[0])}")
    found = few(p.name for p in names) or "it is empty"
    raise CheckpointError(f"no .safetensors and no .gguf in {folder} ({found}): give the folder that holds the weights")


def _unpickle(path: Path) -> str:
    if path.name.startswith("model_world_size_"):
        return (
            "merge verl's shards with `python -m verl.model_merger merge --backend fsdp --local_dir <actor folder> "
            "--target_dir <new folder>` and give the new folder"
        )
    return "load the model with transformers and convert it with model.save_pretrained(folder, safe_serialization=True)"


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files: download it again")
    return weight_map


def _indexed(folder: Path, index: dict[str, str]) -> list[Path]:
    files = [folder / name for name in sorted(set(index.values()))]
    missing = [p.name for p in files if not p.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / _INDEX} names {len(files)} shards, of which {len(missing)} are missing: {few(missing)}; "
            "download or copy them into that folder"
        )
    return files


def _all_parts(files: list[Path]) -> list[Path]:
    """`files`, and every other part of those that are parts of a split model (NAME-00001-of-00003), in order.

    Raises:
        CheckpointError: a part is missing.
    """
    result, missing = set(), set()
    for file in files:
        match = _PART.fullmatch(file.name)
        if match is None:
            result.add(file)
            continue
        for number in range(1, int(match["count"]) + 1):
            part = file.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}{match['suffix']}")
            (result if part.is_file() else missing).add(part)
    if missing:
        names = few(sorted(p.name for p in missing))
        raise CheckpointError(f"{files[0].parent} lacks {len(missing)} parts of the model: {names}; add them to that folder")
    return sorted(result)


def _refuse_what_is_no_weight_file(file: Path) -> None:
    if not file.is_file():
        what = "a link to nothing" if file.is_symlink() else "no file"
        raise CheckpointError(f"{file} is {what}: download or copy the model's files again")
    with file.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if not start:
        raise CheckpointError(f"{file} is empty (0 bytes), as an interrupted download leaves it: download it again")
    if start == _LFS_POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is empty, a Git LFS pointer, no JSON, or no object.
    """
    _refuse_what_is_no_weight_file(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} where an object is expected: download it again")
    return content


def few(names: Iterable[object]) -> str:
    """The first four names, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _download(model: str, revision: str | None) -> Path:
    """Folder, in the hub's cache, with the model's config and safetensors."""
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{model} at revision {revision}" if revision else model
    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=["config.json", _INDEX, "*.safetensors"],
            # Second copies of the weights in other layouts, and sub-models in folders of their own.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: accept its terms on its hub page, then `hf auth login`, or give a local path"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r} on the hub: check the branch, tag or commit") from error
    except (errors.LocalEntryNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{at} is neither a local path nor reachable on the hub ({_first_line(error)}): check the name, the network and "
            "HF_HUB_OFFLINE, `hf auth login` if it is private, or give the path of a downloaded model"
        ) from error
    except Exception as error:  # of httpx, of the file system, ...: the hub's client lets them through
        raise CheckpointError(f"cannot download {at} from the hub: {type(error).__name__}: {_first_line(error)}") from error
    folder = Path(folder)
    if not any(folder.glob("*.safetensors")) and not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{at} has no .safetensors on the hub, or none was downloaded before going offline (looked in {folder}); "
            "a model in GGUF or pickled files has to be downloaded by hand: give its path then"
        )
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
