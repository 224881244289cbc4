"""Values per block: reducing over 2-D tiles and macro blocks, in an order that is the same everywhere.

Sums decide which scale a search keeps, so their rounding is part of the specification: `fold_sum` adds the two halves of an
axis, elementwise, until one element is left. That order is as natural for a GPU's reduction as it is here.
"""

import torch


def fold_sum(t: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, halves first: float (..., n) -> (...). A length that is no power of two is zero-padded."""
    length = t.shape[-1]
    size = 1 << max(length - 1, 0).bit_length()
    if size != length:
        t = torch.nn.functional.pad(t, (0, size - length))
    while size > 1:
        size //= 2
        t = t[..., :size] + t[..., size:]
    return t.squeeze(-1)


def over_groups(block_values: torch.Tensor, group: int, reduce: str) -> torch.Tensor:
    """Reduce `group` neighbouring blocks of a row: (R, blocks) -> (R, ceil(blocks / group)). `reduce`: "amax" or "sum"."""
    tail = -block_values.shape[-1] % group
    padded = torch.nn.functional.pad(block_values, (0, tail)) if tail else block_values
    grouped = padded.unflatten(-1, (-1, group))
    return grouped.amax(-1) if reduce == "amax" else fold_sum(grouped)


def over_tiles(block_values: torch.Tensor, rows: int, reduce: str) -> torch.Tensor:
    """Reduce `rows` rows that form a tile, and give each row the tile's value: (R, blocks) -> (R, blocks)."""
    if rows == 1:
        return block_values
    count = block_values.shape[0]
    tail = -count % rows
    padded = torch.nn.functional.pad(block_values, (0, 0, 0, tail)) if tail else block_values
    tiles = padded.unflatten(0, (-1, rows)).movedim(1, -1)
    reduced = tiles.amax(-1) if reduce == "amax" else fold_sum(tiles)
    return reduced.repeat_interleave(rows, dim=0)[:count]


def per_block(macro_values: torch.Tensor, group: int, blocks: int) -> torch.Tensor:
    """Spread one value per macro block of `group` blocks, (R, macros), over its blocks, (R, blocks)."""
    return macro_values.repeat_interleave(group, dim=-1)[..., :blocks]
