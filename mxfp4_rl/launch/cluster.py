"""A run that joins a Ray cluster: where its trainer lives, whether it finds its devices, and what it must not share.

verl leaves the trainer's process to Ray, which may put it on any node, and metrics, loggers and the report with it. Here it
stays with the launcher. And verl's transfer queue is one named actor for the whole cluster: a second run would train on the
first one's samples, so it is refused. So is a run that asks for more devices than there are: verl says so a minute later and
without the keys, or, where they are spread over too many nodes, waits for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mxfp4_rl.launch import LaunchError

QUEUE = {"name": "TransferQueueController", "namespace": "transfer_queue"}
# What the run's processes read or write, each in a working directory of its own.
PATH_KEYS = (
    *("data.train_files", "data.val_files", "data.custom_cls.path", "reward.custom_reward_function.path"),
    *("reward.reward_manager.module.path", "trainer.default_local_dir", "trainer.resume_from_path"),
    *("trainer.rollout_data_dir", "trainer.validation_data_dir"),
)
UPLOADED = "runtime_resources/working_dir_files"  # where Ray unpacks a job's --working-dir
FREEING_SECONDS = 10.0  # within which Ray counts as free what a run had that has just ended


class TrainerHere:
    """Stands in for verl's task runner class: its actor runs on the node of the calling process.

    Args:
        task_runner_class: verl's, a Ray actor class.
        config: of the run.
    """

    def __init__(self, task_runner_class, config: DictConfig):
        self._class, self._config = task_runner_class, config

    def options(self, **options):
        """The class with Ray's options, and our place; no CPU is reserved, since a head node often offers none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        check_queue_is_free()
        check_devices(self._config)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return self._class.options(num_cpus=0, scheduling_strategy=here, **options)

    def remote(self, *arguments):
        """Start the actor."""
        return self.options().remote(*arguments)


def check_queue_is_free() -> None:
    """Refuse to run beside another run of verl's V1 trainer on the same cluster.

    Raises:
        RuntimeError: its transfer queue is there.
    """
    import ray

    try:
        ray.get_actor(**QUEUE)
    except ValueError:  # no such actor
        return
    raise RuntimeError(
        "another run of verl's V1 trainer is on this Ray cluster, and the two would mix their samples (verl has one "
        "TransferQueueController a cluster): wait until it has ended, or start a cluster of its own for this run"
    )


def check_devices(config: DictConfig, total: Callable[[], Mapping] | None = None, free: Callable[[], Mapping] | None = None):
    """Refuse a run that the cluster's logical GPUs cannot hold, each of its groups of workers on one node.

    Args:
        config: of the run.
        total, free: node -> name of a resource -> how many; asked of Ray by default.

    Raises:
        RuntimeError: there are too few, or others hold them.
    """
    if total is None or free is None:
        from ray._private import state  # what verl asks; Ray has no public call

        total, free = state.total_resources_per_node, state.available_resources_per_node
    groups = dict(_groups(config))
    wanted = [size for nodes, size in groups.values() for _ in range(nodes)]
    asked = ", ".join(f"{key}.nnodes={nodes} x {key}.n_gpus_per_node={size}" for key, (nodes, size) in groups.items())
    there = _gpus(total())
    listed = ", ".join(f"{count:g} on node {node[:8]}" for node, count in there.items()) or "no node"
    has = f"this Ray cluster has {sum(there.values()):g} logical GPU(s) ({listed}) and the run asks for {asked}"
    if not _fit(wanted, there):
        number = "verl counts workers in GPUs on a CPU too, only a number: " if config.trainer.device == "cpu" else ""
        raise RuntimeError(
            f"{has}: {number}start Ray's nodes with `ray start ... --num-gpus={max(wanted)}` or more, add nodes, or lower "
            "n_gpus_per_node or nnodes"
        )
    deadline = time.monotonic() + FREEING_SECONDS
    while not _fit(wanted, left := _gpus(free())):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{has}, but only {sum(left.values()):g} of them are free: wait for the cluster's other jobs (`ray status` and "
                "`ray job list` show them), or add nodes"
            )
        time.sleep(0.5)


def _groups(config: DictConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Key of each pool of workers in verl -> (nodes, GPUs on each)."""
    yield "trainer", (config.trainer.nnodes, config.trainer.n_gpus_per_node)
    reward = config.reward.reward_model
    if reward.get("enable_resource_pool"):
        yield "reward.reward_model", (reward.nnodes, reward.n_gpus_per_node)
    teacher = config.get("distillation") or {}
    if teacher.get("enabled"):
        yield "distillation", (teacher.nnodes, teacher.n_gpus_per_node)


def _gpus(nodes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {node: resources.get("GPU", resources.get("NPU", 0)) for node, resources in nodes.items()}


def _fit(sizes: list[int], nodes: Mapping[str, float]) -> bool:
    """Whether groups of these sizes find room, each on one node."""
    left = list(nodes.values())
    for size in sorted(sizes, reverse=True):
        place = min((i for i, count in enumerate(left) if count >= size), key=left.__getitem__, default=None)
        if place is None:
            return False
        left[place] -= size  # the smallest that holds it: larger ones are kept for several
    return True


def make_paths_absolute(config: DictConfig) -> None:
    """Relative paths are meant from the launcher's directory, which processes of other nodes are not in."""
    for key in PATH_KEYS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str):
            OmegaConf.update(config, key, _absolute(value))
        elif value is not None:
            OmegaConf.update(config, key, [_absolute(path) for path in value])


def _absolute(path: str) -> str:
    return path if not path or "://" in path else str(Path(path).expanduser().absolute())


def check_run_dir(path: Path) -> None:
    """Refuse a run directory that Ray deletes with the job.

    Raises:
        LaunchError: it lies in the copy of the job's working directory.
    """
    if UPLOADED in str(path):
        raise LaunchError(
            f"mxfp4.run_dir={path} lies in Ray's copy of the job's working directory, which Ray deletes: set "
            "mxfp4.run_dir to an absolute path, on a disk that all nodes share if there are several"
        )
