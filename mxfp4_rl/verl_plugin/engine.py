"""verl's FSDP engine with MXFP4 layers: swapped in before FSDP wraps the model, packed on the way to the rollout.

A weight is quantised once per optimiser step: for the rollout, from the same bits (the parameter in the compute dtype) that
the actor's products use, and the actor keeps the operand those codes stand for. So trainer and rollout multiply by the same
weights, bit for bit. (With product="fp8" and macro blocks the trainer's are not yet rounded to the compute dtype.)
"""

from collections.abc import Iterator

import torch
from verl.utils.device import get_device_name
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from mxfp4_rl.monitor.components import collect_errors, start_measuring
from mxfp4_rl.nn import convert, converted_layers, release_operands
from mxfp4_rl.quant import QuantizedTensor, quantize
from mxfp4_rl.settings import Settings


class MXFP4FSDPEngine(FSDPEngineWithLMHead):
    """Drop-in for verl's engine; what it does is decided by `engine_config.mxfp4`."""

    @property
    def settings(self) -> Settings:
        """The checked `mxfp4:` block; a plain engine config (no such field) means switched off."""
        if not hasattr(self, "_settings"):
            self._settings = Settings.from_config(getattr(self.engine_config, "mxfp4", None) or None)
        return self._settings

    @property
    def compute_dtype(self) -> torch.dtype:
        """What FSDP casts parameters to before a forward."""
        mixed_precision = self.engine_config.mixed_precision or {}
        return PrecisionType.to_dtype(mixed_precision.get("param_dtype", "bf16"))

    def _build_module(self):
        module = super()._build_module()
        reference = self.engine_config.forward_only
        if self.settings.enable and (self.settings.quantize_reference or not reference):
            report = convert(module, self.settings.recipe)
            if self.rank == 0:
                role = "reference" if reference else "actor"
                print(f"[mxfp4] {role}: {report.describe()}", flush=True)
                kernels = report.backends(torch.device(get_device_name()))
                print(f"[mxfp4] {role}: {self.settings.recipe.describe()}; kernels: {kernels}", flush=True)
                held = report.bytes_kept(torch.device(get_device_name()), self.compute_dtype) / 2**30
                print(f"[mxfp4] {role}: every rank keeps its quantised weights, {held:.2f} GiB", flush=True)
        return module

    def _build_fsdp_module(self, module):
        for layer in converted_layers(module).values():
            layer.gathered = True  # FSDP hands the forward another tensor than the parameter
        if self.device_mesh.device_type == "cpu" and self.engine_config.forward_only:
            # verl offloads a reference policy to pinned CPU memory, which needs an accelerator; here it is there already.
            object.__setattr__(self.engine_config, "forward_only", False)
            try:
                return super()._build_fsdp_module(module)
            finally:
                object.__setattr__(self.engine_config, "forward_only", True)
        return super()._build_fsdp_module(module)

    def load_checkpoint(self, *args, **kwargs):
        super().load_checkpoint(*args, **kwargs)
        release_operands(self.module)

    def get_per_tensor_param(self, **kwargs):
        """verl's (name, full tensor) pairs, with every converted weight as a QuantizedTensor."""
        pairs, peft_config = super().get_per_tensor_param(**kwargs)
        layers = converted_layers(self.module)
        return (self._packed(pairs, layers) if layers else pairs), peft_config

    @torch.no_grad()
    def _packed(self, pairs, layers) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
        waiting = {f"{name}.weight": layer for name, layer in layers.items()}
        for name, tensor in pairs:
            layer = waiting.pop(name, None)
            if layer is None or layer.recipe.weight is None:
                yield name, tensor
                continue
            packed = quantize(tensor.to(self.compute_dtype), layer.recipe.weight)
            layer.hold(packed, self.compute_dtype)
            yield name, packed
        if waiting:
            raise RuntimeError(
                f"{len(waiting)} quantised weights were not exported to the rollout, e.g. {next(iter(waiting))!r}: "
                "their parameters have other names in this model; exclude them in mxfp4.recipe.exclude"
            )

    def start_measuring(self) -> None:
        """From here to `collect_errors` the layers measure their activations' and gradients' error."""
        start_measuring(self.module, self.settings.monitor.max_rows)

    def collect_errors(self):
        """Error statistics by layer and operand since `start_measuring`, this rank's rows of the weights included."""
        return collect_errors(self.module, self.settings.monitor.max_rows, self.compute_dtype)
