"""What a run writes down and says about itself before it starts."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from omegaconf import OmegaConf

import mxfp4_rl
from mxfp4_rl.launch.preflight import PreparedRun

CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
LOG_FILE = "verl.log"
RECORDED_PACKAGES = (
    *("mxfp4-rl", "verl", "torch", "transformers", "tokenizers", "ray", "tensordict", "TransferQueue"),
    *("vllm", "flash-attn", "triton", "numpy", "hydra-core", "omegaconf", "accelerate", "safetensors", "wandb"),
)
# Only a Ray that is being started takes these; `ray.init` refuses them when it joins a cluster.
LOCAL_RAY_KEYS = ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard", "_temp_dir")


def write_records(run: PreparedRun, temp_dir: str | None, arguments: Sequence[str]) -> None:
    """Write config.yaml (what the child loads) and versions.json; a resumed run keeps those of its earlier parts.

    Args:
        run: from `preflight.prepare`; its configuration gets what Ray is started with.
        temp_dir: Ray's own temporary directory; None when a cluster is joined.
        arguments: the command line.
    """
    ray_init = run.config["ray_kwargs"]["ray_init"]
    if run.joins_cluster:
        for key in LOCAL_RAY_KEYS:
            ray_init.pop(key, None)
    else:
        ray_init["_temp_dir"] = temp_dir
    for name, text in (
        (CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(run.config))),
        (VERSIONS_FILE, json.dumps(versions(arguments) | {"directory": os.getcwd()}, indent=2) + "\n"),
    ):
        path = run.run_dir.path / name
        if run.run_dir.resumes and path.exists():
            path.rename(next(kept for n in range(1, sys.maxsize) if not (kept := _numbered(path, n)).exists()))
        path.write_text(text, encoding="utf-8")


def versions(arguments: Sequence[str]) -> dict:
    """What is needed, beside its configuration, to repeat the run."""
    packages = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "git": {"mxfp4_rl": _own_revision(), "working_directory": git_revision(Path.cwd())},
        "command": ["mxfp4-rl", *arguments],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def resume_command(run_dir: Path) -> str | None:
    """The command line that goes on with a run, for a shell; None where the run did not note its own."""
    try:
        noted = json.loads((run_dir / VERSIONS_FILE).read_text(encoding="utf-8"))
        command, directory = [str(word) for word in noted["command"]], noted.get("directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if command[1:2] != ["train"]:  # started from Python
        return None
    given = {"trainer.resume_mode": "auto", "mxfp4.run_dir": str(run_dir.absolute())}
    kept = [word for word in command if word.lstrip("+").split("=", 1)[0] not in given]
    text = shlex.join([*kept, *(f"{key}={value}" for key, value in given.items())])
    return f"cd {shlex.quote(directory)} && {text}" if directory else text


def git_revision(folder: Path) -> str | None:
    """The commit of the repository around a folder, with "+" where tracked files were changed since; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    return commit and commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _own_revision() -> str | None:
    """This package's commit if it runs from a checkout; installed into somebody's repository, that one's says nothing."""
    module = Path(mxfp4_rl.__file__)
    return git_revision(module.parent) if _git(module.parent, "ls-files", module.name) else None


def print_header(run: PreparedRun) -> None:
    """Say once what runs, with what, and where it writes."""
    settings, trainer = run.settings, run.config["trainer"]
    aqn, directory = settings.aqn, run.run_dir.path
    noise = f"sigma {aqn.sigma_start:g} to {aqn.sigma_end:g} in {aqn.stages} stages"
    prompts, samples = run.config["data"]["train_batch_size"], run.config["actor_rollout_ref"]["rollout"]["n"]
    ray = f"Ray cluster {os.environ.get('RAY_ADDRESS', '')}".rstrip() if run.joins_cluster else "local Ray"
    rows = {
        "model": run.config["actor_rollout_ref"]["model"]["path"],
        "recipe": settings.recipe.describe() if settings.enable else "off: plain verl",
        "quantised": run.quantised,
        "KV cache": settings.kv_cache.describe() if settings.enable and settings.kv_cache else None,
        "AQN": noise if settings.enable and aqn.enable else "off",
        "steps": f"{run.total_steps or 'known to verl only'}, {prompts} prompts x {samples} samples",
        "device": f"{trainer['nnodes']} x {trainer['n_gpus_per_node']} {trainer['device']}, {ray}",
        "run": f"{directory} (resuming)" if run.run_dir.resumes else directory,
        "log": directory / LOG_FILE,
    }
    for label, value in rows.items():
        if value is not None:
            print(f"{label:>9}  {value}")
    for warning in run.warnings:
        print(f"{'warning':>9}  {warning}")
    sys.stdout.flush()


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
