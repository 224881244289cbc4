"""FP8 containers with a scale every 128 elements, for both operands of a product and both directions of a matrix.

E2M1 times 2^k is an E4M3 number for k = -8 .. 6. Let `top` be the largest scale byte of the blocks in a group of 128 elements,
b a block's own, f the macro block's factor. Then

    P = E2M1 * 2^(b - top + 6)        x_hat = P * scale        scale = 2^(top - 6 - 127) / f

with P exact while b >= top - 14 in every block that is not zero. So an MXFP4 product, macro blocks of 128 or 256 included, is
an FP8 product with a float32 scale for every row and 128 of the contraction: the block scaling of DeepSeek-V3, which cuBLAS
computes on Hopper. Groups of 64 and 32 (macro blocks of that size) are the same with a scale for fewer elements.

A group lies within a tile, so one kernel reads a matrix once and writes what a training step needs of it: the container of its
rows, the container of its columns (transposed, since FP8 tensor cores want both operands contiguous along the contraction), and
the operand itself. Rows with a group of larger spread are flagged and that group's payload is zero: a product repairs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

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
    supports,
    to_type,
    two_passes,
    unsupported,
)
from mxfp4_rl.quant.elements import decode_packed
from mxfp4_rl.quant.scales import NAN_BYTE
from mxfp4_rl.quant.scales import exp2_byte as exp2_byte_reference
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import QuantRecipe

LARGE_MACRO = 256
GROUP = 128  # elements that share a scale, unless macro blocks are smaller
WINDOW = 14  # exponents between the largest and the smallest scale of a group
HEADROOM = 6  # 6 * 2^6 = 384 is the largest payload
LEAST_TOP = HEADROOM + 2  # keeps the scale, divided by a factor below 2, a normal number
_WINDOW, _HEADROOM, _LEAST_TOP = tl.constexpr(WINDOW), tl.constexpr(HEADROOM), tl.constexpr(LEAST_TOP)
ROWS_MULTIPLE = 16  # rows are padded to this, and the contraction to GROUP, with zeros: what cuBLAS asks for


@dataclass
class BlockContainer:
    """One operand of an FP8 product: contraction axis last and contiguous, zero-padded.

    Attributes:
        payload: float8_e4m3fn (rows up to a multiple of 16, K up to a multiple of 128).
        scale: float32 (padded K / group, padded rows).
        wide: uint8 (padded rows,), 1 for rows with a group that did not fit; any_wide: uint8 (1,), whether there is one.
        shape: (rows, K) before padding; group: elements that share a scale.
    """

    payload: torch.Tensor
    scale: torch.Tensor
    wide: torch.Tensor
    any_wide: torch.Tensor
    shape: tuple[int, int]
    group: int = GROUP

    def dequantize(self) -> torch.Tensor:
        """x_hat (rows, K), float32; zero in groups that did not fit."""
        x = self.payload.float().unflatten(-1, (-1, self.group)) * self.scale.t().unsqueeze(-1)
        return x.flatten(-2)[: self.shape[0], : self.shape[1]]


def fits(recipe: QuantRecipe | None) -> bool:
    """Whether containers hold operands of this recipe: MXFP4 with a fixed scale rule, static macro blocks or none."""
    return recipe is not None and supports(recipe) and recipe.fallback_alpha is None


def _macro_size(recipe: QuantRecipe) -> int:
    return recipe.macro_size if recipe.macro_block else 0


def group_of(recipe: QuantRecipe) -> int:
    """Elements that share a scale in containers of the recipe."""
    return min(GROUP, recipe.macro_size) if recipe.macro_block else GROUP


# ---- the definition ---------------------------------------------------------------------------------------------------------


def reference(q: MXFP4Tensor, group: int = GROUP) -> BlockContainer:
    """The container of a quantised matrix along its quantised axis, in PyTorch: what the kernel computes, to the bit."""
    length, rows = q.shape[q.axis], q.codes.shape[0]
    pad_rows, pad_blocks = -rows % ROWS_MULTIPLE, -q.scales.shape[1] % (GROUP // BLOCK)
    values = torch.nn.functional.pad(decode_packed(q.codes).unflatten(-1, (-1, BLOCK)), (0, 0, 0, pad_blocks, 0, pad_rows))
    byte = torch.nn.functional.pad(q.scales.int(), (0, pad_blocks, 0, pad_rows), value=1).unflatten(-1, (-1, group // BLOCK))
    values = values.unflatten(1, (-1, group // BLOCK))
    valid = byte != NAN_BYTE
    used = valid & (values != 0).any(-1)
    top = torch.where(used, byte, 0).amax(-1).clamp_(min=LEAST_TOP)
    wide = torch.where(used, byte, NAN_BYTE).amin(-1) < top - WINDOW
    shift = exp2_byte_reference((torch.where(used, byte - top.unsqueeze(-1) + HEADROOM, 0) + 127).clamp_(min=1))
    shift = torch.where(wide.unsqueeze(-1), 0.0, shift)
    payload = torch.where(valid.unsqueeze(-1), values * shift.unsqueeze(-1), torch.nan).flatten(1)
    scale = exp2_byte_reference(top - HEADROOM)
    if q.macro is not None:
        factor = q.macro.repeat_interleave(max(1, q.macro_size // group), -1)[:, : scale.shape[1]]
        factor = torch.nn.functional.pad(factor, (0, scale.shape[1] - factor.shape[1], 0, pad_rows), value=1.0)
        scale = scale / factor
    flags = wide.any(-1).to(torch.uint8)
    any_wide = flags.amax().view(1)
    return BlockContainer(payload.to(torch.float8_e4m3fn), scale.t().contiguous(), flags, any_wide, (rows, length), group)


# ---- the kernel -------------------------------------------------------------------------------------------------------------


@triton.jit
def _contain(
    x, CARRY: tl.constexpr, SHIFT: tl.constexpr, MACRO: tl.constexpr, LARGEST: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """x (R, blocks, 32) -> E4M3 payloads (R, blocks, 32), scales, wide flags (R, groups), x_hat before the factor, factors."""
    R: tl.constexpr = x.shape[0]
    NB: tl.constexpr = x.shape[1]
    first, byte, _v, _b, factor = two_passes(x, CARRY, SHIFT, MACRO, LARGEST, False)
    # A block is in use if its largest element does not round to zero.
    used = largest_magnitude(x, 2) * (inverse_scale(byte) * factor) > 0.25
    top = tl.maximum(tl.max(tl.reshape(tl.where(used, byte, 0), (R, NB // BLOCKS, BLOCKS)), axis=2), _LEAST_TOP)
    low = tl.min(tl.reshape(tl.where(used, byte, 255), (R, NB // BLOCKS, BLOCKS)), axis=2)
    wide = low < top - _WINDOW
    spread = tl.reshape(tl.broadcast_to(top[:, :, None], (R, NB // BLOCKS, BLOCKS)), (R, NB))
    left_out = tl.reshape(tl.broadcast_to(wide[:, :, None], (R, NB // BLOCKS, BLOCKS)), (R, NB))
    shift = tl.where(left_out, 0.0, exp2_byte(tl.where(used, byte - spread + _HEADROOM + 127, 127)))
    payload = (first * shift[:, :, None]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    if INTERPRETED:  # whose cast loses NaN
        payload = tl.where((byte == 255)[:, :, None], 0x7F, payload).to(tl.uint8)
    per_group = tl.max(tl.reshape(factor, (R, NB // BLOCKS, BLOCKS)), axis=2)
    scale = exp2_byte(top - _HEADROOM)
    if MACRO > 0:
        scale = tl.div_rn(scale, per_group)
    return payload, scale, wide, first * exp2_byte(byte)[:, :, None], factor


@triton.jit
def _store(
    payload, scale, wide, payload_ptr, scale_ptr, wide_ptr, row0, k0, ROWS, K,
    R: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    rows, columns = row0 + tl.arange(0, R), k0 + tl.arange(0, BK)
    at = rows[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(payload_ptr + at, tl.reshape(payload, (R, BK)), mask=(rows < ROWS)[:, None] & (columns < K)[None, :])
    groups = k0 // G + tl.arange(0, BK // G)
    mask = (rows < ROWS)[:, None] & (groups * G < K)[None, :]
    tl.store(scale_ptr + groups[None, :].to(tl.int64) * ROWS + rows[:, None], scale, mask=mask)
    tl.store(wide_ptr + rows[:, None] + tl.zeros((R, BK // G), tl.int32), wide.to(tl.uint8), mask=mask & wide)
    tl.store(wide_ptr + ROWS + tl.zeros((R, BK // G), tl.int32), wide.to(tl.uint8), mask=mask & wide)  # any_wide, behind them


@triton.jit
def _tile_kernel(
    x_ptr, payload_ptr, scale_ptr, wide_ptr, payload_t_ptr, scale_t_ptr, wide_t_ptr, operand_ptr,
    M, K, M_ROWS, K_ROWS, M_LONG, K_LONG, stride_m, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, MACRO: tl.constexpr, GROUP: tl.constexpr,
    CARRY_T: tl.constexpr, SHIFT_T: tl.constexpr, MACRO_T: tl.constexpr, GROUP_T: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr, LARGEST: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile (BM, BK) of x: its part of the rows' container, of the columns' container, and of the rows' operand."""
    m0, k0 = tl.program_id(0) * BM, tl.program_id(1) * BK
    if COLUMNS:
        blocks = load_columns(x_ptr, m0, k0, M, K, stride_m, stride_k, BM, BK)
        payload, scale, wide, _x, _f = _contain(blocks, CARRY_T, SHIFT_T, MACRO_T, LARGEST, GROUP_T // 32)
        _store(payload, scale, wide, payload_t_ptr, scale_t_ptr, wide_t_ptr, k0, m0, K_ROWS, M_LONG, BK, BM, GROUP_T)
    if ROWS:
        rows, columns = m0 + tl.arange(0, BM), k0 + tl.arange(0, BK)
        blocks = tl.reshape(load_tile(x_ptr, rows, columns, M, K, stride_m, stride_k), (BM, BK // 32, 32))
        payload, scale, wide, x_hat, factor = _contain(blocks, CARRY, SHIFT, MACRO, LARGEST, GROUP // 32)
        _store(payload, scale, wide, payload_ptr, scale_ptr, wide_ptr, m0, k0, M_ROWS, K_LONG, BM, BK, GROUP)
        if OPERAND:
            if MACRO > 0:
                x_hat = over_factor(x_hat, factor)
            at = rows[:, None].to(tl.int64) * K + columns[None, :]
            mask = (rows < M)[:, None] & (columns < K)[None, :]
            tl.store(operand_ptr + at, to_type(tl.reshape(x_hat, (BM, BK)), operand_ptr.dtype.element_ty), mask=mask)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _empty(rows: int, length: int, group: int, device) -> BlockContainer:
    pad_rows, pad_length = _up(rows, ROWS_MULTIPLE), _up(length, GROUP)
    flags = torch.zeros(pad_rows + 1, dtype=torch.uint8, device=device)
    return BlockContainer(
        torch.empty(pad_rows, pad_length, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(pad_length // group, pad_rows, dtype=torch.float32, device=device),
        flags[:pad_rows],
        flags[pad_rows:],
        (rows, length),
        group,
    )


@launches
def containers(
    x: torch.Tensor,
    rows: QuantRecipe | None = None,
    columns: QuantRecipe | None = None,
    operand_dtype: torch.dtype | None = None,
) -> tuple[BlockContainer | None, BlockContainer | None, torch.Tensor | None]:
    """What a training step needs of a matrix, from one read of it.

    Args:
        x: (M, K), float32, bfloat16 or float16, of any strides.
        rows, columns: recipes of the container of x, blocks along K, and of x^T, blocks along M; None leaves one out.
        operand_dtype: dtype of x_hat (M, K), quantised by `rows`, or None to leave it out.

    Returns:
        (container of x, container of x^T, x_hat), None for what was left out.

    Raises:
        ValueError: containers do not hold a recipe (see `fits`), or an operand without a `rows` recipe.
    """
    for recipe in (rows, columns):
        if recipe is not None and not fits(recipe):
            why = unsupported(recipe) or "it has a fallback"
            raise ValueError(f"no FP8 container holds {recipe.describe()} ({why}): dequantise and multiply in BF16")
    if operand_dtype is not None and rows is None:
        raise ValueError("an operand is quantised by `rows`: give that recipe too")
    if rows is not None and columns is not None and LARGE_MACRO in (_macro_size(rows), _macro_size(columns)):
        # A tile of both would be 256 x 256, more than the registers hold.
        first, _, x_hat = containers(x, rows=rows, operand_dtype=operand_dtype)
        return first, containers(x, columns=columns)[1], x_hat
    M, K = x.shape
    first = _empty(M, K, group_of(rows), x.device) if rows is not None else None
    second = _empty(K, M, group_of(columns), x.device) if columns is not None else None
    x_hat = torch.empty(M, K, dtype=operand_dtype, device=x.device) if operand_dtype is not None else None
    if x.numel():
        how, how_t = (constants(r) if r is not None else None for r in (rows or columns, columns or rows))
        tile = _tile(how["GROUP"], how_t["GROUP"], columns is not None)
        views = [(c.payload.view(torch.uint8), c.scale, c.wide) if c is not None else (None,) * 3 for c in (first, second)]
        padded = [_up(n, multiple) for multiple in (ROWS_MULTIPLE, GROUP) for n in (M, K)]
        _tile_kernel[triton.cdiv(padded[0 if columns is None else 2], tile["BM"]), triton.cdiv(padded[3], tile["BK"])](
            x, *views[0], *views[1], x_hat, M, K, *padded, x.stride(0), x.stride(1),
            CARRY=how["CARRY"], SHIFT=how["SHIFT"], MACRO=how["GROUP"], GROUP=group_of(rows or columns),
            CARRY_T=how_t["CARRY"], SHIFT_T=how_t["SHIFT"], MACRO_T=how_t["GROUP"], GROUP_T=group_of(columns or rows),
            ROWS=rows is not None, COLUMNS=columns is not None, OPERAND=operand_dtype is not None, LARGEST=how["LARGEST"],
            enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return first, second, x_hat


def _tile(macro: int, macro_t: int, columns: bool) -> dict[str, int]:
    """Tiles that hold whole groups and macro blocks in the directions that are quantised."""
    if columns:
        return {"BM": max(GROUP, macro_t * BLOCK), "BK": max(GROUP, macro * BLOCK), "num_warps": 8}
    return {"BM": 32, "BK": max(GROUP, macro * BLOCK), "num_warps": 4}
