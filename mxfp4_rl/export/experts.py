"""Experts between training, files and servers, which hold the same matrices in three ways.

Training has a layer's experts in two fused tensors, `gate_up_proj` and `down_proj`; recipes speak of them by these names, and
an expert's part of one is quantised as one matrix (`mxfp4_rl.nn.experts`). Files hold Linear layers, a gate, an up and a down
projection an expert (Mixtral's w1, w3, w2), or the fused tensors. Servers of compressed-tensors look for the Linear layers.

transformers' table of conversions says which Linear layers become which fused tensor.
"""

from __future__ import annotations

import re
from typing import Any

from mxfp4_rl.nn.experts import LAYERS_OF, PROJECTIONS

_OF_ONE_EXPERT = re.compile(r"(?:.*\.)?experts\.\d+\.\w+")


class ExpertNames:
    """The names of experts in models of one config.json.

    Source: `transformers.conversion_mapping`, by `model_type` (the text model's, if the whole has no entry).
    """

    def __init__(self, config: dict[str, Any]):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        text = config.get("text_config")
        types = [config.get("model_type"), text.get("model_type") if isinstance(text, dict) else None]
        table = next((found for t in types if t and (found := get_checkpoint_conversion_mapping(t))), [])
        self._renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]

    def trained_as(self, module: str) -> str:
        """The fused tensor that a Linear layer of one expert becomes a part of, or `module` itself if there is none."""
        from transformers.core_model_loading import rename_source_key

        if not _OF_ONE_EXPERT.fullmatch(module):
            return module
        name, _ = rename_source_key(f"{module}.weight", self._renamings, self._converters)
        return name if name.rpartition(".")[2] in PROJECTIONS else module

    def taken_apart(self, fused: str, shape: tuple[int, ...]) -> dict[str, tuple[int, slice]] | None:
        """The Linear layers of a fused tensor (E, out, in): name -> expert, rows; expert by expert, gate before up.

        None if the family has no such layers, or has them under other names.
        """
        stem, _, last = fused.rpartition(".")
        halves = LAYERS_OF.get(last, ())
        if not halves or any(self.trained_as(f"{stem}.0.{half}") != fused for half in halves):
            return None
        rows = shape[1] // len(halves)
        return {
            f"{stem}.{expert}.{half}": (expert, slice(i * rows, (i + 1) * rows))
            for expert in range(shape[0])
            for i, half in enumerate(halves)
        }
