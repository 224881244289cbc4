"""The formats of an export: what each stores of a quantised weight, and which recipes it cannot carry.

    mxfp4-pack-quantized    compressed-tensors: X.weight_packed (E2M1, two a byte), X.weight_scale (E8M0, one per 32)
    nvfp4-pack-quantized    compressed-tensors: X.weight_packed, X.weight_scale (E4M3, one per 16), X.weight_global_scale, 1 / g
    gpt-oss                 experts.Y_blocks (E2M1, (E, out, in / 32, 16)), experts.Y_scales (E8M0); the other layers as bf16
    bf16                    X.weight: the dequantised values, rounded to BF16; carries every recipe

The first two hold a Linear layer an expert, the others hold experts as the source does. Weights only: activations stay
unquantised when such a checkpoint is served (W4A16).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mxfp4_rl.quant import QuantizedTensor, StackedTensor, quantize
from mxfp4_rl.quant.elements import E2M1_MAX
from mxfp4_rl.quant.nvfp4 import TARGET
from mxfp4_rl.recipe import QuantRecipe


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: of the command line and, for compressed-tensors, of its `format` key.
        stored: (tensor's name, quantised weight) -> name -> tensor.
        refuses: (recipe) -> why it cannot carry it, or None.
        arguments: compressed-tensors' description of the weights; None for other formats.
        shares_scale: layers that are served as one product must have one tensor scale.
        experts_only: fused experts are stored in MXFP4, all of them, and Linear layers as dequantised BF16.
        model_type: of the models that it is for; None for all.
    """

    name: str
    stored: Callable[[str, QuantizedTensor], dict[str, torch.Tensor]]
    refuses: Callable[[QuantRecipe], str | None]
    arguments: dict[str, Any] | None = None
    shares_scale: bool = False
    experts_only: bool = False
    model_type: str | None = None

    @property
    def of_linears(self) -> bool:
        """Whether fused experts become a Linear layer an expert."""
        return self.arguments is not None

    @property
    def whole_blocks(self) -> bool:
        """Whether the inputs of a quantised weight must fill their blocks."""
        return self.of_linears or self.experts_only

    def config(self, ignored: Sequence[str]) -> dict[str, Any] | None:
        """`quantization_config` of config.json; `ignored` are the Linear layers that are not quantised."""
        if self.experts_only:
            return {"quant_method": "mxfp4", "modules_to_not_convert": list(_GPT_OSS_UNCONVERTED)}
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


# As in the checkpoints on the hub.
_GPT_OSS_UNCONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def _mxfp4(name: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {f"{name}_packed": weight.codes, f"{name}_scale": weight.scales}


def _nvfp4(name: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {
        f"{name}_packed": weight.codes,
        f"{name}_scale": weight.scales.view(torch.float8_e4m3fn),
        f"{name}_global_scale": (1.0 / weight.tensor_scale.cpu()).reshape(1),  # divided in one place for all devices
    }


def _bf16(name: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {name: weight.dequantize(torch.bfloat16)}


def _gpt_oss(name: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    if len(weight.shape) == 2:
        return _bf16(name, weight)
    if isinstance(weight, StackedTensor):  # every expert by itself, where a recipe looks at whole tensors
        codes, scales = (torch.stack([getattr(part, own) for part in weight.parts]) for own in ("codes", "scales"))
    else:
        codes, scales = weight.codes, weight.scales
    return {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}


def _no_corrections(recipe: QuantRecipe, name: str, kind: str, size: int) -> str | None:
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
            f"--recipe {kind}, which gives the values of another, plainer recipe"
        )
    if recipe.format != kind or recipe.block_size != size:
        return f"{name} stores {kind} in blocks of {size}, not {recipe.describe()}: give --recipe {kind}, or --format bf16"
    return None


_COMMON = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "actorder": None, "block_structure": None}
FORMATS = {
    f.name: f
    for f in (
        Format(
            "mxfp4-pack-quantized",
            _mxfp4,
            lambda recipe: _no_corrections(recipe, "mxfp4-pack-quantized", "mxfp4", 32),
            {**_COMMON, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"},
        ),
        Format(
            "nvfp4-pack-quantized",
            _nvfp4,
            lambda recipe: _no_corrections(recipe, "nvfp4-pack-quantized", "nvfp4", 16),
            {**_COMMON, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
            shares_scale=True,
        ),
        Format(
            "gpt-oss",
            _gpt_oss,
            lambda recipe: _no_corrections(recipe, "gpt-oss", "mxfp4", 32),
            experts_only=True,
            model_type="gpt_oss",
        ),
        Format("bf16", _bf16, lambda recipe: None),
    )
}

_SERVED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def served_together(module: str) -> list[str]:
    """The modules that a server multiplies as one with this one, itself included."""
    stem, _, last = module.rpartition(".")
    group = next((g for g in _SERVED_TOGETHER if last in g), (last,))
    return [f"{stem}.{part}" if stem else part for part in group]


def quantise_group(
    weights: Sequence[torch.Tensor], recipe: QuantRecipe, round_scale: bool, importance: torch.Tensor | None = None
) -> list[QuantizedTensor]:
    """Weights (N_i, K) quantised as the rows of one tensor, e.g. an expert's gate and up.

    A server takes one g for layers it multiplies as one. If `round_scale`, NVFP4's g is a power of two: its reciprocal, which
    is what is stored, is then exact, and so are E2M1 * E4M3 * g in BF16: every reader gets the same values. (soar chooses g
    itself, and keeps it.) importance: of the layers' inputs, as `quantize` takes it.
    """
    rows = list(weights)
    if round_scale and recipe.scale_rule in TARGET:
        largest = max(weight.abs().max().item() for weight in weights)
        unit = E2M1_MAX * TARGET[recipe.scale_rule]
        rows.append(torch.zeros_like(rows[0][:1]))  # a row that is cut off again: its one number makes g what it shall be
        rows[-1][0, 0] = unit * 2.0 ** math.ceil(math.log2(largest / unit)) if largest > 0 else 0
    if len(rows) == 1:
        return [quantize(rows[0], recipe, importance=importance)]
    whole = quantize(torch.cat(rows), recipe, importance=importance)
    ends = [*itertools.accumulate(len(weight) for weight in weights)]
    return [_rows(whole, slice(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


def _rows(weight: QuantizedTensor, part: slice) -> QuantizedTensor:
    """Some rows of a matrix quantised along its last axis."""
    own: dict[str, Any] = {"shape": torch.Size((part.stop - part.start, weight.shape[1]))}
    for field in dataclasses.fields(weight):
        value = getattr(weight, field.name)
        if isinstance(value, QuantizedTensor):
            own[field.name] = _rows(value, part)
        elif isinstance(value, torch.Tensor) and value.ndim:  # not the scale of the whole
            own[field.name] = value[part]
    return dataclasses.replace(weight, **own)
