"""Grouped products of a mixture of experts, tokens shared out by a skewed router, beside BF16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mxfp4_kernels.matmul.fp8 import Operand
from mxfp4_kernels.matmul.grouped import grouped_product, grouped_wgrad
from mxfp4_kernels.matmul.grouped_operands import Experts, Tokens, align_to_blocks
from report import Row
from timing import device, median_ms, random

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


def _scaled_grouped_mm(a, b, offsets):
    experts = b.source.shape[0]
    return torch._scaled_grouped_mm(
        a.container.payload,
        b.container.payload.view(experts, -1, b.source.shape[2]).transpose(1, 2),
        a.container.scale,
        b.container.scale.view(experts, -1),
        offs=offsets[1:],
        out_dtype=torch.bfloat16,
    )


def products(shapes: dict[str, tuple[int, int]], experts: int, counts: tuple[int, ...]) -> Iterator[Row]:
    """Forward and wgrad: ratios to `torch._grouped_mm` in BF16."""
    for name, (out, features) in shapes.items():
        (w,) = random(experts, out, features, copies=1)
        for tokens in counts:
            yield from _forward(f"{name}, {tokens} rows", w, Experts(w, RECIPE), tokens)
            yield from _wgrad(f"{name}, {tokens} rows", w, tokens)


def _forward(case: str, w: torch.Tensor, weights: Experts, tokens: int) -> Iterator[Row]:
    experts, out, features = w.shape
    offsets, counts = offsets_of(tokens, experts)
    xs = random(tokens, features)
    operands = [Operand(x, RECIPE) for x in xs]
    variants = {
        "BF16": (lambda x: _grouped_mm(x, w, offsets), xs, 2),
        "BF16, loop over experts": (lambda x: _loop(x, w, counts), xs, 2),
        "BF16, ours": (lambda x: grouped_product(x, w, offsets), xs, 2),
        "W4A4": (lambda a: grouped_product(a, weights, offsets), operands, 1),
        "W4A4, fast": (lambda a: grouped_product(a, weights, offsets, exact=False), operands, 1),
        "W4A4, torch._scaled_grouped_mm": (lambda a: _scaled_grouped_mm(a, weights, offsets), operands, 1),
        "W4A4 with quantisation": (lambda x: grouped_product(Operand(x, RECIPE), weights, offsets), xs, 1),
    }
    used = sum(count > 0 for count in counts)
    moved = {n: 2 * tokens * out + n * (tokens * features + used * out * features) for n in (1, 2)}
    yield from _rows("Grouped forward, against torch._grouped_mm in BF16", case, variants, 2 * tokens * out * features, moved)


def _wgrad(case: str, w: torch.Tensor, tokens: int) -> Iterator[Row]:
    experts, out, features = w.shape
    offsets, counts = offsets_of(tokens, experts)
    aligned, where, rows = align_to_blocks(offsets, tokens)
    xs, (g,) = random(tokens, features), random(tokens, out, copies=1)

    def quantised(x):
        return Tokens(x.new_zeros(rows, x.shape[1]).index_copy_(0, where, x), RECIPE, aligned)

    g_tokens, x_tokens = quantised(g), [quantised(x) for x in xs]
    variants = {
        "BF16": (lambda x: torch._grouped_mm(g.t(), x, offs=offsets[1:]), xs, 2),
        "BF16, ours": (lambda x: grouped_wgrad(g, x, offsets), xs, 2),
        "W4A4": (lambda x: grouped_wgrad(g_tokens, x, aligned), x_tokens, 1),
        "W4A4, fast": (lambda x: grouped_wgrad(g_tokens, x, aligned, exact=False), x_tokens, 1),
        "W4A4 with quantisation": (lambda x: grouped_wgrad(quantised(g), quantised(x), aligned), xs, 1),
    }
    used = sum(count > 0 for count in counts)
    moved = {n: 2 * used * out * features + n * tokens * (out + features) for n in (1, 2)}
    yield from _rows("Grouped wgrad, against torch._grouped_mm in BF16", case, variants, 2 * tokens * out * features, moved)


def _rows(section, case, variants, flops, moved) -> Iterator[Row]:
    bf16 = None
    for variant, (work, inputs, width) in variants.items():
        try:
            ms = median_ms(work, inputs)
            bf16 = ms if variant == "BF16" else bf16
            ratio = None if variant == "BF16" or bf16 is None else bf16 / ms
            yield Row(section, case, variant, ms, ratio, flops, moved[width])
        except Exception as error:
            yield Row(section, case, variant, error=f"{type(error).__name__}: {str(error)[:200]}")
