"""verl's FSDP engine with MXFP4 layers: swapped in before FSDP wraps the model, packed on the way to the rollout.

A weight is quantised once per optimiser step: for the rollout, from the same bits (the parameter in the compute dtype) that
the actor's products use, and the actor keeps the operand those codes stand for. So trainer and rollout multiply by the same
weights, bit for bit. (With product="fp8" and macro blocks the trainer's are not yet rounded to the compute dtype.)

FSDP2 cuts a weight along its output features and blocks lie along its inputs: each rank packs its own rows, and codes are
gathered, a quarter of the bytes (`packing`). Experts in fused tensors are cut between experts.
"""

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fsdp_utils import fsdp_version
from verl.utils.model import convert_weight_keys
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from mxfp4_rl.monitor import routing
from mxfp4_rl.monitor.components import collect_errors, start_measuring
from mxfp4_rl.nn import convert, converted_layers, release_operands
from mxfp4_rl.quant import QuantizedTensor
from mxfp4_rl.settings import Settings
from mxfp4_rl.verl_plugin.packing import pack


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

    def get_per_tensor_param(self, base_sync_done: bool = False, **kwargs):
        """verl's (name, full tensor) pairs, with every converted weight as a QuantizedTensor."""
        layers = converted_layers(self.module)
        adapters = hasattr(self.module, "peft_config")
        if layers and not adapters and fsdp_version(self.module) == 2:
            return self._packed(self._sharded_pairs(), layers), None
        pairs, peft_config = super().get_per_tensor_param(base_sync_done=base_sync_done, **kwargs)
        only_adapters = peft_config is not None and base_sync_done
        return (self._packed(pairs, layers) if layers and not only_adapters else pairs), peft_config

    def _sharded_pairs(self):
        """verl's export of FSDP2 parameters up to the point where it gathers them, with fused experts as they are.

        verl takes experts apart for vLLM. Here they stay whole until they are quantised: transformers' rollout has them fused,
        and on the way to vLLM `vllm_plugin.expert_names` takes them apart.
        """
        device = get_device_id()
        parameters = convert_weight_keys(self.module.state_dict(), self.module)
        return ((name, p.to(device, non_blocking=True) if isinstance(p, DTensor) else p) for name, p in parameters.items())

    @torch.no_grad()
    def _packed(self, pairs, layers) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
        waiting = {layer.weight_name: layer for layer in layers.values()}
        for name, tensor in pairs:
            # PEFT puts a layer of its own around ours and names ours "base_layer".
            layer = waiting.pop(name.replace(".base_layer.", "."), None)
            if layer is None or layer.recipe.weight is None:
                yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                continue
            # Where LoRA adapters are, verl exports the base weights on the CPU.
            own = tensor if isinstance(tensor, DTensor) else tensor.to(get_device_id())
            packed = pack(own, layer.recipe.weight, self.compute_dtype, layer.axis)
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

    def routing(self, sequences: list[list[int]]) -> torch.Tensor | None:
        """The experts that the actor's router chooses for these sequences (`monitor.routing`); None for a dense model.

        Every rank reads all of them: FSDP gathers the weights together.
        """
        if not routing.routed_modules(self.module):
            return None
        device, dtype = get_device_name(), self.compute_dtype
        with self.eval_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return routing.choices_of(self.module, sequences, pad_id=0).short().cpu()

    def collect_errors(self):
        """Error statistics by layer and operand since `start_measuring`, this rank's rows of the weights included."""
        return collect_errors(self.module, self.settings.monitor.max_rows, self.compute_dtype)
