"""verl's extension of vLLM's workers with what MXFP4 needs there: packed weights by their names, noise, checks.

A worker of vLLM imports this, so nothing of verl's servers is imported here.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.utils.vllm.utils import resolve_weight_name
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from mxfp4_rl.noise import AQNSchedule, noise_targets
from mxfp4_rl.vllm_plugin.layout import checksum, is_packed


class MXFP4WorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension, with the calls that `MXFP4vLLMServer` makes."""

    def update_weights_from_ipc(self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False):
        """Load what the trainer sends.

        Raises:
            RuntimeError: a tensor does not fit this model. (verl's transfer would wait for ever for a receiver that raises in
                the middle: the rest is received, and left.)
        """
        self._mxfp4_error: Exception | None = None
        super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
        if self._mxfp4_error is not None:
            raise RuntimeError(
                f"vLLM's model cannot load the trainer's weights ({type(self._mxfp4_error).__name__}: {self._mxfp4_error}): "
                "another model, or one whose layers vLLM names differently; exclude those in mxfp4.recipe.exclude"
            ) from self._mxfp4_error
        if not (peft_config and base_sync_done):  # not only adapters
            self._mxfp4_clean = None  # the norms that came are clean

    def _update_weights(self, weights: list[tuple[str, torch.Tensor]], peft_config: dict, base_sync_done: bool):
        if self._mxfp4_error is not None:
            return
        try:
            if peft_config and not base_sync_done:  # verl finds wrapped layers by the name of an unpacked weight
                model = self.model_runner.model
                known = layer_names(model)
                model.load_weights([(under_adapters(model, n, known), t) for n, t in weights if is_packed(n)])
                weights = [(n, t) for n, t in weights if not is_packed(n)]
            super()._update_weights(weights, peft_config=peft_config, base_sync_done=base_sync_done)
        except Exception as error:
            self._mxfp4_error = error

    def mxfp4_set_noise(self, schedule: dict[str, Any], step: int | None) -> float:
        """The norm weights with the noise of `step`, or clean for None; returns sigma."""
        schedule = AQNSchedule(**schedule)
        norms = dict(self.model_runner.model.named_parameters())
        if getattr(self, "_mxfp4_clean", None) is None:
            self._mxfp4_clean = {name: norms[name].data.clone() for name in noise_targets(self.model_runner.model)}
        for name, clean in self._mxfp4_clean.items():
            norms[name].data.copy_(clean if step is None else schedule.noisy(name, clean, step))
        return 0.0 if step is None else schedule.sigma(step)

    def mxfp4_report(self) -> dict[str, Any]:
        """Which path serves how many layers, and the bytes that the weights take."""
        model, config = self.model_runner.model, self.model_runner.vllm_config.quant_config
        sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
        elements = sum(p.numel() * 2 for name, p in model.named_parameters() if name.endswith("weight_packed"))
        packed = sum(size for name, size in sizes.items() if is_packed(name))
        return {"paths": config.describe(), "packed_bytes": packed, "packed_elements": elements, "bytes": sum(sizes.values())}

    def mxfp4_checksum(self) -> tuple[int, bool]:
        """Of the packed weights that this worker holds, and whether the sum over all workers is the whole model's.

        It is not where several workers hold the same rows: key and value heads fewer than workers, layers that are not cut.
        """
        model = self.model_runner.model
        workers = self.model_runner.vllm_config.parallel_config.tensor_parallel_size
        holders = [m for m in model.modules() if any(is_packed(n) for n, _ in m.named_parameters(recurse=False))]
        once = workers == 1 or all(getattr(m, "num_kv_head_replicas", 1) == 1 and _parts(m) == workers for m in holders)
        return int(checksum((name, p.data) for name, p in model.named_parameters())), once


def _parts(layer: torch.nn.Module) -> int:
    """How many workers share the layer's weights out between them."""
    config = getattr(layer, "moe_config", None)
    return getattr(layer, "tp_size", 1) if config is None else config.moe_parallel_config.tp_size


def layer_names(model: torch.nn.Module) -> set[str]:
    """The model's parameters and buffers, and for every packed weight the name that an unpacked one would have."""
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    return names | {n.removesuffix("weight_packed") + "weight" for n in names if n.endswith("weight_packed")}


def under_adapters(model: torch.nn.Module, name: str, known: set[str]) -> str:
    """A packed tensor's name where LoRA layers may be wrapped around some of vLLM's; as verl finds it for unpacked weights."""
    stem, _, leaf = name.rpartition(".")
    return resolve_weight_name(model, f"{stem}.weight", known).rpartition(".")[0] + "." + leaf
