"""A matrix as FP8 containers: of its rows, of its columns, and as the operand, to the bit of `reference.py`.

A training step needs a matrix along both axes (FP8 tensor cores want operands contiguous along the contraction, so the
container of the columns is transposed). A group of 128 elements lies within a tile of 128 x 128: one read of it gives
everything. Whole rows share the scale of their largest element: a row up to 16384 elements stays in registers between finding
that and writing the payload; where columns are wanted too, one kernel finds the largest magnitudes of both, and then tiles
are independent again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from mxfp4_kernels.container.reference import (
    GROUP,
    HEADROOM,
    LEAST_TOP,
    MULTIPLE,
    WINDOW,
    Container,
    fits,
    fits_rows,
    group_of,
    macro_size,
    padded,
)
from mxfp4_kernels.device import (
    BLOCK,
    INTERPRETED,
    constants,
    exp2_byte,
    inverse_scale,
    largest_magnitude,
    load_columns,
    load_tile,
    over_factor,
    scale_byte,
    to_type,
    two_passes,
    unsupported,
)
from mxfp4_kernels.launch import Launch, Part, Prepared, empty, zeros
from mxfp4_rl.quant.quantizer import check
from mxfp4_rl.recipe import QuantRecipe

_LARGE_MACRO = 256
_IN_REGISTERS = 16384  # longest row between the largest magnitude and the payloads
_WINDOW, _HEADROOM, _LEAST_TOP = tl.constexpr(WINDOW), tl.constexpr(HEADROOM), tl.constexpr(LEAST_TOP)


@triton.jit
def largest_finite(x):
    """x (R, blocks, 32) -> the largest magnitude of a row's blocks without NaN and Inf, as bits (R,)."""
    amax = largest_magnitude(x, 2)
    return tl.max(tl.where(amax < float("inf"), amax, 0.0), axis=1).to(tl.int32, bitcast=True)


@triton.jit
def contain(
    x, largest, CARRY: tl.constexpr, SHIFT: tl.constexpr, MACRO: tl.constexpr, LARGEST: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """E4M3 payloads (R, blocks, 32), scales and wide flags (R, groups), x_hat before the factor, factors.

    x (R, blocks, 32) is in groups of BLOCKS; 0 if rows share a scale, whose largest magnitudes are `largest` (R,) then.
    """
    R: tl.constexpr = x.shape[0]
    NB: tl.constexpr = x.shape[1]
    first, byte, _v, _b, factor = two_passes(x, CARRY, SHIFT, MACRO, LARGEST, False)
    # A block is in use if its largest element does not round to zero.
    used = largest_magnitude(x, 2) * (inverse_scale(byte) * factor) > 0.25
    if BLOCKS > 0:
        groups: tl.constexpr = (R, NB // BLOCKS, BLOCKS)
        top = tl.maximum(tl.max(tl.reshape(tl.where(used, byte, 0), groups), axis=2), _LEAST_TOP)
        spread = tl.reshape(tl.broadcast_to(top[:, :, None], groups), (R, NB))
    else:
        top = tl.maximum(scale_byte(largest.to(tl.float32, bitcast=True), CARRY, SHIFT)[:, None], _LEAST_TOP)
        spread = tl.broadcast_to(top, (R, NB))
    left_out = used & (byte < spread - _WINDOW)
    shift = tl.where(left_out, 0.0, exp2_byte(tl.where(used, byte - spread + _HEADROOM + 127, 127)))
    payload = (first * shift[:, :, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    if INTERPRETED:  # whose cast loses NaN
        payload = tl.where((byte == 255)[:, :, None], 0x7F, payload).to(tl.uint8)
    scale = exp2_byte(top - _HEADROOM)
    if BLOCKS > 0:
        wide = tl.max(tl.reshape(left_out.to(tl.int32), groups), axis=2) > 0
        if MACRO > 0:
            scale = tl.div_rn(scale, tl.max(tl.reshape(factor, groups), axis=2))
    else:
        wide = tl.max(left_out.to(tl.int32), axis=1)[:, None] > 0
    return payload, scale, wide, first * exp2_byte(byte)[:, :, None], factor


@triton.jit
def _store(
    payload, scale, wide, payload_ptr, scale_ptr, wide_ptr, row0, k0, ROWS, LONG,
    R: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Groups of G elements; 0 if rows share a scale, which then the first program of a row stores."""
    rows, columns = row0 + tl.arange(0, R), k0 + tl.arange(0, BK)
    at = rows[:, None].to(tl.int64) * LONG + columns[None, :]
    tl.store(payload_ptr + at, tl.reshape(payload, (R, BK)), mask=(rows < ROWS)[:, None] & (columns < LONG)[None, :])
    if G > 0:
        groups = k0 // G + tl.arange(0, BK // G)
        mask = (rows < ROWS)[:, None] & (groups * G < LONG)[None, :]
        tl.store(scale_ptr + groups[None, :].to(tl.int64) * ROWS + rows[:, None], scale, mask=mask)
    else:
        groups = tl.zeros((1,), tl.int32)
        mask = (rows < ROWS)[:, None] & (groups == 0)[None, :]
        tl.store(scale_ptr + rows[:, None] + groups[None, :], scale, mask=mask & (groups + k0 == 0)[None, :])
    tl.store(wide_ptr + rows[:, None] + 0 * groups[None, :], wide.to(tl.uint8), mask=mask & wide)
    tl.store(wide_ptr + ROWS + 0 * rows[:, None] + 0 * groups[None, :], wide.to(tl.uint8), mask=mask & wide)  # any_wide


@triton.jit
def _store_operand(x_hat, factor, operand_ptr, rows, columns, M, K, MACRO: tl.constexpr):
    if MACRO > 0:
        x_hat = over_factor(x_hat, factor)
    at = operand_ptr + rows[:, None].to(tl.int64) * K + columns[None, :]
    value = to_type(tl.reshape(x_hat, (rows.shape[0], columns.shape[0])), operand_ptr.dtype.element_ty)
    tl.store(at, value, mask=(rows < M)[:, None] & (columns < K)[None, :])


@triton.jit
def _rows_kernel(
    x_ptr, payload_ptr, scale_ptr, wide_ptr, operand_ptr, M, K, ROWS, LONG, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, OPERAND: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Whole rows that share a scale, and their operand."""
    row0 = tl.program_id(0) * R
    rows, columns = row0 + tl.arange(0, R), tl.arange(0, BK)
    blocks = tl.reshape(load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k), (R, BK // 32, 32))
    payload, scale, wide, x_hat, factor = contain(blocks, largest_finite(blocks), CARRY, SHIFT, 0, 1.0, 0)
    _store(payload, scale, wide, payload_ptr, scale_ptr, wide_ptr, row0, 0, ROWS, LONG, R, BK, 0)
    if OPERAND:
        _store_operand(x_hat, factor, operand_ptr, rows, columns, M, K, 0)


@triton.jit
def _largest_kernel(
    x_ptr, largest_ptr, largest_t_ptr, M, K, stride_m, stride_k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitudes of the rows and of the columns, as bits, joined to those of other tiles."""
    m0, k0 = tl.program_id(0) * BM, tl.program_id(1) * BK
    rows, columns = m0 + tl.arange(0, BM), k0 + tl.arange(0, BK)
    if COLUMNS:
        largest = largest_finite(load_columns(x_ptr, m0, k0, M, K, stride_m, stride_k, BM, BK))
        tl.atomic_max(largest_t_ptr + columns, largest, mask=columns < K, sem="relaxed")
    if ROWS:
        x = load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k)
        tl.atomic_max(
            largest_ptr + rows, largest_finite(tl.reshape(x, (BM, BK // 32, 32))), mask=rows < M, sem="relaxed"
        )  # fmt: skip


@triton.jit
def _tile_kernel(
    x_ptr, payload_ptr, scale_ptr, wide_ptr, largest_ptr, payload_t_ptr, scale_t_ptr, wide_t_ptr, largest_t_ptr, operand_ptr,
    M, K, M_ROWS, K_ROWS, M_LONG, K_LONG, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, MACRO: tl.constexpr, GROUP: tl.constexpr,
    CARRY_T: tl.constexpr, SHIFT_T: tl.constexpr, MACRO_T: tl.constexpr, GROUP_T: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr, LARGEST: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BK) of x: its part of the rows' container, of the columns' container, and of the rows' operand."""
    m0, k0 = tl.program_id(0) * BM, tl.program_id(1) * BK
    rows, columns = m0 + tl.arange(0, BM), k0 + tl.arange(0, BK)
    if COLUMNS:
        blocks = load_columns(x_ptr, m0, k0, M, K, stride_m, stride_k, BM, BK)
        largest = tl.load(largest_t_ptr + columns, mask=columns < K, other=0) if GROUP_T == 0 else columns
        payload, scale, wide, _x, _f = contain(blocks, largest, CARRY_T, SHIFT_T, MACRO_T, LARGEST, GROUP_T // 32)
        _store(payload, scale, wide, payload_t_ptr, scale_t_ptr, wide_t_ptr, k0, m0, K_ROWS, M_LONG, BK, BM, GROUP_T)
    if ROWS:
        blocks = tl.reshape(load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k), (BM, BK // 32, 32))
        largest = tl.load(largest_ptr + rows, mask=rows < M, other=0) if GROUP == 0 else rows
        payload, scale, wide, x_hat, factor = contain(blocks, largest, CARRY, SHIFT, MACRO, LARGEST, GROUP // 32)
        _store(payload, scale, wide, payload_ptr, scale_ptr, wide_ptr, m0, k0, M_ROWS, K_LONG, BM, BK, GROUP)
        if OPERAND:
            _store_operand(x_hat, factor, operand_ptr, rows, columns, M, K, MACRO)


class Side:
    """What is known of a container before it is made: its sizes, and the matrix (rows, length) it will be made from.

    Attributes:
        strides, dtype, device: the matrix's.
        shape, group: the container's. size, scales: of its payload and of its scales. flags: where they start in its buffer.
    """

    def __init__(self, x: torch.Tensor, recipe: QuantRecipe, group: int | None, flags: int):
        rows, length = self.shape = tuple(x.shape)
        self.strides, self.dtype, self.device, self.recipe, self.flags = x.stride(), x.dtype, x.device, recipe, flags
        self.size = n, long = padded(rows, MULTIPLE), padded(length, GROUP if group else MULTIPLE)
        self.group = group or max(long, MULTIPLE)
        self.scales = -(-long // self.group), n

    def empty(self, buffer: torch.Tensor) -> Written:
        """A container to be written."""
        payload, scale = empty(self.size, torch.float8_e4m3fn, self.device), empty(self.scales, torch.float32, self.device)
        return Written(payload, scale, buffer, self)


class Written(Container):
    """A container that a kernel wrote. Its flags are a part of a buffer, looked up where somebody asks for them."""

    def __init__(self, payload: torch.Tensor, scale: torch.Tensor, buffer: torch.Tensor, side: Side):
        self.payload, self.scale, self.buffer, self.side = payload, scale, buffer, side
        self.shape, self.group = side.shape, side.group

    @functools.cached_property
    def wide(self) -> torch.Tensor:
        return self.buffer.view(torch.uint8)[self.side.flags :][: self.side.size[0]]

    @functools.cached_property
    def any_wide(self) -> torch.Tensor:
        return self.buffer.view(torch.uint8)[self.side.flags + self.side.size[0] :][:1]


class _Job:
    """`containers` for a kind of matrix: where everything goes, and the launches.

    A buffer that starts as zeros holds the bits of the largest magnitudes of rows and of columns, then the flags of both, each
    with `any_wide` behind.
    """

    def __init__(self, x, rows, columns, operand_dtype, whole_rows):
        (M, K), self.operand_dtype = x.shape, operand_dtype
        m_rows, k_rows, m_long, k_long = (padded(n, multiple) for multiple in (MULTIPLE, GROUP) for n in (M, K))
        if whole_rows:
            m_long, k_long = m_rows, k_rows
        largest = [m_rows * 4 * (rows is not None), k_rows * 4 * (columns is not None)]
        flags = sum(largest), sum(largest) + (m_rows + 16) * (rows is not None)
        self.count = (flags[1] + (k_rows + 16) * (columns is not None)) // 4
        groups = [None if whole_rows else group_of(r) for r in (rows or columns, columns or rows)]
        self.first = Side(x, rows, groups[0], flags[0]) if rows is not None else None
        self.second = Side(x.t(), columns, groups[1], flags[1]) if columns is not None else None
        self.device, self.shape = x.device, (M, K)
        # The tensors of a launch: x, the buffer, payload and scale of each side, the operand.
        parts = iter(range(2, 7))
        sides = []
        for side, start in ((self.first, 0), (self.second, largest[0])):
            own = (
                [Part(next(parts), 0, torch.uint8), Part(next(parts)), Part(1, side.flags, torch.uint8)] if side else [None] * 3
            )
            sides.append([*own, Part(1, start, torch.int32) if side else None])
        x_hat = Part(next(parts)) if operand_dtype is not None else None
        self.launches = []
        if not x.numel():
            return
        how, how_t = (constants(r) for r in (rows or columns, columns or rows))
        strides = x.stride()
        if whole_rows and columns is None and K <= _IN_REGISTERS:
            wide = max(triton.next_power_of_2(k_rows), 256)
            R = max(1, 2048 // wide)
            self.launches.append(Launch(
                _rows_kernel, (triton.cdiv(m_rows, R),),
                [Part(0), *sides[0][:3], x_hat], (M, K, m_rows, k_rows, *strides),
                CARRY=how["CARRY"], SHIFT=how["SHIFT"], OPERAND=x_hat is not None, R=R, BK=wide,
                num_warps=max(2, min(16, R * wide // 1024)), enable_fp_fusion=False,
            ))  # fmt: skip
            return
        which = {"ROWS": rows is not None, "COLUMNS": columns is not None}
        if whole_rows:
            self.launches.append(Launch(
                _largest_kernel, (triton.cdiv(M, 64), triton.cdiv(K, 256)),
                [Part(0), sides[0][3], sides[1][3]], (M, K, *strides),
                **which, BM=64, BK=256, num_warps=8, enable_fp_fusion=False,
            ))  # fmt: skip
        macros = [how["GROUP"] * (rows is not None), how_t["GROUP"] * (columns is not None)]
        tile = _tile(*macros, columns is not None and not whole_rows)
        grid = triton.cdiv(m_rows if columns is None else max(m_rows, m_long), tile["BM"]), triton.cdiv(k_long, tile["BK"])
        self.launches.append(Launch(
            _tile_kernel, grid,
            [Part(0), *sides[0], *sides[1], x_hat], (M, K, m_rows, k_rows, m_long, k_long, *strides),
            CARRY=how["CARRY"], SHIFT=how["SHIFT"], MACRO=how["GROUP"], GROUP=groups[0] or 0,
            CARRY_T=how_t["CARRY"], SHIFT_T=how_t["SHIFT"], MACRO_T=how_t["GROUP"], GROUP_T=groups[1] or 0,
            **which, OPERAND=x_hat is not None, LARGEST=how["LARGEST"], enable_fp_fusion=False, **tile,
        ))  # fmt: skip

    def __call__(self, x: torch.Tensor) -> tuple[Container | None, Container | None, torch.Tensor | None]:
        buffer = zeros(self.count, self.device)
        tensors, made, x_hat = [x, buffer], [], None
        for side in (self.first, self.second):
            if side is not None:
                made.append(container := side.empty(buffer))
                tensors += container.payload, container.scale
            else:
                made.append(None)
        if self.operand_dtype is not None:
            x_hat = empty(self.shape, self.operand_dtype, self.device)
            tensors.append(x_hat)
        for launch in self.launches:
            launch(*tensors)
        return *made, x_hat


_jobs = Prepared()


def containers(
    x: torch.Tensor,
    rows: QuantRecipe | None = None,
    columns: QuantRecipe | None = None,
    operand_dtype: torch.dtype | None = None,
    whole_rows: bool = False,
) -> tuple[Container | None, Container | None, torch.Tensor | None]:
    """What a training step needs of a matrix.

    Args:
        x: (M, K), float32, bfloat16 or float16, of any strides.
        rows, columns: recipes of the container of x, blocks along K, and of x^T, blocks along M; None leaves one out.
        operand_dtype: dtype of x_hat (M, K), quantised by `rows`, or None to leave it out.
        whole_rows: one scale a row of each container, instead of one for every 128 elements or macro block.

    Returns:
        (container of x, container of x^T, x_hat), None for what was left out.

    Raises:
        ValueError: not a matrix, no recipe, containers do not hold one (see `fits`, `fits_rows`), or an operand without `rows`.
        TypeError: another dtype.
    """
    key = (id(rows), id(columns), operand_dtype, whole_rows, x.shape, x.stride(), x.dtype, x.device)
    known = _jobs.get(key) or _jobs.keep(key, (_job(x, rows, columns, operand_dtype, whole_rows), rows, columns))
    return known[0](x)


def _job(x, rows, columns, operand_dtype, whole_rows) -> Callable[[torch.Tensor], tuple]:
    """What `containers` does with tensors like x; errors as there."""
    if x.ndim != 2:
        raise ValueError(
            f"a container holds a matrix, not a tensor of shape {tuple(x.shape)}: reshape it to (tokens, features)"
        )
    check(x, 0)
    if rows is None and columns is None:
        raise ValueError("no recipe is given: `rows`, `columns` or both")
    for recipe in (rows, columns):
        if recipe is not None and not (fits_rows if whole_rows else fits)(recipe):
            why = unsupported(recipe) or ("it has a fallback" if recipe.fallback_alpha is not None else "rows share a scale")
            raise ValueError(f"no FP8 container holds {recipe.describe()} ({why}): dequantise and multiply in BF16")
    if operand_dtype is not None and rows is None:
        raise ValueError("an operand is quantised by `rows`: give that recipe too")
    if rows is not None and columns is not None and _LARGE_MACRO in (macro_size(rows), macro_size(columns)):
        # A tile of both would be 256 x 256, more than the registers hold.
        of_rows, of_columns = _job(x, rows, None, operand_dtype, False), _job(x, None, columns, None, False)

        def apart(x):
            first, _, x_hat = of_rows(x)
            return first, of_columns(x)[1], x_hat

        return apart
    if x.stride(0) == 1 and x.stride(1) != 1 and operand_dtype is None:  # a transposed view: neighbours lie along its columns
        transposed = _Job(x.t(), columns, rows, None, whole_rows)

        def swapped(x):
            second, first, _ = transposed(x.t())
            return first, second, None

        return swapped
    return _Job(x, rows, columns, operand_dtype, whole_rows)


def _tile(macro: int, macro_t: int, columns: bool) -> dict[str, int]:
    """Tiles that hold whole groups and macro blocks, of columns too if they have groups."""
    if columns:
        return {"BM": max(GROUP, macro_t * BLOCK), "BK": max(GROUP, macro * BLOCK), "num_warps": 8}
    return {"BM": 32, "BK": max(GROUP, macro * BLOCK), "num_warps": 4}
