"""verl's synchronous trainer with MXFP4's hooks: error metrics each step, noise off in validation, the run's own log.

Registered as `trainer.v1.trainer_mode=mxfp4_sync`. Every hook is one that verl's trainer offers to subclasses; with
`mxfp4.enable=false` the log, the alerts, the guards and the checkpoints remain.
"""

import json
import shutil
import time
from pathlib import Path

import ray
import torch
import transfer_queue as tq
from omegaconf import open_dict
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

from mxfp4_rl import checkpoints
from mxfp4_rl.monitor import experts
from mxfp4_rl.monitor.alerts import MISMATCH, WATCHED, Alerts, is_inside, send
from mxfp4_rl.monitor.components import error_metrics, pool
from mxfp4_rl.monitor.routing import agreement
from mxfp4_rl.settings import HF_ROLLOUT, RECIPE_FILE, ROLLOUTS, VLLM_ROLLOUT, Settings
from mxfp4_rl.verl_plugin.guards import Guards, StallWatch, count_sessions
from mxfp4_rl.verl_plugin.loggers import attach_run_log, drop_records_past, prepare_backends
from mxfp4_rl.verl_plugin.rewards import guard_rewards
from mxfp4_rl.verl_plugin.waves import ROW, SAMPLE, NumberedRows, RowClient
from mxfp4_rl.verl_plugin.worker import MXFP4ActorRolloutRefWorker

ROUTED_SAMPLES = 8  # of a measured step, whose experts are compared
RANDOM_STATE_FILE = "trainer_rng.pt"  # of this process; the workers' are in their own files


@register_trainer("mxfp4_sync")
class MXFP4TrainerSync(PPOTrainerSync):
    """PPOTrainerSync that measures, logs and keeps validation free of noise."""

    def __init__(self, config):
        self.settings = Settings.from_config(config.get("mxfp4"))
        self.run_dir = Path(self.settings.run_dir or f"runs/{config.trainer.experiment_name}").absolute()
        prepare_backends(self.run_dir, config.trainer.logger)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares this string in several places
            self.keep_checkpoints = checkpoints_to_keep(config.trainer)
            config.trainer.max_actor_ckpt_to_keep = None  # verl would remove old ones before the new one is whole
            config.trainer.max_critic_ckpt_to_keep = None
            config.trainer.remove_previous_ckpt_in_save = False
            guard_rewards(config)
        super().__init__(config)
        most = (config.algorithm.get("filter_groups") or {}).get("max_num_gen_batches") or 0
        self.guards = Guards(self.settings.guards, config.data.train_batch_size, most)
        self.stall = StallWatch(self.settings.guards.stall_s, self._count_samples)
        # verl polls its queue every 2 s and offers no key for it: a step of a small model is shorter than that.
        self.replay_buffer.poll_interval = 0.05
        self.routes = True  # until the actor says that nothing is routed in its model
        self.noise = self._noise_schedule()
        self.alerts = self._make_alerts()
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
            metrics.update(self._compare_routing(batch))
            self.actor_rollout_wg.start_measuring()
        batch = super()._update_actor(batch, metrics)
        self.guards.updated(self.global_steps, metrics)
        if measure:
            began = time.perf_counter()
            errors = pool(self.actor_rollout_wg.collect_errors())
            metrics.update(error_metrics(errors, self.settings.monitor.layers))
            if self.settings.monitor.layers:
                experts.write_table(self.run_dir, self.global_steps, errors)
            metrics["timing_s/mxfp4_monitor"] = time.perf_counter() - began
        if self.noise is not None:
            metrics["mxfp4/aqn_sigma"] = self.noise.sigma(self.global_steps - 1)
        if self.settings.enable:
            self._stop_at_mismatch(metrics)
        return batch

    def _compare_routing(self, batch) -> dict[str, float]:
        """Whether actor and rollout send the same tokens to the same experts; before the update, while weights are equal.

        Of the first samples of the step. {} for a dense model, and for a rollout that is not ours: vLLM is not asked.
        """
        if not self.routes or self.config.actor_rollout_ref.rollout.name != HF_ROLLOUT:
            return {}
        keys = batch.keys[:ROUTED_SAMPLES]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["prompts", "responses"])
        prompts, responses = ([t.tolist() for t in data[name].unbind()] for name in ("prompts", "responses"))
        sequences = [p + r for p, r in zip(prompts, responses, strict=True)]
        ours = self.actor_rollout_wg.routing(sequences)[0]
        if ours is None:
            self.routes = False
            return {}
        replica = self.llm_server_manager.get_replicas()[0]
        theirs = ray.get(replica.servers[0].routing.remote(sequences, [len(p) for p in prompts]))
        return {f"mxfp4/{name}": value for name, value in agreement(ours, theirs).items()}

    def _mismatch_limit(self, metrics: dict) -> float:
        quantises = self.settings.recipe.activation is not None or self.settings.kv_cache is not None
        return self.settings.mismatch.limit(quantises, metrics.get("mxfp4/aqn_sigma", 0.0))

    def _stop_at_mismatch(self, metrics: dict) -> None:
        """End the run where trainer and rollout are two different models: rounding differs a little, another recipe a lot."""
        metric, meaning = WATCHED[MISMATCH]
        limit = self._mismatch_limit(metrics)
        if self.settings.mismatch.stop and metric in metrics and not is_inside(metrics[metric], (None, limit)):
            raise RuntimeError(
                f"step {self.global_steps}: {metric} is {metrics[metric]:.3g}, its limit is {limit:g} ({meaning})"
            )

    def _make_alerts(self) -> Alerts:
        bands = self.settings.alerts.bands()
        if self.settings.enable:
            bands[MISMATCH] = lambda metrics: (None, self._mismatch_limit(metrics))
        return Alerts(bands, self.settings.alerts.calm)

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        super()._compute_metrics(batch, metrics, timing_raw, global_steps, epoch)  # the last to add to a step's metrics
        send(self.alerts.check(global_steps, metrics), self.logger.logger, global_steps)

    def _recipe(self) -> dict | None:
        return self.settings.recipe.to_dict() if self.settings.enable else None

    def get_llm_client(self):
        own = self.config.actor_rollout_ref.rollout.name == HF_ROLLOUT
        return self.llm_server_manager.get_client(client_cls=RowClient) if own else super().get_llm_client()

    def fit(self, agent_loop_manager):
        rollout = self.config.actor_rollout_ref.rollout
        if rollout.name == HF_ROLLOUT:
            agent_loop_manager = NumberedRows(agent_loop_manager, self._announce_wave, rollout.n, rollout.val_kwargs.n)
        super().fit(agent_loop_manager)
        self.stall.stop()

    def _announce_wave(self, requests: int) -> None:
        if len(self.llm_server_manager.get_replicas()) == 1:  # several share a wave by load, which nobody knows beforehand
            self._servers("expect", requests)

    def _balance_batch(self, batch, metrics, *args, **kwargs):
        expected = self.config.data.train_batch_size // self.parameter_sync_step * self.config.actor_rollout_ref.rollout.n
        metrics.update(self.guards.sampled(self.global_steps, count_sessions(batch.keys), expected))
        if self.config.actor_rollout_ref.rollout.name == HF_ROLLOUT:
            # verl hands the samples over as they came back; sums, and so the last bits of a step, follow their order.
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[ROW, "extra_fields"])
            rows, extra = list(data[ROW]), list(data["extra_fields"])  # a tensor or a list, as the queue's backend likes
            place = [(int(rows[i]), extra[i].get(SAMPLE, 0), int(k.rsplit("_", 1)[-1])) for i, k in enumerate(batch.keys)]
            batch.reorder(sorted(range(len(place)), key=place.__getitem__))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _load_checkpoint(self):
        trainer = self.config.trainer
        asked = trainer.resume_mode, trainer.resume_from_path
        folder = Path(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else None
        if trainer.resume_mode == "auto":  # verl would take the one that its pointer names, whole or not
            folder, torn = checkpoints.latest_whole(trainer.default_local_dir)
            for one, lacks in torn:
                print(f"[mxfp4] {checkpoints.describe_torn(one, lacks)}", flush=True)
            trainer.resume_mode = "resume_path" if folder else "disable"
            trainer.resume_from_path = str(folder) if folder else None
        super()._load_checkpoint()
        trainer.resume_mode, trainer.resume_from_path = asked
        if folder is None:
            return
        stored = folder / RECIPE_FILE
        if stored.is_file() and json.loads(stored.read_text()) != self._recipe():
            print(f"[mxfp4] warning: {stored} is another recipe than this run's, which goes on with its own", flush=True)
        if (random_state := folder / RANDOM_STATE_FILE).is_file():
            BaseCheckpointManager.load_rng_state(torch.load(random_state, weights_only=False))
        done, again = drop_records_past(self.run_dir, self.global_steps)
        experts.drop_past(self.run_dir, self.global_steps)
        for step, metrics in done:  # the alerts' streaks go on; what there was to tell was told
            self.alerts.check(step, metrics)
        more = f"; steps logged past it are done again: {again}" if again else ""
        print(f"[mxfp4] resuming from {folder}, step {self.global_steps}{more}", flush=True)

    def _save_checkpoint(self):
        self.guards.check_weights(self.global_steps, self.actor_rollout_wg.weights_are_finite())
        root = self.config.trainer.default_local_dir
        folder = checkpoints.folder_of(root, self.global_steps)
        before, _ = checkpoints.latest_whole(root)
        needed, free = checkpoints.size(before) if before else 0, checkpoints.free(root)
        if free < needed:
            raise RuntimeError(
                f"no room for the checkpoint of step {self.global_steps}: {checkpoints.gib(free)} are free on the disk of "
                f"{root} and the last one took {checkpoints.gib(needed)}; free some and resume from {before}, which is whole"
            )
        callback, self.checkpoint_callback = self.checkpoint_callback, CheckpointCallback()
        try:
            checkpoints.begin(folder)
            (folder / RECIPE_FILE).write_text(json.dumps(self._recipe(), indent=2) + "\n")
            torch.save(BaseCheckpointManager.get_rng_state(), folder / RANDOM_STATE_FILE)
            super()._save_checkpoint()
            checkpoints.seal(folder)
        except Exception as error:
            if not checkpoints.is_full_disk(error):
                raise
            free = checkpoints.free(root)
            shutil.rmtree(folder, ignore_errors=True)
            left = f"resume from {before}, which is whole" if before else "there was none before it"
            raise RuntimeError(
                f"the disk is full: the checkpoint of step {self.global_steps} could not be written to {folder} "
                f"({checkpoints.gib(free)} were free) and what there was of it is removed; free some and {left}"
            ) from error
        finally:
            self.checkpoint_callback = callback
        for old in checkpoints.prune(root, self.keep_checkpoints, self.global_steps):
            print(f"[mxfp4] checkpoint {old} is removed: the last {self.keep_checkpoints} are kept", flush=True)
        callback.on_save(trainer=self, global_step=self.global_steps, checkpoint_dir=str(folder), async_save=False)

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


def checkpoints_to_keep(trainer) -> int | None:
    """How many checkpoints stay, by verl's keys; None for all. The critic's are in the same folders as the actor's."""
    return 1 if trainer.get("remove_previous_ckpt_in_save") else trainer.get("max_actor_ckpt_to_keep")


def sync_metrics(syncs: list[dict[str, float]]) -> dict[str, float]:
    """One step's metrics of the replicas' last weight syncs: bytes of all, seconds of the slowest."""
    metrics = {
        "mxfp4_sync/bytes": sum(s["bytes"] for s in syncs),
        "mxfp4_sync/seconds": max(s["seconds"] for s in syncs),
    }
    if elements := sum(s.get("packed_elements", 0) for s in syncs):
        metrics["mxfp4_sync/fraction_of_bf16"] = sum(s["packed_bytes"] for s in syncs) / (2 * elements)  # quantised weights
    return metrics
