"""A run on a GPU that is killed goes on as the run that was not, as far as vLLM itself repeats what it did.

Which of its requests share a batch is not the same twice, and 4-bit activations make another token of a last bit.
So what chance does not decide is compared exactly (prompts, learning rate, noise, steps), and what the resumed weights answer
is compared with what they answered before the kill, beside what two runs of the same weights answer.
"""

import importlib.util
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
from tests.test_resume import kill_everything, records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
STEPS, KILL = 5, 2
EXACT = ("actor/lr", "mxfp4/aqn_sigma", "training/global_step", "training/epoch")


def command(run_dir, dumps, *overrides):
    rollout = "actor_rollout_ref.rollout"
    return [
        *(sys.executable, "-m", "mxfp4_rl.cli", "train", "--config-name", "one_gpu", f"mxfp4.run_dir={run_dir}"),
        *(f"trainer.total_training_steps={STEPS}", "trainer.logger=[console]", "trainer.resume_mode=auto"),
        *(f"trainer.rollout_data_dir={dumps / 'rollout'}", f"trainer.validation_data_dir={dumps / 'validation'}"),
        *("trainer.test_freq=1", "trainer.max_actor_ckpt_to_keep=2", "data.train_batch_size=8", "mxfp4.aqn.enable=true"),
        *("actor_rollout_ref.actor.ppo_mini_batch_size=8", f"{rollout}.n=8", f"{rollout}.gpu_memory_utilization=0.05"),
        # Two runs share the GPU: vLLM neither measures what is free nor gives its memory back.
        *(f"{rollout}.free_cache_engine=false", f"+{rollout}.engine_kwargs.vllm.kv_cache_memory_bytes=2000000000"),
        *("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64", f"{rollout}.log_prob_micro_batch_size_per_gpu=64"),
        *("trainer.save_freq=1", *overrides),
    ]


def dumped(folder, step, *fields):
    """The samples of a step, sorted."""
    return sorted(
        tuple(line[f] for f in fields) for line in map(json.loads, (folder / f"{step}.jsonl").read_text().splitlines())
    )


def agreement(one, other, step):
    """The share of validation problems with the same answer."""
    one, other = (dumped(d / "validation", step, "input", "output") for d in (one, other))
    assert [problem for problem, _ in one] == [problem for problem, _ in other]
    return sum(a == b for a, b in zip(one, other)) / len(one)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    ray_dir = tempfile.mkdtemp(prefix="k", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", ray_dir)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    dumps = {name: tmp_path / f"dumps_{name}" for name in ("whole", "before", "after")}
    try:
        with (tmp_path / "whole.txt").open("w") as log:
            beside = subprocess.Popen(command(whole, dumps["whole"]), cwd=tmp_path, stdout=log, stderr=log)
        process = subprocess.Popen(command(killed, dumps["before"]), cwd=tmp_path, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 400
        while max(records(killed), default=0) < KILL:
            assert process.poll() is None and time.monotonic() < deadline, (killed / "verl.log").read_text()[-4000:]
            time.sleep(0.1)
        kill_everything(process)
        resumed_from = checkpoints.step_of(checkpoints.latest_whole(killed / "checkpoints")[0])
        done = subprocess.run(command(killed, dumps["after"]), cwd=tmp_path, capture_output=True, text=True, timeout=400)
        log = (killed / "verl.log").read_text()
        assert done.returncode == 0, done.stdout + done.stderr + log[-4000:]
        assert beside.wait(timeout=200) == 0, (tmp_path / "whole.txt").read_text()[-4000:]
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
    print(f"same answers: {same_weights:.3f} of two runs before training, {resumed:.3f} before the kill and after")
    assert resumed >= same_weights - 0.05
