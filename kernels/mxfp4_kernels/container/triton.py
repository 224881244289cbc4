"""A matrix as FP8 containers: of its rows, of its columns, and as the operand, to the bit of `reference.py`.

A training step needs a matrix along both axes (FP8 tensor cores want operands contiguous along the contraction, so the
container of the columns is transposed). A group of 128 elements lies within a tile of 128 x 128: one read of it gives
everything. Whole rows share the scale of their largest element: a row up to 16384 elements stays in registers between finding
that and writing the payload; where columns are wanted too, one kernel finds the largest magnitudes of both, and then tiles
are independent again.
"""

from __future__ import annotations

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
    launches,
    load_columns,
    load_tile,
    over_factor,
    scale_byte,
    to_type,
    two_passes,
    unsupported,
)
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


def _empty(rows: int, length: int, group: int | None, device: torch.device) -> tuple[Container, torch.Tensor]:
    """A container to be written, and the bits of its rows' largest magnitudes, zero as are its flags."""
    n, long = padded(rows, MULTIPLE), padded(length, GROUP if group else MULTIPLE)
    group = group or max(long, MULTIPLE)
    zeros = torch.zeros(n + n // 4 + 4, dtype=torch.int32, device=device)
    flags = zeros[n:].view(torch.uint8)
    payload = torch.empty(n, long, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(-(-long // group), n, dtype=torch.float32, device=device)
    return Container(payload, scale, flags[:n], flags[n : n + 1], (rows, length), group), zeros[:n]


@launches
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
        first, _, x_hat = containers(x, rows=rows, operand_dtype=operand_dtype)
        return first, containers(x, columns=columns)[1], x_hat
    if x.stride(0) == 1 and x.stride(1) != 1 and operand_dtype is None:  # a transposed view: neighbours lie along its columns
        second, first, _ = containers(x.t(), columns, rows, whole_rows=whole_rows)
        return first, second, None
    M, K = x.shape
    groups = [None if whole_rows else group_of(r) for r in (rows or columns, columns or rows)]
    first, largest = _empty(M, K, groups[0], x.device) if rows is not None else (None, None)
    second, largest_t = _empty(K, M, groups[1], x.device) if columns is not None else (None, None)
    x_hat = torch.empty(M, K, dtype=operand_dtype, device=x.device) if operand_dtype is not None else None
    size = (M, K, x.stride(0), x.stride(1))
    if not x.numel():
        pass
    elif whole_rows and columns is None and K <= _IN_REGISTERS:
        _launch_rows(x, first, x_hat, constants(rows))
    else:
        how, how_t = (constants(r) for r in (rows or columns, columns or rows))
        views = [(c.payload.view(torch.uint8), c.scale, c.wide) if c is not None else (None,) * 3 for c in (first, second)]
        sides = {"ROWS": rows is not None, "COLUMNS": columns is not None}
        if whole_rows:
            _largest_kernel[triton.cdiv(M, 64), triton.cdiv(K, 256)](
                x, largest, largest_t, *size, **sides, BM=64, BK=256, num_warps=8, enable_fp_fusion=False
            )
        m_rows, k_rows, m_long, k_long = (padded(n, multiple) for multiple in (MULTIPLE, GROUP) for n in (M, K))
        if whole_rows:
            m_long, k_long = m_rows, k_rows
        macros = [how["GROUP"] * (rows is not None), how_t["GROUP"] * (columns is not None)]
        tile = _tile(*macros, columns is not None and not whole_rows)
        grid = triton.cdiv(m_rows if columns is None else max(m_rows, m_long), tile["BM"]), triton.cdiv(k_long, tile["BK"])
        _tile_kernel[grid](
            x, *views[0], largest, *views[1], largest_t, x_hat, *size[:2], m_rows, k_rows, m_long, k_long, *size[2:],
            CARRY=how["CARRY"], SHIFT=how["SHIFT"], MACRO=how["GROUP"], GROUP=groups[0] or 0,
            CARRY_T=how_t["CARRY"], SHIFT_T=how_t["SHIFT"], MACRO_T=how_t["GROUP"], GROUP_T=groups[1] or 0,
            **sides, OPERAND=x_hat is not None, LARGEST=how["LARGEST"], enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return first, second, x_hat


def _launch_rows(x: torch.Tensor, first: Container, x_hat: torch.Tensor | None, how: dict) -> None:
    (M, K), (n, long) = x.shape, first.payload.shape
    wide = max(triton.next_power_of_2(long), 256)
    rows = max(1, 2048 // wide)
    _rows_kernel[(triton.cdiv(n, rows),)](
        x, first.payload.view(torch.uint8), first.scale, first.wide, x_hat, M, K, n, long, x.stride(0), x.stride(1),
        CARRY=how["CARRY"], SHIFT=how["SHIFT"], OPERAND=x_hat is not None, R=rows, BK=wide,
        num_warps=max(2, min(16, rows * wide // 1024)), enable_fp_fusion=False,
    )  # fmt: skip


def _tile(macro: int, macro_t: int, columns: bool) -> dict[str, int]:
    """Tiles that hold whole groups and macro blocks, of columns too if they have groups."""
    if columns:
        return {"BM": max(GROUP, macro_t * BLOCK), "BK": max(GROUP, macro * BLOCK), "num_warps": 8}
    return {"BM": 32, "BK": max(GROUP, macro * BLOCK), "num_warps": 4}
