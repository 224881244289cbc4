"""verl's workers with what MXFP4 adds: a CPU process group, and two calls for the monitor."""

import os

import torch
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from mxfp4_rl.monitor.components import LayerErrors


class MXFP4TrainingWorker(TrainingWorker):
    """On a CPU verl would ask for the backend "cpu:gloo,cpu:gloo", a duplicate; it asks only if no group exists."""

    def __init__(self, config):
        on_cpu = get_device_name() == "cpu"
        if on_cpu:  # Ray gives its actors one thread
            workers_here = int(os.environ.get("RAY_LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))
        if on_cpu and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend="gloo",
                rank=int(os.environ.get("RANK", 0)),
                world_size=int(os.environ.get("WORLD_SIZE", 1)),
                init_method=os.environ.get("DIST_INIT_METHOD", None),
            )
        super().__init__(config)
        # verl seeds its workers in its slow deterministic mode only; stochastic rounding draws its seeds from here.
        torch.manual_seed(self.engine_config.seed + torch.distributed.get_rank())


class MXFP4ActorRolloutRefWorker(ActorRolloutRefWorker):
    """The hybrid worker; `actor_worker_cls` and `ref_worker_cls` are verl's own places to put another class."""

    actor_worker_cls = MXFP4TrainingWorker
    ref_worker_cls = MXFP4TrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def start_measuring(self) -> None:
        """Every rank: measure activations and gradients of the coming update."""
        self.actor.engine.start_measuring()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def collect_errors(self) -> LayerErrors:
        """Every rank: its error statistics; the caller pools them."""
        return self.actor.engine.collect_errors()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def routing(self, sequences: list[list[int]]) -> torch.Tensor | None:
        """Every rank: the experts that the actor's router chooses for these tokens; None for a dense model."""
        return self.actor.engine.routing(sequences)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def weights_are_finite(self) -> bool:
        """Every rank: whether its part of the actor's master weights holds neither NaN nor infinity."""
        module = self.actor.engine.module
        modules = module if isinstance(module, list | tuple) else [module]  # Megatron's engine has a list of them
        weights = (weight for one in modules for weight in one.parameters())
        parts = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights)  # FSDP2's are DTensors
        return all(bool(torch.isfinite(part).all()) for part in parts)
