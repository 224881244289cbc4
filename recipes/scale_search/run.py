"""Seconds that each scale rule takes for all Linear weights of a model: `python recipes/scale_search/run.py --help`.

Every weight is quantised by itself to codes and scales, as a weight sync and an export do, by the Triton kernels and by the
PyTorch reference on the same device. `ratio` is to the plain rule of the same format and backend; the paper of ScaleSearch
(arXiv 2605.12464) has 1.74. `one tensor` is all weights as a single matrix: there launches cost nothing and kernels compare.
The kernels' codes and scales of every weight are compared with the reference's to the bit. Without a GPU only the reference
runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

RULES = {
    "nvfp4": ("nvfp4", "nvfp4+four-over-six", "nvfp4+search", "nvfp4+soar"),
    "mxfp4": ("mxfp4", "mxfp4+oas", "mxfp4+search"),
}
BITS = {True: "equal", False: "DIFFERENT", None: "-"}  # to the reference's, which is not compared with itself
BARS = {"seconds": 5.0, "ratio": 1.8}  # of ScaleSearch, on an H100


def weights_of(model: str, layers: int | None) -> list[torch.Tensor]:
    """BF16 matrices of the model's Linear layers, without the output head."""
    from mxfp4_rl.analysis.checkpoint import open_checkpoint
    from mxfp4_rl.analysis.weights import linear_weights
    from mxfp4_rl.evaluation.sources import find_model

    with open_checkpoint(find_model(model)) as checkpoint:
        found = [weight.info for weight in linear_weights(checkpoint)[0] if len(weight.info.shape) == 2]
        return [checkpoint.read(info).to(torch.bfloat16) for info in found[:layers] if "lm_head" not in info.name]


def seconds(work, passes: int) -> float:
    """Of the fastest of so many calls, after one that compiles."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best = float("inf")
    for turn in range(passes + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - began) if turn else best
    return best


def _same_bits(weight: torch.Tensor, recipe, backend: str) -> bool:
    """Whether the backend's codes and scales are the reference's."""
    from mxfp4_rl import quantize

    mine, theirs = (quantize(weight, recipe, backend=own).tensors() for own in (backend, "reference"))
    return all(torch.equal(own, theirs[name]) for name, own in mine.items())


def measure(weights: list[torch.Tensor], words: str, backend: str, passes: int) -> dict | None:
    """Seconds, or None where the backend has no kernel for the recipe."""
    from mxfp4_rl import QuantRecipe, quantize

    recipe = QuantRecipe.parse(words)
    whole = torch.cat([weight.reshape(-1) for weight in weights]).view(-1, recipe.block_size)
    try:
        quantize(weights[0], recipe, backend=backend)
    except ValueError as error:
        print(f"{words}, {backend}: {error}", flush=True)
        return None
    return {
        "recipe": words,
        "backend": backend,
        "same_bits": None if backend == "reference" else all(_same_bits(weight, recipe, backend) for weight in weights),
        "seconds": seconds(lambda: [quantize(weight, recipe, backend=backend) for weight in weights], passes),
        "one_tensor_seconds": seconds(lambda: quantize(whole, recipe, backend=backend), passes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, a hub name or smollm2-135m-instruct")
    parser.add_argument("--format", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--layers", type=int, help="the first N weights only, to try the script")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    weights = [weight.to(device) for weight in weights_of(options.model, options.layers)]
    elements = sum(weight.numel() for weight in weights)
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.model}: {len(weights)} weights, {elements / 1e6:.1f} M elements, on {name}, torch {torch.__version__}")
    print(f"{'recipe':22} {'backend':10} {'seconds':>9} {'ratio':>6} {'one tensor':>11} {'ratio':>6}  bits", flush=True)
    rows = []
    for format in options.format:
        for backend in ("triton", "reference") if on_gpu else ("reference",):
            plain = None
            for words in RULES[format]:
                row = measure(weights, words, backend, options.passes)
                if row is None:
                    continue
                plain = plain or row
                row["ratio"] = row["seconds"] / plain["seconds"]
                row["one_tensor_ratio"] = row["one_tensor_seconds"] / plain["one_tensor_seconds"]
                rows.append(row)
                print(
                    f"{words:22} {backend:10} {row['seconds']:9.4f} {row['ratio']:6.2f} {row['one_tensor_seconds']:11.4f} "
                    f"{row['one_tensor_ratio']:6.2f}  {BITS[row['same_bits']]}",
                    flush=True,
                )
    if on_gpu:
        for row in rows:
            if row["recipe"].endswith("+search") and row["backend"] == "triton":
                met = {key: "met" if row[key] <= bar else "missed" for key, bar in BARS.items()}
                print(f"{row['recipe']}: {BARS['seconds']:.0f} s {met['seconds']}, {BARS['ratio']} times {met['ratio']}")
    if options.out:
        record = {"device": name, "torch": torch.__version__, "model": options.model, "elements": elements, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if any(row["same_bits"] is False for row in rows) else 0)


if __name__ == "__main__":
    main()
