"""Everything that can be known to be wrong before Ray starts, cheapest first, each as one sentence with the fix.

verl finds most of these minutes later, inside a worker, as an assertion about something else; some (too few logical
CPUs) it never finds and hangs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mxfp4_rl import checkpoints
from mxfp4_rl.launch import MIN_FREE_DISK, MIN_FREE_MEMORY, LaunchError, quietly
from mxfp4_rl.launch.cluster import check_run_dir, make_paths_absolute
from mxfp4_rl.launch.compose import one_line, resolved, verl_defaults
from mxfp4_rl.launch.inputs import check_quantisable, prepare_data, prepare_model
from mxfp4_rl.launch.run_dir import RunDir, claim_run_dir
from mxfp4_rl.launch.schema import check_blocks, check_schema, interpolated
from mxfp4_rl.launch.support import check_supported
from mxfp4_rl.launch.values import check_names, check_numbers
from mxfp4_rl.recipe import RecipeError
from mxfp4_rl.settings import Settings


@dataclass
class PreparedRun:
    """A run that passed the preflight.

    Attributes:
        config: resolved, plain containers; what the child process loads.
        settings: the `mxfp4` block.
        run_dir: claimed; release it when the run ends.
        quantised: one line on what the recipe quantises; None when it is off.
        total_steps: None where only verl will know.
        joins_cluster: Ray runs already; the run joins it.
        warnings: sentences to show.
    """

    config: dict
    settings: Settings
    run_dir: RunDir
    quantised: str | None
    total_steps: int | None
    joins_cluster: bool
    warnings: list[str] = field(default_factory=list)


def prepare(config: DictConfig, say: Callable[[str], None] = lambda text: None, added: Collection[str] = ()) -> PreparedRun:
    """Check a composed configuration and fill in what only now is known (paths, data, the number of steps).

    Args:
        config: from `compose_config`; changed in place.
        say: told what takes a while.
        added: keys that were added on purpose (`compose.added_keys`), which verl need not know.

    Raises:
        LaunchError: the run cannot start.
    """
    check_blocks(config, verl_defaults())
    plain = resolved(config)  # an interpolation that leads nowhere, before anything is read through one
    settings = _settings(config)
    warnings = _check_against_verl(plain, added, set(interpolated(config)))
    joins_cluster = _joins_cluster(config)
    try:
        _check_resume(config)
        check_supported(config, settings)
        warnings += check_resources(config, joins_cluster)
        warnings += check_batches(config)
        warnings += _check_lengths(config, settings)
        with quietly():
            check_names(plain)
        wanted = settings.run_dir or f"runs/{config.trainer.experiment_name}"
        check_run_dir(Path(wanted).absolute())
        run_dir = claim_run_dir(wanted, _resumes(config))
    except OmegaConfBaseException as error:  # a key that verl's configuration has and this one lacks
        raise LaunchError(f"{one_line(error)}: does the configuration build on ppo_trainer (in its defaults)?") from error
    try:
        with open_dict(config):
            config.mxfp4.run_dir = str(run_dir.path)
        warnings += _check_free_space(run_dir.path)
        warnings += _check_checkpoints(config)
        rows = prepare_data(config, settings)
        make_paths_absolute(config)
        total_steps = fix_total_steps(config, settings, rows)
        prepare_model(config, say)
        warnings += _check_room(config)
        quantised = None
        if settings.enable:
            say("checking the recipe against the model")
            quantised = check_quantisable(config, settings)
        final = resolved(config)
    except BaseException:
        run_dir.release(unused=True)
        raise
    return PreparedRun(final, settings, run_dir, quantised, total_steps, joins_cluster, warnings)


def _settings(config: DictConfig) -> Settings:
    if "mxfp4" not in config:
        raise LaunchError("the configuration has no mxfp4 block: add `- mxfp4` after `- ppo_trainer` to its defaults")
    try:
        settings = Settings.from_config(config.mxfp4)
        if settings.enable:
            settings.aqn.schedule(total_steps=1)  # checks the rest; the length is checked by its own name
        return settings
    except RecipeError as error:
        raise LaunchError(str(error)) from error
    except (TypeError, AttributeError) as error:
        raise LaunchError(f"mxfp4 must be a block of keys ({error}); compare configs/mxfp4.yaml") from error


def _check_against_verl(config: dict, added: Collection[str], copies: set[str]) -> list[str]:
    defaults = verl_defaults()
    with quietly():
        found = check_schema(config, defaults, added, copies)
        check_numbers(config, defaults, copies)
    return found


def _check_resume(config: DictConfig) -> None:
    mode, source = config.trainer.resume_mode, config.trainer.resume_from_path
    if mode not in ("auto", "disable", "resume_path"):
        raise LaunchError(f"trainer.resume_mode={mode} is not one of auto, disable, resume_path")
    if mode == "resume_path" and (not source or checkpoints.step_of(source) is None or not Path(source).is_dir()):
        raise LaunchError(f"trainer.resume_from_path={source} is not a checkpoint: give an existing .../global_step_N folder")
    # One without a manifest is verl's own, or torn: whoever names it takes it as it is.
    if mode == "resume_path" and Path(source, checkpoints.MANIFEST).exists() and (lacks := checkpoints.flaw(source)):
        raise LaunchError(f"trainer.resume_from_path={source} is torn ({lacks}): give another one, or trainer.resume_mode=auto")
    keep = config.trainer.get("max_actor_ckpt_to_keep")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise LaunchError(f"trainer.max_actor_ckpt_to_keep={keep} must be a positive integer, or null to keep all")
    if (config.actor_rollout_ref.actor.get("checkpoint") or {}).get("async_save"):
        raise LaunchError(
            "actor_rollout_ref.actor.checkpoint.async_save=true: a checkpoint counts as whole once everything is written; "
            "set it to false"
        )


def _resumes(config: DictConfig) -> Callable[[Path], bool]:
    """Whether the run continues what is in a given run directory."""

    def resumes(path: Path) -> bool:
        mode = config.trainer.resume_mode
        if mode == "resume_path":
            return path in Path(os.path.abspath(config.trainer.resume_from_path)).parents
        there = OmegaConf.merge(config, {"mxfp4": {"run_dir": str(path)}})
        return mode == "auto" and checkpoints.latest_whole(there.trainer.default_local_dir)[0] is not None

    return resumes


def _check_checkpoints(config: DictConfig) -> list[str]:
    """The checkpoints that are there against the one that the run starts from; returns warnings.

    Raises:
        LaunchError: later ones, which are not this run's: they would be resumed from, and this run's removed as the older.
    """
    root, mode = config.trainer.default_local_dir, config.trainer.resume_mode
    last, torn = checkpoints.latest_whole(root)
    warnings = [checkpoints.describe_torn(folder, lacks) for folder, lacks in torn] if mode == "auto" else []
    start = {"auto": last, "resume_path": Path(config.trainer.resume_from_path or "")}.get(mode)
    if last and (start is None or checkpoints.step_of(start) < checkpoints.step_of(last)):
        raise LaunchError(
            f"trainer.default_local_dir={root} holds a checkpoint of step {checkpoints.step_of(last)}, past the one that this "
            "run starts from: set trainer.resume_mode=auto to go on from it, move it away, or set another folder"
        )
    return warnings


def _check_room(config: DictConfig) -> list[str]:
    """A warning where not even one checkpoint fits: by the size of the last, else about six times that of BF16 weights.

    That is FP32 weights and Adam's two moments.
    """
    root = config.trainer.default_local_dir
    if config.trainer.save_freq <= 0:
        return []
    last, _ = checkpoints.latest_whole(root)
    weights = sum(path.stat().st_size for path in Path(config.actor_rollout_ref.model.path).glob("*.safetensors"))
    needed, free = checkpoints.size(last) if last else 6 * weights, checkpoints.free(root)
    if free >= needed:
        return []
    return [f"a checkpoint takes about {checkpoints.gib(needed)}, and {checkpoints.gib(free)} are free on the disk of {root}"]


def check_batches(config: DictConfig) -> list[str]:
    """Sizes that must divide each other; returns warnings.

    Raises:
        LaunchError: sizes that verl's workers would stop at, all of them: mending one alone would only show the next.
    """
    actor, rollout, ref = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "ref"))
    train, mini, samples = config.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n
    sizes = {"data.train_batch_size": train, "actor_rollout_ref.actor.ppo_mini_batch_size": mini}
    for key, value in {**sizes, "actor_rollout_ref.rollout.n": samples}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LaunchError(f"{key}={value} must be a positive integer")
    warnings = []
    if config.algorithm.adv_estimator == "grpo" and samples == 1:
        warnings.append("actor_rollout_ref.rollout.n=1 with GRPO: a group of one has no advantage; use 4 or more")
    if actor.strategy not in ("fsdp", "fsdp2"):
        return warnings
    if actor.use_dynamic_bsz != rollout.log_prob_use_dynamic_bsz:
        raise LaunchError(
            f"actor_rollout_ref.rollout.log_prob_use_dynamic_bsz={rollout.log_prob_use_dynamic_bsz} must equal "
            f"actor_rollout_ref.actor.use_dynamic_bsz={actor.use_dynamic_bsz}"
        )
    workers = config.trainer.nnodes * config.trainer.n_gpus_per_node
    parallel = max(1, workers // (actor.get("ulysses_sequence_parallel_size") or 1))
    wrong: list[str] = []
    if mini * samples % parallel:
        wrong.append(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} times rollout.n={samples} is not divisible by the "
            f"{parallel} data-parallel workers: use a multiple of {parallel}"
        )
    if train % mini:
        warnings.append(
            f"data.train_batch_size={train} is not a multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini}: "
            "verl pads each step with dummy samples"
        )
    if not actor.use_dynamic_bsz:
        if train < mini:
            wrong.append(
                f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} exceeds data.train_batch_size={train}: use {train} or less"
            )
        if train * samples % workers:
            wrong.append(f"data.train_batch_size={train} times rollout.n={samples} is not divisible by the {workers} workers")
        # What the micro-batches must divide, once the sizes above are right.
        mini = min(mini, train)
        step = -(-train // mini) * mini * samples // parallel
        micro = [("actor_rollout_ref.actor.ppo_micro_batch_size", actor, mini * samples // parallel, "mini-batch")]
        micro.append(("actor_rollout_ref.rollout.log_prob_micro_batch_size", rollout, step, "batch"))
        if (actor.use_kl_loss or config.algorithm.use_kl_in_reward) and not ref.log_prob_use_dynamic_bsz:
            micro.append(("actor_rollout_ref.ref.log_prob_micro_batch_size", ref, step, "batch"))
        if mini * samples % parallel == 0:  # else there is no such number yet
            wrong += filter(None, (_micro_batch_flaw(*given) for given in micro))
    if wrong:
        raise LaunchError("; ".join(wrong))
    return warnings


def _micro_batch_flaw(key: str, block: DictConfig, samples: int, whole: str) -> str | None:
    name = key.rsplit(".", 1)[-1]
    if block.get(name) is not None:
        return f"{key}={block[name]} is deprecated in verl: set {key}_per_gpu instead"
    size = block.get(f"{name}_per_gpu")
    fit = max((n for n in range(1, min(samples, size or 32) + 1) if samples % n == 0), default=1)
    if size is None:
        return f"{key}_per_gpu is null: set it to a divisor of the {samples} samples a worker gets, e.g. {fit}"
    if not isinstance(size, int) or size < 1 or samples % size:
        return (
            f"{key}_per_gpu={size} does not divide the {samples} samples of a worker's {whole} "
            f"(prompts * rollout.n / workers): use {fit}, or set use_dynamic_bsz=true"
        )
    return None


def _check_lengths(config: DictConfig, settings: Settings) -> list[str]:
    from mxfp4_rl.tasks import word_problems

    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    if settings.task is None and (prompt <= 64 or response <= 16):
        return [
            f"data.max_prompt_length={prompt}, data.max_response_length={response} fit the built-in arithmetic: longer prompts "
            "lose their beginning and longer answers their end; set both for your data"
        ]
    if hasattr(settings.task, "get") and settings.task.get("name") == word_problems.DATA_SOURCE:
        wanted = word_problems.RECOMMENDED_PROMPT_TOKENS, word_problems.RECOMMENDED_RESPONSE_TOKENS
        if prompt < wanted[0] or response < wanted[1]:
            return [
                f"data.max_prompt_length={prompt}, data.max_response_length={response} are short for word_problems, which "
                f"wants {wanted[0]} and {wanted[1]}: longer prompts lose their beginning and longer answers their end"
            ]
    return []


def check_resources(config: DictConfig, joins_cluster: bool) -> list[str]:
    """The devices the workers want against those that are there; returns warnings. A cluster knows its own devices.

    Raises:
        LaunchError: a local run asks for devices that this machine does not have.
    """
    if joins_cluster:
        return []
    per_node, nodes = config.trainer.n_gpus_per_node, config.trainer.nnodes
    if nodes > 1:
        raise LaunchError(
            f"trainer.nnodes={nodes} but there is no Ray cluster to join: start one with `ray start --head` and "
            "`ray start --address=...`, and set RAY_ADDRESS"
        )
    if config.trainer.device != "cpu":
        import torch

        found = torch.cuda.device_count() if config.trainer.device == "cuda" else per_node
        if found < per_node:
            raise LaunchError(
                f"trainer.device={config.trainer.device} with trainer.n_gpus_per_node={per_node}, but torch sees "
                f"{found} GPU(s): lower n_gpus_per_node, or run on the CPU with --config-name quickstart"
            )
        return []
    ray_init = config.ray_kwargs.ray_init
    if (ray_init.get("num_gpus") or 0) < per_node:
        raise LaunchError(
            f"ray_kwargs.ray_init.num_gpus={ray_init.get('num_gpus')} is below trainer.n_gpus_per_node={per_node}: "
            f"verl counts workers in GPUs on a CPU too; set ++ray_kwargs.ray_init.num_gpus={per_node} (only a number)"
        )
    # A worker's placement group reserves 3 CPUs, and every other actor needs 1 to be placed; verl waits for ever.
    wanted = 3 * per_node + config.actor_rollout_ref.rollout.agent.num_workers + config.reward.num_workers + 8
    given = ray_init.get("num_cpus") or psutil.cpu_count()
    if given < wanted:
        return [
            f"ray_kwargs.ray_init.num_cpus={given} may be too few for {per_node} worker(s), and verl would wait for "
            f"ever; set it to {wanted} or more (it is only a number)"
        ]
    return []


def fix_total_steps(config: DictConfig, settings: Settings, rows: int | None) -> int | None:
    """The run's number of steps, computed from epochs and rows and put into the configuration where it is null.

    Raises:
        LaunchError: fewer rows than a batch, a count that is not positive, or AQN is on and the length cannot be known.
    """
    batch = config.data.train_batch_size
    if rows is not None and rows < batch:
        raise LaunchError(f"data.train_batch_size={batch} exceeds the {rows} rows of the training data: use {rows} or less")
    given = config.trainer.total_training_steps
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise LaunchError(f"trainer.total_training_steps={given} must be a positive integer, or null")
        epoch = (rows or 0) // batch
        if epoch and not config.data.get("filter_overlong_prompts") and given > config.trainer.total_epochs * epoch:
            raise LaunchError(
                f"trainer.total_training_steps={given} needs more than trainer.total_epochs={config.trainer.total_epochs} "
                f"epochs of {epoch} steps; verl would stop early, without its last validation: set trainer.total_epochs="
                f"{-(-given // epoch)}"
            )
        return given
    # verl drops prompts that are too long only once it runs: how many stay is not known here.
    if rows is not None and not config.data.get("filter_overlong_prompts"):
        steps = config.trainer.total_epochs * (rows // batch)
        if steps < 1:
            raise LaunchError(f"trainer.total_epochs={config.trainer.total_epochs} must be a positive integer")
        config.trainer.total_training_steps = steps
        return steps
    if settings.enable and settings.aqn.enable:
        raise LaunchError(
            "trainer.total_training_steps is null and cannot be computed (prompts are filtered, or the data are not "
            "plain Parquet files), but the noise schedule mxfp4.aqn needs it: set trainer.total_training_steps"
        )
    return None


def _joins_cluster(config: DictConfig) -> bool:
    address = os.environ.get("RAY_ADDRESS") or config.ray_kwargs.ray_init.get("address")
    return bool(address) and address != "local"


def _check_free_space(run_dir: Path) -> list[str]:
    warnings = []
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(run_dir).free
    if memory < MIN_FREE_MEMORY:
        warnings.append(f"only {memory / 2**30:.1f} GiB of memory are free; verl's processes alone take about 4")
    if disk < MIN_FREE_DISK:
        warnings.append(f"only {disk / 2**30:.1f} GiB are free on the disk of {run_dir}")
    return warnings
