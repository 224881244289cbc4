"""The quantiser: a tensor and a `QuantRecipe` to MXFP4 codes and scales, or straight to the operand they stand for.

For a block of 32 elements along the contraction axis, with f its macro block's factor (1 without MBS) and s the power of
two that the scale rule gives for f * max|x|,

    q1    = s * E2M1(f * x / s)                     first pass
    q2    = s2 * E2M1((f * x - q1) / s2)            outlier fallback (OF), a second pass over the residual with scales s2
    x_hat = (q1 + alpha * q2) / f                   what a matrix product sees

(arXiv 2605.20402; the residual is taken in the scaled domain, so both passes share one f.) Everything runs in float32 on
the bits of x. Divisions by s are exact multiplications, and f * x - q1 is exact, so the result is defined to the bit:
this module is the specification that kernels are tested against.

`quantize` returns the codes, `fake_quantize` the operand x_hat; both run the same passes, in chunks small enough that the
scratch buffers stay in cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mxfp4_rl.quant.elements import decode_packed, encode_e2m1, pack_codes, round_e2m1
from mxfp4_rl.quant.macro_blocks import DYNAMIC_CANDIDATES, per_block, per_macro_block, static_factor
from mxfp4_rl.quant.scales import MIN_BYTE, NAN_BYTE, exp2_byte, inverse_scale, scale_byte
from mxfp4_rl.recipe import BLOCK_SIZE, QuantRecipe

_CHUNK = 1 << 17  # elements; three float32 buffers of this size fit two cores' level-2 caches
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class MXFP4Tensor:
    """A tensor in MXFP4. The quantised axis comes last in `codes`, `scales` and `macro`; K is its length.

    Attributes:
        codes: uint8 (..., ceil(K/32)*16), two E2M1 codes a byte, low nibble = even index; the tail is zero codes.
        scales: uint8 (..., ceil(K/32)), E8M0; 255 marks a block that held NaN or Inf and dequantises to NaN.
        shape: shape of the original tensor.
        axis: the quantised axis of the original tensor, non-negative.
        macro: float32 (..., ceil(K/macro_size)), MBS factors, or None.
        macro_size: elements of a macro block.
        residual: the second pass of the outlier fallback (without factors of its own), or None.
        alpha: weight of the residual.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    axis: int
    macro: torch.Tensor | None = None
    macro_size: int = 128
    residual: MXFP4Tensor | None = None
    alpha: float = 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """x_hat in the original shape; computed in float32, then cast to `dtype`."""
        blocks = self.scales.shape[-1]
        length = self.shape[self.axis]
        rows = self.scales.numel() // blocks if blocks else 0
        codes, scales = self.codes.view(rows, blocks * BLOCK_SIZE // 2), self.scales.view(rows, blocks)
        second = self.residual
        if second is not None:
            second_codes, second_scales = second.codes.view_as(codes), second.scales.view_as(scales)
        macro = self.macro.view(rows, -1) if self.macro is not None else None
        out = torch.empty(rows, length, dtype=dtype, device=codes.device)
        for r in _row_chunks(rows, blocks * BLOCK_SIZE):
            x = _scaled(decode_packed(codes[r]), scales[r])
            if second is not None:
                x += _scaled(decode_packed(second_codes[r]), second_scales[r]).mul_(self.alpha)
            if macro is not None:
                x /= per_block(macro[r], self.macro_size, blocks).unsqueeze(-1)
            out[r] = x.view(x.shape[0], -1)[:, :length]
        return _axis_back(out, self.shape, self.axis)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name: "codes", "scales", and where present "macro", "residual.codes", ..."""
        named = {"codes": self.codes, "scales": self.scales}
        if self.macro is not None:
            named["macro"] = self.macro
        if self.residual is not None:
            named |= {f"residual.{k}": v for k, v in self.residual.tensors().items()}
        return named

    def to(self, device) -> MXFP4Tensor:
        """The same tensor on `device`."""
        return dataclasses.replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            macro=self.macro.to(device) if self.macro is not None else None,
            residual=self.residual.to(device) if self.residual is not None else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors (a macro factor counts 4; its 8 mantissa bits would fit one)."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def quantize(x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1, backend: str | None = None) -> MXFP4Tensor:
    """Quantise `x` along `axis`.

    Args:
        x: float32, bfloat16 or float16, any shape with at least one axis. float16 and bfloat16 are widened exactly.
        recipe: defaults to `QuantRecipe()`, plain MXFP4 with the rceil rule.
        axis: the contraction axis of the product that consumes `x`; it need not be a multiple of 32.
        backend: "reference", or None for the best one here.

    Raises:
        TypeError: `x` is not one of the floating types above. IndexError: no such axis. ValueError: unknown backend.
    """
    _check_backend(backend)
    recipe = recipe or QuantRecipe()
    rows, axis = _axis_last(x, axis)
    blocks = -(-rows.shape[-1] // BLOCK_SIZE)
    lead = rows.shape[:-1]
    flat = rows.reshape(-1, rows.shape[-1]) if rows.numel() else rows.new_empty(lead.numel(), rows.shape[-1])
    count = flat.shape[0]
    fallback = recipe.fallback_alpha is not None

    def store(width, dtype=torch.uint8):
        return torch.empty(count, width, dtype=dtype, device=x.device)

    passes = [(store(blocks * 16), store(blocks)) for _ in range(1 + fallback)]
    macro = store(-(-flat.shape[1] // recipe.macro_size), torch.float32) if recipe.macro_block else None
    for r, done in _quantise_rows(flat, recipe):
        for (codes, scales), (values, byte) in zip(passes, done.passes, strict=True):
            codes[r] = pack_codes(encode_e2m1(values.view(values.shape[0], -1)))
            scales[r] = byte.to(torch.uint8)
        if macro is not None:
            macro[r] = done.macro
    built = None
    for codes, scales in reversed(passes):
        built = MXFP4Tensor(codes.view(*lead, blocks * 16), scales.view(*lead, blocks), x.shape, axis, residual=built)
    built.macro_size = recipe.macro_size
    if macro is not None:
        built.macro = macro.view(*lead, macro.shape[-1])
    if fallback:
        built.alpha = recipe.fallback_alpha
    return built


@torch.no_grad()
def fake_quantize(
    x: torch.Tensor, recipe: QuantRecipe | None = None, axis: int = -1, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`quantize(x, recipe, axis).dequantize(dtype)` to the bit, without building the codes.

    Args and errors as `quantize`; `dtype` defaults to that of `x`. The result has the shape of `x` and no gradient.
    """
    recipe = recipe or QuantRecipe()
    rows, axis = _axis_last(x, axis)
    flat = rows.reshape(-1, rows.shape[-1]) if rows.numel() else rows.new_empty(0, rows.shape[-1])
    out = torch.empty(flat.shape, dtype=dtype or x.dtype, device=x.device)
    length = flat.shape[-1]
    for r, done in _quantise_rows(flat, recipe):
        (values, byte), *second = done.passes
        x_hat = values.mul_(exp2_byte(byte).unsqueeze(-1))
        for values2, byte2 in second:
            x_hat += values2.mul_(exp2_byte(byte2).unsqueeze(-1)).mul_(recipe.fallback_alpha)
        if done.macro is not None:
            x_hat /= per_block(done.macro, recipe.macro_size, byte.shape[-1]).unsqueeze(-1)
        out[r] = x_hat.view(x_hat.shape[0], -1)[:, :length]
    return _axis_back(out, x.shape, axis)


@dataclass
class _Quantised:
    """One chunk: per pass the E2M1 values (R, blocks, 32) in units of the scale and the scale bytes (R, blocks)."""

    passes: list[tuple[torch.Tensor, torch.Tensor]]
    macro: torch.Tensor | None  # (R, macros)


def _quantise_rows(flat: torch.Tensor, recipe: QuantRecipe) -> Iterator[tuple[slice, _Quantised]]:
    """Quantise (rows, K) chunk by chunk. The yielded tensors are scratch: valid until the next chunk."""
    count, length = flat.shape
    width = -(-length // BLOCK_SIZE) * BLOCK_SIZE
    scratch = None
    for r in _row_chunks(count, width):
        chunk = flat[r]
        shape = (chunk.shape[0], width // BLOCK_SIZE, BLOCK_SIZE)
        if scratch is None or scratch[0].shape != shape:
            scratch = [torch.empty(shape, device=flat.device) for _ in range(4)]
        x = scratch[0].view(shape[0], width)
        x[:, :length] = chunk
        x[:, length:] = 0
        yield r, _quantise_chunk(*scratch, recipe)


def _quantise_chunk(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, scratch: torch.Tensor, recipe: QuantRecipe
) -> _Quantised:
    """Quantise float32 (R, blocks, 32); overwrites all four buffers, the passes' values live in `first` and `second`."""
    amax = torch.abs(x, out=first).amax(-1)
    macro = factor = None
    if recipe.macro_block:
        macro = _macro_factors(x, amax, recipe)
        factor = per_block(macro, recipe.macro_size, amax.shape[-1])
        amax = amax * factor  # rounding is monotone: this is the largest magnitude of f * x
    byte = scale_byte(amax, recipe.scale_rule)
    to_grid = inverse_scale(byte)
    # f / s is exact, so one multiplication rounds like f * x does and divides exactly.
    t = x.mul_((to_grid * factor if factor is not None else to_grid).unsqueeze(-1))
    round_e2m1(t, out=first, scratch=scratch)
    if recipe.fallback_alpha is None:
        return _Quantised([(first, byte)], macro)
    # The residual in units of s: the subtraction is exact. Its own power of two is found in these units and moved.
    rest = t.sub_(first)
    relative = scale_byte(torch.abs(rest, out=scratch).amax(-1), recipe.scale_rule)
    byte2 = (relative + (byte - 127)).clamp_(MIN_BYTE, NAN_BYTE)
    byte2 = torch.where(relative == MIN_BYTE, MIN_BYTE, byte2)  # nothing left: a zero block's canonical scale
    shift = torch.where(relative == MIN_BYTE, 127, byte2 - byte + 127)  # byte2 clamped at the bottom shifts less
    invalid = byte == NAN_BYTE
    byte2 = torch.where(invalid, NAN_BYTE, byte2)
    rest.mul_(inverse_scale(torch.where(invalid, 127, shift)).unsqueeze(-1))
    round_e2m1(rest, out=second, scratch=scratch)
    return _Quantised([(first, byte), (second, byte2)], macro)


def _macro_factors(x: torch.Tensor, amax: torch.Tensor, recipe: QuantRecipe) -> torch.Tensor:
    """MBS factors, float32 (R, macros), for blocks x (R, blocks, 32) with largest magnitudes amax (R, blocks)."""
    macro_amax = per_macro_block(amax, recipe.macro_size, "amax")
    if recipe.macro_block == "static":
        return static_factor(macro_amax)
    best = torch.ones_like(macro_amax)
    best_error = torch.full_like(best, torch.inf)
    for candidate in DYNAMIC_CANDIDATES:
        byte = scale_byte(amax * candidate, recipe.scale_rule)
        values = round_e2m1(x * (inverse_scale(byte) * candidate).unsqueeze(-1))
        error = values.mul_(exp2_byte(byte).unsqueeze(-1)).div_(candidate).sub_(x).square_().sum(-1)
        error = per_macro_block(error, recipe.macro_size, "sum")
        better = error < best_error  # False for NaN: such macro blocks keep 1
        best = torch.where(better, candidate, best)
        best_error = torch.where(better, error, best_error)
    return best


def _scaled(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return values.view(*scales.shape, BLOCK_SIZE).mul_(exp2_byte(scales).unsqueeze(-1))


def _row_chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _axis_last(x: torch.Tensor, axis: int) -> tuple[torch.Tensor, int]:
    if x.dtype not in _FLOATS:
        raise TypeError(f"cannot quantise {x.dtype}; give float32, bfloat16 or float16")
    if not -x.ndim <= axis < x.ndim:
        raise IndexError(f"axis={axis} is out of range for a tensor of shape {tuple(x.shape)}")
    return x.detach().movedim(axis, -1), axis % x.ndim


def _axis_back(rows: torch.Tensor, shape: torch.Size, axis: int) -> torch.Tensor:
    moved = [*shape[:axis], *shape[axis + 1 :], shape[axis]]
    return rows.view(moved).movedim(-1, axis)


def _check_backend(backend: str | None) -> None:
    if backend not in (None, "reference"):
        raise ValueError(f"backend={backend!r} is not available here; use 'reference' or None")
