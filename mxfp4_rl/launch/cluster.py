"""A run that joins a Ray cluster: where its trainer lives, and what it must not share with another run.

verl leaves the trainer's process to Ray, which may put it on any node, and metrics, loggers and the report with it. Here it
stays with the launcher. And verl's transfer queue is one named actor for the whole cluster: a second run would train on the
first one's samples, so it is refused.
"""

from __future__ import annotations

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


class TrainerHere:
    """Stands in for verl's task runner class: its actor runs on the node of the calling process.

    Args:
        task_runner_class: verl's, a Ray actor class.
    """

    def __init__(self, task_runner_class):
        self._class = task_runner_class

    def options(self, **options):
        """The class with Ray's options, and our place; no CPU is reserved, since a head node often offers none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        check_queue_is_free()
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
