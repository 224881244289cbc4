"""Where the tokens of a batch of sequences are, and where the next ones go.

A sequence's tokens are counted without its padding, so that its sinks are its own first tokens and its blocks begin at the same
tokens whatever batch it is in. Token p of a cache with S sinks and blocks of B tokens is

    p < S                     sink p
    q = p - S < packed * B    token q % B of packed block q // B
    else                      token q - packed * B of the open block

An open block is packed when the first token beyond it arrives, so that a call sees what earlier calls left: complete blocks
quantised, all else (its own tokens too) as it came. That is causal, and the same for one token a call and for many.

Positions are computed on the host, once a call; the layers of a model share the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Layout:
    """The state of R sequences.

    Attributes:
        sink, block: S and B.
        origin: int64 (R, columns), the token of each column of the first call; -1 for padding. Later columns have no padding.
        lengths: int64 (R,), tokens that are held.
        packed: int64 (R,), blocks that are packed.
    """

    sink: int
    block: int
    origin: torch.Tensor
    lengths: torch.Tensor
    packed: torch.Tensor
    later: int = 0  # columns after those of `origin`
    _next: dict = field(default_factory=dict, repr=False)

    @classmethod
    def empty(cls, rows: int, sink: int, block: int) -> Layout:
        zeros = torch.zeros(rows, dtype=torch.int64)
        return cls(sink, block, torch.empty(rows, 0, dtype=torch.int64), zeros, zeros)

    @property
    def columns(self) -> int:
        """Of the attention mask: tokens, and padding of the first call."""
        return self.origin.shape[1] + self.later

    def open(self) -> torch.Tensor:
        """Tokens in the open block, int64 (R,), 0..B."""
        return (self.lengths - self.sink).clamp_(min=0) - self.packed * self.block

    def append(self, count: int, mask: torch.Tensor | None, device: torch.device) -> Step:
        """What `count` more columns change. `mask`: (R, count) of the first call, false for padding. The same object again
        for the layers that ask after the first."""
        if count not in self._next:
            self._next = {count: Step.of(self, count, mask, device)}
        return self._next[count]

    def select(self, rows: list[int]) -> Layout:
        """The layout of these sequences, in this order, some perhaps more than once."""
        return Layout(self.sink, self.block, self.origin[rows], self.lengths[rows], self.packed[rows], self.later)


@dataclass(eq=False)
class Step:
    """One call's tokens: which full open blocks are packed before, where the tokens go, what is packed after.

    Attributes:
        flush: (rows, block numbers) of the open blocks that are packed before; None for none.
        to_sink, to_open: (rows, positions, columns of the call): where tokens are written, or None. With `stage` > 1 the
            positions of `to_open` run through that many blocks, of which the open one is the first.
        stage: blocks that the new tokens and the open one fill.
        full: (rows, blocks of the stage, block numbers) to pack after; None for none.
        last: (R,), the block of the stage that is then open; None if it is the first in all rows.
        after: the layout then.
        lengths, packed: int32 (R,) on the device: tokens, and packed blocks, that this call sees.
    """

    flush: tuple[torch.Tensor, ...] | None
    to_sink: tuple[torch.Tensor, ...] | None
    to_open: tuple[torch.Tensor, ...] | None
    stage: int
    full: tuple[torch.Tensor, ...] | None
    last: torch.Tensor | None
    after: Layout
    lengths: torch.Tensor
    packed: torch.Tensor
    blocks_before: int  # room for packed blocks that this call sees
    blocks_after: int
    _index: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, layout: Layout, count: int, mask: torch.Tensor | None, device: torch.device) -> Step:
        rows, sink, block = layout.lengths.numel(), layout.sink, layout.block
        is_open = layout.open()
        flushed = is_open == block
        packed = layout.packed + flushed
        is_open = torch.where(flushed, 0, is_open)

        real = torch.ones(rows, count, dtype=torch.bool) if mask is None else mask.cpu().bool()
        token = torch.where(real, layout.lengths[:, None] + real.cumsum(1) - 1, -1)
        lengths = layout.lengths + real.sum(1)
        if layout.columns:
            origin, later = layout.origin, layout.later + count
        else:
            origin, later = token, 0
        row, column = real.nonzero(as_tuple=True)
        place = token[row, column] - sink - packed[row] * block
        in_sink = token[row, column] < sink
        held = is_open + ((lengths - sink).clamp(min=0) - (layout.lengths - sink).clamp(min=0))
        stage = max(1, -(-int(held.max()) // block))
        done = torch.zeros_like(packed) if stage == 1 else held // block
        full = (torch.arange(stage)[None] < done[:, None]).nonzero(as_tuple=True)

        def there(*tensors):
            return tuple(t.to(device) for t in tensors) if tensors[0].numel() else None

        flush = flushed.nonzero().squeeze(1)
        after = Layout(sink, block, origin, lengths, packed + done, later)
        return cls(
            flush=there(flush, layout.packed[flush]),
            to_sink=there(row[in_sink], token[row, column][in_sink], column[in_sink]),
            to_open=there(row[~in_sink], place[~in_sink], column[~in_sink]),
            stage=stage,
            full=there(*full, packed[full[0]] + full[1]),
            # A row that fills the stage to its end leaves no open block: any will do.
            last=done.clamp(max=stage - 1).to(device) if stage > 1 else None,
            after=after,
            lengths=lengths.int().to(device),
            packed=packed.int().to(device),
            blocks_before=int(packed.max()) if rows else 0,
            blocks_after=int((packed + done).max()) if rows else 0,
        )

    def index(self) -> torch.Tensor:
        """Of every column the place of its token in [sinks, packed blocks, stage]: int64 (R, columns), or (columns,) if all
        rows agree. Padding takes place 0."""
        if self._index is None:
            after, packed = self.after, self.packed.cpu().long()[:, None]
            lengths = (after.lengths - after.later)[:, None]
            token = torch.cat((after.origin, lengths + torch.arange(after.later)[None]), dim=1)
            q = token - after.sink
            at = torch.where(q < packed * after.block, q, q - packed * after.block + self.blocks_before * after.block)
            index = torch.where(token < after.sink, token, at + after.sink).clamp_(min=0)
            if index.shape[0] and (index == index[:1]).all():
                index = index[0]
            self._index = index.to(self.lengths.device)
        return self._index
