"""What a layer of experts costs, forward and backward, beside transformers' own. `python recipes/step_cost/experts.py --help`.

One layer with random weights, of Qwen3-30B-A3B's shape by default: 128 experts of 2048 x 768, 8 a token, tokens shared out by a
skewed router. Rivals in the same process: transformers' `grouped_mm` and `eager` implementations in BF16. Times are medians of
CUDA events around forward and backward, the weights' operands kept from one to the next as within an optimiser step; the time
to quantise them is a column of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import recipe_with

VARIANTS = {  # words of the recipe, values of ModelRecipe; or the name of transformers' implementation
    "BF16, transformers grouped_mm": "grouped_mm",
    "BF16, transformers eager": "eager",
    "W4A16": ("mxfp4", dict(activation=None)),
    "W4A4": ("mxfp4", {}),
    "W4A4 + MBS + OF": ("mxfp4+mbs+of", {}),
    "W4A4, FP8": ("mxfp4", dict(product="fp8_fast")),
    "W4A4, FP8, promoted sums": ("mxfp4", dict(product="fp8")),
    "W4A4, FP8, mx backward": ("mxfp4", dict(product="fp8_fast", grad="mxfp4", dgrad="mx", wgrad="mx")),
    "W4A4, mx backward": ("mxfp4", dict(grad="mxfp4", dgrad="mx", wgrad="mx")),
}


def experts_layer(arguments):
    """transformers' fused experts, BF16, on the GPU."""
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = transformers.Qwen3MoeConfig(
        hidden_size=arguments.hidden, moe_intermediate_size=arguments.inner, num_experts=arguments.experts,
        num_experts_per_tok=arguments.top, num_hidden_layers=1,
    )  # fmt: skip
    with torch.device("cuda"):
        layer = Qwen3MoeExperts(config).bfloat16()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02)
    return layer


def routed(arguments):
    """Hidden states, chosen experts and their weights; the busiest expert gets about three times the mean."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = dict(device="cuda", generator=generator)
    x = torch.randn(arguments.tokens, arguments.hidden, **draw).bfloat16()
    odds = torch.randn(arguments.experts, **draw) * 0.5 + torch.randn(arguments.tokens, arguments.experts, **draw)
    weights, index = odds.softmax(-1).topk(arguments.top)
    return x.requires_grad_(), index, (weights / weights.sum(-1, keepdim=True)).bfloat16().requires_grad_()


def time_of(run, repeats: int) -> float:
    """Median milliseconds of the device; the host's share shows where it is the slower of the two."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(variant: str, arguments) -> dict:
    from mxfp4_rl.nn import MXFP4Experts
    from mxfp4_rl.nn.experts import PROJECTIONS

    torch.manual_seed(0)
    layer, chosen = experts_layer(arguments), VARIANTS[variant]
    row = {"variant": variant}
    if isinstance(chosen, str):
        layer.config._experts_implementation = chosen
    else:
        words, others = chosen
        MXFP4Experts.swap(layer, "experts", dict.fromkeys(PROJECTIONS, recipe_with(words, **others)))

        def quantise():
            for projection in layer.projections.values():
                projection.release()
                if projection.recipe.in_fp8:
                    projection.fp8_weights(torch.bfloat16)
                else:
                    projection.weight_operand(torch.bfloat16)

        row["quantise_weights_ms"] = time_of(quantise, 5)
    x, index, weights = routed(arguments)
    g = torch.randn_like(x)

    def forward():
        with torch.no_grad():
            layer(x, index, weights)

    def both():
        layer(x, index, weights).backward(g)
        for t in (x, weights, *layer.parameters()):
            t.grad = None

    row["forward_ms"], row["step_ms"] = time_of(forward, arguments.repeats), time_of(both, arguments.repeats)
    began = time.perf_counter()
    both()
    row["host_ms"] = (time.perf_counter() - began) * 1e3
    torch.cuda.synchronize()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top", type=int, default=8, help="experts a token")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: grouped products are measured on CUDA")
    rows = []
    for variant in arguments.variants:
        rows.append(measure(variant, arguments))
        torch.cuda.empty_cache()
        first, row = rows[0], rows[-1]
        print(
            f"{variant:30} forward {row['forward_ms']:8.2f} ms ({first['forward_ms'] / row['forward_ms']:.2f}x)   "
            f"with backward {row['step_ms']:8.2f} ms ({first['step_ms'] / row['step_ms']:.2f}x)   "
            f"host {row['host_ms']:8.2f} ms   weights {row.get('quantise_weights_ms', 0):.2f} ms", flush=True
        )  # fmt: skip
    if arguments.out:
        own = {k: getattr(arguments, k) for k in ("tokens", "experts", "top", "hidden", "inner")}
        result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **own, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
