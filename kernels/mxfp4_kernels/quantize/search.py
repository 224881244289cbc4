"""NVFP4, and scales that are searched for in both formats: the reference's `quantize` and `fake_quantize`, to the bit.

A block's scale is tried, its elements are rounded, the squared errors are summed in the order of `blocks.fold_sum`, and the
best candidate is kept, all in registers: x is read once for NVFP4's scale of the tensor and once more for everything else,
however many candidates there are. Quotients by the scale of the tensor, mostly no power of two, are IEEE's (`tl.div_rn`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from mxfp4_kernels.device import (
    exp2_byte,
    inverse_scale,
    largest_magnitude,
    launches,
    round_e2m1,
    scale_byte,
    to_type,
)
from mxfp4_kernels.quantize.triton import _encode, _words
from mxfp4_rl.quant.elements import E2M1_MAX
from mxfp4_rl.quant.nvfp4 import LARGEST_AMAX, SMALLEST_TENSOR_SCALE, TARGET
from mxfp4_rl.quant.passes import error_weights
from mxfp4_rl.quant.scales import carry_and_exponent
from mxfp4_rl.quant.tensor import MXFP4Tensor, NVFP4Tensor, QuantizedTensor, axis_back
from mxfp4_rl.recipe import QuantRecipe

_TILE = 64  # blocks of a program
_AMAX_TILE = 256
_STATIC, _STATIC4, _FOUR_OVER_SIX, _SEARCH = (tl.constexpr(k) for k in range(4))
_RULES = {"static": _STATIC, "static4": _STATIC4, "four_over_six": _FOUR_OVER_SIX, "search": _SEARCH}
_LIMITS = {"LARGEST": LARGEST_AMAX, "SMALLEST": SMALLEST_TENSOR_SCALE}


def unsupported(recipe: QuantRecipe, draws: bool = False) -> str | None:
    """Why the kernels here do not compute the recipe, which then runs the reference; None if they do."""
    own = recipe.scale_rule in _RULES if recipe.format == "nvfp4" else recipe.scale_rule == "search"
    reasons = {
        f"its format is {recipe.format}": recipe.format not in ("mxfp4", "nvfp4"),
        f"its scale rule is {recipe.scale_rule}": not own,
        f"its blocks have {recipe.block_size} elements": recipe.block_size not in (16, 32),
        "it has macro blocks": bool(recipe.macro_block),
        "it has a fallback": recipe.fallback_alpha is not None,
        f"its pre-scale is {recipe.pre_scale}": recipe.pre_scale != 1,
        "it rounds stochastically": recipe.rounding != "nearest",
        "its blocks are tiles": recipe.tile,
        "it rotates": bool(recipe.hadamard),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


@triton.jit
def _fold(e):
    """Sums over the last axis of (N, 16 or 32), halves first; each `tl.sum` is one addition."""
    N: tl.constexpr = e.shape[0]
    if e.shape[1] == 32:
        e = tl.sum(tl.reshape(e, (N, 2, 16)), axis=1)
    e = tl.sum(tl.reshape(e, (N, 2, 8)), axis=1)
    e = tl.sum(tl.reshape(e, (N, 2, 4)), axis=1)
    e = tl.sum(tl.reshape(e, (N, 2, 2)), axis=1)
    return tl.sum(e, axis=1)


@triton.jit
def _e4m3_code(v):
    """Positive float32 -> bits of the nearest E4M3 number, ties to even, 1..126 (`nvfp4.e4m3_code`)."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (v * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # multiples of 2^-9 below 2^-6
    return tl.minimum(tl.maximum(tl.where(v < 0.015625, small, normal), 1), 126)


@triton.jit
def _e4m3_value(code):
    """E4M3 bits 0..126 -> float32; NaN for 127."""
    normal = tl.where(code == 127, 0x7FC00000, (code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _blocks(x_ptr, count, N: tl.constexpr, B: tl.constexpr):
    """The program's N blocks of x as float32 (N, B), zeros beyond the last; the first block's number, and which are there."""
    first = tl.program_id(0).to(tl.int64) * N
    there = tl.arange(0, N) < count - first
    at = tl.arange(0, N)[:, None] * B + tl.arange(0, B)[None, :]
    return tl.load(x_ptr + first * B + at, mask=there[:, None], other=0.0).to(tl.float32), first, there


@triton.jit
def _amax_kernel(x_ptr, bits_ptr, count, N: tl.constexpr, B: tl.constexpr):
    """The largest magnitude of all blocks without NaN and Inf, as bits: those of positive numbers order alike."""
    x, _first, _there = _blocks(x_ptr, count, N, B)
    bits = largest_magnitude(x, 1).to(tl.int32, bitcast=True)
    tl.atomic_max(bits_ptr, tl.max(tl.where(bits < 0x7F800000, bits, 0), axis=0))


@triton.jit
def _weights(weights_ptr, first, per_row, N: tl.constexpr, B: tl.constexpr):
    """What the squared errors of the program's blocks are multiplied by, (N, B), of weights (per_row, B); 1 without any."""
    if weights_ptr is None:
        weights = tl.full((N, B), 1.0, tl.float32)
    else:
        block = (first + tl.arange(0, N)) % per_row
        weights = tl.load(weights_ptr + block[:, None] * B + tl.arange(0, B)[None, :])
    return weights


@triton.jit
def _squared_error(x, code, g, weights, B: tl.constexpr):
    """Of the blocks x with these scales, in units of g, (N,) (`NVFP4Quantizer._best`)."""
    N: tl.constexpr = x.shape[0]
    value = _e4m3_value(code)
    to_grid = tl.div_rn(tl.div_rn(tl.full((N,), 1.0, tl.float32), g), value)
    away = round_e2m1(x * to_grid[:, None]) * (value * g)[:, None] - x
    away = tl.div_rn(away, tl.broadcast_to(g[:, None], (N, B)))
    return _fold(away * away * weights)


@triton.jit
def _nvfp4_kernel(
    x_ptr, weights_ptr, bits_ptr, given_ptr, g_ptr, codes_ptr, scales_ptr, out_ptr, count, per_row, FIRST,
    COUNT: tl.constexpr, RULE: tl.constexpr, UNIT: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """given_ptr: the scale of the tensor; None takes it from bits_ptr and stores it. FIRST, COUNT: the window."""
    x, first, there = _blocks(x_ptr, count, N, B)
    weights = _weights(weights_ptr, first, per_row, N, B)
    if given_ptr is None:
        largest = tl.full((N,), 0.0, tl.float32) + tl.load(bits_ptr).to(tl.float32, bitcast=True)
        g = tl.maximum(tl.div_rn(tl.minimum(largest, LARGEST), tl.full((N,), UNIT, tl.float32)), SMALLEST)
        tl.store(g_ptr + tl.arange(0, N), g, mask=tl.program_id(0) + tl.arange(0, N) == 0)
    else:
        g = tl.full((N,), 0.0, tl.float32) + tl.load(given_ptr)
    amax = largest_magnitude(x, 1)
    finite = amax < float("inf")
    known = tl.where(finite, amax, 0.0)  # of broken blocks the scale is NaN in the end
    six = _e4m3_code(tl.div_rn(tl.div_rn(known, tl.full((N,), 6.0, tl.float32)), g))
    code = six
    if RULE == _STATIC4:
        code = _e4m3_code(tl.div_rn(known * 0.25, g))
    elif RULE == _FOUR_OVER_SIX:
        four = _e4m3_code(tl.div_rn(known * 0.25, g))
        code = tl.where(_squared_error(x, four, g, weights, B) < _squared_error(x, six, g, weights, B), four, six)
    elif RULE == _SEARCH:
        code = tl.minimum(tl.maximum(six + FIRST, 1), 126)
        least = tl.full((N,), float("inf"), tl.float32)
        for step in range(COUNT):
            candidate = tl.minimum(tl.maximum(six + FIRST + step, 1), 126)
            error = _squared_error(x, candidate, g, weights, B)
            code = tl.where(error < least, candidate, code)
            least = tl.where(error < least, error, least)
    code = tl.where(finite, code, 127)
    value = _e4m3_value(code)
    t = x * tl.div_rn(tl.div_rn(tl.full((N,), 1.0, tl.float32), g), value)[:, None]
    _store(t, code, value * g, first, there, count, codes_ptr, scales_ptr, out_ptr, PACKED, B)


@triton.jit
def _mxfp4_kernel(
    x_ptr, weights_ptr, codes_ptr, scales_ptr, out_ptr, count, per_row, FIRST,
    COUNT: tl.constexpr, CARRY: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr, B: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The exponents of a window around rceil's, the errors in units of its scale (`MXFP4Quantizer._search`)."""
    x, first, there = _blocks(x_ptr, count, N, B)
    weights = _weights(weights_ptr, first, per_row, N, B)
    start = scale_byte(largest_magnitude(x, 1), CARRY, SHIFT)
    t = x * inverse_scale(start)[:, None]
    byte = start
    least = tl.full((N,), float("inf"), tl.float32)
    for step in range(COUNT):
        candidate = tl.minimum(tl.maximum(start + FIRST + step, 1), 250)
        shift = candidate - tl.minimum(start, 250) + 127
        in_units = t * inverse_scale(shift)[:, None]
        away = round_e2m1(in_units) - in_units
        worth = exp2_byte(shift)
        error = _fold(away * away * weights) * (worth * worth)
        byte = tl.where(error < least, candidate, byte)
        least = tl.where(error < least, error, least)
    t = t * inverse_scale(byte - start + 127)[:, None]
    _store(t, byte, exp2_byte(byte), first, there, count, codes_ptr, scales_ptr, out_ptr, PACKED, B)


@triton.jit
def _store(
    t, code, worth, first, there, count, codes_ptr, scales_ptr, out_ptr, PACKED: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """t (N, B) in units of its scales: as codes, eight a word, and scales; or as the operand."""
    N: tl.constexpr = t.shape[0]
    if PACKED:
        _value, bits = _encode(t)
        rows: tl.constexpr = N * B // 32
        words = _words(tl.reshape(bits, (rows, 1, 32)), tl.reshape(t, (rows, 1, 32)))
        at = tl.arange(0, rows)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(codes_ptr + first * (B // 8) + at, words, mask=at < (count - first) * (B // 8))
        tl.store(scales_ptr + first + tl.arange(0, N), code.to(tl.uint8), mask=there)
    else:
        at = tl.arange(0, N)[:, None] * B + tl.arange(0, B)[None, :]
        x_hat = to_type(round_e2m1(t) * worth[:, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + first * B + at, x_hat, mask=there[:, None])


@launches
def operand(x: torch.Tensor, recipe: QuantRecipe, axis: int, dtype: torch.dtype, seed: int | None = None) -> torch.Tensor:
    """`fake_quantize`. The quantised axis of the result lies as that of x does."""
    rows, _width = _rows(x, recipe, axis)
    out = torch.empty(rows.shape, dtype=dtype, device=x.device)
    if x.numel():
        _launch(rows, recipe, None, out=out)
    out = out[:, : x.shape[axis]]
    return out.reshape(x.shape) if axis == x.ndim - 1 else axis_back(out, x.shape, axis)


@launches
def packed(
    x: torch.Tensor,
    recipe: QuantRecipe,
    axis: int,
    tensor_scale: float | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """`quantize`."""
    rows, width = _rows(x, recipe, axis)
    lead = [*x.shape[:axis], *x.shape[axis + 1 :]]
    words = torch.empty(*lead, width // 8, dtype=torch.int32, device=x.device)
    scales = torch.empty(*lead, width // recipe.block_size, dtype=torch.uint8, device=x.device)
    weights = None if importance is None else error_weights(importance.to(x.device), width, recipe.block_size).contiguous()
    g = _launch(rows, recipe, tensor_scale, words, scales, weights=weights)
    codes = words.view(torch.uint8) if width else words.new_empty(*lead, 0, dtype=torch.uint8)
    common: dict[str, Any] = {"shape": x.shape, "axis": axis, "block_size": recipe.block_size}
    if recipe.format == "nvfp4":
        return NVFP4Tensor(codes, scales, tensor_scale=g, **common)
    return MXFP4Tensor(codes, scales, macro_size=recipe.macro_size, **common)


def _rows(x: torch.Tensor, recipe: QuantRecipe, axis: int) -> tuple[torch.Tensor, int]:
    """x as contiguous rows of whole blocks, and their length; a copy where it is not that already."""
    moved, length = x.movedim(axis, -1), x.shape[axis]
    width = -(-length // recipe.block_size) * recipe.block_size
    if width != length:
        moved = torch.nn.functional.pad(moved, (0, width - length))
    return moved.reshape(-1, width).contiguous() if x.numel() else x.new_empty(0, width), width


def _launch(rows: torch.Tensor, recipe: QuantRecipe, given: float | None, codes=None, scales=None, out=None, weights=None):
    """Fill codes and scales, or out; returns NVFP4's scale of the tensor."""
    size = recipe.block_size
    count, per_row = rows.numel() // size, rows.shape[-1] // size
    grid = (triton.cdiv(count, _TILE),)
    window = recipe.window if recipe.scale_rule == "search" else range(1)
    common = {"N": _TILE, "B": size, "PACKED": out is None, "COUNT": len(window), "num_warps": 4, "enable_fp_fusion": False}
    if recipe.format == "mxfp4":
        carry, exponent = carry_and_exponent(recipe.scale_rule)
        if count:
            _mxfp4_kernel[grid](
                rows, weights, codes, scales, out, count, per_row, window.start, CARRY=carry, SHIFT=2 + exponent, **common
            )  # fmt: skip
        return None
    bits = torch.zeros((), dtype=torch.int32, device=rows.device)
    g = torch.full((), SMALLEST_TENSOR_SCALE if given is None else given, dtype=torch.float32, device=rows.device)
    if count:
        if given is None:
            _amax_kernel[(triton.cdiv(count, _AMAX_TILE),)](rows, bits, count, N=_AMAX_TILE, B=size)
        _nvfp4_kernel[grid](
            rows, weights, bits, None if given is None else g, g, codes, scales, out, count, per_row, window.start,
            RULE=_RULES[recipe.scale_rule].value, UNIT=E2M1_MAX * TARGET[recipe.scale_rule], **_LIMITS, **common,
        )  # fmt: skip
    return g
