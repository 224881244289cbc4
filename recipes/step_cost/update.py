"""What takes the time of a policy update: the actor alone, without verl and vLLM. `python recipes/step_cost/update.py --help`.

FSDP2 on one GPU as verl has it (FP32 masters, BF16 compute, parameters gathered layer by layer), gradient checkpointing, random
weights of a real shape. For each variant: seconds of the forward passes that old log-probs take and of the update, the share of
the time in which the GPU works, and the kernels that take most of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import SHAPES, recipe_with

VARIANTS = {  # words of the recipe, values of ModelRecipe
    "bf16": None,
    "w4a16 mxfp4": ("mxfp4", dict(activation=None)),
    "w4a4 mxfp4, ste": ("mxfp4", {}),
    "w4a4 mxfp4, ste, fp8_fast": ("mxfp4", dict(product="fp8_fast")),
    "w4a4 mxfp4, mx, fp8_fast": ("mxfp4", dict(grad="mxfp4", dgrad="mx", wgrad="mx", product="fp8_fast")),
    "w4a4 mxfp4+mbs+of, ste": ("mxfp4+mbs+of", {}),
}


def build(variant: str, arguments) -> nn.Module:
    """The sharded model on the GPU, converted as the variant says."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    from mxfp4_rl import convert
    from mxfp4_rl.nn import converted_layers

    values = dict(SHAPES[arguments.shape])
    if arguments.layers:
        values["num_hidden_layers"] = arguments.layers
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if arguments.liger:  # what verl does for actor_rollout_ref.model.use_liger
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, swiglu=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if VARIANTS[variant] is not None:
        words, others = VARIANTS[variant]
        print(convert(model, recipe_with(words, **others)).describe(), flush=True)
        for layer in converted_layers(model).values():
            layer.gathered = True
    policy = dict(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for block in model.model.layers:
        fully_shard(block, **policy)
    return fully_shard(model, **policy).train()


def log_probs(model: nn.Module, ids: torch.Tensor, responses: int) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=responses + 1).logits[:, :-1]
    return -nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, -responses:].flatten(), reduction="none")


def step(model, optimiser, batches, arguments) -> dict[str, float]:
    """One forward pass over all micro-batches, then their gradients and the optimiser's step; seconds of both."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        for ids, _ in batches:
            log_probs(model, ids, arguments.tokens)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    for ids, advantage in batches:
        (-(log_probs(model, ids, arguments.tokens) * advantage.repeat_interleave(arguments.tokens)).mean()).backward()
    optimiser.step()
    optimiser.zero_grad()
    torch.cuda.synchronize()
    return {"old_log_prob_s": middle - began, "update_s": time.perf_counter() - middle}


def measure(variant: str, arguments) -> dict:
    """Times of the variant, and where those of an update with half of its micro-batches go."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    model = build(variant, arguments)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, foreach=True)  # its own cost is not the question
    rows, width = arguments.micro_batch, arguments.prompt + arguments.tokens
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    batches = []
    for _ in range(arguments.sequences // rows):
        ids = torch.randint(0, vocabulary, (rows, width), device="cuda")
        batches.append((ids, torch.randn(rows, device="cuda") * arguments.advantage))
    torch.cuda.reset_peak_memory_stats()
    step(model, optimiser, batches, arguments)
    times = [step(model, optimiser, batches, arguments) for _ in range(arguments.repeats)]
    row = {"variant": variant, "liger": arguments.liger, "micro_batch": rows}
    row |= {k: sum(t[k] for t in times) / len(times) for k in times[0]}
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    part = batches[: max(1, len(batches) // 2)]
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        times = step(model, optimiser, part, arguments)
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.self_device_time_total > 0]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    hosts = sorted((e for e in events if e.device_type == torch.autograd.DeviceType.CPU), key=lambda e: -e.self_cpu_time_total)
    row["profiled"] = {
        "wall_s": sum(times.values()), "gpu_s": sum(e.self_device_time_total for e in kernels) / 1e6,
        "launches": sum(e.count for e in kernels),
        "kernels": [[e.key[:110], e.self_device_time_total / 1e3, e.count] for e in kernels[: arguments.shown]],
        "host": [[e.key[:80], e.self_cpu_time_total / 1e3, e.count] for e in hosts[: arguments.shown]],
    }  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="decoder layers, if not all of them")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--liger", action="store_true", help="fused norms, rotary embedding, gate (needs liger-kernel)")
    parser.add_argument("--prompt", type=int, default=88, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=512, help="of each response")
    parser.add_argument(
        "--advantage", type=float, default=1.0, help="standard deviation of the sequences'; 0: no gradient at all"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--shown", type=int, default=25, help="kernels in the table")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: the update is measured on CUDA")
    torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:29533", world_size=1, rank=0)
    torch.cuda.set_device(0)
    rows = []
    for variant in arguments.variants:
        try:
            rows.append(measure(variant, arguments))
        except Exception as error:  # the other variants are still worth their time
            print(f"{variant}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        finally:
            torch.cuda.empty_cache()
        row, p = rows[-1], rows[-1]["profiled"]
        print(
            f"== {variant}: forward {row['old_log_prob_s']:.2f} s, update {row['update_s']:.2f} s, "
            f"peak {row['peak_gib']:.1f} GiB; profiled {p['wall_s']:.2f} s, GPU busy {p['gpu_s']:.2f} s, "
            f"{p['launches']} kernels", flush=True
        )  # fmt: skip
        for name, milliseconds, count in p["kernels"][:16]:
            print(f"{milliseconds:10.2f} ms {count:7}  {name}")
        if arguments.out:
            arguments.out.write_text(
                json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n"
            )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
