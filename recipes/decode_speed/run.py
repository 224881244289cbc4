"""Tokens a second of vLLM with random weights, BF16 against packed MXFP4: `python recipes/decode_speed/run.py --help`.

Every variant is an engine in a process of its own. They start and compile side by side; once all are up they are timed in turn
(a file lock), each with the GPU to itself. The default shape is Qwen2.5-3B's. Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import SHAPES, ask, recipe_of, tell

MARLIN = "marlin mxfp4"  # vLLM's own W4A16 kernel for the same codes and scales, through compressed-tensors
MARLIN_CONFIG = {
    "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": {
        "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
    }}},
}  # fmt: skip
OF_VLLM = ("bf16", "fp8", MARLIN)
VARIANTS = (*OF_VLLM, "w4a16 mxfp4", "w4a16 mxfp4+mbs", "w4a16 mxfp4+mbs+of", "w4a4 mxfp4", "w4a4 mxfp4+mbs+of")


def measure(arguments) -> dict:
    """One variant, in this process; waits for the lock before it times."""
    from mxfp4_rl.vllm_plugin import offline

    own = {"quantization": "fp8"} if arguments.variant == "fp8" else {}
    if arguments.variant == MARLIN:
        os.environ["VLLM_MXFP4_USE_MARLIN"] = "1"
        own = {"quantization": "compressed-tensors", "hf_overrides": {"quantization_config": MARLIN_CONFIG}}
    began = time.perf_counter()
    most = max(arguments.sequences)
    recipe = recipe_of(arguments.variant, OF_VLLM)
    llm = offline.start(
        arguments.folder, recipe, skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=most, seed=1,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=arguments.kv_mib << 20, enable_prefix_caching=False,
        compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"}, **own,
    )  # fmt: skip
    held = offline.model_of(llm)
    if recipe is not None:
        _random_codes(held)
    ready = time.perf_counter() - began
    weights = sum(p.numel() * p.element_size() for p in held.parameters())
    row = {"variant": arguments.variant, "start_s": ready, "weights_gib": weights / 2**30}
    folder = Path(arguments.folder)
    _mark_ready(folder, arguments.variant)
    while len(list(folder.glob("ready-*"))) < arguments.count:  # others still compile
        time.sleep(0.5)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for sequences in arguments.sequences:
            row[str(sequences)] = _rate(llm, sequences, arguments.tokens)
        if arguments.trace:
            row["kernels"] = _trace(llm, most)
    return row


def _mark_ready(folder: Path, variant: str) -> None:
    (folder / f"ready-{variant}").touch()


def _random_codes(held: torch.nn.Module) -> None:
    for name, parameter in held.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("weight_packed", "residual_packed"):
            parameter.data.random_(0, 256)
        elif last in ("weight_scale", "residual_scale"):
            parameter.data.fill_(119)  # 2^-8


def _rate(llm, sequences: int, tokens: int) -> float:
    """Generated tokens a second while `sequences` decode together, prefill taken out: a long run minus a short one."""
    from vllm import SamplingParams

    def seconds(n):
        prompts = torch.randint(10, 1000, (sequences, 128)).tolist()
        began = time.perf_counter()
        sampling = SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - began

    seconds(8)
    short, long = (min(seconds(n) for _ in range(2)) for n in (8, 8 + tokens))
    return sequences * tokens / (long - short)


def _trace(llm, sequences: int) -> list:
    """Microseconds a token step by kernel, the largest first."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": p} for p in torch.randint(10, 1000, (sequences, 128)).tolist()]
    options = SamplingParams(temperature=1.0, max_tokens=17, ignore_eos=True, detokenize=False)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        llm.generate(prompts, options, use_tqdm=False)
    times = [(e.key[:90], e.self_device_time_total / 16, e.count / 16) for e in profiler.key_averages()]
    return [[k, round(t, 1), round(n, 1)] for k, t, n in sorted(times, key=lambda e: -e[1])[:14]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-3b", choices=SHAPES)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--sequences", nargs="+", type=int, default=[64], help="concurrent sequences")
    parser.add_argument("--tokens", type=int, default=256, help="timed tokens of each")
    parser.add_argument("--kv-mib", type=int, default=2048, help="MiB of each engine's key-value cache; all are up at once")
    parser.add_argument("--trace", action="store_true", help="also list the kernels that take the time")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        tell(measure(arguments))
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
        options = ["--folder", folder, "--count", str(len(arguments.variants)), *(["--trace"] if arguments.trace else [])]
        options += ["--tokens", str(arguments.tokens), "--kv-mib", str(arguments.kv_mib)]
        options += ["--sequences", *map(str, arguments.sequences)]

        def one(variant):
            row = ask(variant, __file__, "--variant", variant, *options)
            _mark_ready(Path(folder), variant)  # also if it failed: the others need not wait
            return row

        with ThreadPoolExecutor(len(arguments.variants)) as pool:
            rows = [row for row in pool.map(one, arguments.variants) if row]
    base = next((row for row in rows if row["variant"] == "bf16"), None)
    for row in rows:
        rates = [
            f"{n} sequences {row[str(n)]:.0f} tokens/s" + (f" ({row[str(n)] / base[str(n)]:.2f}x)" if base else "")
            for n in arguments.sequences
        ]
        print(f"{row['variant']:20} weights {row['weights_gib']:.2f} GiB  {'  '.join(rates)}  (start {row['start_s']:.0f} s)")
        for kernel in row.get("kernels", []):
            print("    ", *kernel)
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    if len(rows) < len(arguments.variants):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
