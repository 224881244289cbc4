"""verl's vLLM server with MXFP4 layers, registered over the name "vllm" so that verl's cases for it hold.

`MXFP4vLLMServer` starts vLLM with the quantisation method "mxfp4_rl". `vllm_adapter` ships packed weights to it through verl's
own bucketed transfer. `vllm_worker` runs in vLLM's workers: it loads them, and puts the noise of a step (AQN) on clean copies
of the norm weights; validation takes it off without another sync. With `mxfp4.enable=false` all of it behaves as verl's.
"""

from __future__ import annotations

import asyncio
import json
import os

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from mxfp4_rl.launch.failure import FAULT_MARK
from mxfp4_rl.settings import Settings
from mxfp4_rl.verl_plugin.weight_socket import run_id
from mxfp4_rl.vllm_plugin import METHOD, compile_key, quantization_config

ENGINE_GRACE_SECONDS = 10.0  # for an error of verl's own, which says more
WORKER_EXTENSION = "mxfp4_rl.verl_plugin.vllm_worker.MXFP4WorkerExtension"


class MXFP4vLLMServer(vLLMHttpServer):
    """verl's server: vLLM in one node, with the recipe of `rollout.custom.mxfp4`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # vLLM's workers, which start later, name the socket by it. verl has put Ray's job id here.
        os.environ["VERL_RAY_JOB_ID"] = run_id()

    def _init_config(self, config):
        config = super()._init_config(config)
        custom = dict(config.custom or {})
        self.settings = Settings.from_config(custom.get("mxfp4"))
        steps, aqn = custom.get("total_training_steps"), self.settings.aqn
        self._schedule = vars(aqn.schedule(steps)) if self.settings.enable and aqn.enable else None
        self._noise_on, self._last_sync, self._said = True, {}, False
        return config

    async def run_server(self, args):
        await super().run_server(args)
        self._engine_watch = asyncio.create_task(self._end_with_engine())

    async def _end_with_engine(self) -> None:
        """End this actor where vLLM's processes died: a trainer in the middle of a weight sync would wait for them for ever."""
        while not self.engine.errored:
            await asyncio.sleep(1.0)
        print(
            f"{FAULT_MARK}vLLM's engine died, and so its rollout server (process {os.getpid()}) ends: the first ERROR of "
            "EngineCore or Worker in verl.log says why",
            flush=True,
        )
        await asyncio.sleep(ENGINE_GRACE_SECONDS)
        os._exit(1)  # the run's watch over Ray's actors ends the run

    def _apply_quantization(self):
        if not self.settings.enable:
            return super()._apply_quantization()
        if self.config.quantization:
            raise ValueError(f"rollout.quantization={self.config.quantization} and mxfp4.enable=true: give one of them")
        return METHOD, {"quantization_config": quantization_config(self.settings.recipe)}

    def _preprocess_engine_kwargs(self, engine_kwargs: dict) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        if self.settings.enable:
            given = engine_kwargs.get("additional_config") or {}
            given = json.loads(given) if isinstance(given, str) else dict(given)
            engine_kwargs["additional_config"] = given | compile_key(self.settings.recipe)

    def _get_worker_extension_cls(self) -> str:
        return WORKER_EXTENSION if self.settings.enable else super()._get_worker_extension_cls()

    async def set_global_steps(self, global_steps: int) -> None:
        """verl's mark of a finished sync: the norms that came are clean, and get this step's noise."""
        await super().set_global_steps(global_steps)
        await self.set_noise(self._noise_on)

    async def set_noise(self, on: bool) -> float:
        """Put this step's noise on, or take it off (validation); returns sigma.

        Raises:
            RuntimeError: requests are running, whose keys and values belong to the other weights.
        """
        self._noise_on = on
        if self._schedule is None or self.node_rank != 0:
            return 0.0
        step = (self.global_steps or 0) if on else None
        sigmas = await self.engine.collective_rpc("mxfp4_set_noise", args=(self._schedule, step))
        connector = self.engine.vllm_config.kv_transfer_config is not None  # without one, its reset is said to have failed
        if not await self.engine.reset_prefix_cache(reset_connector=connector):
            raise RuntimeError("the noise of mxfp4.aqn changed while requests were running: vLLM's prefix cache is in use")
        return sigmas[0]

    async def end_sync(self, sync: dict[str, float]) -> None:
        """The adapter's last call of a sync: what it shipped, and whether only LoRA's adapters were in it.

        Raises:
            RuntimeError: the workers hold other packed weights.
        """
        shipped, adapters = sync.pop("checksum"), sync.pop("adapters")
        if not adapters:
            why_not = await self._compare(shipped) if sync["packed_elements"] else "weights travel dequantised"
            if not self._said and self.replica_rank == 0:
                self._said = True
                await self._say_paths()
                if why_not:
                    print(f"[mxfp4] rollout: its weights and the trainer's are not compared: {why_not}", flush=True)
        self._last_sync = sync

    async def _compare(self, shipped: int) -> str | None:
        """The sum of what was shipped packed, with the workers'; returns why they cannot be compared, None where they can."""
        held = await self.engine.collective_rpc("mxfp4_checksum")
        if not all(once for _, once in held):
            return "several workers hold the same rows"
        if shipped != sum(part for part, _ in held):
            raise RuntimeError(
                "the rollout does not hold the weights that the trainer shipped: another model, or tensors that vLLM did not "
                "load; compare actor_rollout_ref.model.path with rollout.engine_kwargs"
            )
        return None

    async def last_sync(self) -> dict[str, float]:
        """What the last sync shipped, and how long it took."""
        return self._last_sync

    async def _say_paths(self) -> None:
        reports = await self.engine.collective_rpc("mxfp4_report")
        packed, elements, whole = (sum(r[k] for r in reports) for k in ("packed_bytes", "packed_elements", "bytes"))
        print(f"[mxfp4] rollout: {reports[0]['paths']}", flush=True)
        if packed:
            print(
                f"[mxfp4] rollout: quantised weights take {packed / 2**20:.0f} MiB, {packed / (2 * elements):.2f} of BF16's "
                f"{2 * elements / 2**20:.0f} MiB; all weights {whole / 2**20:.0f} MiB instead of "
                f"{(whole - packed + 2 * elements) / 2**20:.0f} MiB",
                flush=True,
            )


class MXFP4vLLMReplica(vLLMReplica):
    """verl's replica with our server."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(MXFP4vLLMServer)
