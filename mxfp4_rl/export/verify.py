"""Reads an export back and compares it with what the source and the recipe give, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mxfp4_rl.analysis.checkpoint import Checkpoint, open_checkpoint
from mxfp4_rl.export import ExportError
from mxfp4_rl.export.plan import Plan


def verify_export(
    checkpoint: Checkpoint, plan: Plan, out: Path, dtype: torch.dtype, advance: Callable[[int], None]
) -> dict[str, int]:
    """Compare every stored tensor, and what the format's own reader makes of it where that is installed.

    The reader is compressed-tensors' decompressor, or transformers' of gpt-oss.

    Returns:
        "tensors" compared; "decompressed": weights that the reader read (0 if it is not there or too old);
        "rounded_apart": their values that differ from ours in BF16 (NVFP4's g is stored as its rounded reciprocal).

    Raises:
        ExportError: a stored tensor is missing, unexpected or differs, with its name.
    """
    counts = {"tensors": 0, "decompressed": 0, "rounded_apart": 0}
    decompress = _decompressor(plan)
    with open_checkpoint(str(out), as_stored=True) as written:
        found = {info.name: info for info in written.tensors}
        for name, tensor, elements in plan.tensors(checkpoint, dtype):
            read = {}
            for own, expected in plan.stored(name, tensor).items():
                if own not in found:
                    raise ExportError(f"{out} lacks {own}")
                read[own] = written.read(found.pop(own))
                if read[own].dtype != expected.dtype or not _same_bits(read[own], expected):
                    raise ExportError(f"{out}: {own} differs from what the source and the recipe give")
                counts["tensors"] += 1
            if len(read) > 1 and decompress is not None:  # one tensor alone is dequantised already
                theirs = decompress({own.rpartition(".")[2]: t.to(plan.device) for own, t in read.items()})
                if theirs is None:
                    decompress = None
                else:
                    counts["decompressed"] += 1
                    apart = theirs.to(plan.device, torch.bfloat16) != tensor.dequantize(torch.bfloat16)
                    counts["rounded_apart"] += int(apart.sum())
            advance(elements)
        if found:
            raise ExportError(f"{out} holds {len(found)} tensors that are not of this model, e.g. {next(iter(found))}")
    return counts


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _decompressor(plan: Plan):
    """The reader of a layer's tensors, by the last part of their names, or None."""
    if plan.format.experts_only:
        return _dequantise_gpt_oss
    if plan.format.arguments is None:
        return None
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        compressor = BaseCompressor.get_value_from_registry(plan.format.name)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**plan.format.arguments))
    except (ImportError, KeyError, ValueError, AttributeError):
        return None

    def decompress(stored: dict[str, torch.Tensor]) -> torch.Tensor | None:
        try:
            return compressor.decompress(dict(stored), scheme)["weight"]
        except NotImplementedError:  # 0.15 writes MXFP4 and does not read it
            return None

    return decompress


def _dequantise_gpt_oss(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """(E, in, out), as `GptOssExperts` holds it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = (next(t for name, t in stored.items() if name.endswith(end)) for end in ("_blocks", "_scales"))
    return convert_moe_packed_tensors(blocks, scales)
