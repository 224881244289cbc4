"""A Ray cluster of two raylets on this machine: a run as a job, a run that joins by RAY_ADDRESS, a node that is lost."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.cluster import check_devices, check_run_dir, make_paths_absolute
from mxfp4_rl.monitor.run_log import RunLog
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from tests.test_verl_run import SMALL, environment

# Answers a line "actors" with where each class of actor is or was, by node; ends the cluster at the end of its input.
CLUSTER = """
    import json, os, sys
    import ray
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    temp_dir, port = sys.argv[1], int(sys.argv[2])
    # Ray notes the address in its default folder, which is not there on a machine where no Ray has used it.
    os.makedirs(os.path.dirname(get_ray_address_file(None)), exist_ok=True)
    node = dict(num_cpus=16, num_gpus=1, object_store_memory=200 * 2**20)
    cluster = Cluster(
        initialize_head=True,
        head_node_args=dict(include_dashboard=True, dashboard_port=port, temp_dir=temp_dir, **node),
    )
    second = cluster.add_node(**node)
    cluster.wait_for_nodes()
    raylet = second.all_processes["raylet"][0].process.pid
    print("CLUSTER", json.dumps({"address": cluster.address, "raylet": raylet, "head": cluster.head_node.node_id}), flush=True)
    ray.init(cluster.address, log_to_driver=False)
    for _ in sys.stdin:
        where = {}
        for actor in ray._private.state.actors().values():
            where.setdefault(actor["ActorClassName"].split(".")[-1], []).append(actor["Address"]["NodeID"])
        print("CLUSTER", json.dumps(where), flush=True)
    ray.shutdown()
    cluster.shutdown()
"""


class RayCluster:
    """Two raylets and a job server, in processes of their own."""

    def __init__(self, tmp_path):
        self.temp_dir = tempfile.mkdtemp(prefix="mxc-", dir="/tmp")  # a socket's path has 107 bytes at most
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = open(tmp_path / "cluster.log", "w")  # noqa: SIM115  (open as long as the cluster)
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CLUSTER), self.temp_dir, str(self.port)],
            env=environment(tmp_path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.known = self._answer()

    def _answer(self):
        for line in self._process.stdout:
            if line.startswith("CLUSTER "):
                return json.loads(line.split(" ", 1)[1])
        raise AssertionError("the cluster ended")

    def actors(self):
        self._process.stdin.write("actors\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self):
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.kill()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def arguments(model, run_dir, *overrides):
    return [
        *("-m", "mxfp4_rl.cli", "train", "--config-name", "quickstart", "trainer.nnodes=2", "trainer.test_freq=-1"),
        *(f"actor_rollout_ref.model.path={model}", f"mxfp4.run_dir={run_dir}", "trainer.logger=[console]"),
        *("trainer.val_before_train=false", *SMALL, *overrides),
    ]


def submit(cluster, tmp_path, command):
    """`ray job submit`, once the cluster takes jobs: its agents start after its nodes are there."""
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit"),
                *("--address", f"http://127.0.0.1:{cluster.port}", "--", sys.executable, *command),
            ],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=500,
        )
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


@pytest.mark.slow
def test_a_run_on_two_raylets_as_a_job_and_by_address_and_a_lost_node(tmp_path):
    model = make_tiny_model(tmp_path / "tiny")
    cluster = RayCluster(tmp_path)
    try:
        # As README says; neither side sets a variable.
        job = submit(cluster, tmp_path, arguments(model, tmp_path / "job", "trainer.total_training_steps=1"))
        log = tmp_path / "job" / "verl.log"
        assert job.returncode == 0, job.stdout + job.stderr + (log.read_text()[-6000:] if log.exists() else "")
        assert "Ray cluster" in job.stdout and "step 1/1" in job.stdout and "succeeded" in job.stdout
        where, head = cluster.actors(), cluster.known["head"]
        # Engine, rollout and reward are the plugin's, on both nodes; the trainer stays with the launcher.
        assert len(set(where["WorkerDict"])) == len(set(where["MXFP4Server"])) == 2, where
        assert where["TaskRunnerV1"] == [head]
        assert log.read_text().count("actor: 14 Linear layers quantised") >= 1
        assert RunLog.load(tmp_path / "job").has("mxfp4/rel_mse")
        assert (tmp_path / "job" / "report" / "report.html").is_file()

        # Two logical GPUs on one node, where each node has one: verl would wait for ever.
        refused = subprocess.run(
            [sys.executable, *arguments(model, tmp_path / "no", "trainer.nnodes=1", "trainer.n_gpus_per_node=2")],
            env=environment(tmp_path) | {"RAY_ADDRESS": cluster.known["address"], "COLUMNS": "1000"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert refused.returncode == 1, refused.stdout + refused.stderr
        assert "this Ray cluster has 2 logical GPU(s) (1 on node " in refused.stderr, refused.stderr
        assert "--num-gpus=2" in refused.stderr and "starts anew" not in refused.stderr

        # The same by address, and then a node is lost.
        run_dir = tmp_path / "joined"
        with open(tmp_path / "joined.txt", "w") as output:
            run = subprocess.Popen(
                [sys.executable, *arguments(model, run_dir, "trainer.total_training_steps=500", "trainer.save_freq=1")],
                env=environment(tmp_path) | {"RAY_ADDRESS": cluster.known["address"], "COLUMNS": "1000"},
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text()):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "joined.txt").read_text()
            time.sleep(0.2)
        os.kill(cluster.known["raylet"], signal.SIGKILL)
        assert run.wait(120) == 1
        printed = (tmp_path / "joined.txt").read_text()
        # On one machine the launcher may be connected to either raylet: it sees its own die, or the other's actors.
        own = f"raylet (Ray's daemon on this node, process {cluster.known['raylet']}) died"
        assert own in printed or "died (" in printed, printed
        assert "last checkpoint: " in printed and "Traceback" not in printed, printed
    finally:
        cluster.end()


def test_paths_are_meant_from_the_launchers_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create(
        {
            "data": {
                "train_files": ["a.parquet", "hdfs://x/b.parquet"],
                "val_files": "/c.parquet",
                "custom_cls": {"path": None},
            },
            "reward": {"custom_reward_function": {"path": "pkg://mine.reward"}, "reward_manager": {"module": None}},
            "trainer": {"default_local_dir": "runs/x", "resume_from_path": None},
        }
    )
    make_paths_absolute(config)
    assert config.data.train_files == [f"{tmp_path}/a.parquet", "hdfs://x/b.parquet"] and config.data.val_files == "/c.parquet"
    assert config.reward.custom_reward_function.path == "pkg://mine.reward" and config.data.custom_cls.path is None
    assert config.trainer.default_local_dir == f"{tmp_path}/runs/x"


def wants(nodes, per_node, device="cuda", **more):
    trainer = {"nnodes": nodes, "n_gpus_per_node": per_node, "device": device}
    reward = {"reward_model": {"enable_resource_pool": False, "nnodes": 1, "n_gpus_per_node": 1} | more}
    return OmegaConf.create({"trainer": trainer, "reward": reward})


@pytest.mark.parametrize(
    ("config", "nodes", "words"),
    [
        (wants(1, 2), {"a" * 20: {"GPU": 1.0, "CPU": 8.0}}, ["has 1 logical GPU(s) (1 on node aaaaaaaa)", "--num-gpus=2"]),
        (wants(1, 1, "cpu"), {"a": {"CPU": 8.0}}, ["has 0 logical GPU(s)", "on a CPU too", "--num-gpus=1"]),
        (wants(1, 2), {"a": {"GPU": 1}, "b": {"GPU": 1}}, ["has 2 logical", "trainer.nnodes=1 x trainer.n_gpus_per_node=2"]),
        (wants(2, 8), {"a": {"GPU": 8}}, ["trainer.nnodes=2 x trainer.n_gpus_per_node=8", "add nodes"]),
        (wants(1, 1), {}, ["has 0 logical GPU(s) (no node)"]),
        (wants(1, 1, enable_resource_pool=True), {"a": {"GPU": 1}}, ["reward.reward_model.n_gpus_per_node=1"]),
    ],
)
def test_a_cluster_with_too_few_devices_is_refused(config, nodes, words):
    with pytest.raises(RuntimeError) as error:
        check_devices(config, lambda: nodes, lambda: nodes)
    assert [word for word in words if word not in str(error.value)] == [] and "\n" not in str(error.value)


def test_devices_that_others_hold_are_waited_for_a_while(monkeypatch):
    monkeypatch.setattr("mxfp4_rl.launch.cluster.FREEING_SECONDS", 0.2)
    nodes, free = {"a": {"GPU": 2}, "b": {"NPU": 2}}, iter([{"a": {"CPU": 1}}, {"a": {"GPU": 2}, "b": {"NPU": 2}}])
    check_devices(wants(2, 2), lambda: nodes, lambda: next(free))
    check_devices(wants(2, 1), lambda: {"a": {"GPU": 2}}, lambda: {"a": {"GPU": 2}})  # both groups on one node
    with pytest.raises(RuntimeError, match="but only 1 of them are free: wait"):
        check_devices(wants(1, 2), lambda: nodes, lambda: {"a": {"GPU": 1}})


def test_a_run_directory_that_ray_deletes_is_refused():
    with pytest.raises(LaunchError, match=r"Ray's copy of the job's working directory.*absolute path"):
        check_run_dir(Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/quickstart"))
    check_run_dir(Path("/home/me/runs/quickstart"))
