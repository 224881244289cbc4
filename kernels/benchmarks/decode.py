"""Few rows times packed weights: time a call, beside BF16 and beside the dequantised weight."""

from __future__ import annotations

from collections.abc import Iterator

import marlin
import torch
from mxfp4_kernels.matmul.decode import decode_product, forget_graphs
from report import Row, measured
from tensors import packed_bytes
from timing import copies, median_ms, random

from mxfp4_rl import QuantRecipe, quantize

PLAIN = QuantRecipe()
MARLIN = "W4A16, vLLM's Marlin"
VARIANTS = {
    "W4A16": (PLAIN, None),
    "W4A4": (PLAIN, PLAIN),
    "W4A16 MBS": (QuantRecipe.parse("mxfp4+mbs"), None),
    "W4A16 MBS + OF": (QuantRecipe.parse("mxfp4+mbs+of"), None),
}


def products(shapes: dict[str, tuple[int, int]], counts: tuple[int, ...]) -> Iterator[Row]:
    """Ratios to `torch.matmul` in BF16, and microseconds."""
    for name, (out, features) in shapes.items():
        weights = random(out, features, copies=copies(out * features * packed_bytes(PLAIN), 2 * out * features))
        for rows in counts:
            yield from _products(f"{name}, {out} x {features}, {rows} row{'s' * (rows != 1)}", rows, weights)


def _products(case: str, rows: int, weights: list[torch.Tensor]) -> Iterator[Row]:
    out, features = weights[0].shape
    (x,) = random(rows, features, copies=1)
    section, moved, rival = "Decode, against BF16", 2 * rows * (out + features), None
    for variant in ("BF16", *VARIANTS, *([MARLIN] if marlin.available(out, features) else [])):

        def ms(variant=variant):
            if variant == "BF16":
                return median_ms(lambda w: x @ w.t(), list(zip(weights)))
            if variant == MARLIN:
                return median_ms(
                    lambda layer: marlin.product(x, layer), [(marlin.prepared(quantize(w, PLAIN)),) for w in weights]
                )
            recipe, activation = VARIANTS[variant]
            packed = [(quantize(w, recipe),) for w in weights]
            forget_graphs()  # `median_ms` keeps none
            return median_ms(lambda q: decode_product(x, q, activation=activation), packed)

        each = 2 if variant == "BF16" else packed_bytes(VARIANTS.get(variant, (PLAIN,))[0])
        row = measured(section, case, variant, ms, rival, 2 * rows * out * features, moved + each * out * features, "decode")
        rival = row.ms if variant == "BF16" else rival
        yield row
        if row.ms:
            yield Row(section, case, f"{variant}, time", row.ms)
