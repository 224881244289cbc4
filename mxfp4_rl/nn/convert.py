"""Convert a model: which Linear layers become MXFP4Linear, by name, with a report of what matched.

lm_head (and whatever else the model calls its output embedding), embeddings, routers and norms are never converted: the
paper's tensor counts leave exactly these out, and quantising them breaks models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from mxfp4_rl.nn import fp8
from mxfp4_rl.nn.linear import MXFP4Linear
from mxfp4_rl.nn.packed import PackedLinear
from mxfp4_rl.quant import backend_for
from mxfp4_rl.recipe import ModelRecipe, RecipeError

ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}  # by name part; `gate_proj` is no router


@dataclass
class ConversionReport:
    """What `convert` did, or what `plan` would do.

    Attributes:
        converted: layer name -> ModelRecipe of that layer.
        skipped: layer name -> why it was left alone.
        sizes: layer name -> elements of its weight; elements: their sum; total: all parameters of the model.
        by_pattern: how many layers each override and exclude pattern matched.
    """

    converted: dict[str, ModelRecipe] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    total: int = 0
    by_pattern: dict[str, int] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return sum(self.sizes.values())

    def describe(self) -> str:
        """A few lines for the log: counts by kind of layer, what was skipped, and the share of the parameters."""
        kinds = Counter(name.rsplit(".", 1)[-1] for name in self.converted)
        recipes = Counter(recipe.describe() for recipe in self.converted.values())
        lines = [
            f"{len(self.converted)} Linear layers quantised ({', '.join(f'{n} {k}' for k, n in kinds.items())}), "
            f"{self.elements / 1e6:.1f} M of {self.total / 1e6:.1f} M parameters"
        ]
        lines += [f"{n} with {recipe}" for recipe, n in recipes.items()]
        reasons = Counter(self.skipped.values())
        lines += [f"left alone: {n} {reason}" for reason, n in reasons.items()]
        return "\n".join(lines)

    def bytes_kept(self, device: torch.device, dtype: torch.dtype) -> int:
        """Memory of the operands that the layers keep from one optimiser step to the next, on every rank."""
        eight_bit = fp8.runs_on(device, dtype)
        of_layer = {}
        for name, recipe in self.converted.items():
            of_layer[name] = dtype.itemsize
            if recipe.in_fp8 and eight_bit:  # the weight's copy, its containers, and "ste"'s operand
                of_layer[name] += 1 + (recipe.dgrad == "mx") + dtype.itemsize * (recipe.dgrad == "ste")
        return sum(self.sizes[name] * each for name, each in of_layer.items())

    def backends(self, device: torch.device) -> str:
        """What runs on `device`, e.g. "weight triton, activation triton, grad reference, products bf16"."""
        used: dict[str, set[str]] = {}
        for recipe in self.converted.values():
            for operand in ("weight", "activation", "grad"):
                own = getattr(recipe, operand)
                if own is not None:
                    used.setdefault(operand, set()).add(backend_for(own, device))
        eight_bit = fp8.runs_on(device, torch.bfloat16)
        used["products"] = {r.product if eight_bit else "bf16" for r in self.converted.values()}
        return ", ".join(f"{what} {' and '.join(sorted(names))}" for what, names in used.items())


def plan(model: nn.Module, recipe: ModelRecipe) -> ConversionReport:
    """What `convert` would do, without doing it; the model may live on the meta device.

    Raises:
        RecipeError: no layer would be converted, an override or exclude pattern matches nothing, or the model has experts in
            fused tensors.
    """
    report = ConversionReport(total=sum(p.numel() for p in model.parameters()))
    report.by_pattern = dict.fromkeys((*recipe.overrides, *recipe.exclude), 0)
    experts = [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for own, p in module.named_parameters(recurse=False)
        if p.ndim >= 3  # whatever the family calls them: only convolutions have other weights of three axes
    ]
    if experts:
        raise RecipeError(
            f"{type(model).__name__} keeps its experts in fused tensors ({experts[0]}), which MXFP4 does not reach yet: "
            "they would stay unquantised; use a dense model"
        )
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in _linears(model):
        left_alone, overriding = why_left_alone(name, recipe)
        if type(module) not in (nn.Linear, MXFP4Linear):
            report.skipped[name] = f"of class {type(module).__name__}"
        elif module is output:
            report.skipped[name] = "output embedding"
        elif left_alone:
            report.skipped[name] = left_alone
            for pattern in recipe.exclude if left_alone.startswith("excluded") else ():
                report.by_pattern[pattern] += matches(pattern, name)
        else:
            own = recipe.for_layer(overriding)
            if own.in_fp8:
                fp8.check(own, name)
            report.converted[name] = own
            report.sizes[name] = module.weight.numel()
            for pattern in overriding:
                report.by_pattern[pattern] += 1
    unmatched = [p for p, count in report.by_pattern.items() if not count]
    if unmatched:
        some = ", ".join([*report.converted][:3]) or "none"
        raise RecipeError(
            f"pattern {unmatched[0]!r} of the recipe matches no Linear layer that would be quantised; "
            f"layers are named like: {some}"
        )
    if not report.converted:
        why = "; ".join(f"{n}: {r}" for n, r in [*report.skipped.items()][:4]) or "it has no nn.Linear"
        raise RecipeError(f"{type(model).__name__} has nothing to quantise ({why}); change the recipe or the model")
    return report


def why_left_alone(name: str, recipe: ModelRecipe) -> tuple[str | None, list[str]]:
    """Why a Linear layer of this name is not quantised, None if it is; and the override patterns that match it."""
    excluded = [p for p in recipe.exclude if matches(p, name)]
    if name.rsplit(".", 1)[-1] == "lm_head":
        reason = "output embedding"
    elif not ROUTER_NAMES.isdisjoint(name.split(".")[-2:]):  # `router`, and the likes of `router.layer`
        reason = "router"
    elif "lora_" in name:
        reason = "LoRA adapter"
    else:
        reason = f"excluded by {excluded[0]!r}" if excluded else None
    return reason, [p for p in recipe.overrides if matches(p, name)]


def convert(model: nn.Module, recipe: ModelRecipe | None = None) -> ConversionReport:
    """Swap the model's Linear layers for MXFP4Linear, in place; parameters and their names stay.

    Raises:
        RecipeError: as `plan`; the model is then unchanged.
    """
    return _swap(model, recipe or ModelRecipe(), MXFP4Linear)


def convert_for_rollout(model: nn.Module, recipe: ModelRecipe) -> ConversionReport:
    """As `convert`, into PackedLinear: layers without weights of their own, to be filled with `hold`.

    Layers whose weights the recipe leaves unquantised become MXFP4Linear. Errors as `plan`.
    """
    return _swap(model, recipe, PackedLinear)


def _swap(model: nn.Module, recipe: ModelRecipe, kind: type[MXFP4Linear]) -> ConversionReport:
    report = plan(model, recipe)
    for name, module in _linears(model):
        if name in report.converted:
            own = report.converted[name]
            (MXFP4Linear if own.weight is None else kind).swap(module, name, own)
    return report


def unconvert(model: nn.Module) -> int:
    """Turn every MXFP4Linear back into nn.Linear, in place; returns how many."""
    layers = converted_layers(model)
    for layer in layers.values():
        layer.unswap()
    return len(layers)


def converted_layers(model: nn.Module) -> dict[str, MXFP4Linear]:
    """The model's MXFP4Linear layers by the name they had when converted."""
    return {m.layer_name: m for m in model.modules() if isinstance(m, MXFP4Linear)}


def release_operands(model: nn.Module) -> None:
    """Forget every kept weight operand, after weights changed behind the layers' back (a checkpoint load under FSDP)."""
    for layer in converted_layers(model).values():
        layer.release()


def matches(pattern: str, name: str) -> bool:
    """ "re:..." is searched in the dotted name; any other pattern is a whole name or its last dotted parts."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module
