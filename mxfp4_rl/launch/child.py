"""The child process: `python -m mxfp4_rl.launch.child RUN_DIR/config.yaml PARENT_PID TEMP_DIR` calls verl.

It does what verl's own `main_ppo` does after hydra has composed the configuration, in the same order. If the parent
vanishes (killed with SIGKILL, it cannot stop us), it ends itself and everything that it started.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from mxfp4_rl.launch.cluster import TrainerHere
from mxfp4_rl.launch.failure import LAUNCHER_GONE
from mxfp4_rl.launch.processes import RUN_ID_VARIABLE, RunProcesses, become_subreaper
from mxfp4_rl.launch.watch import POLL_SECONDS, ActorWatch, local_daemons

LAST_LOOK_SECONDS = 2 * POLL_SECONDS
_watches: list[ActorWatch] = []  # of the run, as long as it lasts


def end_with_parent(parent: int, temp_dir: str | None) -> None:
    """Watch `parent` from a thread; when it is gone, kill this process and all that descend from it."""
    threading.Thread(target=_watch, args=(parent, temp_dir), daemon=True).start()


def _watch(parent: int, temp_dir: str | None) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    for watch in _watches:  # what we end is no fault
        watch.stop()
    print(LAUNCHER_GONE, flush=True)
    processes = RunProcesses(os.environ[RUN_ID_VARIABLE], temp_dir, root=os.getpid())
    processes.alive()
    processes.end(interrupt=False, hurry=lambda: True)
    if temp_dir:
        import shutil

        shutil.rmtree(temp_dir, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


def run_verl(config_path: str) -> None:
    """Load a resolved configuration and run verl's trainer with it; blocks until the run ends."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(config_path)
    if config.trainer.device == "cpu":
        # Where torch has a CUDA build verl would take the GPU's platform, whatever trainer.device says.
        os.environ["VERL_PLATFORM"] = "cpu"
        OmegaConf.update(config, "ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM", "cpu", force_add=True)
    print("[mxfp4] importing verl", flush=True)
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    OmegaConf.set_struct(config, True)
    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    if not config.trainer.use_v1:
        raise ValueError("trainer.use_v1=false: mxfp4-rl extends verl's V1 trainer; remove the setting")
    print("[mxfp4] starting Ray", flush=True)
    _watched(lambda: run_ppo(config, task_runner_class=TrainerHere(TaskRunnerV1, config)))


def _watched(run: Callable[[], None]) -> None:
    """Call `run`, which starts Ray, and watch its processes as long as it lasts."""
    import ray

    over = threading.Event()

    def begin() -> None:
        while not ray.is_initialized():
            if over.wait(0.5):
                return
        # On a shared cluster the table holds other people's actors too.
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        _watches.append(ActorWatch(lambda: ray._private.state.actors(job_id=job), local_daemons()))
        _watches[0].start()

    threading.Thread(target=begin, daemon=True).start()
    try:
        run()
    except Exception:
        # verl's error may be faster than the watch, which knows which process was the cause.
        deadline = time.monotonic() + LAST_LOOK_SECONDS
        while _watches and not _watches[0].told and time.monotonic() < deadline:
            time.sleep(0.2)
        raise
    finally:
        over.set()
        for watch in _watches:
            watch.stop()


def main(argv: list[str]) -> None:
    config_path, parent, temp_dir = argv
    become_subreaper()
    end_with_parent(int(parent), temp_dir or None)
    run_verl(config_path)


if __name__ == "__main__":
    main(sys.argv[1:])
