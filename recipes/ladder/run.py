"""The ladder's runner: rungs x seeds, several processes at once, each run in a folder of its own.

    python recipes/ladder/run.py --out runs/ladder --seeds 3 --jobs 4 --time-limit 1500

Finished runs (done.json) are skipped and begun ones go on from their last checkpoint, so the same command, given again, does
what is left. At the time limit, on SIGTERM or Ctrl-C every run ends after the step it is in, with a checkpoint. Seeds are the
outer loop: what is cut off has whole ladders of the first seeds. Exit code: 0 all done, 3 more to do, 1 a run failed (its
log.txt says why).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.ladder.options import MORE_TO_DO, Options, write_atomically
from recipes.ladder.rungs import GROUPS, PRESETS, SELECTIONS, Rung, chosen

_IDENTITY = ("recipe", "fp8", "aqn", "seed")  # of a stored run, with the options: a run of other values is another run
_TOLD_TO_END = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes
_LOOP = Path(__file__).with_name("grpo.py")


class Runner:
    """Starts, watches and ends the runs. `runs`: (rung, seed) in the order in which they shall start.

    Raises:
        ValueError: `gpus` is more than there are to see, or `out` holds runs of other options.
    """

    def __init__(self, out: Path, options: Options, runs: list[tuple[Rung, int]], jobs: int = 1, gpus: int = 1):
        self.out, self.jobs, self.gpus = out.absolute(), jobs, gpus
        self.visible = visible_gpus() if gpus > 1 else []
        if gpus > 1 and len(self.visible) < gpus:
            where = "CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else "nvidia-smi"
            raise ValueError(f"--gpus {gpus}, but {where} shows {len(self.visible)} ({','.join(self.visible)})")
        self.revision = git_revision()
        for file in sorted(self.out.glob("*/seed*/config.json")):
            # By way of Options: a run from before there was an option had its default.
            stored, now = (json.loads(json.dumps(vars(o))) for o in (stored_options(file), options))
            if stored != now:
                changed = _changed(stored, now)
                raise ValueError(f"{file.parent} was made with other options ({changed}): give those, or another --out")
        self.waiting = [self._prepared(rung, seed, options) for rung, seed in runs]
        self.waiting = [folder for folder in self.waiting if not (folder / "done.json").is_file()]
        self.finished_before = len(runs) - len(self.waiting)
        self.running: dict[int, tuple[Path, subprocess.Popen]] = {}  # by slot
        self.unfinished: list[Path] = []
        self.failed: list[Path] = []
        self.stopping = False

    def _prepared(self, rung: Rung, seed: int, options: Options) -> Path:
        """The run's folder, with its config.json.

        Raises:
            ValueError: the folder holds a run of other options.
        """
        folder = self.out / rung.name / f"seed{seed}"
        config = {**rung.config(), "seed": seed, "options": vars(options), "work": str(self.out), **self.identity}
        config |= {"git": self.revision, "device": device_name(), "versions": versions()}
        file = folder / "config.json"
        if file.is_file():
            stored = json.loads(file.read_text())
            now = json.loads(json.dumps(config))
            differ = [k for k in (*_IDENTITY, *self.identity) if stored.get(k) != now[k]]
            if differ:
                shown = "; ".join(f"{k}: stored {_changed(stored.get(k), now[k])}" for k in differ)
                raise ValueError(f"{folder} holds another run ({shown}): give its options again, or another --out")
            config = stored | {"work": config["work"]}  # the folder may have been moved; the rest is the run's own
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(config, indent=1) + "\n")
        return folder

    def go(self, time_limit: float | None = None, grace: float = 120.0) -> int:
        """Run until all is done or the limit; returns the exit code. Runs that outlive `grace` seconds more are killed."""
        end = time.monotonic() + (time_limit or float("inf"))
        print(f"{self.finished_before} runs were done, {len(self.waiting)} to do, {self.jobs} at once", flush=True)
        try:
            while self.running or (self.waiting and not self.stopping):
                self._turn(end, grace)
                time.sleep(0.1)
        except BaseException:  # whatever it is: no run goes on that nobody watches
            self.stop()
            while any(process.poll() is None for _, process in self.running.values()):
                self._kill_late(grace)
                time.sleep(0.1)
            raise
        left = len(self.unfinished) + len(self.waiting)
        print(f"{left} runs have more to do, {len(self.failed)} failed", flush=True)
        return 1 if self.failed else MORE_TO_DO if left else 0

    def _turn(self, end: float, grace: float) -> None:
        """One look at the clock and at every slot."""
        if not self.stopping and time.monotonic() >= end:
            print("time limit: telling the runs to end after their step", flush=True)
            self.stop()
        self._kill_late(grace)
        for slot in range(self.jobs):
            if slot in self.running and self.running[slot][1].poll() is not None:
                self._ended(*self.running.pop(slot))
            if slot not in self.running and self.waiting and not self.stopping:
                self._start(slot, self.waiting.pop(0))

    def _kill_late(self, grace: float) -> None:
        if self.stopping and time.monotonic() >= self.told + grace:
            for _, process in self.running.values():
                process.kill()  # what it had since its last checkpoint is lost

    def stop(self, *_) -> None:
        """Tell the runs to end after the step they are in."""
        if not self.stopping:
            self.told, self.stopping = time.monotonic(), True
            for _, process in self.running.values():
                process.send_signal(signal.SIGTERM)

    identity: dict[str, object] = {}  # what else makes a run another run, kept in config.json
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # unless the user's own says otherwise

    def command(self, folder: Path) -> list[str]:
        """What does the run of `folder`."""
        return [sys.executable, str(_LOOP), str(folder)]

    def _start(self, slot: int, folder: Path) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        own = {
            "OMP_NUM_THREADS": str(max(1, cores // self.jobs)),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment = own | self.environment | os.environ | {"LADDER_JOBS": str(self.jobs), "LADDER_REVISION": self.revision}
        environment["LADDER_BEGAN"] = str(time.time())
        if self.gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self.visible[slot % self.gpus]
        with (folder / "log.txt").open("a") as log:
            process = subprocess.Popen(self.command(folder), stdout=log, stderr=log, env=environment)
        self.running[slot] = folder, process
        if self.stopping:  # told between the decision to start and here
            process.send_signal(signal.SIGTERM)
        print(f"{folder.relative_to(self.out)}: started", flush=True)

    def _ended(self, folder: Path, process: subprocess.Popen) -> None:
        code = process.returncode
        if code == MORE_TO_DO or (self.stopping and code in _TOLD_TO_END):
            self.unfinished.append(folder)
        elif code != 0:
            self.failed.append(folder)
        word = {0: "done", MORE_TO_DO: "more to do"}.get(code, f"exit code {code}, see {folder / 'log.txt'}")
        print(f"{folder.relative_to(self.out)}: {word} after {_seconds(folder):.0f} s", flush=True)


def stored_options(config: Path) -> Options:
    return Options.from_dict(json.loads(config.read_text())["options"])


def git_revision() -> str:
    """The checkout's commit, with "+" where it has changes; LADDER_REVISION where there is no git."""
    if given := os.environ.get("LADDER_REVISION"):
        return given
    try:
        git = ["git", "-C", str(_LOOP.parent)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if dirty else "")


def device_name() -> str:
    """The GPU's name; or the processor's."""
    names = _of_all_gpus("name")
    return names[0] if names else f"cpu ({os.cpu_count()} x {platform.machine()})"


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name: its own entries, or every GPU of the machine."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _of_all_gpus("index") if given is None else [gpu for gpu in given.split(",") if gpu]


def _of_all_gpus(what: str) -> list[str]:
    """One property of each GPU, without opening a CUDA context of this process."""
    if not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True)
    return [line.strip() for line in found.stdout.splitlines()] if found.returncode == 0 else []


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers", "mxfp4-rl")}


def _changed(stored, now) -> str:
    if not (isinstance(stored, dict) and isinstance(now, dict)):
        return f"{stored}, asked for {now}"
    differ = [k for k in stored.keys() | now.keys() if stored.get(k) != now.get(k)]
    return ", ".join(f"{k}={stored.get(k)}, asked for {now.get(k)}" for k in sorted(differ))


def _seconds(folder: Path) -> float:
    file = folder / "sessions.json"
    return sum(s["wall_s"] for s in json.loads(file.read_text()).values()) if file.is_file() else 0.0


def setting(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def check_given(time_limit: float | None, **counts: int) -> None:
    """Raise ValueError unless every count, by its name on the command line, is at least 1, and a time limit above 0."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: give 1 or more")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"--time-limit {time_limit:g}: give more than 0 seconds, or leave it out")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"), help="folder of the runs")
    groups = ", ".join([*GROUPS, *SELECTIONS])
    parser.add_argument("--rungs", nargs="+", default=["ladder"], help=f"names, groups ({groups}) or all")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="of them; another machine may do the others")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that the processes take in turns")
    parser.add_argument("--time-limit", type=float, help="seconds after which runs end with a checkpoint")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds that they then have for the step they are in")
    parser.add_argument("--preset", choices=PRESETS, default="gpu")
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="KEY=JSON", help="options of grpo.py")
    parser.add_argument("--report", type=Path, help="where the report goes; default: results.md in --out")
    parser.add_argument("--preface", type=Path, help="Markdown that the report begins with")
    parser.add_argument("--list", action="store_true", help="print rungs and options, run nothing")
    a = parser.parse_args(arguments)
    try:
        check_given(a.time_limit, seeds=a.seeds, jobs=a.jobs, gpus=a.gpus)
        rungs, options = chosen(a.rungs), Options.from_dict({**PRESETS[a.preset], **dict(a.set)})
        if a.list:
            print(json.dumps({"options": vars(options), "rungs": {r.name: r.label for r in rungs}}, indent=1))
            return 0
        seeds = range(a.first_seed, a.first_seed + a.seeds)
        runner = Runner(a.out, options, [(rung, seed) for seed in seeds for rung in rungs], a.jobs, a.gpus)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    code = runner.go(a.time_limit, a.grace)
    from recipes.ladder.report import write_report

    page = write_report(a.out, a.report or a.out / "results.md", [r.name for r in rungs], seeds, a.preface)
    print(f"report: {page}", flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
