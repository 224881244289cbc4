"""The training worker's side of the vLLM rollout: names and casts what the engine exports, ships it, measures the sync."""

from __future__ import annotations

import time

import ray
import torch
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from mxfp4_rl.settings import Settings
from mxfp4_rl.verl_plugin.weight_socket import run_id
from mxfp4_rl.vllm_plugin.shipment import Shipment


class MXFP4ServerAdapter(ServerAdapter):
    """verl's adapter with a socket of this run's own; with `mxfp4.enable=false` nothing else."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.zmq_handle = self.zmq_handle.replace(ray.get_runtime_context().get_job_id(), run_id())  # as MXFP4vLLMServer does

    async def update_weights(self, weights, global_steps: int | None = None, wire_format: str = "named_tensors", **kwargs):
        settings = Settings.from_config(dict(self.config.custom or {}).get("mxfp4"))
        if not settings.enable:
            return await super().update_weights(weights, global_steps=global_steps, wire_format=wire_format, **kwargs)
        if wire_format != "named_tensors":
            raise ValueError(f"MXFP4 ships named tensors, not {wire_format!r}: set rollout.checkpoint_engine.backend=naive")
        began = time.perf_counter()
        family = getattr(self.model_config.hf_config, "model_type", "")
        shipped = Shipment(getattr(torch, self.config.dtype), family)
        await super().update_weights(shipped.tensors(weights), global_steps=global_steps, wire_format=wire_format, **kwargs)
        if self._ensure_server_handle():
            seconds = time.perf_counter() - began
            adapters = bool(kwargs.get("peft_config") and kwargs.get("base_sync_done"))  # of LoRA, without the weights below
            sync = {**shipped.sizes, "seconds": seconds, "checksum": int(shipped.checksum), "adapters": adapters}
            await self.server_handle.end_sync.remote(sync)
