"""Measure a checkpoint: one pass over its tensors in file order, and nothing kept of a tensor but sums.

Every number that the tables, figures and files show is a ratio of sums, so tensors are pooled by adding their sums: a layer
type or the whole model is what one would measure on all of its weights at once, not a mean of ratios.

A weight is measured as matrices (out, in) in row chunks, so that temporaries stay small whatever the tensor's size: a fused
tensor of experts is its experts' matrices, as if each were stored on its own. Recipes that look at a whole matrix
(NVFP4's scale per tensor, a fallback on the largest blocks of a tensor) get the matrix in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from mxfp4_rl.analysis.checkpoint import Checkpoint
from mxfp4_rl.analysis.weights import LinearWeight
from mxfp4_rl.quant import ErrorStats, error_stats, precision_sweep, scale_ratios
from mxfp4_rl.recipe import QuantRecipe

CHUNK_ELEMENTS = 1 << 22  # temporaries of a few bytes an element: the quantiser has chunks of its own that fit the caches
_SEED = 0  # of stochastic rounding, so that the same command gives the same numbers
_ROWS_TOGETHER = 32  # rows that 2-D tiles may share; chunks never split a tile
SWEEP_BITS = tuple(range(9))

# Bins of log2(s / s*), octaves; what lies outside is counted in the bins at the ends.
DELTA_RANGE = (-4.0, 4.0)
DELTA_BINS = 256


@dataclass(frozen=True)
class Plan:
    """What is measured, and on what.

    Attributes:
        recipes: name -> recipe; the first is the base, which also gets the precision sweep and the histogram.
        dtype: what weights are cast to before they are quantised; training quantises BF16.
        rows: at most so many evenly spaced rows of each tensor; None measures all.
    """

    recipes: Mapping[str, QuantRecipe]
    dtype: torch.dtype = torch.bfloat16
    rows: int | None = None

    @property
    def base(self) -> str:
        return next(iter(self.recipes))


@dataclass
class DeltaSums:
    """Distribution of delta = log2(s / s*) over blocks: moments, and counts per bin; addable."""

    blocks: int = 0
    total: float = 0.0
    squares: float = 0.0
    ratio: float = 0.0  # sum of s / s* = 2^delta
    counts: np.ndarray = field(default_factory=lambda: np.zeros(DELTA_BINS, dtype=np.int64))

    def __add__(self, other: DeltaSums) -> DeltaSums:
        return DeltaSums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @classmethod
    def of(cls, delta: torch.Tensor) -> DeltaSums:
        """The sums of a float tensor of deltas."""
        values = delta.double()
        low, high = DELTA_RANGE
        bins = ((values - low) * (DELTA_BINS / (high - low))).floor().clamp_(0, DELTA_BINS - 1).long()
        counts = torch.bincount(bins, minlength=DELTA_BINS).numpy()
        return cls(values.numel(), values.sum().item(), values.square().sum().item(), torch.exp2(values).sum().item(), counts)

    @property
    def mean(self) -> float:
        """Mean delta in octaves; NaN without a block."""
        return self.total / self.blocks if self.blocks else float("nan")

    @property
    def variance(self) -> float:
        """Variance of delta; NaN without a block."""
        return max(self.squares / self.blocks - self.mean**2, 0.0) if self.blocks else float("nan")

    @property
    def mean_ratio(self) -> float:
        """E[s / s*]: how much too large scales are on average; 1 / ln 2 = 1.4427 for a uniform delta."""
        return self.ratio / self.blocks if self.blocks else float("nan")


@dataclass
class Errors:
    """Sums over one or many tensors; addable.

    Attributes:
        tensors, elements: how many were measured.
        stats: recipe name -> sums of the first pass's parts, and of the final error.
        sweep: mantissa bits of the block scale (None: a real-valued scale) -> squared error.
        delta: the base recipe's scales against the ideal ones.
    """

    tensors: int = 0
    elements: int = 0
    stats: dict[str, ErrorStats] = field(default_factory=dict)
    sweep: dict[int | None, float] = field(default_factory=dict)
    delta: DeltaSums = field(default_factory=DeltaSums)

    def add(self, other: Errors) -> None:
        """Pool `other` into this."""
        self.tensors += other.tensors
        self.elements += other.elements
        self.delta += other.delta
        for name, stats in other.stats.items():
            self.stats[name] = self.stats.get(name, ErrorStats()) + stats
        for bits, energy in other.sweep.items():
            self.sweep[bits] = self.sweep.get(bits, 0.0) + energy


@dataclass
class TensorErrors:
    """What was measured on one weight.

    Attributes:
        nan, inf: how many of its elements are NaN or infinite in the measured dtype. A tensor with any is not measured.
        all_zero: it holds nothing but zeros, which have no error to measure.
    """

    weight: LinearWeight
    errors: Errors = field(default_factory=Errors)
    nan: int = 0
    inf: int = 0
    all_zero: bool = False

    @property
    def broken(self) -> bool:
        """It is in no total."""
        return self.nan + self.inf > 0 or self.all_zero


def measure_checkpoint(
    checkpoint: Checkpoint, weights: Iterable[LinearWeight], plan: Plan, advance: Callable[[int], None] = lambda elements: None
) -> list[TensorErrors]:
    """Measure `weights` one by one, in their order; `advance` is called with the number of elements dealt with.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    return [measure_tensor(checkpoint.read(weight.info), weight, plan, advance) for weight in weights]


@torch.no_grad()
def measure_tensor(
    tensor: torch.Tensor, weight: LinearWeight, plan: Plan, advance: Callable[[int], None] = lambda elements: None
) -> TensorErrors:
    """Measure one weight: a floating tensor of two or more axes, `weight.axis` being the one that the product contracts.

    NaN and infinity are looked for in all of it, also where `plan.rows` measures only a sample.
    """
    result = TensorErrors(weight)
    matrices = _matrices(tensor, weight.axis)
    result.all_zero = True
    for chunk in (chunk for matrix in matrices for chunk in _row_chunks(matrix)):
        chunk = chunk.to(plan.dtype)
        result.all_zero &= not chunk.any()
        if not chunk.isfinite().all():
            result.nan += int(chunk.isnan().sum())
            result.inf += int(chunk.isinf().sum())
    if result.broken:
        advance(tensor.numel())
        return result
    reported = 0
    for matrix in _sampled(matrices, plan):
        for errors in _measure_matrix(matrix, plan):
            result.errors.add(errors)
            if plan.rows is None:
                advance(errors.elements)
                reported += errors.elements
    advance(tensor.numel() - reported)
    result.errors.tensors = 1
    return result


def pool(results: Iterable[TensorErrors]) -> Errors:
    """The sums of all tensors that are not broken."""
    total = Errors()
    for result in results:
        if not result.broken:
            total.add(result.errors)
    return total


def looks_at_whole_matrix(recipe: QuantRecipe) -> bool:
    """Whether quantising a row depends on rows outside its tile, or on where the row is in its matrix."""
    return recipe.format == "nvfp4" or recipe.fallback_fraction is not None or recipe.rounding == "stochastic"


def _measure_matrix(matrix: torch.Tensor, plan: Plan) -> Iterator[Errors]:
    """Sums of a matrix (out, in), chunk by chunk; those of recipes that need it whole come with no elements of their own."""
    whole = [name for name, recipe in plan.recipes.items() if looks_at_whole_matrix(recipe)]
    if whole:
        yield _measure_piece(matrix.to(plan.dtype).contiguous(), plan, whole)
    base = plan.recipes[plan.base]
    by_chunk = [name for name in plan.recipes if name not in whole]
    for chunk in _row_chunks(matrix):
        chunk = chunk.to(plan.dtype).contiguous()
        errors = _measure_piece(chunk, plan, by_chunk)
        errors.elements, errors.sweep = chunk.numel(), precision_sweep(chunk, bits=SWEEP_BITS, block_size=base.block_size)
        yield errors


def _measure_piece(piece: torch.Tensor, plan: Plan, names: list[str]) -> Errors:
    errors = Errors()
    for name in names:
        recipe = plan.recipes[name]
        errors.stats[name] = error_stats(piece, recipe, seed=_SEED)
    if plan.base in names:
        errors.delta = DeltaSums.of(scale_ratios(piece, plan.recipes[plan.base], seed=_SEED))
    return errors


def _matrices(tensor: torch.Tensor, axis: int) -> list[torch.Tensor]:
    """Views (out, in) of a weight: one of a Linear's, one an expert of a fused tensor."""
    rows = tensor.movedim(axis, -1)
    return [rows] if rows.ndim == 2 else list(rows.flatten(0, -3))


def _row_chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    rows = max(CHUNK_ELEMENTS // max(matrix.shape[1], 1) // _ROWS_TOGETHER, 1) * _ROWS_TOGETHER
    return iter(matrix.split(rows))


def _sampled(matrices: list[torch.Tensor], plan: Plan) -> Iterator[torch.Tensor]:
    """The matrices, or what `plan.rows` takes of them: rows that are evenly spaced over all the matrices of a tensor."""
    height = matrices[0].shape[0]
    total = height * len(matrices)
    if plan.rows is None or total <= plan.rows:
        yield from matrices
        return
    # Rows of a 2-D tile are taken together: a tile of spaced rows would be of no tensor's.
    together = _ROWS_TOGETHER if any(recipe.tile for recipe in plan.recipes.values()) else 1
    groups = -(-total // together)
    index = torch.linspace(0, groups - 1, max(plan.rows // together, 1)).round().long()
    index = (index[:, None] * together + torch.arange(together)).flatten().unique()
    index = index[index < total]
    for number, matrix in enumerate(matrices):
        own = index[index // height == number] - number * height
        if len(own):
            yield matrix.index_select(0, own)
