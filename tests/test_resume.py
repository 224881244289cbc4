"""A run that is killed three times is, to the last digit, the run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from mxfp4_rl import checkpoints
from mxfp4_rl.tasks.arithmetic import write_parquet
from mxfp4_rl.tasks.tiny_model import make_tiny_model

STEPS = 10
KILLS = (3, 5, 7)  # the run is killed a moment after it logged these steps
# What the clock decides, and nothing that is trained or measured depends on.
TIMED = ("timing_", "perf/", "actor/perf/", "mxfp4_sync/seconds")

REWARD = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """Something that a random model gets now and then: the policy moves, and every digit of it counts."""
    return sum(c in "aeiou0123456789" for c in solution_str) / 12
'''


def command(folder, run_dir, *overrides):
    train, val = write_parquet(folder / "data", train_size=24, val_size=8)  # 6 steps an epoch: a resume crosses its end
    (folder / "reward.py").write_text(REWARD)
    return [
        *(sys.executable, "-m", "mxfp4_rl.cli", "train", f"mxfp4.run_dir={run_dir}", f"trainer.total_training_steps={STEPS}"),
        *(f"actor_rollout_ref.model.path={make_tiny_model(folder / 'model')}", "actor_rollout_ref.actor.optim.lr=1e-3"),
        *("mxfp4.task=null", f"data.train_files={train}", f"data.val_files={val}", "data.max_prompt_length=128"),
        f"reward.custom_reward_function.path={folder / 'reward.py'}",
        *("data.train_batch_size=4", "data.val_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=2"),
        *("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", "trainer.val_before_train=false", "trainer.test_freq=-1"),
        *("actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8", "mxfp4.recipe.grad={rounding:stochastic}"),
        "mxfp4.aqn.enable=true",
        *("trainer.logger=[console]", "trainer.resume_mode=auto", "trainer.max_actor_ckpt_to_keep=2", *overrides),
    ]


def records(run_dir) -> dict[int, dict[str, float]]:
    """Step -> what it logged, without times; every step once."""
    found = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        assert record["step"] not in found, f"step {record['step']} is there twice"
        found[record["step"]] = {k: v for k, v in record["data"].items() if not k.startswith(TIMED)}
    return found


def kill_everything(process):
    """SIGKILL to a launcher and all that it started, as a machine that loses power does."""
    doomed = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in doomed:
        one.suspend()
    for one in {*doomed, *psutil.Process(process.pid).children(recursive=True)}:
        one.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(doomed, timeout=20)
    assert not alive


@pytest.mark.slow
def test_three_kills_lose_no_step_and_change_no_digit(tmp_path):
    moments = random.Random(7)
    ray_dir = tempfile.mkdtemp(prefix="k", dir="/tmp")  # killed runs leave Ray's files behind
    drop = ("RAY_ADDRESS", "WANDB_MODE", "TENSORBOARD_DIR")
    env = {k: v for k, v in os.environ.items() if k not in drop} | {"OMP_WAIT_POLICY": "PASSIVE", "RAY_TMPDIR": ray_dir}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    try:
        done = subprocess.run(command(tmp_path, whole), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr

        root = killed / "checkpoints"
        resumed_from = []
        for kill in KILLS:
            process = subprocess.Popen(
                command(tmp_path, killed, "trainer.save_freq=1"), env=env, cwd=tmp_path, stdout=subprocess.DEVNULL
            )
            deadline = time.monotonic() + 300
            while max(records(killed), default=0) < kill:
                assert process.poll() is None and time.monotonic() < deadline, (killed / "verl.log").read_text()[-4000:]
                time.sleep(0.05)
            time.sleep(moments.uniform(0, 1.5))
            kill_everything(process)
            last, _ = checkpoints.latest_whole(root)
            assert checkpoints.step_of(last) >= max(records(killed))  # what was logged was saved
            if kill == KILLS[1]:  # the newest one torn: the one before is taken
                (last / "data.pt").write_bytes(b"")
                torn, last = last, checkpoints.latest_whole(root)[0]
                assert checkpoints.step_of(last) == checkpoints.step_of(torn) - 1
            resumed_from.append(checkpoints.step_of(last))
        done = subprocess.run(
            command(tmp_path, killed, "trainer.save_freq=1"), env=env, cwd=tmp_path, capture_output=True, text=True, timeout=400
        )
        log = (killed / "verl.log").read_text()
        assert done.returncode == 0, done.stdout + done.stderr + log[-4000:]
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)

    for step in resumed_from:
        assert f"resuming from {checkpoints.folder_of(root, step)}, step {step}" in log
    assert f"checkpoint {torn} is torn and skipped: data.pt has 0 bytes of" in log
    expected, got = records(whole), records(killed)
    assert list(expected) == list(range(1, STEPS + 1))
    # A kill between a step's checkpoint and its line loses that line, not the step.
    assert set(expected) - set(got) <= set(resumed_from) and set(got) <= set(expected)
    wrong = [
        (step, name, expected[step][name], value)
        for step in got
        for name, value in got[step].items()
        if expected[step][name] != value
    ]
    assert not wrong, wrong
    assert all(got[step].keys() == expected[step].keys() for step in got)
    assert len({expected[step]["critic/score/mean"] for step in expected}) > 5  # it is a run in which something happens
    assert all(expected[step]["actor/grad_norm"] > 0 for step in expected)
    assert sorted(Path(root).glob("global_step_*")) == [checkpoints.folder_of(root, step) for step in (STEPS, STEPS - 1)]
    assert all(map(checkpoints.is_whole, root.glob("global_step_*")))
