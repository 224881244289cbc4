"""The file of inputs' mean squares: `mxfp4-rl ptq` measures it, `mxfp4-rl export --importance` weighs errors with it.

safetensors, a float32 (in,) tensor a Linear layer, by the layer's name. (llama.cpp calls the same an importance matrix.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mxfp4_rl.export import ExportError


def importance_file(importance: Mapping[str, torch.Tensor]) -> bytes:
    """The file's content."""
    # Layers that share their inputs share a tensor here, which safetensors does not store.
    return save({name: own.cpu().clone() for name, own in importance.items()})


def read_importance(path: str) -> dict[str, torch.Tensor]:
    """Layer -> mean squares of its inputs.

    Raises:
        ExportError: it cannot be read, or holds what no text can give.
    """
    try:
        found = load_file(Path(path).expanduser())
    except (OSError, SafetensorError) as error:
        raise ExportError(f"--importance {path} cannot be read: {error}") from error
    for name, own in found.items():
        if own.dtype != torch.float32 or own.ndim != 1 or not (own.isfinite() & (own >= 0)).all():
            raise ExportError(f"--importance {path}: {name} is no float32 row of mean squares; make it with mxfp4-rl ptq")
    return found
