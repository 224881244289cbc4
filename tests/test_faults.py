"""Faults, put into real processes: a run ends or goes on in bounded time, says what failed, loses nothing, leaves nothing.

Three kinds, by what they cost. Whole runs of a tiny model, whose processes are killed or whose rewards misbehave once a
checkpoint is there (a minute each, slow). Real Ray actors named like verl's, killed in one small Ray (seconds). The command
line with a stand-in for verl (a second each).
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types

import psutil
import pytest

from mxfp4_rl import checkpoints, cli
from mxfp4_rl.launch.failure import ALARM_MARK, FAULT_MARK, find_failure
from mxfp4_rl.launch.outcome import resume_hint
from mxfp4_rl.launch.processes import is_alive
from mxfp4_rl.launch.watch import ActorWatch
from mxfp4_rl.recipe import RecipeError
from mxfp4_rl.settings import GuardSettings, Settings
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from tests.test_verl_run import SMALL, environment

START_SECONDS = 300  # a busy machine with two cores
QUIET = ["trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.logger=[console]", "mxfp4.monitor.every=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def wait_for(condition, seconds, process=None):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


class Run:
    """A run of the tiny model through the command line, in a process of its own."""

    def __init__(self, model, tmp_path, *overrides):
        self.dir, self.output = tmp_path / "run", tmp_path / "output.txt"
        arguments = [f"actor_rollout_ref.model.path={model}", f"mxfp4.run_dir={self.dir}", *SMALL, *QUIET, *overrides]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mxfp4_rl.cli", "train", *arguments],
                env=environment(tmp_path) | {"COLUMNS": "1000"},
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.seen: dict[psutil.Process, str] = {}

    def processes(self):
        """Every process of the run that still runs: all that ever descended from the launcher, which adopts orphans."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.seen[process] = process.name()
        return {process: name for process, name in self.seen.items() if is_alive(process)}

    def steps(self):
        path = self.dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_checkpoint(self):
        """Until step 1 is done, its checkpoint written."""
        deadline = time.monotonic() + START_SECONDS
        while not (self.processes() and self.steps() >= 1):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)

    def end(self, seconds):
        """What the launcher printed, once it has ended, which takes `seconds` at most; nothing may be left behind."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"not ended after {seconds} s; the log:\n{self.log()[-4000:]}"
            self.processes()
            time.sleep(0.2)
        assert self.seen and not (left := self.processes()), left
        return self.output.read_text()

    def log(self):
        return (self.dir / "verl.log").read_text()

    def metrics(self):
        return [json.loads(line)["data"] for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    def assert_checkpoint(self, output):
        """The last checkpoint is there, whole enough for verl to find it, and the launcher says how to go on from it."""
        folder, _ = checkpoints.latest_whole(self.dir / "checkpoints")
        step = checkpoints.step_of(folder)
        assert list(folder.glob("actor/model_world_size_1_rank_0.pt")) and (folder / "mxfp4_recipe.json").is_file()
        assert step >= self.steps() - 1  # at most the step that was going on is lost
        assert f"last checkpoint: {folder}" in output and f"trainer.resume_mode=auto mxfp4.run_dir={self.dir}" in output


@pytest.fixture
def start(model, tmp_path):
    runs = []

    def make(*overrides):
        runs.append(Run(model, tmp_path, *overrides))
        return runs[-1]

    yield make
    for run in runs:  # a failed test must not leave its run behind
        if run.process.poll() is None:
            run.process.terminate()
            run.process.wait(30)


# ---- a process of a whole run is killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "message", "seconds"),
    [
        ("ray::MXFP4Server", "the rollout server died (MXFP4Server, process {pid} on node", 60),
    ],
)
def test_a_killed_process_ends_the_run_which_names_it(victim, message, seconds, start):
    run = start("trainer.total_training_steps=500", "trainer.save_freq=1")
    run.wait_for_checkpoint()
    (target,) = [process for process, name in run.processes().items() if name.startswith(victim)]
    target.kill()
    output = run.end(seconds)
    assert run.process.returncode == 1, output
    assert message.format(pid=target.pid) in output
    assert "Traceback" not in output
    run.assert_checkpoint(output)
    assert (run.dir / "report" / "report.html").is_file()


# ---- rewards, losses, sampling


def data_and_reward(tmp_path, code):
    """Overrides of a run with the built-in arithmetic and a reward function of its own."""
    from mxfp4_rl.tasks.data import resolve_task

    task = resolve_task("arithmetic", tmp_path / "data", val_size=8)
    reward = tmp_path / "reward.py"
    reward.write_text(textwrap.dedent(code))
    return [
        "mxfp4.task=null",
        f"data.train_files={task.train_path}",
        f"data.val_files={task.val_path}",
        f"reward.custom_reward_function.path={reward}",
        "reward.custom_reward_function.name=compute_score",
    ]


BAD_REWARDS = """
    import itertools, time

    calls = itertools.count()  # 16 samples a step

    def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
        call = next(calls)
        if call == 3:
            raise ValueError(f"cannot read {ground_truth!r}")
        if call == 4:
            return float("nan")
        if call == 5:
            return "correct"
        if call >= 16:
            time.sleep(600)
        return call % 2
"""


@pytest.mark.slow
def test_a_reward_function_that_raises_returns_rubbish_and_hangs(start, tmp_path):
    run = start(
        *data_and_reward(tmp_path, BAD_REWARDS),
        "trainer.total_training_steps=500",
        "trainer.save_freq=1",
        "mxfp4.guards.reward_timeout_s=3",
    )
    run.wait_for_checkpoint()
    output = run.end(90)
    assert run.process.returncode == 1, output
    log = run.log()
    # Step 1 goes on without the three samples that have no reward.
    assert f"{ALARM_MARK}the reward function raised ValueError: cannot read" in log
    assert f"{ALARM_MARK}the reward function returned nan, which is no finite number" in log
    assert f"{ALARM_MARK}the reward function returned 'correct', which is no finite number" in log
    (first,) = run.metrics()
    assert first["mxfp4_guards/failed_samples"] == 3 and first["critic/score/mean"] > 0.3
    assert math.isfinite(first["actor/grad_norm"]) and first["actor/grad_norm"] > 0
    # Step 2 has no reward at all.
    assert "step 2: 16 of 16 samples failed (generation or reward), more than mxfp4.guards.failed_samples=0.5" in output
    assert "last alarm: the reward function took longer than mxfp4.guards.reward_timeout_s=3" in output
    run.assert_checkpoint(output)


def constant_reward(tmp_path, value):
    code = f"def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n    return {value}\n"
    return data_and_reward(tmp_path, code)


@pytest.mark.slow
def test_equal_rewards_are_told_and_a_nan_loss_ends_the_run(start, tmp_path):
    run = start(
        *constant_reward(tmp_path, 1.0),
        "trainer.total_training_steps=500",
        "trainer.save_freq=1",
        "mxfp4.alerts.no_signal=[null,1]",
        "mxfp4.guards.nonfinite_steps=3",
        "actor_rollout_ref.actor.entropy_coeff=1e39",  # infinite in float32, and so is the loss
    )
    run.wait_for_checkpoint()
    output = run.end(200)
    assert run.process.returncode == 1, output
    metrics, log = run.metrics(), run.log()
    assert [m["training/steps_without_signal"] for m in metrics] == [1, 2]
    assert [m["mxfp4_guards/nonfinite_steps"] for m in metrics] == [1, 2]
    assert f"{ALARM_MARK}step 2: no_signal: training/steps_without_signal is 2" in log
    assert "GuardError: step 3: actor/grad_norm nan" in output and "optim.lr" in output
    assert "for 3 steps in a row (mxfp4.guards.nonfinite_steps=3)" in output
    run.assert_checkpoint(output)


@pytest.mark.slow
def test_dynamic_sampling_that_finds_no_group_ends(start, tmp_path):
    run = start(
        *constant_reward(tmp_path, 0.0),
        "trainer.total_training_steps=500",
        "data.gen_batch_size=1",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=reward",
        "mxfp4.guards.empty_gen_batches=3",
    )
    output = run.end(START_SECONDS)
    assert run.process.returncode == 1, output
    assert "step 1: 3 batches of 4 prompts without one group that has two different rewards" in output
    assert "mxfp4.guards.empty_gen_batches=3" in output and run.steps() == 0
    assert "no checkpoint was written" in output


# ---- the watch, with Ray's own table of actors


ACTORS = """
    import json, os, signal, sys, time
    import ray
    from ray._private.state import actors
    from mxfp4_rl.launch.cluster import QUEUE, check_queue_is_free
    from mxfp4_rl.launch.watch import ActorWatch

    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1], object_store_memory=10**8)

    def make(name):
        def pid(self):
            return os.getpid()
        def leave(self):
            ray.actor.exit_actor()
        def crash(self):
            os._exit(9)
        return ray.remote(type(name, (), {"pid": pid, "leave": leave, "crash": crash})).remote()

    killed = ["WorkerDict", "TaskRunnerV1", "RewardLoopWorker", "TransferQueueController", "SimpleStorageUnit"]
    handles = {name: make(name) for name in [*killed, "Crashes", "Leaves", "Stopped", "Dropped", "Lives"]}
    pids = dict(zip(handles, ray.get([h.pid.remote() for h in handles.values()])))
    watch = ActorWatch(actors)
    assert watch.look() == []
    for name in killed:
        os.kill(pids[name], signal.SIGKILL)
    handles["Crashes"].crash.remote()
    handles["Leaves"].leave.remote()
    ray.kill(handles["Stopped"])
    handles.pop("Dropped")
    dead = lambda: sum(a["State"] == "DEAD" for a in actors().values())
    deadline = time.monotonic() + 60
    while dead() < len(killed) + 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    watch.look()
    assert watch.look() == []  # each is told once
    check_queue_is_free()
    other_run = ray.remote(type("Queue", (), {})).options(**QUEUE).remote()
    try:
        check_queue_is_free()
    except RuntimeError as error:
        print(error)
    print(json.dumps({"pids": pids, "told": watch.told}))
"""


@pytest.mark.slow
def test_the_watch_tells_deaths_of_actors_and_a_second_run_is_refused(tmp_path):
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mxr-", dir="/tmp") as short:  # a socket's path has 107 bytes at most
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(ACTORS), short],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"pids"')))  # raylet talks too
    roles = {
        "WorkerDict": "actor worker",
        "TaskRunnerV1": "trainer",
        "RewardLoopWorker": "reward worker",
        "TransferQueueController": "transfer queue",
        "SimpleStorageUnit": "storage of the transfer queue",
        "Crashes": "actor",
    }
    expected = {f"the {role} died ({name}, process {result['pids'][name]} on node" for name, role in roles.items()}
    assert {line.rsplit(" node ", 1)[0] + " node" for line in result["told"]} == expected
    assert all(f"{FAULT_MARK}{line}" in done.stdout for line in result["told"])
    assert done.stdout.count("another run of verl's V1 trainer is on this Ray cluster") == 1


def test_a_control_store_that_does_not_answer_ends_the_run(monkeypatch, capsys):
    monkeypatch.setattr("mxfp4_rl.launch.watch.SILENCE_SECONDS", 0.5)
    ended = []
    watch = ActorWatch(lambda: time.sleep(60), end=lambda: ended.append(True))
    watch.start()
    wait_for(lambda: ended, 20)
    watch.stop()
    assert f"{FAULT_MARK}Ray's control store (gcs_server, on the head node) has not answered" in capsys.readouterr().out


def test_verl_that_goes_on_after_a_fault_is_ended(monkeypatch, capsys):
    monkeypatch.setattr("mxfp4_rl.launch.watch.GRACE_SECONDS", 0.5)
    ended = []
    daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(daemon.pid)
    monkeypatch.setattr("mxfp4_rl.launch.watch.DAEMONS", {process.name(): "a daemon"})
    watch = ActorWatch(dict, [process], end=lambda: ended.append(True))
    watch.start()
    daemon.kill()
    wait_for(lambda: ended, 20)
    watch.stop()
    daemon.wait()
    out = capsys.readouterr().out
    assert f"(a daemon, process {process.pid}) died" in out and "verl does not end by itself" in out


# ---- the stand-in for verl: what the launcher does with a child that ends in some way


CHILD = """
    import json, os, signal, subprocess, sys, time
    from pathlib import Path
    import yaml
    from mxfp4_rl.checkpoints import begin, folder_of, seal
    from mxfp4_rl.launch.child import become_subreaper, end_with_parent

    config_path, parent, temp_dir = sys.argv[1:]
    become_subreaper()
    end_with_parent(int(parent), temp_dir)
    config = yaml.safe_load(Path(config_path).read_text())
    run, checkpoints = Path(config["mxfp4"]["run_dir"]), Path(config["trainer"]["default_local_dir"])
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    begin(folder_of(checkpoints, 1))
    seal(folder_of(checkpoints, 1))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({{"step": 1, "data": {{"critic/score/mean": 0.5, "timing_s/step": 1.0}}}}) + "\\n")
    (run / "pids.json").write_text(json.dumps([os.getpid(), worker.pid]))
    {fault}
    time.sleep(300)
"""
STALL = """from mxfp4_rl.verl_plugin.guards import StallWatch
    StallWatch(0.5, lambda: 0).progress("sampling of step 2")"""


@pytest.fixture
def stand_in(tmp_path, model, monkeypatch):
    """Starts the command line with a child that writes a checkpoint, waits, and has a fault; ends it afterwards."""
    started = []

    def make(fault=""):
        child = tmp_path / "child.py"
        child.write_text(textwrap.dedent(CHILD.format(fault=fault)))
        arguments = ["train", f"actor_rollout_ref.model.path={model}", "mxfp4.run_dir=run", "mxfp4.enable=false"]
        command = [sys.executable, str(child)]
        # Under nohup, as tests may run, children inherit that SIGHUP is ignored.
        script = (
            "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); from mxfp4_rl.cli import main; "
            f"sys.exit(main({arguments!r}, {command!r}))"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment(tmp_path) | {"COLUMNS": "1000", "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        wait_for(lambda: (tmp_path / "run/pids.json").exists() and (tmp_path / "run/pids.json").read_text(), 60, process)
        return process, [psutil.Process(pid) for pid in json.loads((tmp_path / "run/pids.json").read_text())]

    yield make
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize(
    ("target", "number", "code", "message"),
    [
        ("launcher", signal.SIGTERM, 143, "SIGTERM: ending the run"),
        ("launcher", signal.SIGHUP, 129, "SIGHUP: ending the run"),
        ("launcher", signal.SIGKILL, -9, None),
        ("child", signal.SIGTERM, 1, "the run was ended by SIGTERM"),
        ("child", signal.SIGKILL, 1, "the run was ended by SIGKILL (out of memory?)"),
        ("child", signal.SIGSEGV, 1, "the run was ended by SIGSEGV"),
    ],
)
def test_signals_to_launcher_and_child(target, number, code, message, stand_in, tmp_path):
    process, family = stand_in()
    (process if target == "launcher" else family[0]).send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    wait_for(lambda: not any(map(is_alive, family)), 15)
    assert checkpoints.is_whole(tmp_path / "run/checkpoints/global_step_1")
    if message:
        assert message in output and "Traceback" not in output
        assert (tmp_path / "run/report/report.html").is_file()
    if target == "child":
        assert "last checkpoint:" in output and "trainer.resume_mode=auto" in output


def test_a_stall_ends_the_process(stand_in):
    process, family = stand_in(STALL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "no progress for 0.5 s in sampling of step 2 (mxfp4.guards.stall_s)" in output and "last checkpoint:" in output
    assert not any(map(is_alive, family))


# ---- the guards' counts and settings


def test_guards_count_in_a_row():
    from mxfp4_rl.verl_plugin.guards import GuardError, Guards

    guards = Guards(GuardSettings(nonfinite_steps=2), 4)
    for value in (math.nan, 1.0, math.inf, 0.5):
        guards.updated(1, {"actor/grad_norm": value, "actor/pg_loss": 0.1})
    guards.updated(5, {"actor/grad_norm": 1.0, "actor/pg_loss": math.nan})
    with pytest.raises(GuardError, match="step 6: actor/entropy nan"):
        guards.updated(6, {"actor/grad_norm": 1.0, "actor/entropy": math.nan})


def test_weights_that_are_not_finite_are_not_stored():
    from mxfp4_rl.verl_plugin.guards import GuardError, Guards

    guards = Guards(GuardSettings(), 4)
    guards.check_weights(2, [True, True])
    with pytest.raises(GuardError, match="step 3: the weights hold NaN or infinity, so no checkpoint is written"):
        guards.check_weights(3, [True, False])


def test_dynamic_sampling_is_bounded_by_verls_own_key_too():
    from mxfp4_rl.verl_plugin.guards import GuardError, Guards

    guards = Guards(GuardSettings(empty_gen_batches=2), 8, max_gen_batches=3)
    for _ in range(2):
        guards.begin_step()
        guards.refill(1, 8, found=1)
        guards.refill(1, 8, found=2)  # not empty: goes on
        with pytest.raises(GuardError, match=r"3 batches of 8 prompts gave 2 of the 8 wanted groups.*max_num_gen_batches=3"):
            guards.refill(1, 8, found=2)
    off = Guards(dataclasses.replace(GuardSettings(), empty_gen_batches=None), 8)
    for _ in range(100):
        off.refill(1, 8, found=0)


def test_progress_keeps_a_slow_phase_alive():
    from mxfp4_rl.verl_plugin.guards import StallWatch

    ended, samples = [], []
    watch = StallWatch(1.0, lambda: len(samples), end=lambda: ended.append(time.monotonic()))
    watch.progress("sampling")
    for _ in range(8):  # 2.4 s, more than twice the limit
        time.sleep(0.3)
        samples.append(None)
    last = time.monotonic()
    assert not ended
    wait_for(lambda: ended, 20)
    assert ended[0] - last > 0.6


@pytest.mark.parametrize("value", [1, 0.5, True, pytest.param("torch", id="torch")])
def test_numbers_are_rewards(value):
    import torch

    from mxfp4_rl.verl_plugin.rewards import is_reward

    assert is_reward(torch.tensor(0.5) if value == "torch" else value)
    assert not any(map(is_reward, (None, "1", b"1", [1, 2], {}, math.nan, -math.inf, torch.tensor([1.0, 2.0]))))


def test_a_samples_time_begins_with_its_turn_and_hanging_ones_block_nobody(monkeypatch, capsys):
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

    from mxfp4_rl.verl_plugin import rewards

    monkeypatch.setattr(rewards, "AT_ONCE", 2)
    over = threading.Event()

    class Manager(RewardManagerBase):
        def __init__(self, config, loop):
            self.loop = loop

        async def run_single(self, data):
            return {"reward_score": await self.loop.run_in_executor(None, data[0].call)}

    def sample(call):
        return [types.SimpleNamespace(non_tensor_batch={"data_source": "task"}, call=call)]

    async def all_of(calls):
        settings = OmegaConf.create({"mxfp4": {"guards": {"reward_timeout_s": 1.0}}})
        manager = rewards.guarded(Manager)(settings, asyncio.get_running_loop())
        return await asyncio.gather(*(manager.run_single(sample(call)) for call in calls), return_exceptions=True)

    def slow():  # 40 of them take 2 s, two at once
        time.sleep(0.1)
        return 1.0

    try:
        found = asyncio.run(all_of([slow] * 40))
        assert found == [{"reward_score": 1.0}] * 40

        async def with_hanging():
            found = await all_of([over.wait] * 5 + [slow] * 4)
            over.set()  # the loop waits for its threads when it closes
            return found

        found = asyncio.run(with_hanging())
        assert all(isinstance(each, rewards.RewardError) and "reward_timeout_s=1 " in f"{each} " for each in found[:5])
        assert found[5:] == [{"reward_score": 1.0}] * 4
    finally:
        over.set()


def test_every_reward_manager_of_verl_has_a_guarded_twin():
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    from mxfp4_rl.verl_plugin.rewards import guard_rewards

    for name in ("naive", "dapo", "gdpo", "rate_limited", "remote"):
        config = OmegaConf.create({"reward": {"reward_manager": {"source": "register", "name": name}}})
        guard_rewards(config)
        guard_rewards(config)  # once more changes nothing
        assert issubclass(get_reward_manager_cls(config.reward.reward_manager.name), get_reward_manager_cls(name))
    own = OmegaConf.create({"reward": {"reward_manager": {"source": "importlib", "name": "naive"}}})
    guard_rewards(own)
    assert own.reward.reward_manager.name == "naive"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"nonfinite_steps": 0}, "mxfp4.guards.nonfinite_steps=0 must be a positive integer, or null"),
        ({"empty_gen_batches": 2.5}, "mxfp4.guards.empty_gen_batches=2.5"),
        ({"failed_samples": 1.5}, r"mxfp4.guards.failed_samples=1.5 must be a number in \(0, 1\]"),
        ({"reward_timeout_s": "5 min"}, "mxfp4.guards.reward_timeout_s='5 min' must be a number above 0"),
        ({"stall_s": -1}, "mxfp4.guards.stall_s=-1"),
        ({"stall": 5}, "stall_s"),
    ],
)
def test_wrong_guards_are_refused(block, message):
    with pytest.raises(RecipeError, match=message):
        Settings.from_config({"guards": block})


def test_a_wrong_guard_on_the_command_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", f"actor_rollout_ref.model.path={model}", "mxfp4.guards.stal_s=5"]) == 2
    assert "stall_s" in capsys.readouterr().err


def test_faults_come_first_then_the_exception_then_the_last_alarm():
    log = [
        f"(RewardLoopWorker pid=7) {ALARM_MARK}the reward function raised ValueError: no",
        f"{FAULT_MARK}the rollout server died",
        f"{FAULT_MARK}the rollout server died",
        "RuntimeError: selected terminal groups",
        "(x pid=7) more",
    ]
    assert find_failure(log).splitlines() == [
        "the rollout server died",
        "RuntimeError: selected terminal groups",
        "last alarm: the reward function raised ValueError: no",
    ]


def test_why_samples_failed():
    log = [
        "(AgentLoopWorkerTQ pid=9) ray.exceptions.RayTaskError(RuntimeError): ray::MXFP4Server.generate()",
        "(AgentLoopWorkerTQ pid=9) RuntimeError: rollout failed: FloatingPointError: the rollout's logits are not finite",
        "(other pid=7) RuntimeError: of somebody else",
        "mxfp4_rl.verl_plugin.guards.GuardError: step 3: 16 of 16 samples failed",
    ]
    assert find_failure(log).splitlines()[1] == (
        "a sample's error: RuntimeError: rollout failed: FloatingPointError: the rollout's logits are not finite"
    )


def test_the_hint_on_resuming(tmp_path):
    nothing = resume_hint(tmp_path, tmp_path / "checkpoints")  # before the first step: as it would end again
    assert "no checkpoint was written" in nothing and "mend the cause" in nothing and "starts anew" not in nothing
    (tmp_path / "metrics.jsonl").touch()
    assert "the same command starts anew" in resume_hint(tmp_path, tmp_path / "checkpoints")
    folder = checkpoints.folder_of(tmp_path, 12)
    checkpoints.begin(folder)
    checkpoints.seal(folder)
    checkpoints.begin(checkpoints.folder_of(tmp_path, 13))  # torn
    assert f"{folder}; to go on" in resume_hint(tmp_path, tmp_path)
