"""How fast the reference quantiser is: `python kernels/benchmarks/quantize.py`.

Prints million elements a second, the best of several passes over a 4096 x 4096 BF16 tensor, for the operand (`fake_quantize`)
and the codes (`quantize`), beside a plain copy of the same tensor to float32 and back in the same run.
"""

import json
import platform
import time

import torch

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize

RECIPES = {
    "rceil": QuantRecipe(),
    "oas": QuantRecipe(scale_rule="oas"),
    "MBS static 128": QuantRecipe(macro_block="static"),
    "MBS dynamic 128": QuantRecipe(macro_block="dynamic"),
    "OF 0.5": QuantRecipe(fallback_alpha=0.5),
    "MBS static 128 + OF 0.5": QuantRecipe(macro_block="static", fallback_alpha=0.5),
}


def rate(work, elements: int, passes: int = 5) -> float:
    """Million elements a second of the fastest of `passes` calls, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(passes):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return elements / best / 1e6


def main():
    x = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    print(
        json.dumps(
            {
                "date": time.strftime("%Y-%m-%d"),
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
        )
    )
    print(f"{'recipe':26} {'operand':>9} {'codes':>9}   million elements a second")
    print(f"{'copy to float32 and back':26} {rate(lambda: x.float().bfloat16(), x.numel()):9.0f}")
    for name, recipe in RECIPES.items():
        operand = rate(lambda r=recipe: fake_quantize(x, r), x.numel())
        codes = rate(lambda r=recipe: quantize(x, r), x.numel())
        print(f"{name:26} {operand:9.0f} {codes:9.0f}")


if __name__ == "__main__":
    main()
