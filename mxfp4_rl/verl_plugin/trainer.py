"""verl's synchronous trainer with MXFP4's hooks: error metrics each step, noise off in validation, the run's own log.

Registered as `trainer.v1.trainer_mode=mxfp4_sync`. Every hook is one that verl's trainer offers to subclasses; with
`mxfp4.enable=false` only the log remains.
"""

import json
import time
from pathlib import Path

import ray
from omegaconf import open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from mxfp4_rl.monitor.components import error_metrics, pool
from mxfp4_rl.settings import RECIPE_FILE, ROLLOUTS, VLLM_ROLLOUT, Settings
from mxfp4_rl.verl_plugin.guards import Guards, StallWatch, count_sessions
from mxfp4_rl.verl_plugin.loggers import attach_run_log, prepare_backends
from mxfp4_rl.verl_plugin.rewards import guard_rewards
from mxfp4_rl.verl_plugin.worker import MXFP4ActorRolloutRefWorker


@register_trainer("mxfp4_sync")
class MXFP4TrainerSync(PPOTrainerSync):
    """PPOTrainerSync that measures, logs and keeps validation free of noise."""

    def __init__(self, config):
        self.settings = Settings.from_config(config.get("mxfp4"))
        self.run_dir = Path(self.settings.run_dir or f"runs/{config.trainer.experiment_name}").absolute()
        prepare_backends(self.run_dir, config.trainer.logger)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares this string in several places
            guard_rewards(config)
        super().__init__(config)
        most = (config.algorithm.get("filter_groups") or {}).get("max_num_gen_batches") or 0
        self.guards = Guards(self.settings.guards, config.data.train_batch_size, most)
        self.stall = StallWatch(self.settings.guards.stall_s, self._count_samples)
        # verl polls its queue every 2 s and offers no key for it: a step of a small model is shorter than that.
        self.replay_buffer.poll_interval = 0.05
        self.noise = self._noise_schedule()
        print(f"[mxfp4] trainer: run directory {self.run_dir}", flush=True)

    def _noise_schedule(self):
        aqn, steps = self.settings.aqn, self.config.trainer.total_training_steps
        if not (self.settings.enable and aqn.enable):
            return None
        if steps is None:
            raise ValueError("trainer.total_training_steps is null: the noise schedule (mxfp4.aqn) needs the run's length")
        return aqn.schedule(steps)

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef, Role.RefPolicy):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(MXFP4ActorRolloutRefWorker)

    # verl makes its logger inside fit(); ours is added to it as it is set.
    @property
    def logger(self):
        return self._logger

    @logger.setter
    def logger(self, tracking):
        self._logger = attach_run_log(tracking, self.run_dir)

    def on_init_end(self):
        print("[mxfp4] trainer: first weight sync", flush=True)
        self.stall.progress("the first weight sync")
        super().on_init_end()

    def fit(self, agent_loop_manager):
        super().fit(agent_loop_manager)
        self.stall.stop()

    # ---- guards

    def _count_samples(self) -> int:
        """Samples in the queue, at most: verl's snapshot of it is empty for a moment while it is renewed."""
        return sum(len(partition) for partition in list(self.replay_buffer.partitions.values()))

    def on_step_begin(self):
        super().on_step_begin()
        self.guards.begin_step()

    def on_sample_begin(self):
        super().on_sample_begin()
        self.stall.progress(f"sampling of step {self.global_steps}")

    def on_sample_end(self):
        self.stall.progress(f"training of step {self.global_steps}")
        super().on_sample_end()

    def _add_prompts_to_generate(self, num_prompts):
        self.guards.refill(self.global_steps, num_prompts, len(self.replay_buffer.finished_keys["train"]))
        self.stall.progress(f"sampling of step {self.global_steps}")
        return super()._add_prompts_to_generate(num_prompts)

    def _step_once(self, metrics, timing_raw, sample_batch_size):
        try:
            return super()._step_once(metrics, timing_raw, sample_batch_size)
        except RuntimeError as error:
            if "no materializable trajectories" in str(error):
                expected = sample_batch_size * self.config.actor_rollout_ref.rollout.n
                self.guards.sampled(self.global_steps, 0, expected)
            raise

    def _balance_batch(self, batch, metrics, *args, **kwargs):
        expected = self.config.data.train_batch_size // self.parameter_sync_step * self.config.actor_rollout_ref.rollout.n
        metrics.update(self.guards.sampled(self.global_steps, count_sessions(batch.keys), expected))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)
        self.guards.finished(global_steps, metrics)

    # ---- measuring and noise

    def on_validate_begin(self):
        super().on_validate_begin()
        self.stall.progress(f"validation after step {self.global_steps}")
        self._set_noise(False)

    def on_validate_end(self):
        self._set_noise(True)
        super().on_validate_end()

    def on_step_end(self):
        self.stall.progress(f"the weight sync of step {self.global_steps}")
        super().on_step_end()
        syncs = self._servers("last_sync")
        if syncs:
            self._pending_sync_metrics = sync_metrics(syncs)

    def _update_actor(self, batch, metrics):
        every = self.settings.monitor.every
        measure = self.settings.enable and every > 0 and (self.global_steps - 1) % every == 0
        if measure:
            self.actor_rollout_wg.start_measuring()
        batch = super()._update_actor(batch, metrics)
        self.guards.updated(self.global_steps, metrics)
        if measure:
            began = time.perf_counter()
            errors = pool(self.actor_rollout_wg.collect_errors())
            metrics.update(error_metrics(errors, self.settings.monitor.layers))
            metrics["timing_s/mxfp4_monitor"] = time.perf_counter() - began
        if self.noise is not None:
            metrics["mxfp4/aqn_sigma"] = self.noise.sigma(self.global_steps - 1)
        if self.settings.enable:
            self._watch_mismatch(metrics)
        return batch

    def _watch_mismatch(self, metrics: dict) -> None:
        """Alarm where trainer and rollout no longer are the same model: rounding differs a little, another recipe a lot."""
        distance = metrics.get("rollout_corr/k3_kl")
        sigma = metrics.get("mxfp4/aqn_sigma", 0.0)
        limit = self.settings.mismatch.limit(self.settings.recipe.activation is not None, sigma)
        if distance is None:
            return
        metrics["mxfp4_mismatch/alarm"] = float(not distance <= limit)  # NaN is one
        if not distance <= limit:
            message = (
                f"step {self.global_steps}: the rollout's probabilities are far from the trainer's (k3-KL {distance:.3g}, "
                f"limit {limit:g}): are both quantised by the same recipe, and are the weights in sync? See mxfp4.mismatch"
            )
            if self.settings.mismatch.stop:
                raise RuntimeError(message)
            print(f"[mxfp4] alarm: {message}", flush=True)

    def _recipe(self) -> dict | None:
        return self.settings.recipe.to_dict() if self.settings.enable else None

    def _load_checkpoint(self):
        super()._load_checkpoint()
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
        stored = Path(trainer.resume_from_path if trainer.resume_mode == "resume_path" else folder) / RECIPE_FILE
        if self.global_steps > 0 and stored.is_file() and json.loads(stored.read_text()) != self._recipe():
            print(f"[mxfp4] warning: {stored} is another recipe than this run's, which goes on with its own", flush=True)

    def _save_checkpoint(self):
        self.guards.check_weights(self.global_steps, self.actor_rollout_wg.weights_are_finite())
        folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(json.dumps(self._recipe(), indent=2) + "\n")
        super()._save_checkpoint()  # writes the pointer to the latest checkpoint last

    def _set_noise(self, on: bool) -> None:
        if self.noise is not None:
            self._servers("set_noise", on)

    def _servers(self, method: str, *args) -> list:
        """Call `method` on every rollout server that is ours."""
        name = self.config.actor_rollout_ref.rollout.name
        if name not in ROLLOUTS or (name == VLLM_ROLLOUT and not self.settings.enable):
            return []  # verl's own
        replicas = self.llm_server_manager.get_replicas()
        return ray.get([getattr(replica.servers[0], method).remote(*args) for replica in replicas])  # the first node answers


def sync_metrics(syncs: list[dict[str, float]]) -> dict[str, float]:
    """One step's metrics of the replicas' last weight syncs: bytes of all, seconds of the slowest."""
    metrics = {
        "mxfp4_sync/bytes": sum(s["bytes"] for s in syncs),
        "mxfp4_sync/seconds": max(s["seconds"] for s in syncs),
    }
    if elements := sum(s.get("packed_elements", 0) for s in syncs):
        metrics["mxfp4_sync/fraction_of_bf16"] = sum(s["packed_bytes"] for s in syncs) / (2 * elements)  # quantised weights
    return metrics
