"""Registers engine and rollout with verl; imported through `actor_rollout_ref.model.external_lib` in the task runner and in
every worker, before either is looked up.

The engine takes verl's own strategy names (fsdp, fsdp2): for the CPU verl has none, and on NVIDIA a (device, vendor) key
goes before verl's device key. With `mxfp4.enable=false` both behave as verl's, but for the loop that `log_probs` replaces.
"""

from verl.workers.engine.base import EngineRegistry
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

from mxfp4_rl.settings import HF_ROLLOUT, VLLM_ROLLOUT
from mxfp4_rl.verl_plugin import log_probs
from mxfp4_rl.verl_plugin.engine import MXFP4FSDPEngine

log_probs.install()
EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(MXFP4FSDPEngine)
EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cuda", vendor="nvidia")(MXFP4FSDPEngine)


def _load_hf_replica():
    from mxfp4_rl.verl_plugin.rollout import MXFP4Replica

    return MXFP4Replica


def _load_vllm_replica():
    from mxfp4_rl.verl_plugin.vllm_server import MXFP4vLLMReplica

    return MXFP4vLLMReplica


RolloutReplicaRegistry.register(HF_ROLLOUT, _load_hf_replica)
RolloutReplicaRegistry.register(VLLM_ROLLOUT, _load_vllm_replica)  # in place of verl's, whose special cases go by the name
# verl has no public call for the trainer's side of a rollout; this dictionary is what its own backends are listed in.
_ROLLOUT_REGISTRY[(HF_ROLLOUT, "async")] = "mxfp4_rl.verl_plugin.rollout.MXFP4RolloutAdapter"
_ROLLOUT_REGISTRY[(VLLM_ROLLOUT, "async")] = "mxfp4_rl.verl_plugin.vllm_adapter.MXFP4ServerAdapter"
