"""Synthetic tensors: laws of elements, rows of differing scale, outliers. The same seed gives the same tensor everywhere.

A block's error under a power-of-two scale depends on where its largest magnitude lies between two powers of two. With one
sigma for all rows that position is not uniform (mean delta 0.451 for a Gaussian of sigma 1); trained weights have rows of many
scales. "octave" multiplies each row by 2^u, u uniform in [0, 1), which makes the position uniform; "fixed" leaves sigma at 1.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

COLUMNS = 1024
LABELS = {"gaussian": "Gaussian", "laplace": "Laplace"}


@dataclass(frozen=True)
class Size:
    """How much is drawn. The page's numbers are `FULL`; `REDUCED` takes seconds and shows only that everything runs.

    Attributes:
        seeds: independent samples per number; the error bars are their scatter.
        rows: rows of 1024 elements in each sample.
        few_rows: the same where many recipes are compared on the same sample, so that sampling error cancels.
        constant_seeds: samples of `rows` for the absolute errors, which are to be good to 0.5 %.
        side: side of square weight matrices. tokens: rows of the operands in the product check.
        soar_rows: rows for the search over all scales and betas, 64 blocks each.
        chains: draws of 48 random layers. paths: random paths through the layers.
        logit_vectors, noise_draws: for the temperature.
    """

    seeds: int = 8
    rows: int = 2048
    few_rows: int = 512
    constant_seeds: int = 16
    side: int = 1024
    tokens: int = 512
    soar_rows: int = 128
    chains: int = 64
    paths: int = 200_000
    logit_vectors: int = 64
    noise_draws: int = 1000


FULL = Size()
REDUCED = Size(
    seeds=2,
    rows=64,
    few_rows=32,
    constant_seeds=2,
    side=128,
    tokens=32,
    soar_rows=4,
    chains=3,
    paths=2000,
    logit_vectors=3,
    noise_draws=50,
)


def label(law: str) -> str:
    """How a law is called in tables: "Gaussian", "Laplace", "t(5)"."""
    return LABELS.get(law) or f"t({law[1:]})"


def sample(law: str, seed: int, rows: int, columns: int = COLUMNS, spread: str = "octave") -> torch.Tensor:
    """A tensor of independent elements, float32 (rows, columns).

    Args:
        law: "gaussian", "laplace" (scale 1), or "t5" for Student's t with 5 degrees of freedom (not normalised).
        spread: "octave": each row times 2^u, u uniform in [0, 1). "fixed": all rows alike.

    Raises:
        ValueError: another law or spread.
    """
    rng = _generator("elements", law, seed)
    x = _elements(law, rng, (rows, columns))
    if spread == "octave":
        x *= np.exp2(rng.random((rows, 1)))
    elif spread != "fixed":
        raise ValueError(f"spread={spread!r} is not 'octave' or 'fixed'")
    return torch.from_numpy(x.astype(np.float32))


def channel_outliers(seed: int, rows: int, columns: int = COLUMNS, channels: int = 4, factor: float = 20) -> torch.Tensor:
    """Like a transformer's activations: t(6) elements, some channels (columns) larger; float32 (rows, columns)."""
    rng = _generator("channels", "t6", seed)
    x = _elements("t6", rng, (rows, columns))
    x[:, rng.choice(columns, channels, replace=False)] *= factor
    return torch.from_numpy(x.astype(np.float32))


def scattered_outliers(seed: int, rows: int, fraction: float, factor: float = 10, columns: int = COLUMNS) -> torch.Tensor:
    """Gaussian rows over one octave in which a fraction of the elements is `factor` times larger; float32 (rows, columns)."""
    x = sample("gaussian", seed, rows, columns)
    outlier = _generator("scattered", "gaussian", seed).random(tuple(x.shape)) < fraction
    return torch.where(torch.from_numpy(outlier), x * factor, x)


def _elements(law: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if law == "gaussian":
        return rng.standard_normal(shape)
    if law == "laplace":
        return rng.laplace(size=shape)
    if law.startswith("t") and law[1:].isdigit() and int(law[1:]) > 0:
        return rng.standard_t(int(law[1:]), shape)
    raise ValueError(f"law={law!r} is none of 'gaussian', 'laplace', 't5' (any whole degrees of freedom)")


def _generator(purpose: str, law: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"{purpose} {law}".encode()), seed])
