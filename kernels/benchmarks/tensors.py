"""Quantising, dequantising and measuring a tensor: bandwidth beside a device copy of it.

Counted is what an ideal kernel moves: the input read once, the outputs written once. Containers of whole columns read it twice,
since a column's scale is known only at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from mxfp4_kernels.container.reference import fits_rows, group_of
from mxfp4_kernels.container.triton import containers
from report import Row, measured
from timing import copies, median_ms, random

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import error_stats, fake_quantize

RECIPES = ("mxfp4", "mxfp4+mbs", "mxfp4+of", "mxfp4+mbs+of")


def packed_bytes(recipe: QuantRecipe) -> float:
    """Bytes an element: codes and scales of one pass or two, and float32 macro factors."""
    passes = 2 if recipe.fallback_alpha else 1
    return passes * (0.5 + 1 / 32) + (4 / recipe.macro_size if recipe.macro_block else 0)


def _kernels(recipe: QuantRecipe):
    """name -> (work, bytes an element)."""
    yield "operand", lambda x: fake_quantize(x, recipe), 4
    yield "operand, columns", lambda x: fake_quantize(x, recipe, axis=0), 4
    yield "codes", lambda x: quantize(x, recipe), 2 + packed_bytes(recipe)
    if not recipe.fallback_alpha:
        scales = 4 / group_of(recipe)
        yield "containers of rows", lambda x: containers(x, rows=recipe), 3 + scales
        yield "of columns", lambda x: containers(x, columns=recipe), 3 + scales
        yield "of rows and columns", lambda x: containers(x, rows=recipe, columns=recipe), 4 + 2 * scales
        yield "of rows, and operand", lambda x: containers(x, rows=recipe, operand_dtype=x.dtype), 5 + scales
    if fits_rows(recipe):
        yield "containers of whole rows", lambda x: containers(x, rows=recipe, whole_rows=True), 3
        yield "of whole rows, and operand", lambda x: containers(x, recipe, None, x.dtype, whole_rows=True), 5
        yield "of whole rows and columns", lambda x: containers(x, rows=recipe, columns=recipe, whole_rows=True), 6
    yield "error statistics", lambda x: error_stats(x, recipe), 2


def bandwidths(shapes: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    for tokens, features in shapes:
        elements = tokens * features
        # As many as pass the cache when they are packed.
        xs = random(tokens, features, copies=copies(elements * packed_bytes(QuantRecipe()), 2 * elements))
        inputs, out = list(zip(xs)), torch.empty_like(xs[0])
        section = f"Bandwidth, {tokens} x {features}, of a copy"
        copy = measured(section, "copy", "TB/s", partial(median_ms, out.copy_, inputs), bytes=4 * elements)
        yield copy
        for name in RECIPES:
            recipe = QuantRecipe.parse(name)
            for kernel, work, each in _kernels(recipe):
                yield _share(copy, kernel, name, partial(_time, kernel, recipe, work, inputs), each)
            yield _share(copy, "dequantise", name, partial(_dequantise, recipe, xs), 2 + packed_bytes(recipe))


def _share(copy: Row, kernel, name, ms, each) -> Row:
    """Of the rate of a copy, which moves 4 bytes an element."""
    size = copy.bytes * each / 4
    return measured(copy.section, kernel, name, ms, copy.ms and copy.ms * size / copy.bytes, bytes=size)


def _dequantise(recipe, xs) -> float:
    return median_ms(lambda q: q.dequantize(torch.bfloat16), [(quantize(x, recipe),) for x in xs])


def _time(kernel, recipe, work, inputs) -> float:
    if kernel != "error statistics" or not torch.cuda.is_available():
        return median_ms(work, inputs)
    from mxfp4_kernels.error_stats.triton import partial_sums  # on the device, without the copy to the host

    return median_ms(lambda x: partial_sums(x, recipe).sum(0), inputs)
