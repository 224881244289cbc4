"""Quantising, dequantising and measuring a tensor: bandwidth beside a device copy of it.

Counted is what an ideal kernel moves: the input read once, the outputs written once (containers with a scale a row, along the
columns: the input read twice, since a column's scale is known only at its end).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mxfp4_kernels.container import triton as row_container
from mxfp4_kernels.container.blocks import containers
from report import Row
from timing import median_ms, random

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import error_stats, fake_quantize

RECIPES = ("mxfp4", "mxfp4+mbs", "mxfp4+of", "mxfp4+mbs+of")


def _kernels(recipe: QuantRecipe):
    """name -> (work, bytes an element)."""
    passes = 2 if recipe.fallback_alpha else 1
    yield "operand", lambda x: fake_quantize(x, recipe), 4
    yield "operand, columns", lambda x: fake_quantize(x, recipe, axis=0), 4
    yield "codes", lambda x: quantize(x, recipe), 2 + passes * (0.5 + 1 / 32)
    if passes == 1:
        scales = 4 / 128
        yield "containers of rows", lambda x: containers(x, rows=recipe), 3 + scales
        yield "of columns", lambda x: containers(x, columns=recipe), 3 + scales
        yield "of rows and columns", lambda x: containers(x, rows=recipe, columns=recipe), 4 + 2 * scales
        yield "of rows, and operand", lambda x: containers(x, rows=recipe, operand=x.dtype), 5 + scales
    if passes == 1 and not recipe.macro_block:
        yield "one scale a row, rows", lambda x: row_container.container(x, recipe), 3
        yield "one scale a column", lambda x: row_container.container(x.t(), recipe), 5
    yield "error statistics", lambda x: error_stats(x, recipe), 2


def bandwidths(shapes: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    for tokens, features in shapes:
        xs = random(tokens, features)
        out, elements = torch.empty_like(xs[0]), tokens * features
        copy = median_ms(out.copy_, xs)
        section, size = f"Bandwidth, {tokens} x {features}, of a copy", 4 * elements
        yield Row(section, "copy", "TB/s", copy, None, 0, size)
        for name in RECIPES:
            recipe = QuantRecipe.parse(name)
            for kernel, work, each in _kernels(recipe):
                try:
                    ms = _time(kernel, recipe, work, xs)
                    yield Row(section, kernel, name, ms, (each * elements / ms) / (size / copy), 0, each * elements)
                except Exception as error:
                    yield Row(section, kernel, name, error=f"{type(error).__name__}: {str(error)[:200]}")
            try:
                packed = [quantize(x, recipe) for x in xs]
                each = 2 + (2 if recipe.fallback_alpha else 1) * (0.5 + 1 / 32)
                ms = median_ms(lambda q: q.dequantize(torch.bfloat16), packed)
                yield Row(section, "dequantise", name, ms, (each * elements / ms) / (size / copy), 0, each * elements)
            except Exception as error:
                yield Row(section, "dequantise", name, error=f"{type(error).__name__}: {str(error)[:200]}")


def _time(kernel, recipe, work, xs) -> float:
    if kernel != "error statistics" or not torch.cuda.is_available():
        return median_ms(work, xs)
    from mxfp4_kernels.error_stats.triton import partial_sums  # on the device, without the copy to the host

    return median_ms(lambda x: partial_sums(x, recipe).sum(0), xs)
