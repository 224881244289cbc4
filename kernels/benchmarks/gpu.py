"""The Triton kernels on a GPU: `python kernels/benchmarks/gpu.py [--json FILE]`, about two minutes.

Times are medians of CUDA-graph replays, so launches cost nothing; every call takes the next of several inputs, together larger
than the L2 cache. Bandwidth counts what an ideal kernel moves: the input read once, the output written once (columns of a
container: the input twice, since a column's scale is known only at its end). Products: `torch._scaled_mm` on containers without
fast accumulation, alone and with the activation's quantisation, against `torch.matmul` in BF16 in the same run; whole steps of
a layer, without graphs, against `nn.Linear`.
"""

import argparse
import itertools
import json
import platform
import time

import torch
import triton
from mxfp4_kernels.container.triton import container

from mxfp4_rl import ModelRecipe, QuantRecipe, quantize
from mxfp4_rl.nn import MXFP4Linear
from mxfp4_rl.quant import fake_quantize

RECIPES = ("mxfp4", "mxfp4+mbs", "mxfp4+mbs+of")
QUANTISED = ((8192, 2048), (8192, 4096), (8192, 11008), (8192, 14336))  # tokens x features of Qwen2.5-3B, Llama-3.1-8B
PRODUCTS = {  # out x in of the fused projections
    "Qwen2.5-3B qkv": (2560, 2048),
    "Qwen2.5-3B o": (2048, 2048),
    "Qwen2.5-3B gate_up": (22016, 2048),
    "Qwen2.5-3B down": (2048, 11008),
    "Llama-3.1-8B qkv": (6144, 4096),
    "Llama-3.1-8B o": (4096, 4096),
    "Llama-3.1-8B gate_up": (28672, 4096),
    "Llama-3.1-8B down": (4096, 14336),
}
TOKENS = 8192


def median_ms(work, inputs, calls: int = 6, replays: int = 11) -> float:
    """Milliseconds of one call of work(input), the inputs taken in turn."""
    for x in inputs:
        work(x)
    torch.cuda.synchronize()
    graph, turn = torch.cuda.CUDAGraph(), itertools.cycle(inputs)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work(next(turn))
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[replays // 2]


def random(rows: int, columns: int, copies: int) -> list[torch.Tensor]:
    return [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]


def quantising():
    """Bandwidth of every kernel, as rows: shape, recipe, kernel, TB/s."""
    for rows, columns in QUANTISED:
        xs = random(rows, columns, 3)
        out, elements = torch.empty_like(xs[0]), rows * columns
        yield rows, columns, "", "copy", elements * 4 / median_ms(out.copy_, xs) / 1e9
        for name in RECIPES:
            recipe = QuantRecipe.parse(name)
            passes = 2 if recipe.fallback_alpha else 1
            kernels = {
                "operand": (lambda x, r=recipe: fake_quantize(x, r), 4),
                "operand, columns": (lambda x, r=recipe: fake_quantize(x, r, axis=0), 4),
                "codes": (lambda x, r=recipe: quantize(x, r), 2 + passes * (0.5 + 1 / 32)),
                "container": (lambda x, r=recipe: container(x, r), 2 + passes),
                "container, columns": (lambda x, r=recipe: container(x.t(), r), 4 + passes),
            }
            for kernel, (work, bytes_per_element) in kernels.items():
                yield rows, columns, name, kernel, elements * bytes_per_element / median_ms(work, xs) / 1e9
        if columns == QUANTISED[0][1]:
            fake_quantize(xs[0], QuantRecipe(), backend="reference")
            torch.cuda.synchronize()
            began = time.perf_counter()
            for x in xs:
                fake_quantize(x, QuantRecipe(), backend="reference")
            torch.cuda.synchronize()
            yield rows, columns, "mxfp4", "operand, PyTorch reference", elements * 4 * 3 / (time.perf_counter() - began) / 1e12


def products():
    """Ratios to BF16, as rows: name, out, in, BF16 TFLOP/s, product, product with the activation's quantisation."""
    recipe = QuantRecipe()
    for name, (out, features) in PRODUCTS.items():
        xs, (w,) = random(TOKENS, features, 3), random(out, features, 1)
        b = container(w, recipe)

        def product(a, b=b):
            return torch._scaled_mm(
                a.payload,
                b.payload.t(),
                scale_a=a.scale.unsqueeze(1),
                scale_b=b.scale.unsqueeze(0),
                out_dtype=torch.bfloat16,
                use_fast_accum=False,
            )

        bf16 = median_ms(lambda x, w=w: x @ w.t(), xs)
        alone = median_ms(product, [container(x, recipe) for x in xs])
        whole = median_ms(lambda x, product=product: product(container(x, recipe)), xs)
        yield name, out, features, 2 * TOKENS * out * features / bf16 / 1e9, bf16 / alone, bf16 / whole


def steps():
    """Ratios of a whole Linear step to nn.Linear in BF16, as rows: name, out, in, BF16 ms, ratio by kind of step.

    Forward, dgrad and wgrad with every quantisation in it, the weight's too; with `product="fp8"`. Replayed as a CUDA graph,
    and "launched": as PyTorch runs it, where launching about twenty small kernels can take longer than they do.
    """
    recipes = {
        "mx": ModelRecipe(grad=QuantRecipe(), dgrad="mx", wgrad="mx", product="fp8"),
        "ste": ModelRecipe(product="fp8"),
    }
    for name, (out, features) in PRODUCTS.items():
        xs, (g,) = random(TOKENS, features, 3), random(TOKENS, out, 1)
        xs = [x.requires_grad_() for x in xs]

        def step(x, layer, g=g):
            layer.weight.grad = x.grad = None
            if isinstance(layer, MXFP4Linear):
                layer.release()
            layer(x).backward(g)

        times = {}
        for kind in ("bf16", *recipes):
            layer = torch.nn.Linear(features, out, bias=False, device="cuda", dtype=torch.bfloat16)
            if kind != "bf16":
                MXFP4Linear.swap(layer, name, recipes[kind])
            times[kind] = median_ms(lambda x, layer=layer: step(x, layer), xs, calls=3)
            turn = itertools.cycle(xs)
            launched = triton.testing.do_bench(
                lambda layer=layer, turn=turn: step(next(turn), layer), warmup=20, rep=60, return_mode="median"
            )
            times[f"{kind}, launched"] = launched
        ratios = {kind: times["bf16"] / times[kind] for kind in recipes}
        ratios |= {f"{kind}, launched": times["bf16, launched"] / times[f"{kind}, launched"] for kind in recipes}
        yield name, out, features, times["bf16"], ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("quantise", "products", "steps"), help="one of the three tables")
    parser.add_argument("--json", help="also write everything to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(about))
    print("\n| tokens x features | recipe | kernel | TB/s | of a copy |\n|---|---|---|---|---|")
    table, copy = [], 1.0
    for rows, columns, recipe, kernel, rate in quantising() if options.only in (None, "quantise") else ():
        copy = rate if kernel == "copy" else copy
        table.append(
            {"rows": rows, "columns": columns, "recipe": recipe, "kernel": kernel, "TB/s": rate, "of_copy": rate / copy}
        )
        print(f"| {rows} x {columns} | {recipe} | {kernel} | {rate:.3g} | {rate / copy:.0%} |", flush=True)
    print(f"\n| {TOKENS} tokens | out x in | BF16 TFLOP/s | W4A4 product | with quantisation |\n|---|---|---|---|---|")
    ratios = []
    for name, out, features, tflops, alone, whole in products() if options.only in (None, "products") else ():
        ratios.append(
            {"name": name, "out": out, "in": features, "bf16_tflops": tflops, "product": alone, "with_quantise": whole}
        )
        print(f"| {name} | {out} x {features} | {tflops:.0f} | {alone:.2f}x | {whole:.2f}x |", flush=True)
    print(f"\n| {TOKENS} tokens, whole step | out x in | BF16 ms | mx | ste | mx, launched | ste, launched |")
    print("|---|---|---|---|---|---|---|")
    whole_steps = []
    for name, out, features, ms, by_kind in steps() if options.only in (None, "steps") else ():
        whole_steps.append({"name": name, "out": out, "in": features, "bf16_ms": ms, **by_kind})
        cells = " | ".join(f"{ratio:.2f}x" for ratio in by_kind.values())
        print(f"| {name} | {out} x {features} | {ms:.2f} | {cells} |", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**about, "quantise": table, "products": ratios, "steps": whole_steps}, file, indent=1)


if __name__ == "__main__":
    main()
