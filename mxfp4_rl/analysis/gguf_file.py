"""A GGUF file's header, checked against the file's size, and its tensors, dequantised a few rows at a time.

The layout (ggml's docs/gguf.md): "GGUF", version, counts; metadata as key, type, value; for each tensor its name, dimensions,
type and offset; padding; the tensors' bytes. gguf's own reader is not used for this: it makes Python objects of the whole
vocabulary (11 s and 500 MB for 152k tokens and their merges), and takes a length that points beyond the file's end for a
shorter one. Block sizes and dequantisation are gguf's.

The first dimension in the file is the contiguous one (ggml's ne[0], the contraction axis). Shapes are reversed here, so that a
Linear weight is (out, in) and experts are (experts, out, in), as in torch.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mxfp4_rl.analysis.model_files import CheckpointError

__all__ = ["GGUFTensor", "is_quantised", "is_readable", "read_header", "read_tensor"]

# Metadata type -> struct format.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AS_STORED = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "BF16": "<i2"}
_AGAIN = "it is damaged or was cut off; copy or download it again"
_ROWS_AT_ONCE = 1 << 22  # elements; gguf's dequantisation holds its result twice


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the header describes it, and where its bytes lie; all of them lie within the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


def is_quantised(dtype: str) -> bool:
    """Whether a stored type has to be dequantised to be read."""
    return dtype not in _AS_STORED


def is_readable(dtype: str) -> bool:
    """Whether `read_tensor` can read this type: gguf knows how large some types are but not what they mean."""
    if not is_quantised(dtype):
        return True
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[dtype]
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read_header(file: Path) -> tuple[dict[str, Any], list[GGUFTensor]]:
    """Metadata without its arrays, and the tensors in the file's order.

    Raises:
        CheckpointError: gguf is not installed, or the file is no GGUF, of another version, or damaged in any way that a header
            can show: it ends early, tensors reach beyond its end or overlap, lengths make no sense.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError(f"reading {file} needs the package gguf: `pip install gguf`") from error
    kinds = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES}
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, file)
        metadata, described = _parse(cursor)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{file}: general.alignment is {alignment!r}: {_AGAIN}")
        start = -(-cursor.at // alignment) * alignment
        tensors = list(_place(file, described, kinds, start, len(data)))
    end, last = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise CheckpointError(f"{file}: tensors {last} and {tensor.name} overlap: {_AGAIN}")
        end, last = tensor.start + tensor.size, tensor.name
    return metadata, tensors


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]]]:
    """Metadata, and (name, shape, type, offset) of every tensor."""
    file = cursor.file
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{file} is no GGUF file (it does not begin with GGUF): {_AGAIN}")
    version = cursor.value("I")
    if version not in (2, 3):
        what = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
        raise CheckpointError(f"{file} {what}; little-endian versions 2 and 3 are read: convert the model again")
    tensor_count, metadata_count = cursor.value("Q"), cursor.value("Q")
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.text()
        value = cursor.metadata(cursor.value("I"))
        if value is not None:
            metadata[key] = value
    described = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.value("I")
        if dimensions > 4:  # ggml's limit
            raise CheckpointError(f"{file}: tensor {name} of {dimensions} dimensions: {_AGAIN}")
        shape = tuple(cursor.value("Q") for _ in range(dimensions))[::-1]
        described.append((name, shape, cursor.value("I"), cursor.value("Q")))
    return metadata, described


def _place(file: Path, described: list, kinds: dict[int, tuple[str, int, int]], start: int, size: int) -> Iterator[GGUFTensor]:
    """The described tensors with their bytes' places; kinds: type number -> (name, elements of a block, bytes of a block)."""
    for name, shape, kind, offset in described:
        if kind not in kinds:
            raise CheckpointError(f"{file}: {name} is of type {kind}, which the installed gguf lacks: pip install -U gguf")
        dtype, block, block_bytes = kinds[kind]
        if block > 1 and (not shape or shape[-1] % block):
            raise CheckpointError(f"{file}: {name} of shape {shape} is not made of {dtype}'s blocks of {block}: {_AGAIN}")
        tensor = GGUFTensor(name, shape, dtype, start + offset, prod(shape) // block * block_bytes)
        if tensor.start + tensor.size > size:
            raise CheckpointError(
                f"{file} has {size} bytes, but its header puts {name} at {tensor.start} to {tensor.start + tensor.size}: "
                f"{_AGAIN}"
            )
        yield tensor


class _Cursor:
    """Little-endian values out of a mapped file, one after the other, never past its end."""

    def __init__(self, data: mmap.mmap, file: Path):
        self.data, self.file, self.at = data, file, 0

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise CheckpointError(f"{self.file} ({len(self.data)} bytes) ends within its header: {_AGAIN}")
        self.at += size

    def take(self, size: int) -> bytes:
        self.skip(size)
        return self.data[self.at - size : self.at]

    def value(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.value("Q")).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file}: a name in its header is no text: {_AGAIN}") from error

    def metadata(self, kind: int) -> Any:
        """A value of that type; None for an array, which is passed over: vocabularies are large and of no use here."""
        if kind in _SCALARS:
            return self.value(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.file}: metadata of unknown type {kind}: {_AGAIN}")
        kind, count = self.value("I"), self.value("Q")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]))
        elif kind == _STRING:
            for _ in range(count):
                self.skip(self.value("Q"))
        else:  # the format allows arrays in arrays; no writer makes them
            raise CheckpointError(f"{self.file}: an array of metadata of type {kind}: {_AGAIN}")
        return None


def read_tensor(file: Path, tensor: GGUFTensor) -> torch.Tensor:
    """A tensor's numbers: quantised types dequantised to float32, others as stored, mapped from the file.

    Raises:
        CheckpointError: the file became shorter since its header was read.
        NotImplementedError: gguf cannot dequantise the type.
    """
    if file.stat().st_size < tensor.start + tensor.size:  # touching pages beyond the end would kill the process
        raise CheckpointError(f"{file} became shorter since it was opened: start again with the whole file")
    if not tensor.size:
        return torch.empty(tensor.shape)
    # One mapping a tensor, gone with it. Copy-on-write because torch knows no read-only tensors.
    raw = np.memmap(file, np.uint8, "c", tensor.start, (tensor.size,))
    if is_quantised(tensor.dtype):
        return _dequantise(raw, tensor)
    values = torch.from_numpy(raw.view(_AS_STORED[tensor.dtype])).reshape(tensor.shape)
    return values.view(torch.bfloat16) if tensor.dtype == "BF16" else values


def _dequantise(raw: np.ndarray, tensor: GGUFTensor) -> torch.Tensor:
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    columns = tensor.shape[-1]
    rows = raw.reshape(prod(tensor.shape) // columns, -1)
    result = torch.empty(len(rows), columns)
    step = max(1, _ROWS_AT_ONCE // columns)
    for i in range(0, len(rows), step):
        part = quants.dequantize(np.asarray(rows[i : i + step]), GGMLQuantizationType[tensor.dtype])
        result[i : i + step] = torch.from_numpy(part)
    return result.reshape(tensor.shape)
