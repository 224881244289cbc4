"""The parent process of a run: starts the child, shows its progress, ends it, reports.

However the run ends, three things hold afterwards: no process of it is left, Ray's temporary directory is gone, and if
it logged any metrics there is a report. Only SIGKILL takes that from us; the child then ends itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence

from mxfp4_rl.launch import run_state
from mxfp4_rl.launch.outcome import Reporter, print_failure
from mxfp4_rl.launch.preflight import PreparedRun
from mxfp4_rl.launch.processes import RUN_ID_VARIABLE, RunProcesses, become_subreaper
from mxfp4_rl.launch.progress import Display, Tail, alarm_of, make_display, phase_of
from mxfp4_rl.launch.records import CONFIG_FILE, LOG_FILE, print_header, write_records
from mxfp4_rl.launch.run_dir import METRICS_FILE

CHILD_COMMAND = (sys.executable, "-m", "mxfp4_rl.launch.child")
POLL_SECONDS = 0.2
REPORT_PATIENCE = 2.5  # seconds; ending the processes takes 6.5 at most, and Ctrl-C is answered within 10


def launch(run: PreparedRun, child_command: Sequence[str] = CHILD_COMMAND, arguments: Sequence[str] = ()) -> int:
    """Run to the end, however it ends, and release the run directory.

    Args:
        run: from `preflight.prepare`.
        child_command: started with three more arguments: the configuration's path, our process id, and Ray's temporary
            directory (empty when a cluster is joined).
        arguments: the command line, for the record.

    Returns:
        The exit code: 0, 1 after a failure, 130 after Ctrl-C, 143 after SIGTERM.
    """
    temp_dir = None if run.joins_cluster else tempfile.mkdtemp(prefix="mxr-", dir=_short_temp_root())
    log = Tail(run.run_dir.path / LOG_FILE, from_end=True)
    state, code = run_state.begin(run.run_dir.path, log_start=log.offset), 1
    try:
        write_records(run, temp_dir, arguments)
        print_header(run)
        with _signals_caught() as caught:
            code = _run_child(run, temp_dir, child_command, caught, log)
            return code
    finally:
        run_state.end(run.run_dir.path, state, code)
        if temp_dir:
            shutil.rmtree(temp_dir, ignore_errors=True)
        run.run_dir.release()


def _run_child(run: PreparedRun, temp_dir: str | None, command: Sequence[str], caught: list[int], log: Tail) -> int:
    directory, run_id = run.run_dir.path, uuid.uuid4().hex
    # vLLM's sockets lie there, too: a process that is killed leaves its own behind, and the directory goes with the run.
    own = {"VLLM_RPC_BASE_PATH": temp_dir} if temp_dir else {}
    # A resumed run appends to both files; what they hold already is not news.
    metrics, log_start = Tail(directory / METRICS_FILE, from_end=True), log.offset
    become_subreaper()
    with open(directory / LOG_FILE, "ab") as log_file:
        child = subprocess.Popen(
            [*command, str(directory / CONFIG_FILE), str(os.getpid()), temp_dir or ""],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            env={**own, **os.environ, RUN_ID_VARIABLE: run_id, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C in the terminal reaches us only, and we end the run in order
        )
    processes = RunProcesses(run_id, temp_dir, child.pid)
    reporter = Reporter(directory)
    try:
        with make_display(run.total_steps) as display:
            while child.poll() is None and not caught:
                _show_news(display, metrics, log)
                time.sleep(POLL_SECONDS)
            _show_news(display, metrics, log)
        if caught:
            print(f"{signal.Signals(caught[0]).name}: ending the run (once more: kill it now)", flush=True)
            reporter.start()  # while the processes end: both together fit into 10 seconds
    finally:  # an error of ours, such as a closed pipe behind print, must not leave the run behind either
        if not processes.end(interrupt=bool(caught), hurry=lambda: len(caught) > 1):
            left = ", ".join(str(process.pid) for process in processes.alive())
            print(f"these processes of the run could not be ended: {left}", file=sys.stderr, flush=True)
    code = child.wait()
    reporter.start()
    reporter.finish(give_up=lambda: len(caught) > 1, patience=REPORT_PATIENCE)
    if caught:
        return 128 + caught[0]
    if code != 0:
        print_failure(directory / LOG_FILE, log_start, code, run.config["trainer"]["default_local_dir"])
        return 1
    return 0


def _show_news(display: Display, metrics: Tail, log: Tail) -> None:
    for line in log.new_lines():
        alarm = alarm_of(line)
        phase = None if alarm else phase_of(line)
        if alarm:
            display.line(alarm)
        elif phase:
            display.phase(phase)
    for line in metrics.new_lines():
        try:
            record = json.loads(line)
            step, data = record["step"], record["data"]
        except (ValueError, KeyError, TypeError):  # the report counts unreadable lines
            continue
        display.record(step, data)


@contextlib.contextmanager
def _signals_caught() -> Iterator[list[int]]:
    """A list that collects SIGINT, SIGTERM and SIGHUP, which would end this process otherwise."""
    caught: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup: the run outlives its terminal
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, frame: caught.append(n)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _short_temp_root() -> str:
    """Where Ray's temporary directory goes: its sockets lie there, and the path of a socket has 107 bytes at most."""
    root = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return root if len(root) <= 24 else "/tmp"
