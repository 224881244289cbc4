"""Grouped products of a mixture of experts, tokens shared out by a skewed router, beside BF16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from mxfp4_kernels.matmul import fp8
from mxfp4_kernels.matmul.grouped import grouped_product, grouped_wgrad
from mxfp4_kernels.matmul.grouped_operands import Experts, Tokens, align_to_blocks
from report import Row, measured
from timing import copies, device, median_ms, random

from mxfp4_rl import QuantRecipe

RECIPE = QuantRecipe()
SKEW = 0.5  # standard deviation of the router's log-odds: the busiest of 128 experts gets about three times the mean


def offsets_of(tokens: int, experts: int) -> tuple[torch.Tensor, list[int]]:
    """int32 (experts + 1,) on the device, and the counts."""
    generator = torch.Generator().manual_seed(0)
    share = torch.softmax(torch.randn(experts, generator=generator) * SKEW, 0)
    counts = torch.multinomial(share, tokens, replacement=True, generator=generator).bincount(minlength=experts)
    return torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))).int().to(device()), counts.tolist()


def _loop(x, w, counts):
    return torch.cat([part @ own.t() for part, own in zip(x.split(counts), w)])


def _grouped_mm(x, w, offsets):
    return torch._grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])


def _operand(x):
    """Tokens quantised along their features."""
    return fp8.operands(x, rows=RECIPE, whole_rows=True)[0]


def _scaled_grouped_mm(a, b, offsets):
    (tokens, features), experts = a.source.shape, b.source.shape[0]
    return torch._scaled_grouped_mm(
        a.container.payload[:tokens],
        b.container.payload.view(experts, -1, features).transpose(1, 2),
        a.container.scale[0, :tokens],
        b.container.scale.view(experts, -1),
        offs=offsets[1:],
        out_dtype=torch.bfloat16,
    )


def products(shapes: dict[str, tuple[int, int]], experts: int, counts: tuple[int, ...]) -> Iterator[Row]:
    """Forward and wgrad: ratios to `torch._grouped_mm` in BF16."""
    for name, (out, features) in shapes.items():
        for tokens in counts:
            case = f"{name}, {tokens} rows"
            yield from _forward(case, experts, out, features, tokens)
            yield from _wgrad(case, experts, out, features, tokens)


def _forward(case: str, experts: int, out: int, features: int, tokens: int) -> Iterator[Row]:
    offsets, counts = offsets_of(tokens, experts)
    used = sum(count > 0 for count in counts)
    read = tokens * features + used * out * features  # elements
    each = copies(read, 3 * (tokens * features + experts * out * features))  # held are BF16 and containers
    pairs = list(zip(random(tokens, features, copies=each), random(experts, out, features, copies=each)))

    def quantised():
        return [(_operand(x), Experts(w, RECIPE)) for x, w in pairs]

    variants = {
        "BF16": (lambda x, w: _grouped_mm(x, w, offsets), lambda: pairs, 2),
        "BF16, loop over experts": (lambda x, w: _loop(x, w, counts), lambda: pairs, 2),
        "BF16, ours": (lambda x, w: grouped_product(x, w, offsets), lambda: pairs, 2),
        "W4A4": (lambda a, b: grouped_product(a, b, offsets), quantised, 1),
        "W4A4, fast": (lambda a, b: grouped_product(a, b, offsets, exact=False), quantised, 1),
        "W4A4, torch._scaled_grouped_mm": (lambda a, b: _scaled_grouped_mm(a, b, offsets), quantised, 1),
        "W4A4 with quantisation": (
            lambda x, b: grouped_product(_operand(x), b, offsets),
            lambda: [(x, Experts(w, RECIPE)) for x, w in pairs],
            None,
        ),
    }
    moved = {n: 2 * tokens * out + n * read for n in (1, 2)}
    moved[None] = 2 * tokens * out + read + tokens * features
    yield from _rows("Grouped forward, against torch._grouped_mm in BF16", case, variants, 2 * tokens * out * features, moved)


def _wgrad(case: str, experts: int, out: int, features: int, tokens: int) -> Iterator[Row]:
    offsets, counts = offsets_of(tokens, experts)
    aligned, where, rows = align_to_blocks(offsets, tokens)
    read = tokens * (out + features)  # elements
    each = copies(read, 3 * read)
    pairs = list(zip(random(tokens, out, copies=each), random(tokens, features, copies=each)))

    def of(x):
        return Tokens(x.new_zeros(rows, x.shape[1]).index_copy_(0, where, x), RECIPE, aligned)

    def quantised():
        return [(of(g), of(x)) for g, x in pairs]

    variants = {
        "BF16": (lambda g, x: torch._grouped_mm(g.t(), x, offs=offsets[1:]), lambda: pairs, 2),
        "BF16, ours": (lambda g, x: grouped_wgrad(g, x, offsets), lambda: pairs, 2),
        "W4A4": (lambda g, x: grouped_wgrad(g, x, aligned), quantised, 1),
        "W4A4, fast": (lambda g, x: grouped_wgrad(g, x, aligned, exact=False), quantised, 1),
        "W4A4 with quantisation": (lambda g, x: grouped_wgrad(of(g), of(x), aligned), lambda: pairs, None),
    }
    written = 2 * sum(count > 0 for count in counts) * out * features
    moved = {1: written + read, 2: written + 2 * read, None: written + 2 * read}
    yield from _rows("Grouped wgrad, against torch._grouped_mm in BF16", case, variants, 2 * tokens * out * features, moved)


def _ms(work, inputs) -> float:
    return median_ms(work, inputs())


def _rows(section, case, variants, flops, moved) -> Iterator[Row]:
    """Of variants (work, what makes its inputs, bytes of an element that is multiplied or None: quantised on the way)."""
    rival = None
    for variant, (work, inputs, width) in variants.items():
        kind = None if width is None else "grouped"
        row = measured(section, case, variant, partial(_ms, work, inputs), rival, flops, moved[width], kind)
        rival = row.ms if variant == "BF16" else rival
        yield row
