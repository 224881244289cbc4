"""Tensors of any shape and strides as matrices whose last axis is the quantised one, without a copy."""

from __future__ import annotations

import itertools

import torch


def merges(x: torch.Tensor, axis: int) -> bool:
    """Whether the axes other than `axis` are one axis of a constant stride."""
    return all(outer == n * inner for (_, outer), (n, inner) in itertools.pairwise(_lead(x, axis)))


def _lead(x: torch.Tensor, axis: int) -> list[tuple[int, int]]:
    """(size, stride) of the axes other than `axis` that are longer than 1."""
    sizes, strides = list(x.shape), list(x.stride())  # on Python numbers: a launch of a small layer waits for this
    del sizes[axis], strides[axis]
    return [(n, s) for n, s in zip(sizes, strides) if n != 1]


def matrices(x: torch.Tensor, axis: int, merged: bool) -> list[torch.Tensor]:
    """Views of x, the quantised axis last, that cover it in the order of its rows: one if the other axes merge."""
    if not x.numel():
        return []
    if x.ndim == 1:
        return [x.unsqueeze(0)]
    if merged:
        lead, length = _lead(x, axis), x.shape[axis]
        return [x.as_strided((x.numel() // length, length), (lead[-1][1] if lead else 0, x.stride(axis)))]
    return [matrix for part in x.movedim(axis, -1).unbind(0) for matrix in matrices(part, -1, merges(part, -1))]


def paired(x: torch.Tensor, out: torch.Tensor, axis: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`matrices` of two tensors of one shape, cut alike: as few as both allow."""
    if not x.numel():
        return []
    if x.ndim == 1 or (merges(x, axis) and merges(out, axis)):
        return [(matrices(x, axis, True)[0], matrices(out, axis, True)[0])]
    return [pair for parts in zip(x.movedim(axis, -1), out.movedim(axis, -1)) for pair in paired(*parts, -1)]


def one_row(unit: int, *matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrices as one long row each, where their rows are of whole units and follow each other; else as they are."""
    if all(matrix.is_contiguous() and matrix.shape[1] % unit == 0 for matrix in matrices):
        return tuple(matrix.view(1, -1) for matrix in matrices)
    return matrices
