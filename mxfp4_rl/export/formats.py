"""The formats of an export: what each stores of a quantised weight, and which recipes it cannot carry.

    mxfp4-pack-quantized    compressed-tensors: X.weight_packed (E2M1, two a byte), X.weight_scale (E8M0, one per 32)
    nvfp4-pack-quantized    compressed-tensors: X.weight_packed, X.weight_scale (E4M3, one per 16), X.weight_global_scale, 1 / g
    bf16                    X.weight: the dequantised values, rounded to BF16; carries every recipe

Weights only: activations stay unquantised when such a checkpoint is served (W4A16).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mxfp4_rl.quant import QuantizedTensor, quantize
from mxfp4_rl.quant.elements import E2M1_MAX
from mxfp4_rl.quant.nvfp4 import TARGET
from mxfp4_rl.recipe import QuantRecipe


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: of the command line and, for compressed-tensors, of its `format` key.
        stored: (quantised weight) -> name of a layer's tensor -> tensor.
        refuses: (recipe) -> why it cannot carry it, or None.
        arguments: compressed-tensors' description of the weights; None for a checkpoint that is not quantised.
        shares_scale: layers that are served as one product must have one tensor scale.
    """

    name: str
    stored: Callable[[QuantizedTensor], dict[str, torch.Tensor]]
    refuses: Callable[[QuantRecipe], str | None]
    arguments: dict[str, Any] | None = None
    shares_scale: bool = False

    def config(self, ignored: Sequence[str]) -> dict[str, Any] | None:
        """`quantization_config` of config.json; `ignored` are the Linear layers that are not quantised."""
        if self.arguments is None:
            return None
        group = {"targets": ["Linear"], "weights": self.arguments, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": self.name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": sorted(ignored),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _mxfp4(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {"weight_packed": weight.codes, "weight_scale": weight.scales}


def _nvfp4(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": weight.codes,
        "weight_scale": weight.scales.view(torch.float8_e4m3fn),
        "weight_global_scale": (1.0 / weight.tensor_scale).reshape(1),
    }


def _bf16(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {"weight": weight.dequantize(torch.bfloat16)}


def _no_corrections(recipe: QuantRecipe, name: str, size: int) -> str | None:
    carried = [
        (recipe.macro_block, "macro-block factors (MBS)"),
        (recipe.fallback_alpha is not None, "the fallback's second pass (OF)"),
        (recipe.hadamard, "a rotation"),
        (recipe.pre_scale != 1, "a pre-scale"),
    ]
    missing = [what for has, what in carried if has]
    if missing:
        return (
            f"{name} has no place for {' and '.join(missing)}: --format bf16 folds them in; or leave them out with "
            f"--recipe {name[:5]}, which gives the values of another, plainer recipe"
        )
    if recipe.format != name[:5] or recipe.block_size != size:
        return (
            f"{name} stores {name[:5]} in blocks of {size}, not {recipe.describe()}: give --recipe {name[:5]}, or --format bf16"
        )
    return None


_COMMON = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "actorder": None, "block_structure": None}
FORMATS = {
    f.name: f
    for f in (
        Format(
            "mxfp4-pack-quantized",
            _mxfp4,
            lambda recipe: _no_corrections(recipe, "mxfp4-pack-quantized", 32),
            {**_COMMON, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
        ),
        Format(
            "nvfp4-pack-quantized",
            _nvfp4,
            lambda recipe: _no_corrections(recipe, "nvfp4-pack-quantized", 16),
            {**_COMMON, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
            shares_scale=True,
        ),
        Format("bf16", _bf16, lambda recipe: None),
    )
}

_SERVED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def served_together(module: str) -> list[str]:
    """The modules that a server multiplies as one with this one, itself included."""
    stem, _, last = module.rpartition(".")
    group = next((g for g in _SERVED_TOGETHER if last in g), (last,))
    return [f"{stem}.{part}" if stem else part for part in group]


def quantise_group(weights: Sequence[torch.Tensor], recipe: QuantRecipe, together: bool) -> list[QuantizedTensor]:
    """Weights (N_i, K) quantised; if `together`, as the rows of one NVFP4 tensor whose scale g is a power of two.

    A server takes one g for layers it multiplies as one. With a power of two its reciprocal, which is what is stored, is exact,
    and so are E2M1 * E4M3 * g in BF16: every reader gets the same values. (soar chooses g itself, and keeps it.)
    """
    if not together:
        return [quantize(weight, recipe) for weight in weights]
    rows = list(weights)
    if recipe.scale_rule in TARGET:
        largest = max(weight.abs().max().item() for weight in weights)
        unit = E2M1_MAX * TARGET[recipe.scale_rule]
        rows.append(torch.zeros_like(rows[0][:1]))  # a row that is cut off again: its one number makes g what it shall be
        rows[-1][0, 0] = unit * 2.0 ** math.ceil(math.log2(largest / unit)) if largest > 0 else 0
    whole = quantize(torch.cat(rows), recipe)
    out, start = [], 0
    for weight in weights:
        part = slice(start, start := start + weight.shape[0])
        own = {"codes": whole.codes[part], "scales": whole.scales[part], "shape": weight.shape}
        out.append(dataclasses.replace(whole, **own))
    return out
