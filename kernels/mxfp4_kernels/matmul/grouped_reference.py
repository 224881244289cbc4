"""What `grouped.py` computes, as a loop over experts: the definition its tests compare with."""

from __future__ import annotations

import itertools

import torch


def product(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Y[t] = B[e(t)] a[t] of dequantised operands (T, K) and (E, N, K): (T, N), zero behind the last expert's tokens."""
    y = torch.zeros(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    for weight, (first, last) in zip(b, _ranges(offsets), strict=True):
        y[first:last] = a[first:last].to(dtype) @ weight.to(dtype).t()
    return y


def wgrad(g: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """dW[e] = G_e^T X_e of dequantised operands (T, N) and (T, K): (E, N, K), zero for experts without tokens."""
    return torch.stack([g[first:last].to(dtype).t() @ x[first:last].to(dtype) for first, last in _ranges(offsets)])


def _ranges(offsets: torch.Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets.tolist()))
