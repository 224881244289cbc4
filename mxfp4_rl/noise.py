"""Adaptive quantisation noise (AQN): exploration noise on the rollout's RMSNorm weights.

At the weight sync of step k the rollout model's norm weights w become w + N(0, sigma(k)^2); the actor, and every validation,
keep w. sigma follows K stages that divide the run evenly: none in stage 0, then an exponential decay,

    sigma_j = sigma_start * (sigma_end / sigma_start)^((j - 1) / (K - 2)),   j = 1 .. K - 1

(QeRL, arXiv 2510.11696; the paper's 1 % -> 0.1 %, K = 10, arXiv 2605.20402). Noise on a norm acts on every projection that
reads it and leaves the 4-bit weights as they are. Unlike the published code, the noise is a pure function of
(seed, step, parameter name): it is the same on every rank and after a resume, and never accumulates, because it is always
added to the clean weights of the last sync.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from mxfp4_rl.recipe import RecipeError

_BEFORE_ROUTER = "post_attention_layernorm"  # in Qwen's, Mixtral's, OLMoE's and gpt-oss's layers


@dataclass(frozen=True)
class AQNSchedule:
    """When and how strong.

    Args:
        sigma_start, sigma_end: absolute standard deviation in stage 1 and in the last stage; 0 < end <= start.
        stages: K >= 2, stage 0 (no noise) included.
        total_steps: training steps that the stages divide.
        seed: of the noise.

    Raises:
        RecipeError: a value outside the above.
    """

    sigma_start: float = 0.01
    sigma_end: float = 0.001
    stages: int = 10
    total_steps: int = 100
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.sigma_end <= self.sigma_start:
            raise RecipeError(
                f"aqn: sigma_start={self.sigma_start!r}, sigma_end={self.sigma_end!r}: need 0 < sigma_end <= sigma_start"
            )
        if not isinstance(self.stages, int) or self.stages < 2:
            raise RecipeError(f"aqn: stages={self.stages!r} must be an integer of at least 2 (stage 0 has no noise)")
        if not isinstance(self.total_steps, int) or self.total_steps < 1:
            raise RecipeError(f"aqn: total_steps={self.total_steps!r} must be a positive integer")

    def sigma(self, step: int) -> float:
        """Standard deviation for the weights synced after `step` finished steps (0 before the first)."""
        stage = min(self.stages * step // self.total_steps, self.stages - 1)
        if stage == 0:
            return 0.0
        decay = (stage - 1) / (self.stages - 2) if self.stages > 2 else 0.0
        return self.sigma_start * (self.sigma_end / self.sigma_start) ** decay

    def noisy(self, name: str, weight: torch.Tensor, step: int) -> torch.Tensor:
        """`weight` with the noise of `step` added in float32, in its own dtype; a new tensor, also where sigma is 0."""
        sigma = self.sigma(step)
        if sigma == 0:
            return weight.clone()
        digest = hashlib.blake2b(f"{self.seed}/{step}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        noise = torch.randn(weight.shape, generator=generator) * sigma
        return (weight.float() + noise.to(weight.device)).to(weight.dtype)


def noise_targets(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that AQN perturbs: the weights of every RMSNorm (query and key norms and the final one too).

    In a mixture of experts only norms that feed no router: the router decides by small margins, and its input's norm
    (`post_attention_layernorm`) feeds it directly, so models with routers keep that norm clean.

    Raises:
        RecipeError: the model has no such norm, so that AQN would silently do nothing; or it has experts, and none of its norms
            is known to feed their router (families with a norm of their own before the MLP).
    """
    has_router = any(_tells_of_router(name) for name, _ in model.named_modules())
    norms = [
        name
        for name, module in model.named_modules()
        if "rmsnorm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), torch.nn.Parameter)  # vLLM's norms without one have a plain tensor
    ]
    if not norms:
        raise RecipeError(f"aqn: {type(model).__name__} has no RMSNorm to add noise to; set mxfp4.aqn.enable=false")
    if not has_router:
        return [f"{name}.weight" for name in norms]
    feeding = [name for name in norms if name.endswith(_BEFORE_ROUTER)]
    others = [name for name in norms if name.rsplit(".", 1)[-1].startswith("pre_")]
    if not feeding or others:
        raise RecipeError(
            f"aqn: which norms feed the routers of {type(model).__name__} is not known (it has {(others or norms)[0]}), and a "
            "router's input must stay clean; set mxfp4.aqn.enable=false"
        )
    return [f"{name}.weight" for name in norms if name not in feeding]


def _tells_of_router(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("gate", "router", "experts")  # what a router is called varies, where there are experts
