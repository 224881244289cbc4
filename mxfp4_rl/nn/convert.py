"""Convert a model: which Linear layers become MXFP4Linear and which fused experts MXFP4Experts, with a report of what matched.

Layers are known by name; a fused tensor of experts is a layer, by the name of its parameter. lm_head (and whatever else the
model calls its output embedding), embeddings, routers and norms are never converted: the paper's tensor counts leave exactly
these out, and quantising them breaks models.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from mxfp4_rl.nn import expert_fp8, fp8
from mxfp4_rl.nn.experts import UNQUANTIZED, ExpertsProjection, MXFP4Experts, check_layout, fused_parameters
from mxfp4_rl.nn.linear import MXFP4Linear
from mxfp4_rl.nn.packed import PackedLinear
from mxfp4_rl.quant import backend_for
from mxfp4_rl.recipe import ModelRecipe, RecipeError

ROUTER_NAMES = {"gate", "router", "shared_expert_gate"}  # by name part; `gate_proj` is no router


@dataclass
class ConversionReport:
    """What `convert` did, or what `plan` would do.

    Attributes:
        converted: layer name -> ModelRecipe of that layer. Those of fused experts are names of parameters.
        experts: name of a converted layer of fused experts -> how many experts it has.
        skipped: layer name -> why it was left alone.
        sizes: layer name -> elements of its weight; elements: their sum; total: all parameters of the model.
        by_pattern: how many layers each override and exclude pattern matched.
    """

    converted: dict[str, ModelRecipe] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    total: int = 0
    by_pattern: dict[str, int] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return sum(self.sizes.values())

    def describe(self) -> str:
        """A few lines for the log: counts by kind of layer, what was skipped, and the share of the parameters."""
        kinds = Counter(name.rsplit(".", 1)[-1] for name in self.converted if name not in self.experts)
        fused = Counter(f"{name.rsplit('.', 1)[-1]} of {count} experts" for name, count in self.experts.items())
        recipes = Counter(recipe.describe() for recipe in self.converted.values())
        counted = [f"{kinds.total()} Linear layers"] if kinds or not fused else []
        counted += [f"{fused.total()} fused tensors of experts"] if fused else []
        lines = [
            f"{' and '.join(counted)} quantised ({', '.join(f'{n} {k}' for k, n in [*kinds.items(), *fused.items()])}), "
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
            fused tensors of an unknown layout.
    """
    report = ConversionReport(total=sum(p.numel() for p in model.parameters()))
    report.by_pattern = dict.fromkeys((*recipe.overrides, *recipe.exclude), 0)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in _linears(model):
        if type(module) not in (nn.Linear, MXFP4Linear):
            report.skipped[name] = f"of class {type(module).__name__}"
        elif module is output:
            report.skipped[name] = "output embedding"
        elif (own := _decided(report, name, recipe)) is not None:
            if own.in_fp8:
                fp8.check(own, name)
            report.converted[name] = own
            report.sizes[name] = module.weight.numel()
    for name, module in _experts(model):
        quantized = {own_name: _decided(report, own_name, recipe) for own_name in _parameter_names(name, module)}
        if any(quantized.values()):
            check_layout(module, name)
        for own_name, own in quantized.items():
            if own is not None:
                weight = getattr(module, own_name.rsplit(".", 1)[-1])
                if not expert_fp8.multiplies(own, weight.shape):  # the same operands in BF16: the report says what runs
                    own = dataclasses.replace(own, product="bf16")
                report.converted[own_name] = own
                report.experts[own_name], report.sizes[own_name] = len(weight), weight.numel()
    unmatched = [p for p, count in report.by_pattern.items() if not count]
    if unmatched:
        some = ", ".join([*report.converted][:3]) or "none"
        raise RecipeError(
            f"pattern {unmatched[0]!r} of the recipe matches no Linear layer that would be quantised, and no fused experts; "
            f"layers are named like: {some}"
        )
    if not report.converted:
        why = "; ".join(f"{n}: {r}" for n, r in [*report.skipped.items()][:4]) or "it has no nn.Linear"
        raise RecipeError(f"{type(model).__name__} has nothing to quantise ({why}); change the recipe or the model")
    return report


def _decided(report: ConversionReport, name: str, recipe: ModelRecipe) -> ModelRecipe | None:
    """The recipe of the layer of this name; None, with the reason in the report, if it is left alone. Counts patterns."""
    left_alone, overriding = why_left_alone(name, recipe)
    if left_alone:
        report.skipped[name] = left_alone
        counted = [p for p in recipe.exclude if matches(p, name)] if left_alone.startswith("excluded") else []
    else:
        counted = overriding
    for pattern in counted:
        report.by_pattern[pattern] += 1
    return None if left_alone else recipe.for_layer(overriding)


def why_left_alone(name: str, recipe: ModelRecipe) -> tuple[str | None, list[str]]:
    """Why a layer of this name is not quantised, None if it is; and the override patterns that match it."""
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
    """Swap the model's Linear layers for MXFP4Linear and its fused experts for MXFP4Experts, in place.

    Parameters and their names stay.

    Raises:
        RecipeError: as `plan`; the model is then unchanged.
    """
    return _swap(model, recipe or ModelRecipe(), MXFP4Linear)


def convert_for_rollout(model: nn.Module, recipe: ModelRecipe) -> ConversionReport:
    """As `convert`, into PackedLinear and PackedProjection: layers without weights of their own, to be filled with `hold`.

    Layers whose weights the recipe leaves unquantised become MXFP4Linear, or keep their parameter. Errors as `plan`.
    """
    return _swap(model, recipe, PackedLinear)


def _swap(model: nn.Module, recipe: ModelRecipe, kind: type[MXFP4Linear]) -> ConversionReport:
    report = plan(model, recipe)
    for name, module in _linears(model):
        if name in report.converted:
            own = report.converted[name]
            (MXFP4Linear if own.weight is None else kind).swap(module, name, own)
    for name, module in [*_experts(model)]:
        recipes = {n.rsplit(".", 1)[-1]: report.converted.get(n) for n in _parameter_names(name, module)}
        if recipes := {own_name: own for own_name, own in recipes.items() if own is not None}:
            MXFP4Experts.swap(module, name, recipes, packed=kind is PackedLinear)
    return report


def unconvert(model: nn.Module) -> int:
    """Turn every converted layer back into what it was, in place; returns how many there were."""
    count = len(converted_layers(model))
    for module in model.modules():
        if isinstance(module, MXFP4Linear | MXFP4Experts):
            module.unswap()
    return count


def converted_layers(model: nn.Module) -> dict[str, MXFP4Linear | ExpertsProjection]:
    """The model's quantised layers, fused tensors of experts included, by the name they had when converted."""
    layers: dict[str, MXFP4Linear | ExpertsProjection] = {}
    for module in model.modules():
        if isinstance(module, MXFP4Linear):
            layers[module.layer_name] = module
        elif isinstance(module, MXFP4Experts):
            layers |= {p.layer_name: p for p in module.projections.values() if p.recipe is not UNQUANTIZED}
    return layers


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


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if fused_parameters(module):
            yield name, module


def _parameter_names(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{own}" if name else own for own in fused_parameters(module)]
