"""The real thing, small: verl's GRPO loop with Ray, FSDP2, rollout server, weight sync and reward loop, two steps."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from mxfp4_rl.monitor import panels
from mxfp4_rl.monitor.experts import read_table
from mxfp4_rl.monitor.live import LiveRun
from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.tasks.tiny_model import make_tiny_model

SMALL = [
    "data.train_batch_size=4",
    "data.val_batch_size=8",
    "data.max_prompt_length=128",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
    "mxfp4.task.val_size=8",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def command(model, run_dir, *overrides):
    fixed = [f"actor_rollout_ref.model.path={model}", f"mxfp4.run_dir={run_dir}", *SMALL, *overrides]
    return [sys.executable, "-m", "mxfp4_rl.cli", "train", *fixed]


def environment(tmp_path):
    drop = ("RAY_ADDRESS", "WANDB_MODE", "WANDB_API_KEY", "TENSORBOARD_DIR", "WANDB_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return kept | {"MXFP4_RL_CACHE": str(tmp_path / "cache"), "OMP_WAIT_POLICY": "PASSIVE"}


def ray_processes():
    """Running processes of Ray; one that has ended and waits to be reaped by init is none."""
    found = set()
    for process in psutil.process_iter(["name", "status"]):
        name = process.info["name"] or ""
        if process.info["status"] != psutil.STATUS_ZOMBIE and (name in ("raylet", "gcs_server") or name.startswith("ray::")):
            found.add((process.pid, name))
    return found


def test_two_steps_of_grpo_in_mxfp4(model, tmp_path):
    run_dir, before = tmp_path / "run", ray_processes()
    result = subprocess.run(
        command(
            model,
            run_dir,
            "trainer.total_training_steps=2",
            "trainer.test_freq=2",
            "trainer.save_freq=2",
            "mxfp4.aqn.enable=true",
            "mxfp4.aqn.stages=2",
            "mxfp4.recipe.overrides={down_proj:{macro_size:64}}",
            "mxfp4.alerts.entropy=[0,0.5]",  # a fresh model is undecided: this must be told of, once
        ),
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    log = (run_dir / "verl.log").read_text() if (run_dir / "verl.log").exists() else ""
    assert result.returncode == 0, result.stdout + result.stderr + log[-6000:]
    assert not (left := ray_processes() - before), left
    assert "14 Linear layers quantised" in log and "kernels: weight reference, activation reference" in log

    run = RunLog.load(run_dir)
    for name in ("scale_bias", "deadzone", "grid_noise", "fallback", "rel_mse", "deadzone_fraction"):
        steps, values = run.series(f"mxfp4/{name}")
        assert list(steps) == [1, 2] and all(0 < v < 1 for v in values), name
        _, activation = run.series(f"mxfp4/activation/{name}")
        assert all(0 < v < 1 for v in activation), name
    assert len([n for n in run.names() if n.startswith("mxfp4_layers/")]) == 14 * 5
    assert list(run.series("mxfp4/aqn_sigma")[1]) == [0.0, 0.01]
    assert all(v > 0 for v in run.series("mxfp4_sync/bytes")[1])
    # Same operands on both sides: what is left is the floor that 4-bit activations have between two summation orders.
    assert all(abs(v) < 0.05 for v in run.series("rollout_corr/k3_kl")[1])
    assert run.series("rollout_corr/rollout_is_mean")[0] is not None  # truncated importance sampling is on
    assert all(math.isfinite(v) for v in run.series("actor/grad_norm")[1])
    validation = [n for n in run.names() if n.startswith("val-core/")]
    assert validation and list(run.series(validation[0])[0]) == [0, 2]

    assert (run_dir / "report" / "report.html").stat().st_size > 50_000
    assert list((run_dir / "tensorboard").rglob("events.*")) and list((run_dir / "wandb").glob("offline-run-*"))
    recipe = json.loads((run_dir / "checkpoints" / "global_step_2" / "mxfp4_recipe.json").read_text())
    assert recipe["weight"]["fallback_alpha"] == 1.0 and recipe["overrides"]["down_proj"]["macro_size"] == 64

    alarm = "step 1: entropy: actor/entropy is "
    watched = LiveRun(run_dir)
    watched.read()
    status = watched.status()
    assert (status["state"], status["step"], status["total"], status["running"]) == ("finished", 2, 2, False)
    assert "entropy" in [alert["name"] for alert in status["alerts"]]
    assert result.stdout.count(f"[mxfp4] alarm: {alarm}") == 1 and result.stdout.count("entropy: actor/entropy is") == 1
    assert list(run.series("mxfp4_alerts/entropy")[1]) == [1.0, 1.0]
    assert list(run.series("mxfp4_alerts/deadzone_fraction")[1]) == [0.0, 0.0]
    (wandb_file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    told = [record.alert for record in wandb_records(wandb_file) if record.WhichOneof("record_type") == "alert"]
    (told,) = [alert for alert in told if alert.title.startswith("entropy:")]
    assert told.title == "entropy: out of its band" and told.text.startswith(alarm) and told.level == "WARN"
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert {"mxfp4_alerts/messages/text_summary", "custom_scalars__config__"} <= set(events.Tags()["tensors"])
    assert [event.value for event in events.Scalars("mxfp4_alerts/entropy")] == [1.0, 1.0]
    # What tests/test_panels.py takes for the metrics of a real run still is one's.
    stored = json.loads((Path(__file__).parent / "metric_names.json").read_text())
    assert set(stored) <= set(run.names())
    drawn = {
        name for section in panels.sections(run.names()) for panel in section.panels for name in panel.metrics(run.names())
    }
    assert {name for name in run.names() if name.startswith("mxfp4")} <= drawn


def wandb_records(path):
    """The records of wandb's offline file: protobuf messages in the framing of LevelDB's log."""
    data, block, position, parts = path.read_bytes(), 32768, 7, []
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:  # too short for a header: padding
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # after the checksum
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or a record's last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def test_switched_off_it_is_plain_verl_and_ctrl_c_ends_it_cleanly(model, tmp_path):
    run_dir, before = tmp_path / "run", ray_processes()
    process = subprocess.Popen(
        command(model, run_dir, "mxfp4.enable=false", "trainer.total_training_steps=500", "trainer.val_before_train=false"),
        env=environment(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    took = time.monotonic() - began
    assert process.returncode == 130, output
    assert took < 10, f"Ctrl-C took {took:.1f} s"
    assert not (left := ray_processes() - before), left
    assert (run_dir / "report" / "report.html").exists()
    assert LiveRun(run_dir).status()["state"] == "interrupted"
    run = RunLog.load(run_dir)
    assert not [n for n in run.names() if n.startswith(("mxfp4/", "mxfp4_share/", "mxfp4_layers/"))]
    assert all(abs(v) < 0.01 for v in run.series("rollout_corr/k3_kl")[1])


def mixture_run(model, run_dir, steps, *overrides):
    """The log of a run of a mixture of experts up to `steps`, from its last checkpoint if it has one."""
    result = subprocess.run(
        command(
            model,
            run_dir,
            "actor_rollout_ref.actor.entropy_coeff=0.1",  # a gradient, though a fresh model earns no reward
            "actor_rollout_ref.actor.optim.lr=1e-3",
            f"trainer.total_training_steps={steps}",
            "trainer.test_freq=-1",
            "trainer.val_before_train=false",
            "trainer.save_freq=2",
            "trainer.resume_mode=auto",
            "mxfp4.aqn.enable=true",
            *overrides,
        ),
        env=environment(run_dir.parent),
        cwd=run_dir.parent,
        capture_output=True,
        text=True,
        timeout=400,
    )
    log = (run_dir / "verl.log").read_text() if (run_dir / "verl.log").exists() else ""
    assert result.returncode == 0, result.stdout + result.stderr + log[-6000:]
    return log


@pytest.mark.slow
@pytest.mark.parametrize("enable", [True, False])
def test_a_mixture_of_experts_trains_and_resumes_with_another_recipe(enable, tmp_path):
    run_dir = tmp_path / "run"
    moe = make_tiny_model(tmp_path / "model", architecture="qwen3_moe", intermediate=72)
    log = mixture_run(moe, run_dir, 2, f"mxfp4.enable={str(enable).lower()}", "mxfp4.recipe.fallback_alpha=0.5")
    run = RunLog.load(run_dir)
    assert all(math.isfinite(v) and v > 0 for v in run.series("actor/grad_norm")[1])
    assert all(abs(v) < (0.05 if enable else 0.01) for v in run.series("rollout_corr/k3_kl")[1])
    layer = "mxfp4_layers/model.layers.0.mlp.experts.down_proj"
    if not enable:
        assert not [n for n in run.names() if n.startswith("mxfp4_layers/")]
        return
    assert "8 Linear layers and 4 fused tensors of experts quantised" in log
    assert "8 layers multiply dequantised weights" in log and "4 layers multiply dequantised weights of experts" in log
    assert len([n for n in run.names() if n.startswith("mxfp4_layers/")]) == 12 * 5 + 4 * 5
    for metric in ("mxfp4/router_agreement", "mxfp4/router_overlap"):
        assert all(0.5 < v <= 1 for v in run.series(metric)[1]) and run.has(metric)
    assert run.has("mxfp4_experts/activation/rel_mse_mean") and read_table(run_dir).tokens.shape == (2, 4)
    assert (run_dir / "report" / "experts.png").is_file()
    assert all(0 < v < 1 for v in run.series(f"{layer}/rel_mse")[1])
    assert all(v > 0 for v in run.series(f"{layer}/tokens_mean")[1])
    assert (run_dir / "report" / "report.html").stat().st_size > 50_000
    assert list((run_dir / "checkpoints" / "global_step_2").rglob("*.pt"))

    log = mixture_run(moe, run_dir, 3)
    assert "another recipe than this run's" in log
    steps, error = RunLog.load(run_dir).series("mxfp4/rel_mse")
    assert list(steps) == [1, 2, 3]
    assert error[2] < 0.2 * error[1]  # alpha 1 instead of 0.5: the third step really ran with the other recipe
    stored = [json.loads((run_dir / f"checkpoints/global_step_{s}/mxfp4_recipe.json").read_text()) for s in (2, 3)]
    assert [recipe["weight"]["fallback_alpha"] for recipe in stored] == [0.5, 1.0]
