"""What a training step costs, by part, with random weights of a real shape: `python recipes/step_cost/run.py --help`.

Each variant is a run of verl through `mxfp4-rl train` on one GPU: the same prompts, responses of a fixed length, the same
micro-batches, gradient checkpointing on. Times are verl's own `timing_s/*`, the mean of the steps after the first.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import SHAPES

PLAIN = ["mxfp4.recipe.macro_block=null", "mxfp4.recipe.fallback_alpha=null"]
MX = ["mxfp4.recipe.grad={}", "mxfp4.recipe.dgrad=mx", "mxfp4.recipe.wgrad=mx"]
VARIANTS = {
    "bf16": ["mxfp4.enable=false"],
    "fp8 rollout": ["mxfp4.enable=false", "actor_rollout_ref.rollout.quantization=fp8"],
    "w4a16 mxfp4": [*PLAIN, "mxfp4.recipe.activation=null"],
    "w4a4 mxfp4, mx, fp8_fast": [*PLAIN, *MX, "mxfp4.recipe.product=fp8_fast"],
    "w4a4 mxfp4, ste, fp8_fast": [*PLAIN, "mxfp4.recipe.product=fp8_fast"],
    "w4a4 mxfp4+mbs+of, ste": [],
}
PARTS = ("gen", "old_log_prob", "update_actor", "update_weights", "mxfp4_monitor", "step")


def make_checkpoint(folder: Path, shape: str) -> None:
    """A checkpoint of random BF16 weights, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from mxfp4_rl.tasks.embedded_model import ensure_embedded_model

    folder.mkdir(parents=True)
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in Path(ensure_embedded_model()).iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)


def command_of(variant: str, arguments) -> list[str]:
    """The `mxfp4-rl train` command line of a variant."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    sizes = [
        f"actor_rollout_ref.model.path={arguments.work / arguments.shape}",
        f"data.train_batch_size={arguments.sequences // 4}", f"{actor}.ppo_mini_batch_size={arguments.sequences // 4}",
        f"{rollout}.n=4", f"data.max_response_length={arguments.tokens}", f"{rollout}.ignore_eos=true",
        f"{rollout}.max_model_len={arguments.tokens + 128}", f"{rollout}.max_num_seqs={arguments.sequences}",
        f"{actor}.ppo_micro_batch_size_per_gpu={arguments.micro_batch}",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={arguments.micro_batch}", f"{actor}.calculate_entropy=false",
        f"{rollout}.cudagraph_capture_sizes=[{arguments.sequences}]", f"{rollout}.gpu_memory_utilization=0.2",
        f"trainer.total_training_steps={arguments.steps}", "trainer.val_before_train=false", "trainer.test_freq=-1",
        "trainer.logger=[console]", f"mxfp4.monitor.every={arguments.steps - 1}", f"trainer.experiment_name={_slug(variant)}",
        f"mxfp4.run_dir={arguments.work / 'runs' / _slug(variant)}",
    ]  # fmt: skip
    if variant == arguments.trace:
        sizes += [
            "global_profiler.tool=torch", f"global_profiler.steps=[{arguments.steps - 1}]",
            f"global_profiler.save_path={arguments.work / 'trace'}",
            f"{actor}.profiler.enable=true", f"{actor}.profiler.all_ranks=true",
        ]  # fmt: skip
    return [sys.executable, "-m", "mxfp4_rl.cli", "train", "--config-name", "one_gpu", *sizes, *VARIANTS[variant]]


def run_for(command: list[str], seconds: float, log: Path) -> int:
    """The exit code. What the run prints goes to `log`; after `seconds` it is asked to end, and ends its own processes too.

    Raises:
        subprocess.TimeoutExpired: it was ended.
    """
    # vLLM's FP8 layers would take FlashInfer's and DeepGEMM's kernels, which compile a thousand shapes first: 20 minutes.
    environment = {"VLLM_USE_DEEP_GEMM": "0", "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", **os.environ}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def read(variant: str, arguments) -> dict:
    """Means over the steps after the first (the last one, which the monitor measures, apart)."""
    lines = (arguments.work / "runs" / _slug(variant) / "metrics.jsonl").read_text().splitlines()
    steps = [data for line in lines if "timing_s/step" in (data := json.loads(line)["data"])]
    row = {"variant": variant}
    for part in PARTS:
        values = [s[f"timing_s/{part}"] for s in steps[1:-1] if f"timing_s/{part}" in s] or [steps[-1].get(f"timing_s/{part}")]
        row[part] = sum(values) / len(values) if None not in values else None
    row["monitored_step"] = steps[-1]["timing_s/step"]
    row["tokens_per_s"] = arguments.sequences * arguments.tokens / row["gen"]
    row["peak_gib"] = max(s.get("actor/perf/max_memory_allocated_gb", 0) for s in steps)
    row["reserved_gib"] = max(s.get("actor/perf/max_memory_reserved_gb", 0) for s in steps)
    row |= {k: steps[-1][k] for k in ("mxfp4_sync/bytes", "mxfp4_sync/seconds", "rollout_corr/k3_kl") if k in steps[-1]}
    return row


def kernels_of(folder: Path, count: int = 25) -> list[tuple[str, float, int]]:
    """(kernel, milliseconds, launches) of the largest trace under `folder`, the largest first."""
    traces = sorted((p for p in folder.rglob("*.json*")), key=lambda p: p.stat().st_size)
    if not traces:
        return []
    opened = gzip.open(traces[-1], "rt") if traces[-1].suffix == ".gz" else open(traces[-1])  # noqa: SIM115
    with opened as file:
        events = json.load(file)["traceEvents"]
    times, launches = defaultdict(float), defaultdict(int)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            times[event["name"][:100]] += event["dur"] / 1e3
            launches[event["name"][:100]] += 1
    return [(name, round(t, 2), launches[name]) for name, t in sorted(times.items(), key=lambda e: -e[1])[:count]]


def _slug(variant: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-3b", choices=SHAPES)
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=64, help="a step, four a prompt; all decode together")
    parser.add_argument("--tokens", type=int, default=512, help="of each response")
    parser.add_argument("--micro-batch", type=int, default=16, help="sequences of a training micro-batch")
    parser.add_argument("--trace", choices=VARIANTS, help="profile the update of this variant, too")
    parser.add_argument("--work", type=Path, default=Path("runs/step_cost"), help="checkpoint, logs and traces")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a variant")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    if not (arguments.work / arguments.shape).is_dir():
        make_checkpoint(arguments.work / arguments.shape, arguments.shape)
    rows, failed = [], []
    for variant in arguments.variants:
        try:
            code = run_for(command_of(variant, arguments), arguments.timeout, arguments.work / f"{_slug(variant)}.txt")
            rows.append(read(variant, arguments))
        except (subprocess.TimeoutExpired, OSError, KeyError, IndexError) as error:
            failed.append(variant)
            log = arguments.work / f"{_slug(variant)}.txt"
            print(f"{variant}: failed ({type(error).__name__}: {str(error)[:200]}); what it printed: {log}", flush=True)
            continue
        row = rows[-1]
        print(
            f"{variant:28} {row['tokens_per_s']:.0f} tokens/s  update {row['update_actor']:.2f} s  sync "
            f"{row['update_weights']:.2f} s  step {row['step']:.2f} s  peak {row['peak_gib']:.1f} GiB  exit {code}",
            flush=True,
        )
    trace = kernels_of(arguments.work / "trace")
    for name, milliseconds, launches in trace:
        print(f"{milliseconds:10.2f} ms {launches:7}  {name}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"rows": rows, "trace": trace}, indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
