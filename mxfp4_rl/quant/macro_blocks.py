"""Macro-block scaling (MBS): an 8-bit mantissa for several blocks.

E8M0 scales are powers of two, so a block's largest element rarely sits at the grid's end. MBS multiplies a macro block
(128 elements, four 32-blocks, by default) by f = 1 + m8/256 in [1, 2) before it is quantised and divides after:

    x_hat = Q(f * x) / f                                       (arXiv 2605.20402; factors as in arXiv 2603.08713)

"static" puts the macro block's largest magnitude at the end of the grid: with t = 6 / amax, m8 is the top 8 bits of t's
mantissa, truncated, so f * amax <= 6 * 2^j and the largest element never clips. "dynamic" tries f = 1 + j/16,
j = 0..15, and keeps the one with the smallest squared error (the first of equals); j = 0 is among them, so it is never
worse than no MBS.
"""

import torch

from mxfp4_rl.recipe import BLOCK_SIZE

DYNAMIC_CANDIDATES = tuple(1 + j / 16 for j in range(16))
_LARGEST_SCALED = 2.0**126  # f * amax could overflow float32 above this: such macro blocks keep f = 1


def static_factor(macro_amax: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes, float32 (...) -> factors, float32 (...), in [1, 2); 1 where amax is 0, not finite or huge."""
    bits = (6.0 / macro_amax).view(torch.int32)
    factor = ((bits & 0x007F8000) | 0x3F800000).view(torch.float32)
    usable = (macro_amax > 0) & (macro_amax < _LARGEST_SCALED)
    return torch.where(usable, factor, 1.0)


def per_macro_block(block_values: torch.Tensor, macro_size: int, reduce: str) -> torch.Tensor:
    """Reduce a value per 32-block, (R, blocks), to one per macro block, (R, ceil(blocks * 32 / macro_size)).

    `reduce` is "amax" or "sum"; the last macro block may hold fewer blocks.
    """
    group = macro_size // BLOCK_SIZE
    tail = -block_values.shape[-1] % group
    padded = torch.nn.functional.pad(block_values, (0, tail)) if tail else block_values
    return getattr(padded.unflatten(-1, (-1, group)), reduce)(-1)


def per_block(macro_values: torch.Tensor, macro_size: int, blocks: int) -> torch.Tensor:
    """Spread one value per macro block, (R, macros), over its 32-blocks, (R, blocks)."""
    return macro_values.repeat_interleave(macro_size // BLOCK_SIZE, dim=-1)[..., :blocks]
