"""Operands of grouped products: weights of all experts, and tokens quantised along the tokens of each expert.

A wgrad contracts the tokens of an expert, so its blocks of 32 lie along them and must not hold tokens of two experts:
`align_to_blocks` gives each expert a multiple of 32 rows of a buffer, the rest of them zero. A feature has one scale an expert:
an expert's tokens of it are what a row is elsewhere (`container/reference.py`). A tile of 128 tokens may hold several experts',
so each of its blocks looks for its own expert, and tiles are independent: one kernel finds the largest magnitudes, another
writes the payloads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mxfp4_kernels.container.reference import fits_rows
from mxfp4_kernels.container.triton import contain, largest_finite
from mxfp4_kernels.device import BLOCK, constants, launches, load_columns
from mxfp4_kernels.matmul import fp8
from mxfp4_kernels.matmul.operand import Operand
from mxfp4_rl.recipe import QuantRecipe

_TILE = {"BT": 128, "BN": 128, "num_warps": 8}


class Experts(Operand):
    """The weights of all experts (E, N, K), of any strides, quantised along K: one container of E * N rows.

    `weights.transpose(1, 2)` quantises along N, as the dgrad of two MXFP4 operands needs it; it is copied once to do so.

    Raises:
        ValueError: not three axes, or the recipe has macro blocks, a fallback, or no kernel.
    """

    def __init__(self, source: torch.Tensor, recipe: QuantRecipe):
        if source.ndim != 3:
            raise ValueError(f"the weights of experts are (E, N, K), not {tuple(source.shape)}")
        rows, _, _ = fp8.operands(source.reshape(-1, source.shape[2]), rows=recipe, whole_rows=True)
        super().__init__(source, recipe, rows.container)


@dataclass
class TokenContainer:
    """The FP8 container of each expert's tokens, side by side: for every expert what `container/reference.py` makes of them.

    Attributes:
        payload: float8_e4m3fn (N, T), not written behind the last expert's tokens.
        scale: float32 (E, N), zero for experts without tokens.
        wide: uint8 (E, N), 1 where a block did not fit; any_wide: uint8 (1,), whether there is one.
        shape: (N, T).
    """

    payload: torch.Tensor
    scale: torch.Tensor
    wide: torch.Tensor
    any_wide: torch.Tensor
    shape: tuple[int, int]


class Tokens(Operand):
    """Tokens (T, N) sorted by expert, quantised along the tokens of each expert: a side of a wgrad.

    Args:
        source: (T, N), float32, bfloat16 or float16, of any strides.
        offsets: int32 (E + 1,), multiples of 32 (`align_to_blocks`).

    Raises:
        ValueError: not two axes, or the recipe has macro blocks, a fallback, or no kernel.
    """

    def __init__(self, source: torch.Tensor, recipe: QuantRecipe, offsets: torch.Tensor):
        if source.ndim != 2 or not fits_rows(recipe):
            have = f"{tuple(source.shape)} of {recipe.describe()}"
            raise ValueError(f"tokens are (T, N), of a plain MXFP4 recipe, not {have}")
        super().__init__(source, recipe, _container(source, recipe, offsets))


@launches
def _container(source: torch.Tensor, recipe: QuantRecipe, offsets: torch.Tensor) -> TokenContainer:
    (T, N), E = source.shape, max(offsets.numel() - 1, 0)
    payload = torch.empty(N, T, dtype=torch.float8_e4m3fn, device=source.device)
    # What starts as zero, in one piece: the bits of the largest magnitudes, the scales, and the flags with `any_wide` behind.
    zeros = torch.zeros(2 * E * N + E * N // 4 + 1, dtype=torch.int32, device=source.device)
    largest, scale, flags = zeros[: E * N], zeros[E * N : 2 * E * N].view(torch.float32), zeros[2 * E * N :].view(torch.uint8)
    if T and N and E:
        grid, how = (triton.cdiv(T, _TILE["BT"]), triton.cdiv(N, _TILE["BN"])), constants(recipe)
        size, tile = (T, N, E, *source.stride()), {**_TILE, "EXPERTS": triton.next_power_of_2(E), "enable_fp_fusion": False}
        _largest_kernel[grid](source, offsets, largest, *size, **tile)
        _tokens_kernel[grid](
            source, offsets, largest, payload.view(torch.uint8), scale, flags, *size,
            CARRY=how["CARRY"], SHIFT=how["SHIFT"], **tile,
        )  # fmt: skip
    return TokenContainer(payload, scale.view(E, N), flags[: E * N].view(E, N), flags[E * N : E * N + 1], (N, T))


def align_to_blocks(offsets: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A buffer in which every expert begins at a multiple of 32: what `Tokens` asks for. Nothing is synchronised.

    Args:
        offsets: int32 (E + 1,), of `rows` tokens sorted by expert.

    Returns:
        int32 (E + 1,), the offsets in the buffer; int64 (rows,), where each token goes; and the number of rows of the
        buffer, enough for any counts: `x.new_zeros(size, K).index_copy_(0, where, x)`.
    """
    counts = offsets.diff()
    ends = ((counts + BLOCK - 1) // BLOCK * BLOCK).cumsum(0)
    aligned = torch.cat((ends.new_zeros(1), ends)).int()
    token = torch.arange(rows, device=offsets.device)
    expert = torch.searchsorted(offsets[1:].long(), token, right=True)
    size = -(-(rows + (BLOCK - 1) * min(counts.numel(), rows)) // BLOCK) * BLOCK
    return aligned, token + (aligned - offsets).long()[expert], size


@triton.jit
def _tile(
    x_ptr, offsets_ptr, T, N, E, stride_t, stride_n, BT: tl.constexpr, BN: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """This program's blocks, features first, (BN * BT / 32, 1, 32): as rows of one block, which find their scales elsewhere.

    Beside them, (BN, BT / 32): where an (E, N) tensor holds what belongs to a block, and whether it does; and (1, BT / 32),
    whether a block is its expert's first.
    """
    t0, n0 = tl.program_id(0) * BT, tl.program_id(1) * BN
    blocks = tl.reshape(load_columns(x_ptr, t0, n0, T, N, stride_t, stride_n, BT, BN), (BN * BT // 32, 1, 32))
    token = t0 + tl.arange(0, BT // 32) * 32
    every = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + 1 + every, mask=every < E, other=2147483647)
    owner = tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)  # E behind the last expert's tokens
    owned = (owner < E) & (token < T)
    leads = owned & (tl.load(offsets_ptr + owner, mask=owned, other=0) == token)
    feature = n0 + tl.arange(0, BN)
    return blocks, owner[None, :] * N + feature[:, None], owned[None, :] & (feature < N)[:, None], leads[None, :]


@triton.jit
def _largest_kernel(
    x_ptr, offsets_ptr, largest_ptr, T, N, E, stride_t, stride_n,
    BT: tl.constexpr, BN: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitudes of each expert's tokens, as bits, (E, N)."""
    if tl.program_id(0) * BT < tl.load(offsets_ptr + E):
        blocks, at, mask, _l = _tile(x_ptr, offsets_ptr, T, N, E, stride_t, stride_n, BT, BN, EXPERTS)
        tl.atomic_max(largest_ptr + at, tl.reshape(largest_finite(blocks), (BN, BT // 32)), mask=mask, sem="relaxed")


@triton.jit
def _tokens_kernel(
    x_ptr, offsets_ptr, largest_ptr, payload_ptr, scale_ptr, wide_ptr, T, N, E, stride_t, stride_n,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Payloads and flags of a tile, and the scales of the experts that begin in it."""
    if tl.program_id(0) * BT < tl.load(offsets_ptr + E):
        blocks, at, mask, leads = _tile(x_ptr, offsets_ptr, T, N, E, stride_t, stride_n, BT, BN, EXPERTS)
        largest = tl.reshape(tl.load(largest_ptr + at, mask=mask, other=0), (BN * BT // 32,))
        payload, scale, wide, _x, _f = contain(blocks, largest, CARRY, SHIFT, 0, 1.0, 0)
        tokens = tl.program_id(0) * BT + tl.arange(0, BT)
        features = tl.program_id(1) * BN + tl.arange(0, BN)
        to = features[:, None].to(tl.int64) * T + tokens[None, :]
        tl.store(payload_ptr + to, tl.reshape(payload, (BN, BT)), mask=(features < N)[:, None] & (tokens < T)[None, :])
        tl.store(scale_ptr + at, tl.reshape(scale, (BN, BT // 32)), mask=mask & leads)
        flags = tl.reshape(wide.to(tl.uint8), (BN, BT // 32))
        tl.store(wide_ptr + at, flags, mask=mask & (flags != 0))
        tl.store(wide_ptr + E * N + 0 * at, flags, mask=mask & (flags != 0))  # any_wide
