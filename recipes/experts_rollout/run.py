"""A mixture of experts in vLLM with packed MXFP4 weights: `python recipes/experts_rollout/run.py --help`.

For each variant, in a process of its own: random weights of Qwen3-MoE's architecture, a vLLM engine that gets them from the
converted transformers model, the experts' dequantised weights of both compared bit for bit, responses sampled from random
prompts, k3 between the rollout's log-probs and the trainer's on the same tokens (as in `recipes/agreement`), and tokens a
second while decoding. The engines start side by side and are timed one after the other, once all are done with the rest. Every
phase says when it began; a variant that fails leaves the others' results. Needs a GPU and vLLM.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import recipe_of, tell

VARIANTS = ("bf16", "w4a16 mxfp4", "w4a4 mxfp4", "w4a4 mxfp4+mbs+of")
_COMMON = dict(
    model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], max_position_embeddings=4096, rms_norm_eps=1e-6,
    rope_theta=1e6, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1, norm_topk_prob=True,
    decoder_sparse_step=1, mlp_only_layers=[], head_dim=128, hidden_act="silu",
)  # fmt: skip
SHAPES = {
    "small": dict(
        hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4,
        num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=4, vocab_size=4096,
    ),
    "qwen3-30b-a3b": dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        num_attention_heads=32, num_key_value_heads=4, num_hidden_layers=4, vocab_size=32768,
    ),
}  # fmt: skip
_BEGAN = time.perf_counter()


def phase(text: str) -> None:
    print(f"[{time.perf_counter() - _BEGAN:6.1f} s] {text}", flush=True)


def trainer_model(folder: str, seed: int = 0):
    """Random weights, the same for every variant, on the GPU in BF16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:  # as wide as keeps activations near 1; the router's choices are to be clear ones
                scale = 1.0 if "embed" in name else (2.0 if ".gate." in name else 1.0) / parameter.shape[-1] ** 0.5
                parameter.normal_(std=scale, generator=generator)
    return model.eval()


def experts_equal(held: torch.nn.Module, layers: dict) -> dict:
    """Whether every converted layer of the trainer and what vLLM holds for it stand for the same operand; first difference."""
    from mxfp4_rl.vllm_plugin.experts import MXFP4ExpertsMethod

    compared = 0
    for name, module in held.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, MXFP4ExpertsMethod):
            continue
        for own in method.recipes:
            weight = method.weight(module, own)
            ours = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.bfloat16)
            trained = layers[f"{name.removesuffix('.routed_experts')}.{own}"]  # from vLLM 0.24 on one level deeper
            if not torch.equal(ours, trained.weight_operand(torch.bfloat16)):
                return {"experts_equal": False, "first_difference": f"{name}.{own}"}
            compared += 1
    return {"experts_equal": compared > 0, "experts_compared": compared}


def k3_of(llm, model, arguments) -> dict:
    """k3 between rollout and trainer on sampled tokens, and on greedy ones."""
    from agreement.run import k3, log_probs
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(10, vocabulary, (arguments.prompts, 32), generator=generator).tolist()
    row = {}
    for kind, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        options = {"max_tokens": arguments.response, "logprobs": 0, "seed": 1, "ignore_eos": True, "detokenize": False}
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts], SamplingParams(temperature=temperature, **options), use_tqdm=False
        )
        responses = [list(o.outputs[0].token_ids) for o in outputs]
        if kind == "greedy":  # whose processed log-probs are all 0
            row["greedy_tokens"] = sum(map(len, responses))
            row["greedy_distinct"] = len({t for r in responses for t in r})
            continue
        rollout = torch.tensor(
            [step[t].logprob for o in outputs for t, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)], device="cuda"
        )
        own = log_probs(model, prompts, responses)
        row |= {"tokens": rollout.numel(), "k3_kl": k3(rollout, own), "entropy": -rollout.mean().item()}
        row["floor_batch"] = k3(log_probs(model, prompts, responses, batch=8), own)
        row["pearson"] = torch.corrcoef(torch.stack([rollout.exp(), own.exp()]))[0, 1].item()
    return row


def measure(arguments) -> dict:
    """One variant, in this process; what one phase raises is told in the row, and the next one goes on."""
    from mxfp4_rl.vllm_plugin import offline

    recipe = recipe_of(arguments.variant)
    row: dict = {"variant": arguments.variant, "errors": []}

    def attempt(what, function):
        phase(f"{arguments.variant}: {what}")
        try:
            row.update(function())
        except Exception:
            traceback.print_exc()
            row["errors"].append(f"{what}: {traceback.format_exc().splitlines()[-1]}")

    began = time.perf_counter()
    phase(f"{arguments.variant}: engine")
    # vLLM's choice for BF16 experts, FlashInfer's CUTLASS kernels, compiles for minutes on a host that never ran them.
    backend = {"moe_backend": arguments.moe_backend} if recipe is None else {}
    graphs = {} if arguments.eager else {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}
    llm = offline.start(
        arguments.folder, recipe, skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=max(arguments.sequences), seed=1,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=arguments.kv_mib << 20, enable_prefix_caching=False,
        enforce_eager=arguments.eager, **graphs, **backend,
    )  # fmt: skip
    held = offline.model_of(llm)
    row["start_s"] = time.perf_counter() - began
    row["weights_mib"] = sum(p.numel() * p.element_size() for p in held.parameters()) / 2**20
    if recipe is not None:
        attempt("paths", lambda: {"paths": held_paths(llm)})
    phase(f"{arguments.variant}: rollout: {row.get('paths', 'BF16')}")
    agree(llm, recipe, arguments, attempt, row)
    gc.collect()
    torch.cuda.empty_cache()
    tell(row)  # should timing be cut short
    from decode_speed.run import _rate

    with alone(arguments):
        for sequences in arguments.sequences:
            attempt(f"time {sequences}", lambda n=sequences: {str(n): _rate(llm, n, arguments.tokens)})
            tell(row)
    return row


def agree(llm, recipe, arguments, attempt, row: dict) -> None:
    """All that needs the trainer's model, which is gone afterwards."""
    from mxfp4_rl.nn import convert, converted_layers
    from mxfp4_rl.vllm_plugin import offline

    held, shipments = offline.model_of(llm), []
    model = trainer_model(arguments.folder)
    if recipe is not None:
        convert(model, recipe)

    def ship():
        began = time.perf_counter()
        shipments.append(offline.load(llm, model))
        torch.cuda.synchronize()
        return {"ship_s": time.perf_counter() - began, **shipments[0].sizes}

    attempt("ship", ship)
    if recipe is not None and shipments:
        attempt("checksum", lambda: checksums(held, shipments[0]))
        attempt("compare", lambda: experts_equal(held, converted_layers(model)))
        row["errors"] += [f"{name} is false" for name in ("checksum_equal", "experts_equal") if row.get(name) is False]
    if shipments:
        attempt("generate and compare", lambda: k3_of(llm, model, arguments))


def held_paths(llm) -> str:
    """Which path serves how many layers."""
    return llm.llm_engine.vllm_config.quant_config.describe()


def checksums(held: torch.nn.Module, shipment) -> dict:
    """Whether the bytes that are held sum up to those that were shipped."""
    from mxfp4_rl.vllm_plugin.layout import checksum

    return {"checksum_equal": int(checksum(held.named_parameters())) == int(shipment.checksum)}


def run_variant(variant: str, options: list[str], seconds: float, folder: str) -> dict:
    """One variant in a process of its own, whose phases go on; the last row it told, or why there is none."""
    command = [sys.executable, __file__, "--variant", variant, *options]
    told: dict = {"variant": variant, "errors": ["no result"]}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit = threading.Timer(seconds, process.kill)
    limit.start()
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("RESULT "):
            told = json.loads(line.removeprefix("RESULT "))
        elif line.startswith("["):
            print(line, end="", flush=True)
    if process.wait() < 0 and limit.finished.is_set():
        told["errors"] = [*told["errors"], f"stopped after {seconds:.0f} s"]
    limit.cancel()
    mark_ready(folder, variant)  # also if it failed: the others need not wait
    if told["errors"]:
        print(f"{variant}: {told['errors']}\n" + "".join(lines[-60:]), flush=True)
    return told


def mark_ready(folder: str, variant: str) -> None:
    Path(folder, f"ready-{variant}").touch()


@contextlib.contextmanager
def alone(arguments):
    """While the GPU is this process' own: every variant is done with all but timing, and no other one times."""
    mark_ready(arguments.folder, arguments.variant)
    last = time.perf_counter() + arguments.seconds / 2
    while len(list(Path(arguments.folder).glob("ready-*"))) < arguments.count and time.perf_counter() < last:
        time.sleep(0.5)
    with open(Path(arguments.folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="of the shape; 4 unless told")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--sequences", nargs="+", type=int, default=[16, 64], help="concurrent sequences that are timed")
    parser.add_argument("--tokens", type=int, default=128, help="timed tokens of each")
    parser.add_argument("--prompts", type=int, default=64, help="whose responses are compared")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response")
    parser.add_argument("--kv-mib", type=int, default=1024, help="MiB of an engine's key-value cache")
    parser.add_argument("--seconds", type=float, default=240, help="stop a variant after this long")
    parser.add_argument("--moe-backend", default="triton", help="vLLM's, for BF16; its own choice is auto")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation and CUDA graphs")
    parser.add_argument("--out", type=Path, help="write the rows as JSON, after every variant")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        try:
            tell(measure(arguments))
        except Exception:
            traceback.print_exc()
            tell({"variant": arguments.variant, "errors": [traceback.format_exc().splitlines()[-1]]})
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = {**_COMMON, **SHAPES[arguments.shape]}
        config["num_hidden_layers"] = arguments.layers or config["num_hidden_layers"]
        Path(folder, "config.json").write_text(json.dumps(config))
        options = ["--folder", folder, "--moe-backend", arguments.moe_backend, *(["--eager"] if arguments.eager else [])]
        for name in ("tokens", "prompts", "response", "kv_mib"):
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        options += ["--sequences", *map(str, arguments.sequences)]
        options += ["--seconds", str(arguments.seconds), "--count", str(len(arguments.variants))]
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        with ThreadPoolExecutor(len(arguments.variants)) as pool:
            running = [pool.submit(run_variant, v, options, arguments.seconds, folder) for v in arguments.variants]
            for done in as_completed(running):
                rows.append(done.result())
                if arguments.out:
                    arguments.out.write_text(json.dumps({"device": device, "config": config, "rows": rows}, indent=1) + "\n")
    rows.sort(key=lambda row: arguments.variants.index(row["variant"]))
    table(rows, arguments.sequences)
    if any(row["errors"] for row in rows):
        raise SystemExit(1)


def table(rows: list[dict], sequences: list[int]) -> None:
    base = next((row for row in rows if row["variant"] == "bf16"), {})
    for row in rows:
        rates = []
        for n in map(str, sequences):
            if n in row:
                against = f" ({row[n] / base[n]:.2f}x)" if n in base else ""
                rates.append(f"{n} sequences {row[n]:.0f} tokens/s{against}")
        k3 = f"k3 {row['k3_kl']:.2e} (floor {row['floor_batch']:.1e})" if "k3_kl" in row else "k3 -"
        same = f"experts equal {row.get('experts_equal')}, checksum {row.get('checksum_equal')}"
        print(f"{row['variant']:20} weights {row.get('weights_mib', 0):.0f} MiB  {k3}  {same}  {'  '.join(rates)}", flush=True)


if __name__ == "__main__":
    main()
