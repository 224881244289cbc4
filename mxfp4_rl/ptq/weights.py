"""The weights of a model's Linear layers, quantised in place one rule at a time, and put back.

As "export", layers that a server multiplies as one (query, key and value; gate and up) are quantised together, and NVFP4's
scale of the tensor is rounded up to a power of two: bit for bit what `mxfp4-rl export` packs. As "training", each
weight is quantised by itself: bit for bit what trainer and rollout multiply by. In MXFP4, which has scales of blocks only, the
two are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from mxfp4_rl.export.formats import FORMATS, quantise_group, served_together
from mxfp4_rl.launch import LaunchError
from mxfp4_rl.nn import plan
from mxfp4_rl.quant import quantize
from mxfp4_rl.recipe import ModelRecipe, QuantRecipe, RecipeError

_DTYPE = torch.bfloat16


@dataclass
class Quantised:
    """What one rule did to the weights.

    Attributes:
        errors: layer -> energy of what was lost over the energy of the weight, of the BF16 values that a product sees.
        rel_mse: the same of all weights together.
        seconds: from BF16 weights to codes and scales. cpu_seconds: the same on all cores together, without waiting for them.
        elements: of the weights.
    """

    errors: dict[str, float] = field(default_factory=dict)
    rel_mse: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    elements: int = 0


class Weights:
    """The Linear weights of a model in BF16: those that training quantises, lm_head and routers left out.

    Attributes:
        layers: name -> its nn.Linear, whose weight is BF16 (out, in). originals: name -> the weight as it was.

    Raises:
        LaunchError: the model has none, has experts in fused tensors, or a weight is not finite.
    """

    def __init__(self, model: nn.Module):
        try:
            report = plan(model, ModelRecipe(activation=None))
        except RecipeError as error:
            raise LaunchError(f"ptq: {error}") from error
        if report.experts:
            raise LaunchError(
                f"ptq measures Linear layers, and {next(iter(report.experts))} holds experts in a fused tensor: "
                "`mxfp4-rl decompose --compare` measures their weights, `mxfp4-rl eval --weight` their accuracy"
            )
        self.layers: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in report.converted}
        self.originals = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        for name, weight in self.originals.items():
            if not weight.isfinite().all():
                raise LaunchError(f"the weight of {name} holds NaN or infinity: repair the checkpoint first")

    @torch.no_grad()
    def quantise(
        self, recipe: QuantRecipe, like: str = "export", importance: Mapping[str, torch.Tensor] | None = None
    ) -> Quantised:
        """Quantise all weights in the model.

        Args:
            recipe: of the weights. like: "export" or "training", see above.
            importance: layer -> mean squares of its inputs, float32 (in,), for a rule that weighs squared errors with them.

        Raises:
            LaunchError: as "export", a weight's inputs do not fill their blocks.
        """
        done = Quantised()
        lost = energy = 0.0
        for group in self._groups(recipe, like):
            weights = [self.originals[name] for name in group]
            own_importance = None if importance is None else importance[group[0]]  # they share their inputs
            with _Clock(weights[0].device) as clock:
                packed = quantise_group(weights, recipe, recipe.format == "nvfp4" and like == "export", own_importance)
            done.seconds, done.cpu_seconds = done.seconds + clock.seconds, done.cpu_seconds + clock.cpu_seconds
            for name, weight, own in zip(group, weights, packed, strict=True):
                operand = own.dequantize(_DTYPE)
                self.layers[name].weight.data.copy_(operand)
                of_layer, whole = squares(operand.float() - weight.float()), squares(weight.float())
                done.errors[name] = of_layer / whole if whole else 0.0
                lost, energy = lost + of_layer, energy + whole
                done.elements += weight.numel()
        done.rel_mse = lost / energy if energy else 0.0
        return done

    def _groups(self, recipe: QuantRecipe, like: str) -> list[list[str]]:
        if like == "training":
            return [[name] for name in self.layers]
        packs = any(f.arguments is not None and f.refuses(recipe) is None for f in FORMATS.values())
        for name, weight in self.originals.items():
            if packs and weight.shape[1] % recipe.block_size:
                raise LaunchError(
                    f"{name} has {weight.shape[1]} inputs, no multiple of {recipe.block_size}, which no packed export stores: "
                    "give --like training"
                )
        if recipe.format != "nvfp4":
            return [[name] for name in self.layers]
        groups = {tuple(other for other in served_together(name) if other in self.layers): None for name in self.layers}
        return [list(group) for group in groups]

    @torch.no_grad()
    def seconds_at_sync(self, recipe: QuantRecipe) -> float:
        """Seconds of a weight sync's own work: every weight quantised by itself, and dequantised for the actor's products."""
        total = 0.0
        for weight in self.originals.values():
            with _Clock(weight.device) as clock:
                quantize(weight, recipe).dequantize(_DTYPE)
            total += clock.seconds
        return total

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back as they were."""
        for name, layer in self.layers.items():
            layer.weight.data.copy_(self.originals[name])


def squares(t: torch.Tensor) -> float:
    """Sum of squares of a float32 tensor, in float64."""
    return torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2


class _Clock:
    """Wall and processor seconds of a block of code, a GPU's work included."""

    def __init__(self, device: torch.device):
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __enter__(self) -> _Clock:
        self._wait()
        self._began, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc) -> None:
        self._wait()
        self.seconds, self.cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu
