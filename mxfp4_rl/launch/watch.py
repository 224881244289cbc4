"""Death in a run's Ray processes, told within seconds: a thread of the child process asks Ray's control store which actor
died, and why, and looks whether Ray's own daemons on this machine still run.

verl notices a dead worker only where it waits for that very one: with a dead agent loop worker or transfer queue it waits
for ever, with a dead rollout server it reports something else. The control store knows every actor of every node, so this
holds on a cluster too. What it says is printed as one line, `FAULT_MARK` first, which the launcher shows; then verl gets
`GRACE_SECONDS` to end by itself, and after that this process ends, and the run with it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from mxfp4_rl.launch.failure import FAULT_MARK
from mxfp4_rl.launch.processes import is_alive

POLL_SECONDS = 1.0
GRACE_SECONDS = 15.0
SILENCE_SECONDS = 30.0  # how long the control store may not answer; Ray itself gives up after 60
FAULT_EXIT = 70  # the child's exit code

# What verl's and our classes are to a user. Ray names an actor by its class.
ROLES = (
    ("TaskRunner", "trainer"),
    ("WorkerDict", "actor worker"),
    ("ActorRolloutRefWorker", "actor worker"),
    ("MXFP4Server", "rollout server"),
    ("vLLM", "rollout server"),
    ("RewardLoopWorker", "reward worker"),
    ("AgentLoopWorker", "agent loop worker"),
    ("TransferQueue", "transfer queue"),
    ("SimpleStorageUnit", "storage of the transfer queue"),
    ("LoadBalancer", "load balancer of the rollout"),
)
DAEMONS = {"raylet": "Ray's daemon on this node", "gcs_server": "Ray's control store"}
# Ends that somebody asked for; every other death of a process is a fault.
_INTENDED = re.compile(r"INTENDED_(?:USER|SYSTEM)_EXIT|killed by `ray.kill`")
_FAULTY_REASON = re.compile(r"reason: (?:WORKER_DIED|NODE_DIED)")


class ActorWatch:
    """Watches the actors of this process's Ray job.

    Args:
        actors: Ray's table of actors, as `ray._private.state.actors` gives it (Ray has no public call for it that works
            without the dashboard).
        daemons: processes of Ray that must not end, in place of actors.
        end: called with a reason to end this process; it need not return.
    """

    def __init__(
        self,
        actors: Callable[[], Mapping[str, Mapping]],
        daemons: Sequence[psutil.Process] = (),
        end: Callable[[], None] | None = None,
    ):
        self._actors = actors
        self._daemons = {process: process.name() for process in daemons}
        self._end = end or (lambda: os._exit(FAULT_EXIT))
        self.told: list[str] = []  # the faults so far
        self._seen: set[str] = set()
        self._fault_at: float | None = None
        self._answered = time.monotonic()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Watch from two threads: one asks, which may block, and one looks at the clock."""
        for target in (self._ask, self._judge):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """The run is over: what dies from now on is no fault."""
        self._stopped.set()

    def look(self) -> list[str]:
        """Ask once; prints and returns the faults that are new."""
        found = []
        for process, name in list(self._daemons.items()):
            if not is_alive(process):
                del self._daemons[process]
                found.append(f"{name} ({DAEMONS[name]}, process {process.pid}) died")
        if not found:
            for actor_id, actor in self._actors().items():
                if actor_id not in self._seen and (fault := fault_of(actor)):
                    self._seen.add(actor_id)
                    found.append(fault)
            self._answered = time.monotonic()
        if found and not self._stopped.is_set():
            self._fault_at = self._fault_at or time.monotonic()
            self.told += found
            for fault in found:
                print(f"{FAULT_MARK}{fault}", flush=True)
        return found

    def _ask(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            try:
                self.look()
            except (AttributeError, KeyError, TypeError) as error:  # another Ray, whose table is not what is read here
                kind = f"{type(error).__name__}: {error}"
                print(f"[mxfp4] warning: Ray's table of actors cannot be read ({kind}): deaths are not watched", flush=True)
                self._stopped.set()
            except Exception:  # no answer; the other thread counts how long
                pass

    def _judge(self) -> None:
        while not self._stopped.wait(0.5):
            now = time.monotonic()
            if now - self._answered > SILENCE_SECONDS:
                print(
                    f"{FAULT_MARK}Ray's control store (gcs_server, on the head node) has not answered for "
                    f"{SILENCE_SECONDS:g} s: it was killed, or its node is gone",
                    flush=True,
                )
                self._end()
                return
            if self._fault_at is not None and now - self._fault_at > GRACE_SECONDS:
                print("[mxfp4] verl does not end by itself: ending the run", flush=True)
                self._end()
                return


def local_daemons() -> list[psutil.Process]:
    """The raylet that this process is connected to, and the control store if it runs on this machine."""
    import ray

    node = ray._private.worker.global_worker.node
    marks = {"raylet": node.raylet_socket_name, "gcs_server": node.get_session_dir_path()}
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        mark = marks.get(process.info["name"])
        if mark and any(mark in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def fault_of(actor: Mapping) -> str | None:
    """One sentence on an actor of Ray's table that died unasked; None for every other one."""
    cause = str(actor.get("DeathCause") or "")
    if actor.get("State") != "DEAD" or not _FAULTY_REASON.search(cause) or _INTENDED.search(cause):
        return None
    name = actor["ActorClassName"]
    role = next((role for part, role in ROLES if part in name), "actor")
    where = actor.get("Address", {}).get("IPAddress", "?")
    return f"the {role} died ({name}, process {actor['Pid']} on node {where}): {_why(cause)}"


def _why(cause: str) -> str:
    if "NODE_DIED" in cause:
        return "its node is gone (raylet killed, or the machine)"
    if "OOM" in cause and "memory monitor" in cause.lower():
        return "Ray's memory monitor ended it: too little memory on that node"
    if "exit code" in cause and (code := re.search(r"exit code (\d+)", cause)):
        return f"it ended with exit code {code.group(1)}"
    return "killed by a signal (SIGKILL by the kernel's out-of-memory killer?), crashed, or ended by itself"
