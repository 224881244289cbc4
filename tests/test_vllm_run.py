"""verl's GRPO loop with rollouts by vLLM, on a CPU: its server and workers, weight syncs, noise and validation, two steps.

Needs vLLM's build for CPUs (`make test-vllm`), skipped without it.
"""

import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from tests.test_faults import Run
from tests.test_verl_run import command, environment, ray_processes

if not pytest.importorskip("vllm.platforms").current_platform.is_cpu():
    pytest.skip("needs vLLM's build for CPUs", allow_module_level=True)


@pytest.mark.parametrize(
    ("architecture", "more", "path"),
    [
        ("qwen3", ["mxfp4.aqn.enable=true", "mxfp4.aqn.stages=2"], "8 layers: packed weights, dequantised"),
        ("qwen3_moe", [], "2 layers: packed weights of experts"),
        ("qwen3", ["mxfp4.enable=false"], None),
    ],
)
def test_two_steps_with_rollouts_by_vllm(tmp_path, architecture, more, path):
    model = make_tiny_model(tmp_path / "tiny", hidden=128, intermediate=128, architecture=architecture)
    run_dir, before = tmp_path / "run", ray_processes()
    own = ["trainer.total_training_steps=2", "trainer.test_freq=2", "actor_rollout_ref.rollout.max_model_len=256", *more]
    asked = command(model, run_dir, "--config-name", "quickstart_vllm", *own)
    result = subprocess.run(asked, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=500)
    log = (run_dir / "verl.log").read_text() if (run_dir / "verl.log").exists() else ""
    assert result.returncode == 0, result.stdout + result.stderr + log[-6000:]
    assert not (left := ray_processes() - before), left

    run = RunLog.load(run_dir)
    _, k3 = run.series("rollout_corr/k3_kl")
    assert len(k3) == 2 and all(0 <= value < 0.02 for value in k3)
    assert run.series("val-core/arithmetic/acc/mean@1")[0][-1] == 2
    if path is None:
        return
    assert path in log and "quantised weights take" in log
    _, bytes_shipped = run.series("mxfp4_sync/bytes")
    assert len(set(bytes_shipped)) == 1 and bytes_shipped[0] > 0


def sockets():
    """Those of weight syncs that are going on, or were when their run was killed."""
    return set(Path("/tmp").glob("rl-colocate-zmq-*"))


def sockets_of_engines():
    return {path for path in Path(tempfile.gettempdir()).iterdir() if len(path.name) == 36 and path.is_socket()}  # a UUID


def test_two_runs_on_a_machine_keep_their_weights(tmp_path):
    """verl names the socket of a weight sync by Ray's job id, the same in both: one's engine would take the other's weights."""
    processes, others, seen = {}, sockets(), set()
    for name, more in {"bf16": ["mxfp4.enable=false"], "mxfp4": []}.items():
        own = ["--config-name", "quickstart_vllm", "trainer.total_training_steps=2", "trainer.test_freq=-1", *more]
        own += ["trainer.val_before_train=false", "actor_rollout_ref.rollout.max_model_len=256"]
        model = make_tiny_model(tmp_path / f"tiny-{name}", hidden=128, intermediate=128, architecture="qwen3")
        log = (tmp_path / f"{name}.txt").open("w")
        asked = command(model, tmp_path / name, *own)
        processes[name] = subprocess.Popen(asked, env=environment(tmp_path), cwd=tmp_path, stdout=log, stderr=log)
    until = time.monotonic() + 600
    while any(process.poll() is None for process in processes.values()) and time.monotonic() < until:
        seen |= sockets() - others
        time.sleep(0.01)
    for process in processes.values():
        process.terminate()  # one that hangs must not be left behind
    for name, process in processes.items():
        logs = (tmp_path / f"{name}.txt", tmp_path / name / "verl.log")
        assert process.poll() == 0, "\n".join(log.read_text()[-6000:] for log in logs)
        _, k3 = RunLog.load(tmp_path / name).series("rollout_corr/k3_kl")
        assert len(k3) == 2 and all(0 <= value < 0.02 for value in k3)
    assert len(seen) == 2, seen


def is_sent_to(worker, others):
    """Whether the trainer is sending weights; then the worker is left suspended, and the trainer waits for it."""
    if not sockets() - others:
        time.sleep(0.001)
        return False
    worker.suspend()
    time.sleep(0.5)
    if sockets() - others:
        return True
    worker.resume()
    return False


@pytest.mark.parametrize("enable", ["true", "false"])
def test_an_engine_that_dies_in_a_weight_sync_ends_the_run(tmp_path, enable):
    """verl's sender waits for ever for a receiver that is gone."""
    model = make_tiny_model(tmp_path / "tiny", hidden=128, intermediate=128, architecture="qwen3")
    own = ["--config-name=quickstart_vllm", "actor_rollout_ref.rollout.max_model_len=256", f"mxfp4.enable={enable}"]
    others, engines = sockets(), sockets_of_engines()
    run = Run(model, tmp_path, *own, "trainer.total_training_steps=500", "trainer.save_freq=1")
    run.wait_for_checkpoint()
    (victim,) = [process for process, name in run.processes().items() if name.startswith("VLLM::Worker")]
    until = time.monotonic() + 200
    while not is_sent_to(victim, others):
        assert run.process.poll() is None and time.monotonic() < until, run.output.read_text()
    victim.kill()
    output = run.end(90)
    assert run.process.returncode == 1, output
    assert "the rollout server died (MXFP4vLLMServer, process" in output and "vLLM's engine died" in output
    assert sockets_of_engines() <= engines
    run.assert_checkpoint(output)
