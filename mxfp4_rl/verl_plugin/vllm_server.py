"""verl's vLLM rollout with MXFP4 layers: the same parts, registered over the name "vllm" so that verl's cases for it hold.

`MXFP4ServerAdapter` lives in the training worker and ships weights: packed ones as the tensors of `vllm_plugin.layout`, the
others in the rollout's dtype, through verl's own bucketed transfer. `MXFP4vLLMServer` starts vLLM with the quantisation method
"mxfp4_rl". `MXFP4WorkerExtension` runs in vLLM's workers: it puts the noise of a step (AQN) on clean copies of the norm
weights, and takes it off for validation without another sync. With `mxfp4.enable=false` all three behave as verl's.
"""

from __future__ import annotations

import time
from typing import Any

import ray
import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from mxfp4_rl.noise import AQNSchedule, noise_targets
from mxfp4_rl.settings import Settings
from mxfp4_rl.vllm_plugin import METHOD, quantization_config
from mxfp4_rl.vllm_plugin.layout import checksum, is_packed
from mxfp4_rl.vllm_plugin.shipment import Shipment


class MXFP4WorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension of a vLLM worker, with the calls that `MXFP4vLLMServer` makes."""

    def update_weights_from_ipc(self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False):
        super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
        if not (peft_config and base_sync_done):  # not only adapters
            self._mxfp4_clean = None  # the norms that came are clean

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
        packed = {name: size for name, size in sizes.items() if is_packed(name)}
        elements = sum(p.numel() * 2 for name, p in model.named_parameters() if name.endswith("weight_packed"))
        return {"paths": config.describe(), "packed_bytes": sum(packed.values()), "packed_elements": elements,
                "all_bytes": sum(sizes.values())}  # fmt: skip

    def mxfp4_checksum(self) -> int:
        """Of the packed weights that this worker holds; the sum over tensor-parallel workers is the whole model's."""
        return int(checksum((name, p.data) for name, p in self.model_runner.model.named_parameters()))

    def mxfp4_tensor(self, name: str) -> torch.Tensor:
        """One stored tensor, on the CPU; for checks that trainer and rollout agree."""
        return dict(self.model_runner.model.named_parameters())[name].data.cpu()


class MXFP4vLLMServer(vLLMHttpServer):
    """verl's server: vLLM in one node, with the recipe of `rollout.custom.mxfp4`."""

    def _init_config(self, config):
        config = super()._init_config(config)
        custom = dict(config.custom or {})
        self.settings = Settings.from_config(custom.get("mxfp4"))
        steps, aqn = custom.get("total_training_steps"), self.settings.aqn
        self._schedule = vars(aqn.schedule(steps)) if self.settings.enable and aqn.enable else None
        self._noise_on, self._last_sync, self._said = True, {}, False
        return config

    def _apply_quantization(self):
        if not self.settings.enable:
            return super()._apply_quantization()
        if self.config.quantization:
            raise ValueError(f"rollout.quantization={self.config.quantization} and mxfp4.enable=true: give one of them")
        return METHOD, {"quantization_config": quantization_config(self.settings.recipe)}

    def _preprocess_engine_kwargs(self, engine_kwargs: dict) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        if self.settings.enable:  # vLLM's cache of compiled graphs tells runs apart by this, not by the recipe
            engine_kwargs["additional_config"] = {
                **(engine_kwargs.get("additional_config") or {}), "mxfp4_recipe": self.settings.recipe.describe()
            }  # fmt: skip

    def _get_worker_extension_cls(self) -> str:
        own = f"{MXFP4WorkerExtension.__module__}.{MXFP4WorkerExtension.__qualname__}"
        return own if self.settings.enable else super()._get_worker_extension_cls()

    async def set_global_steps(self, global_steps: int) -> None:
        """verl's mark of a finished sync: the norms that came are clean, and get this step's noise."""
        await super().set_global_steps(global_steps)
        await self.set_noise(self._noise_on)

    async def set_noise(self, on: bool) -> float:
        """Put this step's noise on, or take it off (validation); returns sigma."""
        self._noise_on = on
        if self._schedule is None or self.node_rank != 0:
            return 0.0
        step = (self.global_steps or 0) if on else None
        sigmas = await self.engine.collective_rpc("mxfp4_set_noise", args=(self._schedule, step))
        await self.engine.reset_prefix_cache()  # keys and values of the other weights
        return sigmas[0]

    async def end_sync(self, sync: dict[str, float]) -> None:
        """The adapter's last call of a sync: what it shipped, whose sum the workers must hold now.

        Raises:
            RuntimeError: they hold other weights.
        """
        shipped = sync.pop("checksum")
        if (
            sync["packed_elements"]
            and self._sums_compare()
            and shipped != sum(await self.engine.collective_rpc("mxfp4_checksum"))
        ):
            raise RuntimeError(
                "the rollout does not hold the weights that the trainer shipped: another model, or tensors that vLLM did not "
                "load; compare actor_rollout_ref.model.path with rollout.engine_kwargs"
            )
        if not self._said and self.replica_rank == 0:
            await self._say_paths()
        self._last_sync = sync

    async def last_sync(self) -> dict[str, float]:
        return self._last_sync

    async def weight_bits(self, name: str) -> list[torch.Tensor]:
        """One stored tensor of every worker; for checks that trainer and rollout agree."""
        return await self.engine.collective_rpc("mxfp4_tensor", args=(name,))

    def _sums_compare(self) -> bool:
        """Whether every weight lies on one worker only: key and value heads do not, where there are fewer than workers."""
        config = self.model_config.hf_config
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
        return self.config.tensor_model_parallel_size <= heads and self.config.data_parallel_size == 1

    async def _say_paths(self) -> None:
        self._said = True
        reports = await self.engine.collective_rpc("mxfp4_report")
        packed, elements, whole = (sum(r[k] for r in reports) for k in ("packed_bytes", "packed_elements", "all_bytes"))
        print(f"[mxfp4] rollout: {reports[0]['paths']}", flush=True)
        print(
            f"[mxfp4] rollout: quantised weights take {packed / 2**20:.0f} MiB, {packed / max(1, 2 * elements):.2f} of BF16's "
            f"{2 * elements / 2**20:.0f} MiB; all weights {whole / 2**20:.0f} MiB instead of "
            f"{(whole - packed + 2 * elements) / 2**20:.0f} MiB",
            flush=True,
        )


class MXFP4vLLMReplica(vLLMReplica):
    """verl's replica with our server."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(MXFP4vLLMServer)


class MXFP4ServerAdapter(ServerAdapter):
    """The training worker's side: names and casts what the engine exports, and measures the sync."""

    @torch.no_grad()
    async def update_weights(self, weights, global_steps: int | None = None, wire_format: str = "named_tensors", **kwargs):
        settings = Settings.from_config(dict(self.config.custom or {}).get("mxfp4"))
        if not settings.enable:
            return await super().update_weights(weights, global_steps=global_steps, wire_format=wire_format, **kwargs)
        if wire_format != "named_tensors":
            raise ValueError(f"MXFP4 ships named tensors, not {wire_format!r}: set rollout.checkpoint_engine.backend=naive")
        began = time.perf_counter()
        shipped = Shipment(getattr(torch, self.config.dtype))
        await super().update_weights(shipped.tensors(weights), global_steps=global_steps, wire_format=wire_format, **kwargs)
        if self._ensure_server_handle():
            seconds = time.perf_counter() - began
            await self.server_handle.end_sync.remote({**shipped.sizes, "seconds": seconds, "checksum": int(shipped.checksum)})
