"""The preflight's part on mixtures of experts in vLLM: what would be refused minutes later, with both models loaded.

vLLM asks most of it again as it builds its layers (`vllm_plugin.experts.check_layer`); vLLM itself is not imported here.
"""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.support import lora_rank
from mxfp4_rl.nn.convert import ConversionReport
from mxfp4_rl.nn.operand import looks_at_other_rows
from mxfp4_rl.settings import HF_ROLLOUT
from mxfp4_rl.vllm_plugin.expert_names import FUSED_IN_VLLM, MULTIPLE, TRIED

_UNQUANTISED = "leave them unquantised (mxfp4.recipe.exclude=['re:experts'])"
_INSTEAD = f"{_UNQUANTISED}, or use actor_rollout_ref.rollout.name={HF_ROLLOUT}"


def check_experts(config: DictConfig, model: nn.Module, report: ConversionReport) -> None:
    """Whether vLLM can hold and multiply the experts that the recipe quantises in this model, which may be a meta model.

    Raises:
        LaunchError: it cannot: a family whose names or tensors are others, adapters, experts dealt out to GPUs, activations
            that depend on other tokens, or widths that the kernels do not cut.
    """
    if not report.experts:
        return
    family, path = model.config.model_type, config.actor_rollout_ref.model.path
    if family in FUSED_IN_VLLM:
        raise LaunchError(
            f"{path}: vLLM loads the experts of {family} only in fused tensors, which our layers do not hold: {_INSTEAD}"
        )
    if family not in TRIED:
        raise LaunchError(
            f"{path}: experts in MXFP4 were tried in vLLM for {', '.join(TRIED)}; checkpoints of {family}, and so vLLM, may "
            f"name theirs otherwise: use actor_rollout_ref.rollout.name={HF_ROLLOUT}, or {_UNQUANTISED}, which ships them "
            "by the plain names, as verl does"
        )
    _check_settings(config)
    for name in report.experts:
        activation = report.converted[name].activation
        if activation and looks_at_other_rows(activation):
            raise LaunchError(
                f"mxfp4.recipe: activations in {activation.describe()} depend on all tokens of an expert ({name}), which no "
                f"CUDA graph of vLLM's knows: quantise them without tile, fallback fraction and nvfp4, {_INSTEAD}"
            )
        _check_widths(name, model.get_parameter(name).shape, config.actor_rollout_ref.rollout.tensor_model_parallel_size)


def _check_settings(config: DictConfig) -> None:
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    dealt = rollout.get("expert_parallel_size", 1)
    if dealt != 1:
        raise LaunchError(
            f"actor_rollout_ref.rollout.expert_parallel_size={dealt}: experts in MXFP4 are cut by tensor parallelism, not "
            f"dealt out; use 1, or {_UNQUANTISED}"
        )
    rank, adapter = lora_rank(model), model.get("lora_adapter_path")
    if rank > 0 or adapter:
        given = f"lora_rank={rank}" if rank > 0 else f"lora_adapter_path={adapter}"
        raise LaunchError(
            f"actor_rollout_ref.model.{given}: with adapters verl takes experts apart before they can be quantised for vLLM: "
            f"train in full, or {_UNQUANTISED}"
        )


def _check_widths(name: str, shape: tuple[int, ...], workers: int) -> None:
    _, rows, columns = shape
    hidden, inner = (rows, columns) if name.endswith("down_proj") else (columns, rows // 2)
    if hidden % MULTIPLE or inner % (workers * MULTIPLE):
        raise LaunchError(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={workers}: {name} has widths {hidden} and {inner}, of which "
            f"a GPU's {hidden} and {inner / workers:g} are no multiples of {MULTIPLE}, as the grouped kernels need them: "
            f"{_INSTEAD}"
        )
