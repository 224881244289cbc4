"""Streams an export: one weight at a time into shards of bounded size, in a folder that becomes the export by a rename.

A cut-off export leaves `.NAME.part`, which nothing takes for a model; the next one of the same name removes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mxfp4_rl.analysis.checkpoint import Checkpoint
from mxfp4_rl.export import ExportError
from mxfp4_rl.export.plan import Plan
from mxfp4_rl.files import sync
from mxfp4_rl.quant import QuantizedTensor

_COPIED = (
    "tokenizer",
    "chat_template",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "generation_config",
    "preprocessor",
)
_INDEX = "model.safetensors.index.json"


def write_export(
    checkpoint: Checkpoint, plan: Plan, out: Path, dtype: torch.dtype, shard_bytes: int, advance: Callable[[int], None]
) -> dict[str, int]:
    """Write the export to `out`, whole or not at all.

    Args:
        checkpoint: opened; its folder gives the tokenizer.
        out: must not exist.
        shard_bytes: a shard is closed before it would pass this; a larger tensor gets a shard of its own.
        advance: told the elements that were read.

    Returns:
        "tensors", "bytes", "quantised" (weights), "quantised_elements", "quantised_bytes".

    Raises:
        ExportError: `out` exists, or the disk or the GPU has no room.
    """
    if out.exists():
        raise ExportError(f"{out} exists: give another folder, or remove it")
    part = out.with_name(f".{out.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    shards = _Shards(part, shard_bytes)
    counts = {"tensors": 0, "bytes": 0, "quantised": 0, "quantised_elements": 0, "quantised_bytes": 0}
    try:
        for name, tensor, elements in plan.tensors(checkpoint, dtype):
            stored = plan.stored(name, tensor)
            if isinstance(tensor, QuantizedTensor):
                counts["quantised"] += 1
                counts["quantised_elements"] += elements
                counts["quantised_bytes"] += sum(t.nbytes for t in stored.values())
            for stored_name, t in stored.items():
                counts["tensors"] += 1
                counts["bytes"] += t.nbytes
                shards.add(stored_name, t.contiguous())
            advance(elements)
        shards.close()
        _copy_beside(checkpoint, part)
        (part / "config.json").write_text(json.dumps(plan.config(checkpoint, dtype), indent=2) + "\n")
        mode = 0o666 & ~_umask()
        for file in part.iterdir():
            file.chmod(mode)  # safetensors' files are their owner's alone
            sync(file)
    except torch.OutOfMemoryError as error:
        raise ExportError(f"{plan.device} has no room for a weight ({error}): give --device cpu; {out} was not made") from error
    except (OSError, SafetensorError) as error:  # safetensors' own writing fails with the latter
        raise ExportError(f"{part} cannot be written ({error}): {out} was not made") from error
    os.rename(part, out)
    sync(out.parent)
    return counts


class _Shards:
    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.waiting: dict[str, torch.Tensor] = {}
        self.size, self.total, self.names = 0, 0, []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.waiting and self.size + tensor.nbytes > self.limit:
            self._write()
        self.waiting[name] = tensor
        self.size += tensor.nbytes

    def _write(self) -> None:
        save_file(self.waiting, self.folder / f"{len(self.names):05}.part", metadata={"format": "pt"})
        self.names.append(list(self.waiting))
        self.total += self.size
        self.waiting, self.size = {}, 0

    def close(self) -> None:
        """Write the rest, and give the shards the names that say how many there are."""
        self._write()
        count = len(self.names)
        weight_map = {}
        for i, names in enumerate(self.names):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            os.rename(self.folder / f"{i:05}.part", self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template and generation settings."""
    source = checkpoint.files[0].parent
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.startswith(_COPIED):
            shutil.copyfile(file, folder / file.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
