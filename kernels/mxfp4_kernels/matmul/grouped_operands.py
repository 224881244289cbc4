"""Operands of grouped products: weights of all experts, and tokens quantised along the tokens of each expert.

A wgrad contracts the tokens of an expert, so its blocks of 32 lie along them and must not hold tokens of two experts:
`align_to_blocks` gives each expert a multiple of 32 rows of a buffer, the rest of them zero. A row of such a container has one
scale an expert: scales need not spread less than 2^14 over all tokens, only over an expert's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.container.reference import Container
from mxfp4_kernels.container.triton import _payload, _widen
from mxfp4_kernels.device import BLOCK, constants, exp2_byte, launches, load_tile, two_passes
from mxfp4_kernels.matmul import fp8, operand
from mxfp4_rl.recipe import QuantRecipe

TILE = {"R": 64, "BT": 32, "num_warps": 2}  # a block a thread


class Experts(fp8.Operand):
    """The weights of all experts (E, N, K), of any strides, quantised along K: one container of E * N rows.

    `weights.transpose(1, 2)` quantises along N, as the dgrad of two MXFP4 operands needs it; it is copied once to do so.

    Raises:
        ValueError: not three axes, or the recipe has macro blocks, a fallback, or no kernel.
    """

    def __init__(self, source: torch.Tensor, recipe: QuantRecipe):
        if source.ndim != 3:
            raise ValueError(f"the weights of experts are (E, N, K), not {tuple(source.shape)}")
        super().__init__(source.reshape(-1, source.shape[2]), recipe)
        self.source = source


class Tokens(operand.Operand):
    """Tokens (T, N) sorted by expert, quantised along the tokens of each expert: a side of a wgrad.

    The container's payload is (N, T), its scales and flags (E, N). Payloads behind the last expert's tokens are not written.

    Args:
        source: (T, N), float32, bfloat16 or float16, of any strides.
        offsets: int32 (E + 1,), multiples of 32 (`align_to_blocks`).

    Raises:
        ValueError: not two axes, or the recipe has macro blocks, a fallback, or no kernel.
    """

    def __init__(self, source: torch.Tensor, recipe: QuantRecipe, offsets: torch.Tensor):
        if source.ndim != 2 or not fp8.fits(recipe):
            have = f"{tuple(source.shape)} of {recipe.describe()}"
            raise ValueError(f"tokens are (T, N), of a plain MXFP4 recipe, not {have}")
        super().__init__(source, recipe, _container(source, recipe, offsets))


@launches
def _container(source: torch.Tensor, recipe: QuantRecipe, offsets: torch.Tensor) -> Container:
    (T, N), E = source.shape, max(offsets.numel() - 1, 0)
    payload = torch.empty(N, T, dtype=torch.float8_e4m3fn, device=source.device)
    scale = torch.empty(E, N, dtype=torch.float32, device=source.device)
    wide = torch.empty(E, N, dtype=torch.bool, device=source.device)
    how = constants(recipe)
    if E and N:
        _tokens_kernel[(triton.cdiv(N, TILE["R"]), E)](
            source, payload.view(torch.uint8), scale, wide, offsets, T, N, *source.stride(),
            CARRY=how["CARRY"], SHIFT=how["SHIFT"], **TILE, enable_fp_fusion=False,
        )  # fmt: skip
    return Container(payload, scale, wide)


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
def _quantised(x_ptr, rows, tokens, last, N, stride_t, stride_n, CARRY: tl.constexpr, SHIFT: tl.constexpr):
    """E2M1 values (R, BT / 32, 32) and scale bytes of some features' tokens."""
    x = load_tile(x_ptr, rows, tokens, N, last, stride_n, stride_t)
    R: tl.constexpr = x.shape[0]
    NB: tl.constexpr = x.shape[1] // 32
    values, byte, _v, _b, _f = two_passes(tl.reshape(x, (R, NB, 32)), CARRY, SHIFT, 0, 1.0, False)
    return values, byte


@triton.jit
def _tokens_kernel(
    x_ptr, payload_ptr, scale_ptr, wide_ptr, offsets_ptr, T, N, stride_t, stride_n,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, R: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """An expert's tokens of R features: read for their scales, then again, from the cache, for the payloads."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    expert = tl.program_id(1)
    first = tl.load(offsets_ptr + expert) // 32 * 32
    last = tl.minimum(tl.load(offsets_ptr + expert + 1), T)
    top = tl.full((R,), 7, tl.int32)
    low = tl.full((R,), 255, tl.int32)
    for t in range(first, last, BT):
        values, byte = _quantised(x_ptr, rows, t + tl.arange(0, BT), last, N, stride_t, stride_n, CARRY, SHIFT)
        top, low = _widen(top, low, values, byte)
    wide = low < top - 14
    tl.store(scale_ptr + expert.to(tl.int64) * N + rows, exp2_byte(top - 6), mask=rows < N)
    tl.store(wide_ptr + expert.to(tl.int64) * N + rows, wide, mask=rows < N)
    for t in range(first, last, BT):
        tokens = t + tl.arange(0, BT)
        values, byte = _quantised(x_ptr, rows, tokens, last, N, stride_t, stride_n, CARRY, SHIFT)
        at = rows[:, None].to(tl.int64) * T + tokens[None, :]
        mask = (rows < N)[:, None] & (tokens < last)[None, :]
        tl.store(payload_ptr + at, tl.reshape(_payload(values, byte, top, wide), (R, BT)), mask=mask)
