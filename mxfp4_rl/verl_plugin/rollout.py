"""A rollout made of transformers, `rollout.name=mxfp4_hf`: where vLLM does not run, and where its bits must be the actor's.

verl's rollout has two sides. `MXFP4RolloutAdapter` lives in the training worker and ships weights; `MXFP4Server` is a Ray
actor that answers `generate` requests, started by `MXFP4Replica`. Weights travel as MXFP4 codes and scales. The server keeps
the clean norm weights beside the noisy ones (AQN), so validation switches the noise off and on without another sync.
"""

import asyncio
import functools
import hashlib
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from mxfp4_rl.generation import Sampling, generate
from mxfp4_rl.monitor.routing import choices_of
from mxfp4_rl.nn import convert_for_rollout, converted_layers
from mxfp4_rl.nn.experts import LAYERS_OF
from mxfp4_rl.noise import AQNSchedule, noise_targets
from mxfp4_rl.quant import QuantizedTensor
from mxfp4_rl.settings import Settings
from mxfp4_rl.verl_plugin.waves import SAMPLE, Waiting

_ACTOR_PREFIX = "mxfp4_hf_server"


class RolloutModel:
    """The model a server samples from: its weights, their noise, and generation. No Ray in here.

    Args:
        config: the transformers configuration that the actor's model was built from; weights come from `load`.
        stop_ids: token ids that end a response. pad_id: fills shorter prompts of a batch.
        settings: the `mxfp4:` block.
        schedule: of the noise, or None.
        dtype: compute dtype, the actor's.
        device: where it lives.
        seed: of the sampling.
        trust_remote_code: as in transformers.
    """

    def __init__(
        self,
        config,
        stop_ids: set[int],
        pad_id: int,
        settings: Settings,
        schedule: AQNSchedule | None,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        from transformers import AutoModelForCausalLM

        # Its parameters keep requires_grad: torch multiplies the last hidden states, a strided slice, by a frozen lm_head as
        # a batch of products with that many copies of it (3.6 GB for 64 rows and a vocabulary of 49k).
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
        self.report = convert_for_rollout(self.model, settings.recipe) if settings.enable else None
        self.make_cache = None  # of transformers' own
        if settings.enable and settings.kv_cache is not None:
            from mxfp4_rl.kv_cache import ATTENTION, QuantizedCache

            settings.kv_cache.check_model(self.model.config)
            self.model.set_attn_implementation(ATTENTION)
            self.make_cache = functools.partial(QuantizedCache, self.model.config, settings.kv_cache)
        self.model.to(device)
        self.settings, self.dtype, self.seed, self.schedule = settings, dtype, seed, schedule
        self.noise_targets = noise_targets(self.model) if schedule else []
        self.clean: dict[str, torch.Tensor] = {}
        self._noise_on = True
        self.global_steps: int | None = None
        self._drawn: Counter = Counter()
        self.stop_ids, self.pad_id = stop_ids, pad_id

    def describe_cache(self) -> str:
        """How past tokens are kept, and what reads them for the next one."""
        from mxfp4_rl.kv_cache.attention import path
        from mxfp4_rl.kv_cache.recipe import head_channels

        width = head_channels(self.model.config.get_text_config(decoder=True))
        return f"{self.settings.kv_cache.describe()}; {path(self.settings.kv_cache, width, self.model.device)}"

    def packed_layers(self) -> list:
        """The layers whose weights come as codes."""
        return [layer for layer in converted_layers(self.model).values() if layer.weight is None]

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor | QuantizedTensor], global_steps: int | None) -> int:
        """Take the weights of a sync, all or none, and put this step's noise on; returns the bytes that came.

        Raises:
            ValueError: a weight is missing, unknown, of another shape, or packed where the model has a plain one (or the
                reverse).
        """
        packed = {layer.weight_name: layer for layer in self.packed_layers()}
        plain = dict(self.model.named_parameters(remove_duplicate=False))
        plain |= {n: b for n, b in self.model.named_buffers() if n in weights}
        weights = fuse_experts(weights, plain.keys() - weights.keys())
        tied = {n for n, p in plain.items() if any(p is q and n != m and m in weights for m, q in plain.items())}
        missing = (packed.keys() | plain.keys()) - weights.keys() - tied
        unknown = weights.keys() - packed.keys() - plain.keys()
        mixed = [n for n, w in weights.items() if isinstance(w, QuantizedTensor) != (n in packed)]
        shapes = {n: tuple(p.shape) for n, p in plain.items()} | {n: layer.shape for n, layer in packed.items()}
        came = {n: tuple(w.shape) for n, w in weights.items() if n in shapes}
        other = [f"{n} holds {shapes[n]}, not {shape}" for n, shape in came.items() if shape != shapes[n]]
        if missing or unknown or mixed or other:
            raise ValueError(
                "the actor's weights do not fit the rollout's model: "
                f"missing {sorted(missing)[:3]}, unknown {sorted(unknown)[:3]}, quantised on one side {sorted(mixed)[:3]}, "
                f"of other shapes {other[:3]}"
            )
        size = 0
        for name, weight in weights.items():
            if name in packed:
                packed[name].hold(weight.to(self.model.device), self.dtype)
                size += weight.nbytes
            else:
                plain[name].copy_(weight)
                size += weight.numel() * weight.element_size()
        self.clean = {name: plain[name].clone() for name in self.noise_targets}
        if global_steps is not None and global_steps != self.global_steps:
            self.global_steps = global_steps
            self._drawn.clear()
        self.set_noise(self._noise_on)  # a sync in the middle of a validation leaves the noise off
        return size

    @torch.no_grad()
    def set_noise(self, on: bool) -> float:
        """Put this step's noise on the clean norm weights, or take it off; returns sigma."""
        self._noise_on = on
        step = self.global_steps or 0
        parameters = dict(self.model.named_parameters())
        for name, clean in self.clean.items():
            parameters[name].copy_(self.schedule.noisy(name, clean, step) if on else clean)
        return self.schedule.sigma(step) if on and self.schedule else 0.0

    def sample(
        self, prompts: list[list[int]], limits: list[int], sampling: Sampling, rows: list[int]
    ) -> list[tuple[list[int], list[float], int]]:
        """Responses, their log-probs, and which sample of its row each is, counted from 0.

        A seed follows from the run's seed, the step, the row, the prompt and that number: a run repeats, and a resumed one
        goes on as if nothing had happened.
        """
        numbers, seeds = [], []
        for key in zip(rows, map(tuple, prompts), strict=True):
            numbers.append(self._drawn[key])
            self._drawn[key] += 1
            text = f"{self.seed}/{self.global_steps}/{key}/{numbers[-1]}"
            seeds.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1)
        samples = generate(self.model, prompts, limits, seeds, sampling, self.stop_ids, self.pad_id, self.make_cache)
        return [(*sample, number) for sample, number in zip(samples, numbers, strict=True)]

    def routing(self, sequences: list[list[int]], prompt_lengths: list[int]) -> torch.Tensor:
        """The experts that this model's router chooses for these sequences, read as `sample` reads them (`monitor.routing`)."""
        return choices_of(self.model, sequences, self.pad_id, prompt_lengths, self.make_cache).short().cpu()


def fuse_experts(weights: dict[str, torch.Tensor], missing: set[str]) -> dict[str, torch.Tensor]:
    """`weights` with the `missing` fused tensors of experts put together again, where verl took them apart for vLLM."""
    weights = dict(weights)
    for name in missing:
        base, _, own = name.rpartition(".")
        if own not in LAYERS_OF:
            continue
        stacked = []
        while all(f"{base}.{len(stacked)}.{part}.weight" in weights for part in LAYERS_OF[own]):
            stacked.append(torch.cat([weights.pop(f"{base}.{len(stacked)}.{part}.weight") for part in LAYERS_OF[own]]))
        if stacked:
            weights[name] = torch.stack(stacked)
    return weights


def stop_token_ids(tokenizer, generation_config=None) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's generation config (one, several or none)."""
    eos = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    return ids - {None}


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    row: int
    limit: int
    sampling: Sampling
    answer: asyncio.Future


def _fail(requests: list[_Request], error: BaseException) -> None:
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(RuntimeError(f"rollout failed: {type(error).__name__}: {error}"))


class MXFP4Server:
    """The Ray actor: batches requests that arrive together, one batch at a time, and answers verl's control calls."""

    def __init__(self, config, model_config, replica_rank: int, device: str = "cpu"):
        if device == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))  # Ray gives its actors one thread
        custom = dict(config.custom or {})
        settings = Settings.from_config(custom.get("mxfp4"))
        steps = custom.get("total_training_steps")
        schedule = settings.aqn.schedule(steps) if settings.enable and settings.aqn.enable else None
        model = omega_conf_to_dataclass(model_config)  # reads config and tokenizer, as the actor does
        self.config = config
        self.rollout = RolloutModel(
            config=model.hf_config,
            stop_ids=stop_token_ids(model.tokenizer, model.generation_config),
            pad_id=model.tokenizer.pad_token_id or 0,
            settings=settings,
            schedule=schedule,
            dtype=getattr(torch, config.dtype),
            device=device,
            seed=int(config.seed or 0) + replica_rank,
            trust_remote_code=model.trust_remote_code,
        )
        self._says_path = self.rollout.report is not None and replica_rank == 0  # once it has weights
        if self._says_path:
            print(f"[mxfp4] rollout: {self.rollout.report.describe()}", flush=True)
            if settings.kv_cache is not None:
                print(f"[mxfp4] rollout: KV cache {self.rollout.describe_cache()}", flush=True)
        self._waiting = Waiting(config.max_num_seqs)
        self._worker = ThreadPoolExecutor(1)  # model calls and weight loads, strictly one after the other
        self._loop_task = None
        self._last_sync = {"bytes": 0, "seconds": 0.0}

    async def address(self) -> str:
        return f"{ray.util.get_node_ip_address()}:{os.getpid()}"

    async def expect(self, count: int) -> None:
        """`count` requests are on their way and belong together."""
        self._waiting.expect(count)

    async def generate(
        self,
        prompt_ids,
        sampling_params: dict[str, Any],
        request_id: str,
        image_data=None,
        video_data=None,
        row: int = 0,
        **kwargs,
    ) -> TokenOutput:
        """One sample, of the prompt in row `row` of its step; log-probs are those of the sampled distribution."""
        if image_data or video_data:
            raise ValueError("rollout.name=mxfp4_hf samples from text only; use another rollout for images and video")
        if sampling_params.get("repetition_penalty", 1.0) not in (None, 1.0):
            raise ValueError("rollout.name=mxfp4_hf has no repetition_penalty; set it to 1.0")
        limit = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens") or self.config.response_length
        room = self.config.prompt_length + self.config.response_length - len(prompt_ids)
        sampling = Sampling(
            temperature=float(sampling_params.get("temperature", 1.0)),
            top_p=float(sampling_params.get("top_p", 1.0)),
            top_k=int(sampling_params.get("top_k", -1)),
        )
        loop = asyncio.get_running_loop()
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = loop.create_task(self._serve())
        request = _Request(list(prompt_ids), row, max(1, min(int(limit), room)), sampling, loop.create_future())
        self._waiting.add(request)
        return await request.answer

    async def _serve(self):
        """Answer batch after batch. A request that is never answered would hang the step, whatever went wrong."""
        batch = []
        try:
            while True:
                batch = await self._waiting.next_batch()
                try:
                    await self._answer(batch)
                except Exception as error:  # goes to those who asked, and the server lives on
                    _fail(batch, error)
        except BaseException as error:  # the next request starts another loop
            _fail([*batch, *self._waiting.take_all()], error)
            raise

    async def _answer(self, batch: list[_Request]) -> None:
        samples = await asyncio.get_running_loop().run_in_executor(
            self._worker,
            self.rollout.sample,
            [r.prompt for r in batch],
            [r.limit for r in batch],
            batch[0].sampling,
            [r.row for r in batch],
        )
        for request, (tokens, log_probs, number) in zip(batch, samples, strict=True):
            if request.answer.done():  # whoever asked has given up
                continue
            stopped = tokens[-1] in self.rollout.stop_ids
            request.answer.set_result(
                TokenOutput(
                    token_ids=tokens,
                    log_probs=log_probs,
                    stop_reason="completed" if stopped else "length",
                    extra_fields={"global_steps": self.rollout.global_steps, SAMPLE: number},
                )
            )

    async def update_weights(self, weights: dict, global_steps: int | None = None) -> None:
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        size = await loop.run_in_executor(self._worker, self.rollout.load, weights, global_steps)
        if self._says_path:
            paths = Counter(layer.path for layer in self.rollout.packed_layers())
            for path, count in paths.items():
                print(f"[mxfp4] rollout: {count} layers multiply {path}", flush=True)
            self._says_path = False
        self._last_sync = {"bytes": size, "seconds": time.perf_counter() - began}

    async def set_noise(self, on: bool) -> float:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self.rollout.set_noise, on)

    async def routing(self, sequences: list[list[int]], prompt_lengths: list[int]) -> torch.Tensor:
        """The experts that the router chooses, of the weights and the noise that are there."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self.rollout.routing, sequences, prompt_lengths)

    async def last_sync(self) -> dict[str, float]:
        return self._last_sync

    async def weight_bits(self, name: str) -> torch.Tensor:
        """The operand a layer multiplies by; for checks that trainer and rollout agree."""
        return converted_layers(self.rollout.model)[name].weight_operand(self.rollout.dtype).cpu()

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        return {"aborted_count": 0, "request_ids": []}  # the synchronous trainer never has a request in flight here

    # Nothing is cached between requests and nothing is offloaded, so these have nothing to do.
    async def _nothing(self, *args, **kwargs):
        return None

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = resume_generation = _nothing
    start_profile = stop_profile = _nothing


class MXFP4Replica(RolloutReplica):
    """Starts one server a replica, on the node of its training worker."""

    async def launch_servers(self):
        if self.world_size != 1:
            raise ValueError("rollout.name=mxfp4_hf runs a replica in one process: set rollout.tensor_model_parallel_size=1")
        options = {
            "name": f"{_ACTOR_PREFIX}_{self.replica_rank}{self.name_suffix}",
            "max_concurrency": self.max_concurrency,
            "num_cpus": 0,
        }
        device = get_device_name()
        node, visible = await self.workers[0].__ray_call__.remote(_node_and_devices)
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        if device != "cpu":
            # The replica shares its worker's GPU, which the placement group has given to the worker.
            names = {"CUDA_VISIBLE_DEVICES": visible, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
            options["runtime_env"] = {"env_vars": names}
        server = ray.remote(MXFP4Server).options(**options)
        self._server_handle = server.remote(self.config, self.model_config, self.replica_rank, device)
        self.servers = [self._server_handle]
        self._server_address = await self._server_handle.address.remote()


def _node_and_devices(worker) -> tuple[str, str]:
    return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


class MXFP4RolloutAdapter(BaseRollout):
    """The training worker's side: collects the engine's weights and hands them to its replica's server."""

    def __init__(self, config, model_config, device_mesh, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self._server = None

    async def update_weights(self, weights, wire_format: str = "named_tensors", global_steps: int | None = None, **kwargs):
        if wire_format != "named_tensors":
            raise ValueError(f"rollout.name=mxfp4_hf takes named tensors, not {wire_format!r}; use the naive weight sync")
        # The generator gathers across ranks, so every rank drains it; its tensors are the live parameters.
        dtype, tied = getattr(torch, self.config.dtype), self.model_config.hf_config.tie_word_embeddings
        shipped = {}
        for name, weight in weights:
            if isinstance(weight, QuantizedTensor):
                shipped[name] = weight.to("cpu")
            elif not (tied and name == "lm_head.weight"):
                shipped[name] = weight.detach().to("cpu", dtype, copy=True)
        if self._server is None:
            self._server = ray.get_actor(f"{_ACTOR_PREFIX}_{self.replica_rank}")
        await self._server.update_weights.remote(shipped, global_steps)

    async def resume(self, tags: list[str]):
        return None

    async def release(self):
        return None
