"""Tensors of any shape and strides as matrices whose last axis is the quantised one, without a copy."""

from __future__ import annotations

import itertools

import torch


def merges(x: torch.Tensor, axis: int) -> bool:
    """Whether the axes other than `axis` are one axis of a constant stride."""
    lead = [(n, s) for n, s in zip(x.movedim(axis, -1).shape[:-1], x.movedim(axis, -1).stride()[:-1]) if n != 1]
    return all(outer == n * inner for (_, outer), (n, inner) in itertools.pairwise(lead))


def matrices(x: torch.Tensor, axis: int, merged: bool) -> list[torch.Tensor]:
    """Views of x, the quantised axis last, that cover it in the order of its rows: one if the other axes merge."""
    moved = x.movedim(axis, -1)
    if not moved.numel():
        return []
    if moved.ndim == 1:
        return [moved.unsqueeze(0)]
    if merged:
        strides = [s for n, s in zip(moved.shape[:-1], moved.stride()[:-1]) if n != 1]
        return [moved.as_strided((moved[..., 0].numel(), moved.shape[-1]), (strides[-1] if strides else 0, moved.stride(-1)))]
    return [matrix for part in moved.unbind(0) for matrix in matrices(part, -1, merges(part, -1))]


def paired(x: torch.Tensor, out: torch.Tensor, axis: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`matrices` of two tensors of one shape, cut alike: as few as both allow."""
    if not x.numel():
        return []
    x, out = x.movedim(axis, -1), out.movedim(axis, -1)
    if x.ndim == 1 or (merges(x, -1) and merges(out, -1)):
        return [(matrices(x, -1, True)[0], matrices(out, -1, True)[0])]
    return [pair for parts in zip(x, out) for pair in paired(*parts, -1)]


def one_row(unit: int, *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrices as one long row each, where their rows are of whole units and follow each other; else as they are."""
    if all(matrix.is_contiguous() and matrix.shape[1] % unit == 0 for matrix in matrices):
        return tuple(matrix.view(1, -1) for matrix in matrices)
    return matrices
