"""What an export consists of: which tensors are quantised and how, by name, read and quantised one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch

from mxfp4_rl.analysis.checkpoint import Checkpoint
from mxfp4_rl.analysis.weights import LinearWeight, linear_weights
from mxfp4_rl.export import ExportError, serving
from mxfp4_rl.export.experts import ExpertNames
from mxfp4_rl.export.formats import Format, quantise_group, served_together
from mxfp4_rl.nn.convert import why_left_alone
from mxfp4_rl.nn.experts import PROJECTIONS, quantize_experts
from mxfp4_rl.quant import QuantizedTensor
from mxfp4_rl.recipe import ModelRecipe


class Plan:
    """Which tensors are quantised, by name, and which Linear layers are not.

    Attributes:
        format: of the export.
        recipes: layer -> its recipe: Linear layers as the export names them, and fused tensors that stay in one.
        left_alone: layer -> why it is not quantised.
        routers: modules that no recipe quantises.

    Args:
        importance: layer -> mean squares of its inputs, float32 (in,), which weigh the squared errors of all layers.
        device: where weights are quantised and dequantised, one after the other; the bits are the same on all.

    Raises:
        ExportError: the format cannot carry a recipe, a shape or this model, or the importance is not of its layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: ModelRecipe,
        format: Format,
        importance: Mapping[str, torch.Tensor] | None = None,
        device: str = "cpu",
    ):
        if checkpoint.format == "gguf":
            raise ExportError("a GGUF file permutes rows and renames tensors: give the model as safetensors")
        if checkpoint.config.get("quantization_config"):
            raise ExportError(f"{checkpoint.source} is quantised already (quantization_config in its config.json)")
        model_type = checkpoint.config.get("model_type")
        if format.model_type not in (None, model_type):
            raise ExportError(
                f"{format.name} is the format of models of type {format.model_type}, not {model_type}: "
                "give --format mxfp4-pack-quantized or bf16"
            )
        lost = {info.name for info in checkpoint.tensors} & {f"{own}$" for own in PROJECTIONS}
        if lost:  # transformers 5.10 saves models that it loaded from MXFP4 so
            raise ExportError(
                f"{checkpoint.source} has lost its experts: {min(lost)} is the name of a pattern, under which save_pretrained "
                "wrote one layer over another; save the model's state_dict with safetensors instead"
            )
        weights, left_out = linear_weights(checkpoint)
        for name, reason in left_out.items():
            if reason.startswith("experts in a fused tensor"):  # training would quantise them
                raise ExportError(f"{name}: {reason}")
        self.format, self.device, self._importance = format, device, importance
        self.routers = [name.removesuffix(".weight") for name, reason in left_out.items() if reason == "router"]
        self.recipes: dict[str, ModelRecipe] = {}
        self.left_alone: dict[str, str] = {}
        self._infos = {info.name: info for info in checkpoint.tensors}
        self._axes: dict[str, int] = {}  # fused tensor that stays in one -> the axis its blocks run along
        self._apart: dict[str, dict[str, tuple[int, slice]]] = {}  # fused tensor -> the Linear layers that it is stored as
        self._joined: set[str] = set()  # Linear layers whose rows training quantises with those of another
        names = ExpertNames(checkpoint.config)
        for weight in weights:
            self._add(weight, recipe, names)
        if not self.recipes:
            raise ExportError("the recipe quantises no weight of this model: there is nothing to export")
        if format.experts_only and not self._axes:
            raise ExportError(f"{checkpoint.source} has no fused experts, which {format.name} is made for: give --format bf16")

    def _add(self, weight: LinearWeight, recipe: ModelRecipe, names: ExpertNames) -> None:
        fused = len(weight.info.shape) == 3
        trained = names.trained_as(weight.name)
        reason, overriding = why_left_alone(trained, recipe)
        own = recipe.for_layer(overriding)
        if reason is None and own.weight is None:
            reason = "the recipe leaves its weight alone"
        layers = [weight.name]
        can_part = fused and self.format.of_linears and weight.axis == -1
        if can_part and (apart := names.taken_apart(weight.name, weight.info.shape)) is not None:
            self._apart[weight.name] = apart
            layers = list(apart)
        if reason is not None:
            if fused and self.format.experts_only:
                raise ExportError(
                    f"{weight.name}: {reason}, but {self.format.name} stores all experts in MXFP4: give --format bf16"
                )
            self.left_alone |= dict.fromkeys(layers, reason)
            return
        self._check(weight, own)
        self.recipes |= dict.fromkeys(layers, own)
        if fused and weight.name not in self._apart:
            self._axes[weight.name] = weight.axis
        elif trained != weight.name:
            self._joined |= {weight.name}

    def _check(self, weight: LinearWeight, own: ModelRecipe) -> None:
        name, shape, format = weight.info.name, weight.info.shape, self.format
        fused = len(shape) == 3
        if fused:
            if name.rpartition(".")[2] not in PROJECTIONS:
                raise ExportError(f"{name} {shape}: training knows no experts of this layout; exclude it in the recipe")
            if format.of_linears and name not in self._apart:
                raise ExportError(
                    f"{name} {shape}: transformers knows no Linear layers for the fused experts of this model, which "
                    f"{format.name} would be made of: give --format bf16 (or gpt-oss, if the model is one)"
                )
        elif len(shape) != 2 or weight.axis not in (-1, 1) or not name.endswith(".weight"):
            raise ExportError(
                f"{name} {shape} is no (outputs, inputs) matrix of a Linear layer (GPT-2's Conv1D is (inputs, outputs)): such "
                "models cannot be exported yet; exclude it in the recipe"
            )
        if format.experts_only and not fused:
            return  # stored as BF16
        if self._importance is not None:
            self._check_importance(weight, own)
        if why := format.refuses(own.weight):
            raise ExportError(why)
        if format.whole_blocks and shape[weight.axis] % own.weight.block_size:
            raise ExportError(
                f"{weight.name} has {shape[weight.axis]} inputs, no multiple of {own.weight.block_size}: {format.name} "
                "cannot store a part of a block; exclude the layer in the recipe, or use --format bf16"
            )

    def _check_importance(self, weight: LinearWeight, own: ModelRecipe) -> None:
        name, shape = weight.name, weight.info.shape
        if len(shape) != 2:
            raise ExportError(
                f"{name}: --importance is of Linear layers, and this holds experts in a fused tensor: leave it out"
            )
        if why := own.weight.why_not_weighed():
            raise ExportError(f"{name}: --importance is not for {own.weight.describe()}: {why}")
        if name not in self._importance:
            raise ExportError(f"--importance has no inputs of {name}: it was made from another model")
        if self._importance[name].shape != (shape[weight.axis],):
            raise ExportError(
                f"--importance has {len(self._importance[name])} inputs of {name}, which has {shape[weight.axis]}"
            )

    def group(self, module: str) -> list[str]:
        """The Linear layers to be quantised in one go with this one."""
        if not self.format.shares_scale and module not in self._joined:
            return [module]
        together = [m for m in served_together(module) if m in self.recipes]
        if any(self.recipes[m].weight != self.recipes[module].weight for m in together):
            raise ExportError(f"{', '.join(together)} are served as one product and need one recipe for {self.format.name}")
        return together

    def tensors(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor, int]]:
        """(name, tensor or quantised weight, elements read) in the checkpoint's order; floats are cast to `dtype` first."""
        done = set()
        for info in checkpoint.tensors:
            module = info.name.removesuffix(".weight")
            if info.name in self._apart:
                yield from self._taken_apart(checkpoint.read(info).to(self.device, dtype), self._apart[info.name])
            elif info.name in self._axes:
                weight, recipe = checkpoint.read(info).to(self.device, dtype), self.recipes[info.name].weight
                yield info.name, quantize_experts(weight, recipe, self._axes[info.name]), info.elements
            elif module not in self.recipes or not info.name.endswith(".weight"):
                tensor = checkpoint.read(info)
                yield info.name, tensor.to(dtype) if tensor.is_floating_point() else tensor, info.elements
            elif module not in done:
                group = self.group(module)
                done.update(group)
                weights = [checkpoint.read(self._infos[f"{m}.weight"]).to(self.device, dtype) for m in group]
                yield from self._quantised(group, weights)

    def _taken_apart(self, experts: torch.Tensor, layers: dict[str, tuple[int, slice]]):
        """The Linear layers of a fused tensor (E, out, in), quantised or not, as `tensors` yields them."""
        for expert, own in itertools.groupby(layers, key=lambda layer: layers[layer][0]):
            group = list(own)
            weights = [experts[expert][layers[layer][1]] for layer in group]
            if group[0] in self.recipes:
                yield from self._quantised(group, weights)
            else:
                yield from ((f"{m}.weight", w, w.numel()) for m, w in zip(group, weights, strict=True))

    def _quantised(self, group: list[str], weights: list[torch.Tensor]):
        importance = None if self._importance is None else self._importance[group[0]].to(self.device)  # they share their inputs
        quantised = quantise_group(weights, self.recipes[group[0]].weight, self.format.shares_scale, importance)
        yield from ((f"{m}.weight", q, q.shape.numel()) for m, q in zip(group, quantised, strict=True))

    def notes(self) -> list[str]:
        """What vLLM would refuse of the export."""
        if not self.format.of_linears:
            return []
        shapes = {name: self._infos.get(f"{name}.weight") for name in self.recipes if ".experts." not in name}
        quantised = {name: info.shape for name, info in shapes.items() if info is not None}
        return serving.notes(quantised, set(self.left_alone))

    def stored(self, name: str, tensor: torch.Tensor | QuantizedTensor) -> dict[str, torch.Tensor]:
        """What is written of a pair of `tensors`, by name, on the CPU."""
        stored = self.format.stored(name, tensor) if isinstance(tensor, QuantizedTensor) else {name: tensor}
        return {own: t.cpu() for own, t in stored.items()}

    def config(self, checkpoint: Checkpoint, dtype: torch.dtype) -> dict:
        """config.json of the export."""
        config = {k: v for k, v in checkpoint.config.items() if k not in ("torch_dtype", "dtype")}
        config["dtype"] = str(dtype).removeprefix("torch.")
        ignored = {"lm_head", *self.left_alone, *self.routers}
        if (quantization := self.format.config(ignored)) is not None:
            config["quantization_config"] = quantization
        return config
