"""Linear layers: forward products, with and without quantising the activation, and whole training steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from mxfp4_kernels.matmul import fp8, w8a8
from report import Row, measured
from timing import copies, device, launched_ms, median_ms, random

from mxfp4_rl import ModelRecipe, QuantRecipe
from mxfp4_rl.nn import MXFP4Linear
from mxfp4_rl.quant import fake_quantize

PLAIN, MBS, OF = (QuantRecipe.parse(name) for name in ("mxfp4", "mxfp4+mbs", "mxfp4+of"))
SMALL_MBS = QuantRecipe.parse("mxfp4+mbs32")


def _whole_rows(x, recipe: QuantRecipe = PLAIN):
    return fp8.operands(x, rows=recipe, whole_rows=True)[0]


def _groups(recipe: QuantRecipe) -> Callable:
    return lambda x: fp8.operands(x, rows=recipe)[0]


def _fast(a, b):
    """The tensor core's own accumulation, as FP8 libraries use it by default."""
    return fp8.product(a, b, fast=True)


def _triton(a, b):
    return fp8.product(a, b, backend="triton")


def _bf16(x, w):
    return x @ w.t()


# name -> how x and w become operands, and how those are multiplied
PRODUCTS: dict[str, tuple[Callable, Callable, Callable]] = {
    "W4A4": (_whole_rows, _whole_rows, fp8.product),
    "W4A4, fast": (_whole_rows, _whole_rows, _fast),
    "W4A4, 1x128": (_groups(PLAIN), _groups(PLAIN), fp8.product),
    "W4A4 MBS on weights": (_groups(PLAIN), _groups(MBS), fp8.product),
    "W4A4 MBS on both": (_groups(MBS), _groups(MBS), fp8.product),
    "W4A4 MBS on both, Triton": (_groups(MBS), _groups(MBS), _triton),
    "W4A4 MBS 32 on both": (_groups(SMALL_MBS), _groups(SMALL_MBS), fp8.product),
    "W4A4 OF on weights, BF16": (lambda x: fake_quantize(x, PLAIN), lambda w: fake_quantize(w, OF), _bf16),
    "W4A4 OF on both, BF16": (lambda x: fake_quantize(x, OF), lambda w: fake_quantize(w, OF), _bf16),
    "W8A8": (w8a8.Operand, w8a8.Operand, w8a8.product),
    "W8A8, fast": (w8a8.Operand, w8a8.Operand, lambda a, b: w8a8.product(a, b, fast=True)),
    "W4A4 by QDQ in PyTorch": (
        lambda x: fake_quantize(x, PLAIN, backend="reference"),
        lambda w: fake_quantize(w, PLAIN, backend="reference"),
        _bf16,
    ),
}
_NOT_ALONE = "W4A4 by QDQ in PyTorch"  # its product is the BF16 one


def products(shapes: dict[str, tuple[int, int]], tokens: int) -> Iterator[Row]:
    """Ratios to `torch.matmul` in BF16: the product alone, and with the activation's quantisation."""
    for name, (out, features) in shapes.items():
        yield from _products(f"{name}, {out} x {features}", out, features, tokens, tuple(PRODUCTS))


def sweep(shape: tuple[str, tuple[int, int]], counts: tuple[int, ...]) -> Iterator[Row]:
    """The same for one shape over the number of tokens."""
    name, (out, features) = shape
    for tokens in counts:
        case = f"{tokens} token{'s' * (tokens != 1)}"
        for row in _products(case, out, features, tokens, ("W4A4", "W4A4, fast", "W4A4 MBS on both", "W8A8")):
            row.section = row.section.replace("Forward", f"{name} over the number of tokens: forward")
            yield row


def _products(case: str, out: int, features: int, tokens: int, variants: tuple[str, ...]) -> Iterator[Row]:
    each = copies(features * (tokens + out), 3 * features * (tokens + out))  # in FP8; held are BF16 and FP8
    pairs = list(zip(random(tokens, features, copies=each), random(out, features, copies=each)))
    flops, moved = 2 * tokens * out * features, 2 * tokens * out
    alone, whole = "Forward product, against BF16", "Forward with the activation's quantisation, against BF16"
    bf16 = measured(
        alone, case, "BF16", lambda: median_ms(_bf16, pairs), None, flops, moved + 2 * features * (tokens + out), "dense"
    )
    yield bf16
    yield dataclasses.replace(bf16, section=whole, kind=None)
    for variant in variants:
        width = 2 if "BF16" in variant or "QDQ" in variant else 1  # bytes of an element when it is multiplied
        if variant != _NOT_ALONE:
            size = moved + width * features * (tokens + out)
            yield measured(alone, case, variant, partial(_product_ms, variant, pairs), bf16.ms, flops, size, "dense")
        size = moved + features * (2 * tokens + width * out)
        yield measured(whole, case, variant, partial(_forward_ms, variant, pairs), bf16.ms, flops, size)


def _product_ms(variant, pairs) -> float:
    of_x, of_w, multiply = PRODUCTS[variant]
    return median_ms(multiply, [(of_x(x), of_w(w)) for x, w in pairs])


def _forward_ms(variant, pairs) -> float:
    of_x, of_w, multiply = PRODUCTS[variant]
    return median_ms(lambda x, b: multiply(of_x(x), b), [(x, of_w(w)) for x, w in pairs])


RECIPES = {
    "mx": ModelRecipe(grad=PLAIN, dgrad="mx", wgrad="mx", product="fp8"),
    "mx, fast": ModelRecipe(grad=PLAIN, dgrad="mx", wgrad="mx", product="fp8_fast"),
    "ste": ModelRecipe(product="fp8"),
    "ste, fast": ModelRecipe(product="fp8_fast"),
    "mx, MBS": ModelRecipe(weight=MBS, activation=MBS, grad=MBS, dgrad="mx", wgrad="mx", product="fp8"),
    "ste, MBS": ModelRecipe(weight=MBS, activation=MBS, product="fp8"),
    "ste, MBS + OF": ModelRecipe(weight=QuantRecipe.parse("mxfp4+mbs+of"), activation=QuantRecipe.parse("mxfp4+mbs+of")),
}


def steps(shapes: dict[str, tuple[int, int]], tokens: int) -> Iterator[Row]:
    """Whole steps of a layer against `nn.Linear`: forward, dgrad, wgrad and every quantisation, the weight's too.

    x and dL/dy change from call to call, the weight does not: a step writes more than the cache holds before it is read again.
    """
    for name, (out, features) in shapes.items():
        size = 2 * tokens * (out + features)
        pairs = list(zip(*(random(tokens, n, copies=copies(size, 2 * size)) for n in (features, out))))  # x and dL/dy
        case, rivals = f"{name}, {out} x {features}", {}
        for kind in ("BF16", *RECIPES):
            for how, time in (("", median_ms), (", launched by Python", launched_ms)):
                section, ms = f"Step of a layer{how}, against nn.Linear in BF16", partial(_step_ms, time, name, kind, pairs)
                row = measured(section, case, kind, ms, rivals.get(how), 6 * tokens * out * features)
                if kind == "BF16":
                    rivals[how] = row.ms
                yield row


def _step_ms(time: Callable, name: str, kind: str, pairs: list[tuple]) -> float:
    features, out = (t.shape[1] for t in pairs[0])
    layer = torch.nn.Linear(features, out, bias=False, device=device(), dtype=torch.bfloat16)
    if kind != "BF16":
        MXFP4Linear.swap(layer, name, RECIPES[kind])

    def step(x, g):
        x.requires_grad_()
        layer.weight.grad = x.grad = None
        if isinstance(layer, MXFP4Linear):
            layer.release()
        layer(x).backward(g)

    return time(step, pairs)
