"""Few rows times packed weights: time a call, beside BF16 and beside the dequantised weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mxfp4_kernels.matmul.decode import decode_product
from report import Row
from timing import CACHE_BYTES, median_ms, random

from mxfp4_rl import QuantRecipe, quantize

VARIANTS = {
    "W4A16": (QuantRecipe(), None),
    "W4A4": (QuantRecipe(), QuantRecipe()),
    "W4A16 MBS": (QuantRecipe.parse("mxfp4+mbs"), None),
    "W4A16 MBS + OF": (QuantRecipe.parse("mxfp4+mbs+of"), None),
}


def products(shapes: dict[str, tuple[int, int]], counts: tuple[int, ...]) -> Iterator[Row]:
    """Ratios to `torch.matmul` in BF16, and microseconds; weights are rotated past the cache, not only activations."""
    for name, (out, features) in shapes.items():
        size = out * features * (0.5 + 1 / 32)
        copies = max(3, min(40, round(CACHE_BYTES / size) + 1)) if torch.cuda.is_available() else 1
        weights = random(out, features, copies=copies)
        for rows in counts:
            (x,), case, flops = (
                random(rows, features, copies=1),
                f"{name}, {out} x {features}, {rows} rows",
                2 * rows * out * features,
            )
            section, moved = "Decode, against BF16", 2 * rows * (out + features)
            bf16 = median_ms(lambda w, x=x: x @ w.t(), weights)
            yield Row(section, case, "BF16", bf16, None, 0, moved + 2 * out * features)
            for variant, (recipe, activation) in VARIANTS.items():
                try:
                    packed = [quantize(w, recipe) for w in weights]
                    ms = median_ms(lambda q, x=x, activation=activation: decode_product(x, q, activation=activation), packed)
                    passes = 2 if recipe.fallback_alpha else 1
                    yield Row(section, case, variant, ms, bf16 / ms, flops, moved + passes * size)
                    yield Row(section, case, f"{variant}, time", ms)
                except Exception as error:
                    yield Row(section, case, variant, error=f"{type(error).__name__}: {str(error)[:200]}")
