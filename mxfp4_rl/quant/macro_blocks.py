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

DYNAMIC_CANDIDATES = tuple(1 + j / 16 for j in range(16))
LARGEST_SCALED = 2.0**125  # f * amax, pre-scale included, could overflow float32 above this: such macro blocks keep f = 1


def static_factor(macro_amax: torch.Tensor) -> torch.Tensor:
    """Largest magnitudes, float32 (...) -> factors, float32 (...), in [1, 2); 1 where amax is 0, not finite or huge."""
    # A number over a tensor would be PyTorch's reciprocal times the number: two roundings.
    bits = torch.full_like(macro_amax, 6.0).div_(macro_amax).view(torch.int32)
    factor = ((bits & 0x007F8000) | 0x3F800000).view(torch.float32)
    usable = (macro_amax > 0) & (macro_amax < LARGEST_SCALED)
    return torch.where(usable, factor, 1.0)
