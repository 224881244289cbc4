"""Streams an export: one weight at a time into shards of bounded size, in a folder that becomes the export by a rename.

A cut-off export leaves `.NAME.part`, which nothing takes for a model; the next one of the same name removes it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mxfp4_rl.analysis.checkpoint import Checkpoint
from mxfp4_rl.analysis.weights import linear_weights
from mxfp4_rl.export import ExportError
from mxfp4_rl.export.formats import Format, quantise_group, served_together
from mxfp4_rl.files import sync
from mxfp4_rl.nn.convert import why_left_alone
from mxfp4_rl.quant import QuantizedTensor
from mxfp4_rl.recipe import ModelRecipe

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


class Plan:
    """Which tensors are quantised, by name, and which Linear layers are not.

    Raises:
        ExportError: the format cannot carry a recipe, a shape or this model.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: ModelRecipe, format: Format):
        if checkpoint.format == "gguf":
            raise ExportError("a GGUF file permutes rows and renames tensors: give the model as safetensors")
        if checkpoint.config.get("quantization_config"):
            raise ExportError(f"{checkpoint.source} is quantised already (quantization_config in its config.json)")
        weights, _ = linear_weights(checkpoint)
        self.format = format
        self.recipes: dict[str, ModelRecipe] = {}  # module -> its recipe
        self.left_alone: dict[str, str] = {}  # module -> why
        for weight in weights:
            reason, overriding = why_left_alone(weight.name, recipe)
            own = recipe.for_layer(overriding)
            if reason is None and own.weight is None:
                reason = "the recipe leaves its weight alone"
            if reason is not None:
                self.left_alone[weight.name] = reason
                continue
            self._check(weight, own, format)
            self.recipes[weight.name] = own
        if not self.recipes:
            raise ExportError("the recipe quantises no weight of this model: there is nothing to export")
        self.infos = {info.name: info for info in checkpoint.tensors}

    def _check(self, weight, own: ModelRecipe, format: Format) -> None:
        if len(weight.info.shape) != 2 or weight.axis not in (-1, 1) or not weight.info.name.endswith(".weight"):
            raise ExportError(
                f"{weight.info.name} {weight.info.shape} is no (outputs, inputs) matrix of a Linear layer (experts in fused "
                "tensors, or GPT-2's Conv1D): such models cannot be exported yet; exclude it in the recipe"
            )
        if why := format.refuses(own.weight):
            raise ExportError(why)
        if format.arguments and weight.info.shape[1] % own.weight.block_size:
            raise ExportError(
                f"{weight.name} has {weight.info.shape[1]} inputs, no multiple of {own.weight.block_size}: {format.name} "
                "cannot store a part of a block; exclude the layer in the recipe, or use --format bf16"
            )

    def group(self, module: str) -> list[str]:
        """The modules to be quantised in one go with this one."""
        together = [m for m in served_together(module) if m in self.recipes] if self.format.shares_scale else [module]
        if any(self.recipes[m].weight != self.recipes[module].weight for m in together):
            raise ExportError(f"{', '.join(together)} are served as one product and need one recipe for {self.format.name}")
        return together

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor, int]]:
        """(name, tensor or quantised weight, elements read) in the checkpoint's order; floats are cast to `dtype` first."""
        done = set()
        for info in checkpoint.tensors:
            module = info.name.removesuffix(".weight")
            if module not in self.recipes or not info.name.endswith(".weight"):
                tensor = checkpoint.read(info)
                yield info.name, tensor.to(dtype) if tensor.is_floating_point() else tensor, info.elements
            elif module not in done:
                group = self.group(module)
                weights = [checkpoint.read(self.infos[f"{m}.weight"]).to(dtype) for m in group]
                quantised = quantise_group(weights, self.recipes[module].weight, self.format.shares_scale)
                for m, q in zip(group, quantised, strict=True):
                    done.add(m)
                    yield f"{m}.weight", q, q.shape.numel()

    def stored(self, name: str, tensor: torch.Tensor | QuantizedTensor) -> dict[str, torch.Tensor]:
        """What is written of a pair of `tensors`, by name."""
        if not isinstance(tensor, QuantizedTensor):
            return {name: tensor}
        stem = name.removesuffix("weight")
        return {stem + own: t for own, t in self.format.stored(tensor).items()}

    def config(self, checkpoint: Checkpoint, dtype: torch.dtype) -> dict:
        """config.json of the export."""
        config = {k: v for k, v in checkpoint.config.items() if k not in ("torch_dtype", "dtype")}
        config["dtype"] = str(dtype).removeprefix("torch.")
        ignored = {"lm_head", *self.left_alone}
        if (quantization := self.format.config(ignored)) is not None:
            config["quantization_config"] = quantization
        return config


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
        ExportError: `out` exists, or the disk has no room.
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
