"""What 4 bits do to a tensor: the quantisation error, split into parts (arXiv 2605.20402).

For a block with largest magnitude m, s* = m / 6 is the real-valued scale that the format rounds to s, Q* quantises with s*, and
D = {Q*(x) = 0} is the deadzone. The first pass's error telescopes exactly:

    Q1(x) - x  =  Q1(x) - Q*(x)                 scale bias: the scale is a power of two (or an E4M3 number)
               +  (Q*(x) - x) on D              deadzone:   small elements become zero
               +  (Q*(x) - x) off D             grid noise: the grid has eight magnitudes
    Q(x) - Q1(x)  =  alpha * q2 / f             fallback:   what the outlier fallback adds back (0 without it)

Where s >= s* (rules rceil and ceil, rounding to nearest) the deadzone part is orthogonal to the other two, element by element.
Scale bias and grid noise overlap (their cosine is about -0.66 on weights), so the three energies do not add up to the error's.

`partition` splits the same error by the scale that was used, for any rule: elements that became zero, elements beyond the
grid's end (which clipped), and the rest. These parts live on disjoint elements, so their energies do add up.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mxfp4_rl.quant.blocks import over_tiles
from mxfp4_rl.quant.elements import E2M1_MAX, round_e2m1
from mxfp4_rl.quant.hadamard import rotate_back
from mxfp4_rl.quant.passes import Chunk
from mxfp4_rl.quant.quantizer import check, fake_quantize, passes, rows_of, triton_module
from mxfp4_rl.quant.scales import divided, rounded_up_scale
from mxfp4_rl.quant.tensor import axis_back
from mxfp4_rl.recipe import QuantRecipe, RecipeError


class _Parts:
    """Tensors that add up to the error."""

    def total(self) -> torch.Tensor:
        """Q(x) - x."""
        return functools.reduce(torch.add, vars(self).values())


@dataclass
class ErrorParts(_Parts):
    """The four parts of Q(x) - x, float64, each of the shape of x; their sum is Q(x) - x exactly for float32 x.

    A block with NaN or Inf is NaN in every part; no other block is touched.
    """

    scale_bias: torch.Tensor
    deadzone: torch.Tensor
    grid_noise: torch.Tensor
    fallback: torch.Tensor


@dataclass
class ErrorPartition(_Parts):
    """Q(x) - x by what became of each element, float64, each of the shape of x; the sum is Q(x) - x exactly.

    Attributes:
        deadzone: -x where the first pass gave 0. clipping: the first pass's error where |x| was beyond the grid's end.
        grid_noise: its error elsewhere. fallback: what a second pass added.
    """

    deadzone: torch.Tensor
    clipping: torch.Tensor
    grid_noise: torch.Tensor
    fallback: torch.Tensor


def decompose(x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1, seed: int | None = None) -> ErrorParts:
    """Split the error of quantising `x` along `axis` into the paper's parts.

    Args and errors as `quantize`; RecipeError for a recipe that rotates, whose parts live in the rotated tensor.
    """
    return ErrorParts(*_collect(_parts, x, recipe, axis, seed))


def partition(x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1, seed: int | None = None) -> ErrorPartition:
    """Split the error of quantising `x` by what became of each element. Args and errors as `decompose`."""
    return ErrorPartition(*_collect(_partition, x, recipe, axis, seed))


def _collect(split, x, recipe, axis, seed) -> list[torch.Tensor]:
    """What `split` gives for every chunk, put together: four float64 tensors of the shape of x."""
    recipe = recipe or QuantRecipe()
    if recipe.hadamard:
        raise RecipeError(
            "the parts of a rotated tensor's error live in the rotated tensor: rotate it, and decompose with hadamard=None"
        )
    rows, chunks = passes(x, recipe, axis, seed)
    outs = [torch.empty(rows.count, rows.length, dtype=torch.float64, device=x.device) for _ in range(4)]
    done = 0
    for source, chunk in chunks:
        count = source.shape[0]
        for out, values in zip(outs, split(_measure(source, chunk, recipe, torch.float64))):
            out[done : done + count] = values.flatten(-2)[:, : rows.length]
        done += count
    return [axis_back(out, x.shape, axis % x.ndim) for out in outs]


@dataclass
class _Measured:
    """A chunk's first pass, final result and ideal result, each (R, blocks, block_size); masks; m, (R, blocks)."""

    x: torch.Tensor
    first: torch.Tensor
    final: torch.Tensor | None  # None without a second pass: the first is the final result
    ideal: torch.Tensor
    dead: torch.Tensor
    zero: torch.Tensor
    beyond: torch.Tensor
    amax: torch.Tensor


def _measure(x: torch.Tensor, chunk: Chunk, recipe: QuantRecipe, dtype: torch.dtype) -> _Measured:
    """`x` is float32; `dtype` is that of the ideal quantiser's arithmetic and of the results. The chunk is used up."""
    scale = chunk.block_scales()
    zero = chunk.values[0] == 0
    first_only = dataclasses.replace(chunk, values=[chunk.values[0].clone()], scales=chunk.scales[:1])
    first = first_only.operand()
    final = chunk.operand() if len(chunk.values) > 1 else None
    magnitude = x.abs()
    amax = over_tiles(magnitude.amax(-1), recipe.tile_rows, "amax").unsqueeze(-1)
    beyond = magnitude > (E2M1_MAX * scale).unsqueeze(-1)
    x, amax = x.to(dtype), amax.to(dtype)
    on_grid = round_e2m1(torch.where(amax > 0, x * E2M1_MAX / amax, x))
    # Rounded to float32, so that every difference below is exact in float64 and the sum telescopes to the bit.
    ideal = divided(on_grid * amax, E2M1_MAX).float()
    return _Measured(
        x,
        first.to(dtype),
        None if final is None else final.to(dtype),
        ideal.to(dtype),
        on_grid == 0,
        zero,
        beyond,
        amax.squeeze(-1),
    )


def _parts(m: _Measured) -> tuple[torch.Tensor, ...]:
    """scale bias, deadzone, grid noise, fallback."""
    remainder, broken = m.ideal - m.x, ~m.first.isfinite()  # a broken block is NaN in every part
    return (
        m.first - m.ideal,
        torch.where(m.dead | broken, remainder, 0.0),
        torch.where(m.dead & ~broken, 0.0, remainder),
        _fallback(m),
    )


def _partition(m: _Measured) -> tuple[torch.Tensor, ...]:
    """deadzone, clipping, grid noise, fallback."""
    error, broken = m.first - m.x, ~m.first.isfinite()
    return (
        torch.where(m.zero | broken, error, 0.0),
        torch.where(m.beyond | broken, error, 0.0),
        torch.where((m.zero | m.beyond) & ~broken, 0.0, error),
        _fallback(m),
    )


def _fallback(m: _Measured) -> torch.Tensor:
    return m.first - m.first if m.final is None else m.final - m.first


@dataclass
class ErrorStats:
    """Sums over one or many tensors; adding two of them pools the tensors, so every ratio is a ratio of sums."""

    energy: float = 0.0  # of x
    scale_bias: float = 0.0
    deadzone: float = 0.0
    grid_noise: float = 0.0
    fallback: float = 0.0
    cross: float = 0.0  # <scale bias, grid noise>
    cross_deadzone: float = 0.0  # <scale bias, deadzone>
    zeroed: float = 0.0  # of the first pass's error where it gave 0
    clipped: float = 0.0  # of the first pass's error where |x| was beyond the grid's end
    first_error: float = 0.0  # of Q1(x) - x
    error: float = 0.0  # of Q(x) - x
    dead_error: float = 0.0  # of Q(x) - x on the deadzone: what a second pass leaves of it
    product: float = 0.0  # <Q(x), x>
    dead_elements: float = 0.0
    zero_elements: float = 0.0  # of the first pass
    final_zeros: float = 0.0  # of Q(x)
    elements: float = 0.0
    broken: float = 0.0  # elements of blocks with NaN or Inf: in no other sum
    delta: float = 0.0  # sum over non-zero blocks of log2(s / s*)
    blocks: float = 0.0

    def __add__(self, other: ErrorStats) -> ErrorStats:
        return ErrorStats(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def metrics(self) -> dict[str, float]:
        """Empty if nothing was added, else:

        scale_bias, deadzone, grid_noise, fallback, rel_mse, final_deadzone: energies over that of x; deadzone_fraction,
        zero_fraction, final_zero_fraction: of the elements that the ideal quantiser, the first pass and the final result make
        zero; cos_scale_grid, cos_scale_deadzone; delta_mean (octaves); slope: <Q(x), x> / <x, x>.
        """
        if not self.energy > 0:
            return {}
        ratios = {n: getattr(self, n) / self.energy for n in ("scale_bias", "deadzone", "grid_noise", "fallback")}
        return ratios | {
            "rel_mse": self.error / self.energy,
            "final_deadzone": self.dead_error / self.energy,
            "deadzone_fraction": self.dead_elements / self.elements,
            "zero_fraction": self.zero_elements / self.elements,
            "final_zero_fraction": self.final_zeros / self.elements,
            "cos_scale_grid": self.cross / max((self.scale_bias * self.grid_noise) ** 0.5, 1e-300),
            "cos_scale_deadzone": self.cross_deadzone / max((self.scale_bias * self.deadzone) ** 0.5, 1e-300),
            "delta_mean": self.delta / max(self.blocks, 1),
            "slope": self.product / self.energy,
        }

    def shares(self) -> dict[str, float]:
        """The paper's table: energy of each part of the first pass over that pass's error energy."""
        return self._over_first_error({n: getattr(self, n) for n in ("scale_bias", "deadzone", "grid_noise")})

    def partition(self) -> dict[str, float]:
        """Shares of the first pass's error by what became of the elements; they sum to 1 (see `partition`)."""
        rest = self.first_error - self.zeroed - self.clipped
        return self._over_first_error({"deadzone": self.zeroed, "clipping": self.clipped, "grid_noise": rest})

    def _over_first_error(self, energies: dict[str, float]) -> dict[str, float]:
        return {n: e / self.first_error for n, e in energies.items()} if self.first_error > 0 else {}


def error_stats(
    x: torch.Tensor,
    recipe: QuantRecipe | None = None,
    axis: int = -1,
    seed: int | None = None,
    backend: str | None = None,
) -> ErrorStats:
    """Energies of the error parts of `x`, pooled over its finite blocks. Args and errors as `quantize`.

    Backends give the same counts for bfloat16 and float16, and energies within float32 rounding.

    For a recipe that rotates the parts and the counts are those of the rotated tensor, padded to whole rotations; `error` and
    `product` are of what comes back.
    """
    recipe = recipe or QuantRecipe()
    check(x, axis)
    if kernels := triton_module("error_stats.triton", x, recipe, backend):
        return kernels.error_stats(x.detach(), recipe, axis % x.ndim)
    rows, chunks = passes(x, recipe, axis, seed)
    counted = torch.arange(rows.width, device=x.device).view(rows.blocks, -1) < (rows.width if recipe.hadamard else rows.length)
    sums = ErrorStats()
    for source, chunk in chunks:
        # float32 decides rightly on which side of a midpoint values of 8 or 11 bits are, but not always those of 24 bits.
        dtype = torch.float64 if x.dtype == torch.float32 else _arithmetic(source)
        measured = _measure(source, chunk, recipe, dtype)
        new = _sums(measured, chunk, counted)
        if recipe.hadamard:
            _measure_rotated_back(new, measured, recipe.hadamard, rows.length)
        sums += new
    return sums


def _measure_rotated_back(sums: ErrorStats, m: _Measured, size: int, length: int) -> None:
    """Replace the sums of the final result: what the rotation back puts into the padding is dropped with it."""
    final = m.first if m.final is None else m.final
    x, x_hat = (rotate_back(t.float().flatten(-2), size)[:, :length].double() for t in (m.x, final))
    sums.error, sums.product = (x_hat - x).square().sum().item(), (x_hat * x).sum().item()


def _arithmetic(values: torch.Tensor) -> torch.dtype:
    """float32, which is twice as fast, unless the squares of the values, NaN and Inf apart, would leave its range."""
    finite = values.abs().nan_to_num_(nan=0.0, posinf=0.0)
    largest = finite.max().item() if finite.numel() else 0.0
    return torch.float32 if largest == 0 or 1e-12 < largest < 1e15 else torch.float64


def _sums(m: _Measured, chunk: Chunk, counted: torch.Tensor) -> ErrorStats:
    """`counted` (blocks, block_size) is False on padding, which is zero before and after: it adds to no energy."""
    broken = ~m.amax.isfinite()
    if broken.any():
        for t in (m.x, m.first, m.ideal, *([] if m.final is None else [m.final])):
            t.masked_fill_(broken.unsqueeze(-1), 0)
        m.amax = m.amax.masked_fill(broken, 0)
        m.beyond.masked_fill_(broken.unsqueeze(-1), False)
        counted_before, counted = counted, counted & ~broken.unsqueeze(-1)
    whole = counted.ndim == 2 and bool(counted.all())
    first_error, remainder, scale_bias = m.first - m.x, m.ideal - m.x, m.first - m.ideal
    dead_remainder = torch.where(m.dead, remainder, 0.0)
    grid_noise = remainder - dead_remainder

    def count(mask):
        return float(mask.sum() if whole else (mask & counted).sum())

    def dot(a, b):
        return (a * b).sum(-1).double().sum().item()

    final, final_error = (m.first, first_error) if m.final is None else (m.final, m.final - m.x)
    first_energy = dot(first_error, first_error)
    delta = torch.log2(chunk.block_scales().double() * E2M1_MAX / m.amax)[m.amax > 0]
    delta = delta[delta.isfinite()]
    return ErrorStats(
        energy=dot(m.x, m.x),
        scale_bias=dot(scale_bias, scale_bias),
        deadzone=dot(dead_remainder, dead_remainder),
        grid_noise=dot(grid_noise, grid_noise),
        fallback=0.0 if m.final is None else dot(final - m.first, final - m.first),
        cross=dot(scale_bias, grid_noise),
        cross_deadzone=dot(scale_bias, dead_remainder),
        zeroed=dot(torch.where(m.zero, m.x, 0.0), m.x),
        clipped=dot(torch.where(m.beyond, first_error, 0.0), first_error) if m.beyond.any() else 0.0,
        first_error=first_energy,
        error=first_energy if m.final is None else dot(final_error, final_error),
        dead_error=dot(torch.where(m.dead, final_error, 0.0), final_error),
        product=dot(final, m.x),
        dead_elements=count(m.dead),
        zero_elements=count(m.zero),
        final_zeros=count(final == 0),
        elements=count(torch.ones_like(m.dead)),
        broken=float((counted_before & broken.unsqueeze(-1)).sum()) if broken.any() else 0.0,
        delta=delta.sum().item(),
        blocks=float(delta.numel()),
    )


def scale_ratios(x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1, seed: int | None = None) -> torch.Tensor:
    """delta = log2(s / s*) of every non-zero finite block, float32 (blocks,). Args and errors as `quantize`."""
    recipe = recipe or QuantRecipe()
    found = [torch.empty(0, device=x.device)]
    for source, chunk in passes(x, recipe, axis, seed)[1]:
        amax = over_tiles(source.abs().amax(-1), recipe.tile_rows, "amax")
        delta = torch.log2(chunk.block_scales() * E2M1_MAX / amax)
        found.append(delta[(amax > 0) & amax.isfinite() & delta.isfinite()])
    return torch.cat(found)


def precision_sweep(
    x: torch.Tensor, axis: int = -1, bits: Iterable[int] = range(9), block_size: int = 32
) -> dict[int | None, float]:
    """Squared error of `x` when the block scale keeps k mantissa bits, rounded up (E8Mk; k = 0 is MXFP4 with rceil).

    Figure 2 of arXiv 2605.20402. Key None is the real-valued scale, the absmax quantisers' floor. Blocks with NaN or Inf are
    left out. Args and errors as `quantize`.
    """
    bits = tuple(bits)
    errors: dict[int | None, float] = dict.fromkeys((*bits, None), 0.0)
    for _, b in rows_of(x, axis, QuantRecipe(block_size=block_size)).chunks():
        amax = torch.abs(b.x, out=b.first).amax(-1)
        amax = torch.where(amax.isfinite(), amax, 0)
        dtype = _arithmetic(amax)
        b.x.masked_fill_((amax == 0).unsqueeze(-1), 0)
        for k in errors:
            scale = (divided(amax, E2M1_MAX) if k is None else rounded_up_scale(amax, k)).clamp_(min=2.0**-126).unsqueeze(-1)
            torch.mul(b.x, 1 / scale, out=b.second)
            error = round_e2m1(b.second, out=b.first, scratch=b.scratch).mul_(scale).sub_(b.x)
            errors[k] += error.to(dtype).square_().sum(-1).double().sum().item()
    return errors


def rel_mse(x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1, seed: int | None = None) -> float:
    """Energy of Q(x) - x over the energy of x, without the parts; NaN for zeros. Args and errors as `quantize`."""
    error = fake_quantize(x, recipe, axis, dtype=torch.float32, seed=seed) - x.float()
    return (error.double().square().sum() / x.double().square().sum()).item()
