"""How far the rollout's probabilities are from the trainer's, on identical tokens: `python recipes/agreement/run.py --help`.

For each recipe: vLLM samples responses with packed weights, the trainer's model (transformers, converted) gives the same tokens
its own log-probs, and k3 = mean(r - 1 - log r), r = p_trainer / p_rollout, is verl's `rollout_corr/k3_kl`. Beside it the noise
floor: the trainer against itself with another attention kernel, and in batches of another size. A process a recipe; needs a GPU
and vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ask, recipe_of, tell

RECIPES = (
    "bf16",
    "w4a16 mxfp4", "w4a16 mxfp4+mbs", "w4a16 mxfp4+mbs+of",
    "w4a4 mxfp4", "w4a4 mxfp4+mbs", "w4a4 mxfp4+of", "w4a4 mxfp4+mbs+of",
)  # fmt: skip


def k3(rollout: torch.Tensor, trainer: torch.Tensor) -> float:
    """verl's estimate of KL(rollout || trainer) from log-probs of tokens that the rollout sampled."""
    log_ratio = trainer - rollout
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


@torch.no_grad()
def log_probs(model, prompts: list[list[int]], responses: list[list[int]], batch: int = 16) -> torch.Tensor:
    """Of every response token, in order, at temperature 1: float32."""
    out = []
    for i in range(0, len(prompts), batch):
        rows = [p + r for p, r in zip(prompts[i : i + batch], responses[i : i + batch])]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        every = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        for j, row in enumerate(rows):
            n = len(responses[i + j])
            out.append(every[j, len(row) - n - 1 : len(row) - 1].gather(-1, ids[j, len(row) - n : len(row), None]).flatten())
    return torch.cat(out)


def measure(arguments) -> dict:
    """One recipe, in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mxfp4_rl.nn import convert, converted_layers
    from mxfp4_rl.vllm_plugin import offline

    recipe = recipe_of(arguments.recipe)

    def trainer(attention):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, attn_implementation=attention)
        model = model.cuda().eval()
        if recipe is not None:
            convert(model, recipe)
        return model

    model = trainer("sdpa")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    llm = offline.start(
        arguments.model, recipe, gpu_memory_utilization=0.05, max_model_len=512, max_num_seqs=arguments.prompts,
        kv_cache_memory_bytes=arguments.kv_mib << 20, seed=1, enforce_eager=arguments.eager, enable_prefix_caching=False,
    )  # fmt: skip
    shipment = offline.load(llm, model)
    equal = _weights_equal(offline.model_of(llm), converted_layers(model))

    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(1, 100, (arguments.prompts, 2), generator=generator).tolist()
    texts = [f"What is {a} + {b}? Explain your answer step by step." for a, b in pairs]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True, return_dict=False)
        for t in texts
    ]
    sampled = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=1.0, max_tokens=arguments.tokens, logprobs=0, seed=1),
    )
    responses = [list(o.outputs[0].token_ids) for o in sampled]
    rollout = torch.tensor(
        [step[t].logprob for o in sampled for t, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)], device="cuda"
    )
    own = log_probs(model, prompts, responses)
    other = log_probs(trainer("eager"), prompts, responses)
    halves = log_probs(model, prompts, responses, batch=8)
    return {
        "recipe": arguments.recipe,
        "tokens": rollout.numel(),
        "k3_kl": k3(rollout, own),
        "floor_attention": k3(other, own),
        "floor_batch": k3(halves, own),
        "pearson": torch.corrcoef(torch.stack([rollout.exp(), own.exp()]))[0, 1].item(),
        "entropy": -rollout.mean().item(),
        "weights_equal": equal,
        **shipment.sizes,
    }


def _weights_equal(held: torch.nn.Module, layers) -> bool | None:
    """Whether the rollout's layers stand for the very operands that the trainer multiplies by."""
    from mxfp4_rl.vllm_plugin.quantization import MXFP4LinearMethod

    if not layers:
        return None
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, module in held.named_modules():
        if isinstance(getattr(module, "quant_method", None), MXFP4LinearMethod):
            stem, _, last = name.rpartition(".")
            parts = [layers[f"{stem}.{part}"].weight_operand(torch.bfloat16) for part in fused.get(last, (last,))]
            if not torch.equal(module.quant_method.weight(module).dequantize(torch.bfloat16), torch.cat(parts)):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a checkpoint folder, or the embedded model")
    parser.add_argument("--recipe", help="measure this one here and print one JSON line")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="e.g. bf16 'w4a4 mxfp4+mbs+of'")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="of a response, at most")
    parser.add_argument("--kv-mib", type=int, default=2048, help="MiB of vLLM's key-value cache")
    parser.add_argument("--at-once", type=int, default=1, help="processes at once")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation and CUDA graphs")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    if arguments.model == "smollm2-135m-instruct":
        from mxfp4_rl.tasks.embedded_model import ensure_embedded_model

        arguments.model = str(ensure_embedded_model())
    if arguments.recipe:
        tell(measure(arguments))
        return
    options = ["--eager"] if arguments.eager else []
    for name in ("model", "prompts", "tokens", "kv_mib"):
        options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]

    def one(recipe):
        row = ask(recipe, __file__, "--recipe", recipe, *options)
        if row is None:
            return None
        print(
            f"{recipe:22} k3 {row['k3_kl']:.2e}  floor {row['floor_attention']:.2e} (attention), {row['floor_batch']:.2e} "
            f"(batch)  pearson {row['pearson']:.5f}  weights equal {row['weights_equal']}",
            flush=True,
        )
        return row

    with ThreadPoolExecutor(arguments.at_once) as pool:
        rows = list(pool.map(one, arguments.recipes))
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")
    if None in rows:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
