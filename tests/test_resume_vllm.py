"""A run with rollouts by vLLM that is killed goes on as the run that was not, as far as vLLM itself repeats what it did.

Which of its requests share a batch is not the same twice, and 4-bit activations make another token of a last bit.
So what chance does not decide is compared exactly (prompts, learning rate, noise, steps), and what the resumed weights answer
is compared with what they answered before the kill, beside what two runs of the same weights answer.

On a GPU SmolLM2 learns, with vLLM's build for CPUs (`make test-vllm`) a tiny model takes the same way.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from mxfp4_rl import checkpoints
from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.tasks.arithmetic import write_parquet
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from tests.test_resume import REWARD, kill_everything, records
from tests.test_verl_run import SMALL

platform = pytest.importorskip("vllm.platforms").current_platform
GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (GPU or platform.is_cpu()), reason="needs a GPU, or vLLM's build for CPUs"),
]
STEPS, KILL = 5, 2
EXACT = ("actor/lr", "mxfp4/aqn_sigma", "training/global_step", "training/epoch")
ROLLOUT = "actor_rollout_ref.rollout"
ON_GPU = [
    *("--config-name=one_gpu", "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"),
    # Two runs share the GPU: vLLM neither measures what is free nor gives its memory back.
    *(f"{ROLLOUT}.free_cache_engine=false", f"+{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes=2000000000"),
    *(f"{ROLLOUT}.n=4", f"{ROLLOUT}.gpu_memory_utilization=0.05", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=32"),
    # One request at a time, each from its first token: then no answer depends on what else is in the batch. (With 64 at once
    # two fresh engines gave 63 of 64 answers alike, one that had already served and one that had not 50 of 64.)
    *(f"{ROLLOUT}.max_num_seqs=1", f"{ROLLOUT}.enable_prefix_caching=false", "mxfp4.task={name: arithmetic, val_size: 32}"),
    # Three starts, two at once: compiling and each worker's imports take longer than the steps.
    *(f"{ROLLOUT}.enforce_eager=true", f"{ROLLOUT}.agent.num_workers=1", "reward.num_workers=1"),
    *("transfer_queue.backend.SimpleStorage.num_data_storage_units=1", f"{ROLLOUT}.max_model_len=256"),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
]
ON_CPU = ["--config-name=quickstart_vllm", *SMALL, f"{ROLLOUT}.max_model_len=256", "actor_rollout_ref.actor.optim.lr=1e-3"]


def command(run_dir, dumps, *where):
    return [
        *(sys.executable, "-m", "mxfp4_rl.cli", "train", *where, f"mxfp4.run_dir={run_dir}", "mxfp4.aqn.enable=true"),
        *(f"trainer.total_training_steps={STEPS}", "trainer.logger=[console]", "trainer.resume_mode=auto"),
        *(f"trainer.rollout_data_dir={dumps / 'rollout'}", f"trainer.validation_data_dir={dumps / 'validation'}"),
        *("trainer.val_before_train=true", "trainer.test_freq=1", "trainer.save_freq=1", "trainer.max_actor_ckpt_to_keep=2"),
    ]


def dumped(folder, step, *fields):
    """The samples of a step, sorted."""
    return sorted(
        tuple(line[f] for f in fields) for line in map(json.loads, (folder / f"{step}.jsonl").read_text().splitlines())
    )


def agreement(one, other, step, other_step=None):
    """The share of validation problems with the same answer."""
    steps = (step, step if other_step is None else other_step)
    one, other = (dumped(d / "validation", at, "input", "output") for d, at in zip((one, other), steps))
    assert [problem for problem, _ in one] == [problem for problem, _ in other]
    return sum(a == b for a, b in zip(one, other)) / len(one)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    ray_dir = tempfile.mkdtemp(prefix="k", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", ray_dir)
    where = ON_GPU
    if not GPU:
        model = make_tiny_model(tmp_path / "tiny", hidden=128, intermediate=128, architecture="qwen3")
        train, val = write_parquet(tmp_path / "data", train_size=24, val_size=32)
        (tmp_path / "reward.py").write_text(REWARD)
        files = [f"data.train_files={train}", f"data.val_files={val}"]
        files.append(f"reward.custom_reward_function.path={tmp_path / 'reward.py'}")
        where = [*ON_CPU, f"actor_rollout_ref.model.path={model}", "mxfp4.task=null", *files]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    dumps = {name: tmp_path / f"dumps_{name}" for name in ("whole", "before", "after")}
    try:
        with (tmp_path / "whole.txt").open("w") as log:
            beside = subprocess.Popen(command(whole, dumps["whole"], *where), cwd=tmp_path, stdout=log, stderr=log)
        process = subprocess.Popen(command(killed, dumps["before"], *where), cwd=tmp_path, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 500
        while max(records(killed), default=0) < KILL:
            assert process.poll() is None and time.monotonic() < deadline, (killed / "verl.log").read_text()[-4000:]
            time.sleep(0.1)
        kill_everything(process)
        resumed_from = checkpoints.step_of(checkpoints.latest_whole(killed / "checkpoints")[0])
        done = subprocess.run(
            command(killed, dumps["after"], *where), cwd=tmp_path, capture_output=True, text=True, timeout=500
        )
        log = (killed / "verl.log").read_text()
        assert done.returncode == 0, done.stdout + done.stderr + log[-4000:]
        assert beside.wait(timeout=300) == 0, (tmp_path / "whole.txt").read_text()[-4000:]
    finally:
        shutil.rmtree(ray_dir, ignore_errors=True)

    assert f"resuming from {checkpoints.folder_of(killed / 'checkpoints', resumed_from)}" in log
    logged = [RunLog.load(folder).records for folder in (whole, killed)]
    for step in range(1, STEPS + 1):
        one, other = (run[step] for run in logged)
        shown = {k: (one[k], other[k]) for k in ("critic/score/mean", "actor/grad_norm", "rollout_corr/k3_kl") if k in one}
        print(f"step {step}: {shown}")
        assert {k: one[k] for k in EXACT if k in one} == {k: other[k] for k in EXACT if k in other}
        again = dumps["before"] if step <= resumed_from else dumps["after"]
        assert dumped(dumps["whole"] / "rollout", step, "input") == dumped(again / "rollout", step, "input")
    same_weights = agreement(dumps["whole"], dumps["before"], 0)
    resumed = agreement(dumps["before"], dumps["after"], resumed_from)
    moved = agreement(dumps["whole"], dumps["whole"], 0, STEPS)
    print(f"same answers: two runs before training {same_weights:.3f}, before the kill and after {resumed:.3f}, ", end="")
    print(f"before training and after {moved:.3f}")
    assert resumed >= same_weights - 0.05 and moved < same_weights
