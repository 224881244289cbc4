"""The rungs that decide, through verl's own loop: `python recipes/ladder/through_verl.py --out runs/verl` (a GPU, vLLM).

`grpo.py` is an instrument; this asks whether `mxfp4-rl train` comes to the same. Each rung is a run of verl with the
configuration `one_gpu` and the ladder's options: the same supervised start (`OUT/start`, made once by the ladder's code),
problems, batch sizes, learning rate and held-out problems. What a run leaves is kept in the ladder's files, so `report.py OUT`
writes its page. A run that ended is skipped when the command is given again; one that was cut off goes on from verl's last
checkpoint (the option `checkpoint_every`, 1.6 GB a run, removed at its end), or begins anew without one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mxfp4_rl.checkpoints import latest_whole
from mxfp4_rl.monitor.experts import EXPERTS_FILE
from mxfp4_rl.recipe import ModelRecipe
from recipes.ladder.options import MORE_TO_DO, Options, record_session, write_atomically
from recipes.ladder.run import Runner, check_given, device_name, setting
from recipes.ladder.rungs import PRESETS, RUNGS, Rung, chosen

CHECKPOINTS = "checkpoints"  # verl's, in the run's folder
DECIDING = ["bf16", "w4a4", "w4a4+mbs+of1"]
_OPERANDS = ("weight", "activation", "grad")


def start_of(out: Path, options: Options) -> Path:
    """The checkpoint that all runs begin with: the model after the ladder's supervised start, in FP32; made if missing.

    Raises:
        RuntimeError: it could not be made.
    """
    folder = out / "start"
    if not (folder / "config.json").is_file():
        # In a process of its own, so that no GPU memory stays taken when vLLM claims its share.
        made = subprocess.run([sys.executable, __file__, "--out", str(out), "--make-start", json.dumps(vars(options))])
        if made.returncode:
            raise RuntimeError(f"the supervised start could not be made in {out} (exit code {made.returncode}, see above)")
    return folder


def make_start(out: Path, options: Options) -> None:
    from transformers import AutoTokenizer

    from recipes.ladder.grpo import Run

    made = out / ".start"
    made.mkdir(parents=True, exist_ok=True)
    config = {**RUNGS["bf16"].config(), "seed": 0, "options": vars(options), "work": str(out)}
    (made / "config.json").write_text(json.dumps(config))
    run = Run(made)
    source = run.model.config._name_or_path
    run.model.float()
    for parameter, master in zip(run.weights, run.masters, strict=True):
        parameter.data.copy_(master.data)
    run.model.save_pretrained(made)
    AutoTokenizer.from_pretrained(source).save_pretrained(made)
    made.rename(out / "start")


def overrides_of(rung: Rung, seed: int, options: Options, start: Path, folder: Path) -> list[str]:
    """What the rung and the options are in verl's configuration.

    Raises:
        ValueError: the rung, or the task, is one that only the ladder's loop has.
    """
    if rung.fp8 or "name" not in options.task:
        what = f"rung {rung.name}" if rung.fp8 else "a task of files"
        raise ValueError(f"{what} is of the ladder's own loop: verl's run has BF16, MXFP4 and the tasks of mxfp4_rl.tasks")
    o, actor, rollout = options, "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    validate = o.validate_every or -1
    return [
        f"actor_rollout_ref.model.path={start}", f"mxfp4.task={_hydra(o.task)}", f"mxfp4.run_dir={folder}",
        f"trainer.experiment_name={rung.name.replace('+', '_')}", "trainer.logger=[console]",
        "trainer.resume_mode=auto", f"trainer.save_freq={o.checkpoint_every or -1}", "trainer.max_actor_ckpt_to_keep=1",
        f"trainer.total_training_steps={o.steps}", f"trainer.test_freq={validate}",
        f"trainer.val_before_train={validate > 0}".lower(), f"trainer.validation_data_dir={folder / 'validation'}",
        f"data.seed={seed + 1}", f"data.train_batch_size={o.prompts}", "data.val_batch_size=null",
        f"data.max_response_length={o.response_tokens}",
        f"{actor}.ppo_mini_batch_size={o.prompts // o.mini_batches}", f"{actor}.ppo_micro_batch_size_per_gpu={o.micro_batch}",
        f"{actor}.clip_ratio_low={o.clip_low}", f"{actor}.clip_ratio_high={o.clip_high}", f"{actor}.optim.lr={o.lr}",
        f"{actor}.optim.weight_decay={o.weight_decay}", f"{actor}.optim.clip_grad={o.max_grad_norm}",
        f"{rollout}.n={o.samples}", f"{rollout}.temperature={o.temperature}",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={o.micro_batch}",
        f"algorithm.norm_adv_by_std_in_grpo={o.norm_std}".lower(),
        f"algorithm.rollout_correction.rollout_is_threshold={o.is_cap}", f"mxfp4.monitor.every={o.measure_every}",
        *_recipe_of(rung),
    ]  # fmt: skip


def _recipe_of(rung: Rung) -> list[str]:
    if rung.words is None:
        return ["mxfp4.enable=false"]
    recipe = ModelRecipe.from_dict(rung.recipe())
    operands = [(name, getattr(recipe, name)) for name in _OPERANDS]
    given = [f"mxfp4.recipe.{name}={'null' if q is None else _hydra(vars(q))}" for name, q in operands]
    noise = {"enable": True, **rung.aqn} if rung.aqn is not None else {"enable": False}
    return [*given, *(f"mxfp4.aqn.{key}={_hydra(value)}" for key, value in noise.items())]


def _hydra(value) -> str:
    """A value in the grammar of hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_hydra(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_hydra, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)


def collect(folder: Path, start: Path, options: Options) -> None:
    """Write done.json from the last validation that verl stored.

    Raises:
        ValueError: it is not of the last step, or not of the held-out problems.
    """
    from transformers import AutoTokenizer

    from recipes.ladder.data import Data

    stored = {int(file.stem): file for file in (folder / "validation").glob("*.jsonl")}
    if max(stored, default=-1) != options.steps:
        raise ValueError(f"{folder} was validated at steps {sorted(stored)}, not at its last, {options.steps}")
    tokenizer = AutoTokenizer.from_pretrained(start)
    lines = [json.loads(line) for line in stored[options.steps].read_text().splitlines()]
    scores = {line["input"]: line["score"] for line in lines}
    problems = Data(options, tokenizer, folder.parents[1]).val
    asked = [tokenizer.decode(row["ids"], skip_special_tokens=True) for row in problems]
    if len(lines) != len(asked) or scores.keys() != set(asked):
        raise ValueError(f"{stored[options.steps]} holds {len(lines)} answers, not those to the {len(asked)} held-out problems")
    result = {
        "scores": [float(scores[text]) for text in asked], "steps": options.steps,
        "problems": [row["prompt"][-1]["content"] for row in problems], "sources": [row["data_source"] for row in problems],
    }  # fmt: skip
    write_atomically(folder / "done.json", json.dumps(result))


class VerlRunner(Runner):
    """The ladder's runner with runs of `mxfp4-rl train --config-name NAME`; `more` is put on it last."""

    environment: dict[str, str] = {}  # vLLM's sleep mode has an allocator of its own

    def __init__(
        self, out: Path, options: Options, runs: list[tuple[Rung, int]], jobs: int, gpus: int, name: str, more: list[str]
    ):
        self.options, self.name, self.more, self.began = options, name, more, {}
        self.identity = {"config_name": name, "more": more}
        super().__init__(out, options, runs, jobs, gpus)
        self.start = start_of(self.out, options)

    def command(self, folder: Path) -> list[str]:
        self.began[folder] = time.time()
        if latest_whole(folder / CHECKPOINTS)[0] is None:
            of_a_run_that_was_cut_off = (folder / name for name in ("metrics.jsonl", EXPERTS_FILE))
            for old in (*of_a_run_that_was_cut_off, *(folder / "validation").glob("*.jsonl")):
                old.unlink(missing_ok=True)
        rung, seed = RUNGS[folder.parent.name], int(folder.name.removeprefix("seed"))
        own = overrides_of(rung, seed, self.options, self.start, folder)
        return [sys.executable, "-m", "mxfp4_rl.cli", "train", "--config-name", self.name, *own, *self.more]

    def _ended(self, folder: Path, process: subprocess.Popen) -> None:
        session = {"began": self.began[folder], "wall_s": time.time() - self.began[folder], "cpu_s": 0.0, "jobs": self.jobs}
        session |= {"device": device_name(), "git": self.revision}
        record_session(folder / "sessions.json", session)
        super()._ended(folder, process)
        if process.returncode == 0:
            try:
                collect(folder, self.start, self.options)
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            except ValueError as error:
                self.failed.append(folder)
                print(f"{folder.relative_to(self.out)}: {error}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/verl"), help="folder of the runs")
    parser.add_argument("--rungs", nargs="+", default=DECIDING, help="as for run.py")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that the runs take in turns")
    parser.add_argument("--preset", choices=PRESETS, default="gpu")
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="KEY=JSON", help="options of grpo.py")
    parser.add_argument("--config-name", default="one_gpu", help="verl configuration that the options are put on")
    parser.add_argument("--time-limit", type=float, help="seconds after which runs are ended")
    parser.add_argument("--more", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of verl's configuration")
    parser.add_argument("--make-start", help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.make_start:
        make_start(a.out, Options.from_dict(json.loads(a.make_start)))
        return 0
    # Until there is a runner to tell: an exception, with which `subprocess.run` ends the process that makes the start.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(MORE_TO_DO))
    try:
        check_given(a.time_limit, seeds=a.seeds, jobs=a.jobs, gpus=a.gpus)
        options = Options.from_dict({**PRESETS[a.preset], **dict(a.set)})
        runs = [(rung, seed) for seed in range(a.seeds) for rung in chosen(a.rungs)]
        runner = VerlRunner(a.out, options, runs, a.jobs, a.gpus, a.config_name, a.more)
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    return runner.go(a.time_limit)


if __name__ == "__main__":
    raise SystemExit(main())
