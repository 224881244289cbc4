"""Reads checkpoints larger than memory: every header is checked when it opens, then one tensor is read at a time.

A model is a folder of safetensors shards, one such file, a GGUF file (or all parts of a split one), or a name on the Hugging
Face hub. Opening reads headers only, and compares what they promise with the files' sizes and with the index: a truncated,
incomplete or contradictory checkpoint is refused before anything is measured.

Both formats are memory-mapped. A mapping is given up when the next file begins, or after a gigabyte, so that the pages of what
was read do not add up.

gpt-oss' experts, which are stored in MXFP4 (`_blocks` and `_scales`), are read as what transformers makes of them: the BF16
values that they stand for, to the bit, as (experts, inputs, outputs).

llama.cpp permutes the rows of q_proj and k_proj of Llama-like models when it writes GGUF (its rotary layout; transformers
undoes that). Rows are outputs: blocks along the inputs, and every sum over them, stay what they are, so it is not undone here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from mxfp4_rl.analysis import gguf_file
from mxfp4_rl.analysis.model_files import CheckpointError, ModelFiles, few, find_model

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "open_checkpoint"]

# The pages of a mapping count as this process's memory until it is closed.
_MAPPED_LIMIT = 1 << 30
_GGUF_CONFIG = {  # metadata key, after the architecture's name -> transformers' name
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_count": "num_experts",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file's header describes it; nothing of it has been read.

    Attributes:
        name: as stored.
        shape: in torch's order.
        dtype: as stored: "BF16", "F32", "F8_E4M3", "U8", "Q4_K", ...
        file: where it lies.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def elements(self) -> int:
        return prod(self.shape)


class _Reader(Protocol):
    def read(self, info: TensorInfo) -> torch.Tensor: ...

    def close(self) -> None: ...


class Checkpoint:
    """An opened model; a context manager. Made by `open_checkpoint`.

    Attributes:
        source: the model as the user gave it.
        files: the files with tensors, in the order of a pass over `tensors`.
        tensors: file by file, in each file's own order.
        config: config.json beside the files ({} if there is none). Of a GGUF file: `model_type` (general.architecture), `name`,
            and sizes under transformers' names (num_hidden_layers, hidden_size, vocab_size, ...).
        format: "safetensors" or "gguf".
        note: what a reader of measurements must know about these weights, or "".
        unreadable: stored dtypes that `read` cannot turn into numbers.
    """

    def __init__(
        self,
        source: str,
        files: list[Path],
        tensors: list[TensorInfo],
        config: dict[str, Any],
        reader: _Reader,
        *,
        format: str = "safetensors",
        note: str = "",
        unreadable: frozenset[str] = frozenset(),
    ):
        self.source, self.files, self.tensors, self.config = source, files, tensors, config
        self.format, self.note, self.unreadable = format, note, unreadable
        self._reader = reader

    def read(self, info: TensorInfo) -> torch.Tensor:
        """One tensor, on the CPU. Nothing of it is kept here: drop it before reading the next.

        Returns:
            tensor of `info.shape`: F16, BF16, F32, F64 and integers as stored, GGUF's quantised types as float32. It may be a
            view of the mapped file; writing to it does not change the file.

        Raises:
            CheckpointError: the file changed since it was opened, or its dtype cannot be read.
        """
        try:
            tensor = self._reader.read(info)
        except CheckpointError:
            raise
        except Exception as error:  # safetensors' error derives from Exception itself
            raise CheckpointError(
                f"cannot read {info.name} ({info.dtype}) in {info.file}: {error}; if the file changed since it was opened, "
                "start again"
            ) from error
        if tuple(tensor.shape) != info.shape:
            raise CheckpointError(
                f"{info.name} in {info.file} had shape {info.shape} and now has {tuple(tensor.shape)}: the file changed; "
                "start again"
            )
        return tensor

    def close(self) -> None:
        """Give up the open file; `read` would open it again."""
        self._reader.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_checkpoint(model: str, revision: str | None = None, as_stored: bool = False) -> Checkpoint:
    """Open a model and check its files; no tensor is read.

    Args:
        model: a folder with safetensors (an index is followed if there is one) or, if it has none, with one GGUF model; a
            `.safetensors` or `.gguf` file (a part of a split GGUF stands for all parts); or a hub name `org/name`, of which
            config.json and the safetensors are downloaded. What exists as a path is not looked for on the hub.
        revision: branch, tag or commit, for hub names only.
        as_stored: every tensor as it lies in its file: gpt-oss' experts as blocks and scales.

    Raises:
        CheckpointError: there is no such model, it has no weights that can be read, or its files are damaged.
    """
    model = str(model)
    try:
        files = find_model(model, revision)
        gguf = files.weights[0].suffix == ".gguf"
        checkpoint = _open_gguf(model, files) if gguf else _open_safetensors(model, files, as_stored)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or model}: {error.strerror or error}") from error
    if not checkpoint.tensors:
        raise CheckpointError(f"no tensor in {few(files.weights)}: give the file or folder that holds the weights")
    first: dict[str, TensorInfo] = {}
    for info in checkpoint.tensors:
        other = first.setdefault(info.name, info)
        if other is not info:
            raise CheckpointError(
                f"tensor {info.name} lies in {other.file} and again in {info.file}: two models or two copies are mixed; "
                "leave one set of files in the folder"
            )
    return checkpoint


def _open_safetensors(source: str, files: ModelFiles, as_stored: bool = False) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    tensors = []
    for file in files.weights:
        try:
            # It compares lengths, offsets and dtypes with each other and with the file's size, and touches no tensor.
            with safe_open(file, framework="pt") as handle:
                for name in handle.offset_keys():
                    part = handle.get_slice(name)
                    tensors.append(TensorInfo(name, tuple(part.get_shape()), str(part.get_dtype()), file))
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is no whole safetensors file: {error}; it is damaged or was cut off: "
                "copy or download it again"
            ) from error
    held = {(info.name, info.file.name) for info in tensors}
    absent = [f"{name} in {file}" for name, file in files.index.items() if (name, file) not in held]
    if absent:
        raise CheckpointError(
            f"the index in {files.weights[0].parent} promises {len(absent)} tensors that their shards do not hold: "
            f"{few(absent)}; index and shards are of different versions: download both again"
        )
    quantisation = files.config.get("quantization_config")
    parts = {}
    if not as_stored and isinstance(quantisation, dict) and quantisation.get("quant_method") == "mxfp4":
        tensors, parts = _experts_of_gpt_oss(tensors)
    if not parts:
        return Checkpoint(source, files.weights, tensors, files.config, _SafetensorsReader())
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    note = f"{len(parts)} tensors of experts are stored in MXFP4 and were read as the BF16 values that they stand for"
    return Checkpoint(source, files.weights, tensors, config, _SafetensorsReader(parts), note=note)


def _experts_of_gpt_oss(tensors: list[TensorInfo]) -> tuple[list[TensorInfo], dict[str, tuple[TensorInfo, TensorInfo]]]:
    """gpt-oss' experts, `X_blocks` (E, out, in / 32, 16) and `X_scales` (E, out, in / 32), as one tensor X (E, in, out) each.

    Returns:
        the tensors, X in the place of its blocks; X -> blocks and scales.
    """
    by_name = {info.name: info for info in tensors}
    parts = {}
    for info in tensors:
        stem = info.name.removesuffix("_blocks")
        scales = by_name.get(f"{stem}_scales")
        pair = stem != info.name and scales is not None and info.dtype == scales.dtype == "U8"
        if pair and len(info.shape) == 4 and info.shape[-1] == 16 and info.shape[:-1] == scales.shape:
            parts[stem] = (info, scales)
    whole = []
    for info in tensors:
        stem = info.name.removesuffix("_blocks").removesuffix("_scales")
        if stem not in parts or info not in parts[stem]:
            whole.append(info)
        elif info is parts[stem][0]:
            experts, outputs, blocks, _ = info.shape
            whole.append(TensorInfo(stem, (experts, blocks * 32, outputs), "BF16", info.file))
    return whole, parts


class _SafetensorsReader:
    """One open shard at a time.

    Args:
        experts: tensors that lie in a file as MXFP4, name -> codes and scales.
    """

    def __init__(self, experts: dict[str, tuple[TensorInfo, TensorInfo]] | None = None):
        self._experts = experts or {}
        self._file, self._handle, self._mapped = None, None, 0

    def read(self, info: TensorInfo) -> torch.Tensor:
        if info.name not in self._experts:
            return self._stored(info)
        from mxfp4_rl.quant.tensor import MXFP4Tensor

        codes, scales = (self._stored(part) for part in self._experts[info.name])
        outputs_first = torch.Size((info.shape[0], info.shape[2], info.shape[1]))
        return MXFP4Tensor(codes.flatten(-2), scales, outputs_first, 2).dequantize(torch.bfloat16).transpose(1, 2)

    def _stored(self, info: TensorInfo) -> torch.Tensor:
        from safetensors import safe_open

        if self._file != info.file or self._mapped > _MAPPED_LIMIT:
            self.close()
            self._handle, self._file = safe_open(info.file, framework="pt"), info.file
        tensor = self._handle.get_tensor(info.name)
        self._mapped += tensor.nbytes
        return tensor

    def close(self) -> None:
        self._file, self._handle, self._mapped = None, None, 0


def _open_gguf(source: str, files: ModelFiles) -> Checkpoint:
    metadata: dict[str, Any] = {}
    tensors, reader = [], _GGUFReader()
    for file in files.weights:
        own, found = gguf_file.read_header(file)
        metadata = own | metadata  # the first part has all of it
        for tensor in found:
            tensors.append(TensorInfo(tensor.name, tensor.shape, tensor.dtype, file))
            reader.places[file, tensor.name] = tensor
    parts, promised = _integer(metadata, "split.count", 0), _integer(metadata, "split.tensors.count", len(tensors))
    if parts and (parts, promised) != (len(files.weights), len(tensors)):
        raise CheckpointError(
            f"{files.weights[0]} belongs to a model of {parts} parts with {promised} tensors, but here are "
            f"{len(files.weights)} parts with {len(tensors)}: put all of them, named NAME-00001-of-{parts:05d}.gguf and so on, "
            "into one folder"
        )
    quantised: Counter[str] = Counter()  # of the layers: the embedding, often of another type, is not measured
    for info in tensors:
        if gguf_file.is_quantised(info.dtype) and info.name.startswith("blk."):
            quantised[info.dtype] += info.elements
    note = ""
    if quantised:
        types = " and ".join(dtype for dtype, _ in quantised.most_common())
        note = f"weights are dequantised from {types}: what is measured comes on top of that error"
    return Checkpoint(
        source,
        files.weights,
        tensors,
        _gguf_config(metadata),
        reader,
        format="gguf",
        note=note,
        unreadable=frozenset(dtype for dtype in {info.dtype for info in tensors} if not gguf_file.is_readable(dtype)),
    )


class _GGUFReader:
    def __init__(self):
        self.places: dict[tuple[Path, str], gguf_file.GGUFTensor] = {}

    def read(self, info: TensorInfo) -> torch.Tensor:
        return gguf_file.read_tensor(info.file, self.places[info.file, info.name])

    def close(self) -> None:
        """No file is open between reads."""


def _gguf_config(metadata: dict[str, Any]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture", "")
    config = {"model_type": architecture}
    if "general.name" in metadata:
        config["name"] = metadata["general.name"]
    for key, name in _GGUF_CONFIG.items():
        if (value := _integer(metadata, f"{architecture}.{key}")) is not None:
            config[name] = value
    if "num_hidden_layers" in config:  # llama.cpp counts layers for multi-token prediction, transformers does not
        config["num_hidden_layers"] -= _integer(metadata, f"{architecture}.nextn_predict_layers", 0)
    return config


def _integer(metadata: dict[str, Any], key: str, default: int | None = None) -> int | None:
    """Some models have an array where others have a number; arrays are not read."""
    value = metadata.get(key, default)
    return value if isinstance(value, int) else default
