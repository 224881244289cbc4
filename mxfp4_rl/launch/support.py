"""The preflight's part on what goes together: verl's parts that MXFP4 reaches, the vLLM rollout's needs, what a CPU can run.

What is not supported is refused, so that nothing runs unquantised behind one's back.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from omegaconf import DictConfig
from packaging.specifiers import SpecifierSet

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.settings import HF_ROLLOUT, ROLLOUTS, VLLM_ROLLOUT, Settings

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def check_supported(config: DictConfig, settings: Settings) -> None:
    """What verl offers and MXFP4 does not reach yet: refused, so that nothing runs unquantised behind one's back.

    Raises:
        LaunchError: such a setting together with `mxfp4.enable`, or one that no CPU run can have.
    """
    model, actor, rollout = (config.actor_rollout_ref[name] for name in ("model", "actor", "rollout"))
    attention = (model.get("override_config") or {}).get("attn_implementation", "flash_attention_2")  # verl's default
    if config.trainer.device == "cuda" and attention == "flash_attention_2" and not has_flash_attention():
        raise LaunchError(
            "attn_implementation=flash_attention_2 needs flash-attn, which is not installed: pip install flash-attn "
            "--no-build-isolation, or set ++actor_rollout_ref.model.override_config.attn_implementation=sdpa and "
            "actor_rollout_ref.model.use_remove_padding=false"
        )
    if config.trainer.device == "cpu":
        if actor.strategy != "fsdp2":
            raise LaunchError(f"actor_rollout_ref.actor.strategy={actor.strategy} does not run on a CPU: use fsdp2")
        if attention and "flash" in attention:  # null leaves the choice to transformers, which takes sdpa
            raise LaunchError(
                f"attn_implementation={attention} does not run on a CPU: set "
                "++actor_rollout_ref.model.override_config.attn_implementation=sdpa"
            )
    if rollout.name == HF_ROLLOUT and rollout.tensor_model_parallel_size != 1:
        raise LaunchError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size}: rollout.name=mxfp4_hf "
            "runs a replica in one process; use 1"
        )
    if not settings.enable:
        return
    off = "or set mxfp4.enable=false"
    if rollout.name not in ROLLOUTS:
        raise LaunchError(
            f"actor_rollout_ref.rollout.name={rollout.name} has no MXFP4 weights and activations: use "
            f"{' or '.join(ROLLOUTS)}, {off}"
        )
    blocks = {"rollout.custom": rollout.get("custom"), "actor.fsdp_config": actor.fsdp_config}
    for where, block in blocks.items():
        if Settings.from_config((block or {}).get("mxfp4")) != settings:
            raise LaunchError(
                f"actor_rollout_ref.{where}.mxfp4 is not the mxfp4 block of the run: trainer and rollout would be two "
                f"different models; set it to ${{mxfp4}}, as configs/mxfp4.yaml does, {off}"
            )
    if settings.kv_cache is not None and rollout.name != HF_ROLLOUT:
        raise LaunchError(
            f"mxfp4.kv_cache with actor_rollout_ref.rollout.name={rollout.name}: only {HF_ROLLOUT} has a 4-bit KV cache. "
            "vLLM's attention reads pages in BF16 or FP8; missing is an attention backend for it whose pages hold packed "
            f"blocks, sinks and an open block. Set mxfp4.kv_cache=null, or rollout.name={HF_ROLLOUT}"
        )
    if rollout.name == VLLM_ROLLOUT:
        check_vllm(config, off)
    if actor.strategy != "fsdp2":
        raise LaunchError(f"actor_rollout_ref.actor.strategy={actor.strategy} has no MXFP4 layers yet: use fsdp2, {off}")
    replay = (actor.get("router_replay") or {}).get("mode", "disabled")
    if rollout.get("enable_rollout_routing_replay") or replay != "disabled":
        raise LaunchError(
            "router replay (actor_rollout_ref.rollout.enable_rollout_routing_replay, actor.router_replay) is for verl's "
            "Megatron and VeOmni engines: FSDP's has no place for recorded experts, and would ignore them. Switch it off; "
            f"mxfp4/router_agreement says how far trainer and rollout route alike, {off}"
        )
    rank = lora_rank(model)
    if rank > 0 or model.get("lora_adapter_path"):
        if rollout.name != VLLM_ROLLOUT:
            raise LaunchError(
                f"LoRA (actor_rollout_ref.model.lora_rank={rank}) with rollout.name={rollout.name}: adapters need "
                f"rollout.name={VLLM_ROLLOUT}; or train in full, {off}"
            )
        if (model.get("lora") or {}).get("merge"):
            raise LaunchError(
                "actor_rollout_ref.model.lora.merge=true would quantise base and adapter together in the rollout, and apart in "
                f"the trainer: use merge=false, {off}"
            )
    correction = config.algorithm.get("rollout_correction") or {}
    measured = correction and not correction.get("bypass_mode") and rollout.calculate_log_probs
    if settings.mismatch.stop and not measured:
        raise LaunchError(
            "mxfp4.mismatch.stop=true needs verl's rollout_corr/k3_kl: set algorithm.rollout_correction with "
            "bypass_mode=false, and actor_rollout_ref.rollout.calculate_log_probs=true"
        )
    if config.trainer.v1.trainer_mode != "mxfp4_sync":
        raise LaunchError(
            f"trainer.v1.trainer_mode={config.trainer.v1.trainer_mode} neither measures nor adds noise: use mxfp4_sync, {off}"
        )
    compute = (actor.fsdp_config.get("mixed_precision") or {}).get("param_dtype") or "bf16"
    if DTYPE_NAMES.get(str(compute), compute) != rollout.dtype:
        raise LaunchError(
            f"actor_rollout_ref.rollout.dtype={rollout.dtype} differs from the actor's compute dtype (actor.fsdp_config."
            f"mixed_precision.param_dtype={compute}): trainer and rollout would quantise other bits; make them the same"
        )


def lora_rank(model: DictConfig) -> int:
    """Of the adapters that `actor_rollout_ref.model` asks for, under either of verl's two names; 0 without."""
    return model.get("lora_rank") or (model.get("lora") or {}).get("rank") or 0


def has_flash_attention() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def check_vllm(config: DictConfig, off: str) -> None:
    """What the vLLM rollout needs: a vLLM that the plugin fits, for the device, and a GPU that the kernels run on.

    Raises:
        LaunchError: either is missing, or another quantisation is asked for too.
    """
    rollout = config.actor_rollout_ref.rollout
    if rollout.get("quantization"):
        raise LaunchError(
            f"actor_rollout_ref.rollout.quantization={rollout.quantization} and mxfp4.enable=true are two quantisations of the "
            f"same weights: set quantization=null, {off}"
        )
    if rollout.load_format != "dummy" or rollout.get("layered_summon"):
        raise LaunchError(
            f"actor_rollout_ref.rollout.load_format={rollout.load_format}, layered_summon={rollout.get('layered_summon')}: "
            "packed weights come from the trainer, not from the checkpoint; use load_format=dummy and layered_summon=false"
        )
    for key in ("disaggregation", "qat"):
        block = rollout.get(key) or {}
        if block.get("enabled") or block.get("enable"):
            raise LaunchError(f"actor_rollout_ref.rollout.{key} has no MXFP4 layers: switch it off, {off}")
    if rollout.get("quantization_config_file"):
        raise LaunchError(
            f"actor_rollout_ref.rollout.quantization_config_file={rollout.quantization_config_file}: the quantisation is the "
            f"recipe's; set it to null, {off}"
        )
    if rollout.dtype != "bfloat16":
        raise LaunchError(f"actor_rollout_ref.rollout.dtype={rollout.dtype}: packed weights multiply bfloat16; use bfloat16")
    backend = rollout.checkpoint_engine.backend
    if backend != "naive":
        raise LaunchError(
            f"actor_rollout_ref.rollout.checkpoint_engine.backend={backend} cannot ship packed weights: use naive"
        )
    from mxfp4_rl.vllm_plugin import SUPPORTED, is_for_cpus, lacks

    try:
        found = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        found = None
    on_cpu = config.trainer.device == "cpu"
    if on_cpu and not is_for_cpus(found or ""):
        raise LaunchError(
            f"actor_rollout_ref.rollout.name=vllm with trainer.device=cpu: it needs a GPU (trainer.device=cuda), or vLLM's "
            f"build for CPUs, X.Y.Z+cpu (`make vllm`; installed: {found or 'no vLLM'}); or use rollout.name={HF_ROLLOUT}"
        )
    if found is None:
        raise LaunchError(
            f"actor_rollout_ref.rollout.name=vllm, but vLLM is not installed: pip install 'vllm{SUPPORTED}', or use "
            f"rollout.name={HF_ROLLOUT}"
        )
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise LaunchError(
            f"vLLM {found} is outside what the plugin was made for ({SUPPORTED}): pip install 'vllm{SUPPORTED}', or use "
            f"rollout.name={HF_ROLLOUT}"
        )
    if not on_cpu and is_for_cpus(found):
        raise LaunchError(
            f"vLLM {found} is its build for CPUs, but trainer.device={config.trainer.device}: pip install 'vllm{SUPPORTED}', "
            f"or use rollout.name={HF_ROLLOUT}"
        )
    if on_cpu and rollout.get("enable_sleep_mode", True):
        raise LaunchError(
            "actor_rollout_ref.rollout.enable_sleep_mode (true unless set) has nothing to free on a CPU, and vLLM refuses it: "
            "set +actor_rollout_ref.rollout.enable_sleep_mode=false, as configs/quickstart_vllm.yaml does"
        )
    if missing := lacks():
        raise LaunchError(f"vLLM {found} lacks what it imports for a quantised model: pip install '{missing[0]}', or {off}")
    _check_capability(off)


def _check_capability(off: str) -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise LaunchError(
            f"{torch.cuda.get_device_name()} has compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}: "
            f"the packed kernels need 8.0 (Ampere) or later; use rollout.name={HF_ROLLOUT}, {off}"
        )
