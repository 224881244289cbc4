"""`mxfp4-rl doctor`: can this machine train? A ladder of checks from the Python version to a run of two steps.

A rung asks the code that will be asked in a run (which kernel, which version range) and never fails itself: whatever goes wrong
in it, a broken library included, is its answer. States: "ok"; "warning", which a run survives; "missing", which it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mxfp4_rl.launch import MIN_FREE_DISK, MIN_FREE_MEMORY, quietly

OK, WARNING, MISSING = "ok", "warning", "missing"
DISTRIBUTION = "mxfp4-rl"
MODULES = {"hydra-core": "hydra", "TransferQueue": "transfer_queue"}  # where a distribution's module has another name
FROM_VERL = ("ray", "tensordict")  # what we use of what verl asks for
RAY_SECONDS, RUN_SECONDS = 120, 900
RAY_SCRIPT = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
ray.shutdown()
"""
SMALL_RUN = (
    *("trainer.total_training_steps=2", "trainer.test_freq=-1", "trainer.val_before_train=false", "trainer.logger=[console]"),
    *("data.train_batch_size=4", "data.max_prompt_length=128", "mxfp4.task.val_size=8", "mxfp4.aqn.stages=2"),
    *("actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8"),
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
)


@dataclasses.dataclass(frozen=True)
class Check:
    """What a rung found; `fix` is a command, or what else to do."""

    name: str
    state: str
    text: str
    fix: str | None = None

    def line(self) -> str:
        """For the terminal: one line, aligned."""
        return f"{self.state:<8} {self.name:<14} {self.text}" + (f"  ->  {self.fix}" if self.fix else "")


def main(argv: Sequence[str]) -> int:
    """Climb the ladder and print it; 0 if training can run here, else 1."""
    parser = argparse.ArgumentParser(prog="mxfp4-rl doctor", description="Check this machine, from Python to a training run.")
    parser.add_argument("--run", action="store_true", help="also train a tiny model for two steps (a minute or two)")
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    options = parser.parse_args(argv)
    checks = []
    try:
        for check in ladder(options.run):
            checks.append(check)
            if not options.json:
                print(check.line(), flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    ready = all(check.state != MISSING for check in checks)
    if options.json:
        print(json.dumps({"ready": ready, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        print("training can run here" if ready else "training cannot run here: see what is missing above")
    return 0 if ready else 1


def ladder(with_run: bool) -> Iterator[Check]:
    """All checks in order; a rung that needs a missing one is not tried."""
    states: dict[str, str] = {}
    for name, needs, rung in RUNGS:
        absent = [need for need in needs if states.get(need) == MISSING]
        if name == "training run" and not with_run:
            continue
        if name == "training run":
            absent = [found for found, state in states.items() if state == MISSING]
        if absent:
            states[name] = MISSING
            yield Check(name, MISSING, f"not tried: {', '.join(absent)} first")
            continue
        for check in _climb(name, rung):
            states[check.name] = check.state
            yield check


def _climb(name: str, rung: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        with quietly(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = list(rung())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may even call sys.exit when imported
        found = [Check(name, MISSING, _reason(error))]
    yield from found


def _reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}".rstrip(": ")[:300]


# ---- the machine


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    try:
        wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        yield Check("python", MISSING, f"{found}, but {DISTRIBUTION} is not installed into it", "pip install -e .")
        return
    fits = SpecifierSet(wanted).contains(found, prereleases=True)
    yield Check("python", OK if fits else MISSING, f"{found} (wanted: {wanted})", None if fits else "make PYTHON=python3.11")


def _system() -> Iterator[Check]:
    linux = platform.system() == "Linux"
    text = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Check("system", OK if linux else WARNING, text, None if linux else "use Linux: nothing else was tried")


def _resources() -> Iterator[Check]:
    import psutil

    free, cores = psutil.virtual_memory().available, len(os.sched_getaffinity(0))
    few = free < MIN_FREE_MEMORY
    fix = f"free some: a run of a small model takes {MIN_FREE_MEMORY / 2**30:.0f} GiB and more"
    yield Check("memory", WARNING if few else OK, f"{free / 2**30:.1f} GiB free", fix if few else None)
    disk = shutil.disk_usage(".").free
    few = disk < MIN_FREE_DISK
    yield Check("disk", WARNING if few else OK, f"{disk / 2**30:.1f} GiB free here", "mxfp4.run_dir=ELSEWHERE" if few else None)
    yield Check("cores", OK if cores > 1 else WARNING, str(cores))


# ---- packages


def _packages() -> Iterator[Check]:
    """Every package that the metadata of mxfp4-rl (and of verl, for Ray) asks for: its version, and whether it imports."""
    from packaging.requirements import Requirement

    for distribution in (DISTRIBUTION, "verl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # verl's absence was told by the first
            for requirement in map(Requirement, importlib.metadata.requires(distribution) or []):
                asked = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
                if asked and (distribution == DISTRIBUTION or requirement.name in FROM_VERL):
                    yield _package(requirement)


def _package(requirement) -> Check:
    name, fix = requirement.name, f"pip install '{requirement.name}{requirement.specifier}'"
    wanted = f" (wanted: {requirement.specifier})" if requirement.specifier else ""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, MISSING, f"not installed{wanted}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, MISSING, f"{version}{wanted}", fix)
    try:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Check(name, MISSING, f"{version}, cannot be imported: {_reason(error)}", f"pip install --force-reinstall {name}")
    return Check(name, OK, f"{version}{wanted}")


# ---- the GPU


def _cuda() -> Iterator[Check]:
    import torch

    driver, build = _driver(), torch.version.cuda
    if torch.cuda.is_available():
        yield Check("cuda", OK, f"torch for CUDA {build}, driver {driver or 'unknown'}")
    elif driver is None:
        yield Check("cuda", OK, "no NVIDIA driver: training runs on the CPU (--config-name quickstart)")
    elif build is None:
        yield Check("cuda", WARNING, f"driver {driver}, but torch is a CPU build", "pip install --force-reinstall torch")
    else:
        fix = "update the driver, or install a torch for its CUDA: https://pytorch.org/get-started"
        yield Check("cuda", WARNING, f"torch for CUDA {build} finds no GPU with driver {driver}", fix)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split() or [None])[0] if done.returncode == 0 else None


def _triton() -> Iterator[Check]:
    import torch

    try:
        version = importlib.metadata.version("triton")
        importlib.import_module("mxfp4_kernels.device")
        yield Check("triton", OK, version)
    except Exception as error:
        if torch.cuda.is_available():
            text = f"no kernels, the PyTorch reference runs on the GPU, many times slower ({_reason(error)})"
            yield Check("triton", WARNING, text, "pip install triton")
        else:
            yield Check("triton", OK, "not installed, and not needed on a CPU")


def _gpus() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, compute capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        yield Check(f"gpu {index}", OK, text)


def _device():
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _recipe():
    """The recipe of the packaged configurations."""
    from mxfp4_rl.launch.compose import compose_config, resolved
    from mxfp4_rl.settings import Settings

    return Settings.from_config(resolved(compose_config("quickstart"))["mxfp4"]).recipe


def _kernel_paths() -> Iterator[Check]:
    """Which code each operation takes here, asked of the functions that choose it in a run."""
    import torch

    from mxfp4_rl.nn import fp8, packed
    from mxfp4_rl.quant import quantizer

    device, recipe = _device(), _recipe().weight
    x = torch.ones(32, 128, device=device)
    kernels = quantizer.triton_module(quantizer.kernels_of(recipe), x, recipe, None)
    yield Check("quantise", OK, "Triton kernels" if kernels else "PyTorch reference")
    yield Check("product bf16", OK, "cuBLAS in BF16" if device.type == "cuda" else "PyTorch on the CPU")
    if kernels and fp8.runs_on(device, torch.bfloat16):
        from mxfp4_kernels.matmul.fp8 import _has_block_scaling

        groups = "cuBLAS" if _has_block_scaling(device) else "a Triton kernel"
        text = f"FP8 tensor cores: torch._scaled_mm by rows, {groups} by groups of 128 (product=fp8)"
    else:
        text = "PyTorch reference: no FP8 tensor cores here, or no kernels; leave product=bf16"
    yield Check("product fp8", OK, text)
    decodes = packed.decodes(quantizer.quantize(x, recipe), torch.bfloat16)
    yield Check("rollout", OK, "packed weights through the decode kernel" if decodes else "decoded weights in BF16")
    if kernels:
        from mxfp4_kernels.matmul.native import CAPABILITY

        native = torch.cuda.get_device_capability(device)[0] >= CAPABILITY
        text = "block-scaled FP4 tensor cores" if native else f"none: they begin with compute capability {CAPABILITY}.0"
        yield Check("product fp4", OK, text)


def _vllm() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    from mxfp4_rl.vllm_plugin import SUPPORTED, lacks

    fix, on_gpu = f"pip install 'vllm{SUPPORTED}'", _device().type == "cuda"
    try:
        found = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        text = "not installed: rollouts are rollout.name=mxfp4_hf" + (
            ", much slower" if on_gpu else "; on CPUs vLLM is for tests (`make vllm`)"
        )
        yield Check("vllm", WARNING if on_gpu else OK, text, fix if on_gpu else None)
        return
    fits = SpecifierSet(SUPPORTED).contains(found, prereleases=True)
    yield Check("vllm", OK if fits else WARNING, f"{found} (wanted: {SUPPORTED})", None if fits else fix)
    if missing := lacks():
        text = f"{missing[0]} is missing: vLLM imports it for any quantised model, so rollouts are rollout.name=mxfp4_hf"
        yield Check("vllm needs", WARNING, text, f"pip install '{missing[0]}'")


def _flash_attention() -> Iterator[Check]:
    try:
        found = importlib.metadata.version("flash-attn")
        importlib.import_module("flash_attn")
        yield Check(
            "flash-attn", OK, f"{found}: attn_implementation=flash_attention_2 and use_remove_padding=true are possible"
        )
    except importlib.metadata.PackageNotFoundError:
        on_gpu = _device().type == "cuda"
        text = "not installed: attn_implementation=sdpa with use_remove_padding=false, as configured"
        yield Check("flash-attn", OK, f"{text}; padding is computed too" if on_gpu else text)
    except Exception as error:
        text = f"cannot be imported: {_reason(error)}; verl would stop at it"
        yield Check("flash-attn", WARNING, text, "pip uninstall flash-attn")


def _self_test() -> Iterator[Check]:
    """Quantise and multiply on the device that is there, against the reference on the CPU, bit for bit."""
    import torch

    from mxfp4_rl.nn import packed
    from mxfp4_rl.quant.quantizer import fake_quantize, quantize

    device, recipe = _device(), _recipe()
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(rows, 320, generator=generator).bfloat16() for rows in (48, 8))
    own, reference = quantize(w.to(device), recipe.weight), quantize(w, recipe.weight, backend="reference")
    pairs = [(own.codes, reference.codes), (own.scales, reference.scales)]
    pairs.append((fake_quantize(w.to(device), recipe.weight), reference.dequantize(torch.bfloat16)))
    if not all(torch.equal(a.cpu(), b) for a, b in pairs):
        yield Check(
            "self-test", MISSING, f"the quantiser on {device} differs from the reference", "report it, with this output"
        )
        return
    operands = [fake_quantize(x, recipe.activation).double(), reference.dequantize(torch.bfloat16).double().t()]
    exact, size = operands[0] @ operands[1], operands[0].abs() @ operands[1].abs()
    tokens = fake_quantize(x.to(device), recipe.activation)
    if packed.decodes(own, torch.bfloat16):
        from mxfp4_kernels.matmul.decode import decode_product

        y = decode_product(tokens, own, None)
    else:
        y = tokens @ own.dequantize(torch.bfloat16).t()
    worst = ((y.cpu().double() - exact).abs() / size).max().item()
    good = worst < 2**-8  # the result's rounding to BF16 is 2^-9 of it at most, and the sum is in float32
    text = f"quantiser equal to the reference bit for bit on {device}, product within {worst:.0e} of its terms"
    yield Check("self-test", OK if good else MISSING, text, None if good else "report it, with this output")


# ---- running


def _ray_starts() -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="mxr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", RAY_SCRIPT, folder], capture_output=True, text=True, timeout=RAY_SECONDS, env=_environment()
        )
    if done.returncode == 0:
        yield Check("ray starts", OK, "started, ran a task, stopped")
    else:
        yield Check("ray starts", MISSING, _last_line(done), "pip install --force-reinstall ray")


def _training_run() -> Iterator[Check]:
    from mxfp4_rl.tasks.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory(prefix="mxr-", ignore_cleanup_errors=True) as folder:
        run_dir = Path(folder, "run")
        overrides = [f"actor_rollout_ref.model.path={make_tiny_model(Path(folder, 'model'))}", f"mxfp4.run_dir={run_dir}"]
        command = [sys.executable, "-m", "mxfp4_rl.cli", "train", "--config-name", "quickstart", *SMALL_RUN, *overrides]
        done = subprocess.run(
            [*command, f"trainer.device={_device().type}"],
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            cwd=folder,
            env=_environment() | {"MXFP4_RL_CACHE": str(Path(folder, "cache"))},
        )
        metrics = run_dir / "metrics.jsonl"
        steps = {json.loads(line)["step"] for line in metrics.read_text().splitlines()} if metrics.exists() else set()
    if done.returncode == 0 and {1, 2} <= steps:
        yield Check("training run", OK, f"two steps of a tiny model on the {_device().type}")
    else:
        yield Check("training run", MISSING, _last_line(done), "mxfp4-rl train shows the log")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1][:300] if lines else f"ended with code {done.returncode}"


RUNGS: tuple[tuple[str, tuple[str, ...], Callable[[], Iterator[Check]]], ...] = (
    ("python", (), _python),
    ("system", (), _system),
    ("resources", (), _resources),
    ("packages", (), _packages),
    ("cuda", ("torch",), _cuda),
    ("triton", ("torch",), _triton),
    ("gpus", ("torch",), _gpus),
    ("kernel paths", ("torch", "hydra-core"), _kernel_paths),
    ("vllm", ("torch",), _vllm),
    ("flash-attn", ("torch",), _flash_attention),
    ("self-test", ("torch", "hydra-core"), _self_test),
    ("ray starts", ("ray",), _ray_starts),
    ("training run", (), _training_run),  # needs everything
)
