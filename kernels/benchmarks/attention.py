"""Decode attention over a packed KV cache, beside PyTorch's over one in BF16: time a call of one layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mxfp4_kernels.attention.decode import attend
from report import Row, measured
from timing import copies, device, median_ms

from mxfp4_rl import QuantRecipe
from mxfp4_rl.kv_cache.blocks import Blocks, Stored

SINKS = 4
# name: (query heads, key heads, channels); sequences and tokens of each
HEADS = {"Qwen2.5-3B": (16, 2, 128), "Llama-3.1-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}
SIZES = ((1, 4096), (1, 32768), (16, 4096), (64, 1024), (64, 4096))
FORMATS = {"NVFP4, blocks of 64": ("nvfp4", 64), "NVFP4, blocks of 16": ("nvfp4", 16), "MXFP4, blocks of 64": ("mxfp4", 64)}


def products(heads: dict[str, tuple[int, int, int]], sizes: tuple[tuple[int, int], ...]) -> Iterator[Row]:
    """Ratios to `scaled_dot_product_attention` in BF16, and microseconds."""
    for name, shape in heads.items():
        for rows, tokens in sizes:
            yield from _products(f"{name}, {rows} x {tokens}", shape, rows, tokens)


def _products(case: str, shape: tuple[int, int, int], rows: int, tokens: int) -> Iterator[Row]:
    queries, heads, width = shape
    section, rival = "Decode attention, against BF16", None
    values = 2 * rows * heads * tokens * width
    q = torch.randn(rows, queries, width, device=device(), dtype=torch.bfloat16)
    for variant in ("BF16", *FORMATS):
        size = 2 if variant == "BF16" else 0.5625

        def ms(variant=variant, size=size):
            count = copies(values * size)
            if variant == "BF16":
                caches = [torch.randn(2, rows, heads, tokens, width, device=q.device, dtype=q.dtype) for _ in range(count)]
                return median_ms(_sdpa, [(q.unsqueeze(2), *cache) for cache in caches])
            held = [(_held(rows, heads, width, tokens, *FORMATS[variant]),) for _ in range(count)]
            return median_ms(lambda h: attend(q, h, width**-0.5), held)

        row = measured(section, case, variant, ms, rival, 4 * rows * queries * tokens * width, values * size)
        rival = row.ms if variant == "BF16" else rival
        yield row
        if row.ms:
            yield Row(section, case, f"{variant}, time", row.ms)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _held(rows: int, heads: int, width: int, tokens: int, format: str, block: int) -> Stored:
    """Random codes; scales of 1. What does not fill a block is open."""
    recipe, count = QuantRecipe(format=format), (tokens - SINKS) // block
    lead = (rows, heads, count)

    def blocks(a, w):
        codes = torch.randint(0, 256, (*lead, a, w // 2), device=device(), dtype=torch.uint8)
        scales = torch.full((*lead, a, w // recipe.block_size), 0x38 if format == "nvfp4" else 127, dtype=torch.uint8)
        exponents = torch.full(lead, 127, dtype=torch.uint8, device=device()) if format == "nvfp4" else None
        return Blocks(codes, scales.to(device()), exponents)

    dense = [torch.randn(rows, heads, n, width, device=device(), dtype=torch.bfloat16) for n in (SINKS, SINKS, block, block)]
    lengths, packed = (torch.full((rows,), n, dtype=torch.int32, device=device()) for n in (tokens, count))
    return Stored(blocks(block, width), blocks(width, block), *dense, lengths, packed, recipe)
