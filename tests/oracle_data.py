"""Data on which quantisers disagree if they disagree at all: the kinds that every oracle is compared on.

Each kind is a named function without arguments that returns the same tensor every time, (512, 1024), float32 or bfloat16: half
a million codes in 16384 blocks of 32. Block maxima stay within 2^-110 .. 2^114, where every quantiser can write the scale that
its rule gives; what happens outside is a matter of convention, and `beyond` is made for it.
"""

import torch

ROWS, LENGTH, BLOCK = 512, 1024, 32
BLOCKS = ROWS * LENGTH // BLOCK
FIRST_EXPONENT, LAST_EXPONENT = -110, 110

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Largest magnitudes over a power of two at which some rule moves to the next scale, or saturates.
BOUNDARIES = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 7.25, 7.5)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _exponents(count: int) -> torch.Tensor:
    """`count` whole exponents, int64, that run through the whole range as evenly as they can."""
    return torch.arange(count) % (LAST_EXPONENT - FIRST_EXPONENT + 1) + FIRST_EXPONENT


def _signs(shape, g: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=g) * 2.0 - 1.0


def _whole(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.reshape(ROWS, LENGTH)


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """Positive float (n) -> (3, n): the number just below, the value, the number just above, in the values' own dtype."""
    bits = values.view({torch.float32: torch.int32, torch.bfloat16: torch.int16}[values.dtype])
    return torch.stack([bits - 1, bits, bits + 1]).view(values.dtype)


def normal() -> torch.Tensor:
    """Weights: N(0, 0.02^2), float32; no two quotients tie."""
    return torch.randn(ROWS, LENGTH, generator=_generator(0)) * 0.02


def bf16() -> torch.Tensor:
    """Activations in BF16: about 1 % of the elements are exact midpoints."""
    return torch.randn(ROWS, LENGTH, generator=_generator(1)).bfloat16()


def _points_at_every_scale(points: torch.Tensor, seed: int) -> torch.Tensor:
    """Blocks of +-`points`, at most 15, times 2^k for every k; the rest of a block repeats its largest magnitude.

    The largest magnitudes take turns, so that each rule sees its points in units of its own scale; larger points are left out.
    """
    g = _generator(seed)
    exponent = _exponents(BLOCKS)
    tops = torch.tensor([4.0, 6.0, 5.0, 3.5, 7.0, 3.0])
    top = tops[torch.arange(BLOCKS) % len(tops)].unsqueeze(-1)
    row = torch.cat([points, -points])
    row = torch.cat([row, row.new_full((BLOCK - len(row),), torch.inf)])
    blocks = torch.where(row.abs() <= top, row, top * _signs((BLOCKS, BLOCK), g))
    blocks = blocks.gather(1, torch.rand(BLOCKS, BLOCK, generator=g).argsort(1))
    return _whole(torch.ldexp(blocks, exponent.unsqueeze(-1)))


def ties() -> torch.Tensor:
    """Every midpoint and grid point of E2M1, of either sign, times every scale 2^k, |k| <= 110."""
    return _points_at_every_scale(torch.tensor(GRID + MIDPOINTS), seed=2)


def bf16_ties() -> torch.Tensor:
    """The same in BF16, which holds them exactly."""
    exact = ties()
    narrow = exact.bfloat16()
    assert torch.equal(narrow.float(), exact)
    return narrow


def near_ties() -> torch.Tensor:
    """The float32 numbers just below and just above every midpoint, times every scale."""
    around = neighbours(torch.tensor(MIDPOINTS))
    return _points_at_every_scale(torch.cat([around[0], around[2]]), seed=3)


def _amax_at_boundaries(dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = _generator(seed)
    amax = neighbours(torch.tensor(BOUNDARIES, dtype=dtype)).float().flatten()
    span = LAST_EXPONENT - FIRST_EXPONENT + 1
    every = torch.ldexp(amax.expand(span, -1), torch.arange(span).unsqueeze(-1) + FIRST_EXPONENT).flatten()  # 6630
    amax = every[torch.arange(BLOCKS) % len(every)].unsqueeze(-1)
    inside = (torch.rand(BLOCKS, BLOCK, generator=g) * 2 - 1) * 0.99
    blocks = (inside * amax).to(dtype)
    where = torch.randint(0, BLOCK, (BLOCKS, 1), generator=g)
    return _whole(blocks.scatter(1, where, (amax * _signs((BLOCKS, 1), g)).to(dtype)))


def boundary() -> torch.Tensor:
    """Largest magnitude exactly at, one float32 ulp below and one above c * 2^k, for the boundaries c and |k| <= 110."""
    return _amax_at_boundaries(torch.float32, seed=4)


def bf16_boundary() -> torch.Tensor:
    """The same in BF16, one BF16 ulp around every boundary."""
    return _amax_at_boundaries(torch.bfloat16, seed=5)


def wide() -> torch.Tensor:
    """Exponents from -110 to 110: in the upper half of the rows one a block, in the lower half one an element."""
    g = _generator(6)
    per_block = _exponents(BLOCKS // 2)[torch.randperm(BLOCKS // 2, generator=g)].unsqueeze(-1).expand(-1, BLOCK)
    per_element = torch.randint(FIRST_EXPONENT, LAST_EXPONENT + 1, (BLOCKS // 2, BLOCK), generator=g)
    mantissa = torch.rand(BLOCKS, BLOCK, generator=g) + 1
    exponent = torch.cat([per_block, per_element])
    return _whole(torch.ldexp(mantissa * _signs((BLOCKS, BLOCK), g), exponent))


def bf16_wide() -> torch.Tensor:
    """The same, rounded to BF16."""
    return wide().bfloat16()


def zeros() -> torch.Tensor:
    """Blocks of 0, of -0, of both, with one element that is not zero, and normal blocks sprinkled with zeros of both signs."""
    g = _generator(7)
    values = torch.randn(BLOCKS, BLOCK, generator=g)
    zero = _signs((BLOCKS, BLOCK), g) * 0.0
    kind = torch.arange(BLOCKS).unsqueeze(-1) % 5
    zero = torch.where(kind == 0, 0.0, torch.where(kind == 1, -0.0, zero))
    only = torch.arange(BLOCK) == torch.randint(0, BLOCK, (BLOCKS, 1), generator=g)
    keep = torch.where(kind == 3, only, torch.rand(BLOCKS, BLOCK, generator=g) < 0.5) & (kind >= 3)
    return _whole(torch.where(keep, values, zero))


def signs() -> torch.Tensor:
    """Every magnitude with both signs side by side, blocks of one sign, and signs that alternate."""
    g = _generator(8)
    size = torch.randn(BLOCKS, BLOCK, generator=g).abs()
    pairs = size[:, : BLOCK // 2].repeat_interleave(2, dim=1)
    alternate = torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
    blocks = torch.stack([pairs * alternate, size * alternate, size, -size])
    return _whole(blocks[torch.arange(BLOCKS) % 4, torch.arange(BLOCKS)])


def beyond() -> torch.Tensor:
    """Blocks whose scale leaves the range that is written: subnormal numbers and the first ones, and the last two octaves."""
    g = _generator(9)
    exponent = torch.cat([torch.arange(-149, -116), torch.arange(118, 128)])
    exponent = exponent[torch.arange(BLOCKS) % len(exponent)].unsqueeze(-1)
    mantissa = (torch.rand(BLOCKS, BLOCK, generator=g) * 2 - 1) * 1.99
    return _whole(torch.ldexp(mantissa.double(), exponent).float())


KINDS = {
    kind.__name__: kind
    for kind in (normal, bf16, ties, bf16_ties, near_ties, boundary, bf16_boundary, wide, bf16_wide, zeros, signs)
}
