"""Quantised tensors: the stored codes and scales of MXFP4 and NVFP4, and what they stand for.

The quantised axis comes last in every stored tensor; K is its length, padded to whole blocks (and to whole Hadamard blocks
where the recipe rotates). `dequantize` gives the operand back in the original shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mxfp4_rl.quant.blocks import per_block
from mxfp4_rl.quant.elements import decode_packed
from mxfp4_rl.quant.hadamard import rotate_back
from mxfp4_rl.quant.scales import divided, exp2_byte

CHUNK = 1 << 17  # elements; three float32 buffers of this size fit two cores' level-2 caches
GPU_CHUNK = 1 << 23  # a GPU has no use for a cache's worth: every operation on a chunk is a launch


class QuantizedTensor:
    """What MXFP4Tensor and NVFP4Tensor share: `codes`, `scales`, `shape`, `axis`, `block_size`, `hadamard`.

    `codes` is uint8 (..., blocks * block_size / 2), two E2M1 codes a byte, low nibble = even index; `scales` is (..., blocks).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    axis: int
    block_size: int
    hadamard: int | None

    def block_scales(self) -> torch.Tensor:
        """What one unit of E2M1 is worth in each block, float32 (..., blocks)."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """x_hat in the original shape; computed in float32, then cast to `dtype`."""
        blocks, length = self.scales.shape[-1], self.shape[self.axis]
        rows = self.scales.numel() // blocks if blocks else 0
        out = torch.empty(rows, length, dtype=dtype, device=self.codes.device)
        width = blocks * self.block_size
        for r in row_chunks(rows, width, self.codes.device):
            x = self._dequantize_rows(r, rows).view(-1, width)
            if self.hadamard:
                x = rotate_back(x, self.hadamard)
            out[r] = saturated(x[:, :length], dtype)
        return axis_back(out, self.shape, self.axis)

    def _dequantize_rows(self, r: slice, rows: int) -> torch.Tensor:
        """Rows r of all `rows`, float32 (R, blocks, block_size)."""
        scales = self.block_scales().view(rows, -1)[r].unsqueeze(-1)
        return self._values(r, rows).mul_(scales)

    def _values(self, r: slice, rows: int) -> torch.Tensor:
        return decode_packed(self.codes.view(rows, -1)[r]).unflatten(-1, (-1, self.block_size))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name: "codes", "scales", and where present "macro", "residual.codes", "tensor_scale", ..."""
        named = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                named[field.name] = value
            elif isinstance(value, QuantizedTensor):
                named |= {f"{field.name}.{k}": v for k, v in value.tensors().items()}
        return named

    def to(self, device) -> QuantizedTensor:
        """The same tensor on `device`."""
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor | QuantizedTensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors (a macro factor counts 4; its 8 mantissa bits would fit one)."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


@dataclass
class MXFP4Tensor(QuantizedTensor):
    """A tensor in MXFP4: E2M1 codes, one E8M0 scale a block, and what the corrections add.

    Attributes:
        codes: uint8 (..., ceil(K/32)*16), two E2M1 codes a byte, low nibble = even index; the tail is zero codes.
        scales: uint8 (..., ceil(K/32)), E8M0; 255 marks a block that held NaN or Inf and dequantises to NaN.
        shape: shape of the original tensor.
        axis: the quantised axis of the original tensor, non-negative.
        macro: float32 (..., ceil(K/macro_size)), MBS factors, or None.
        macro_size: elements of a macro block.
        residual: the second pass of the outlier fallback (without factors of its own), or None. Where a mask left a block
            out, its codes are zero.
        alpha: weight of the residual.
        block_size: elements that share a scale; 32 above.
        pre_scale: x was multiplied by it before (and is divided after).
        hadamard: size of the blocks that were rotated before, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    axis: int
    macro: torch.Tensor | None = None
    macro_size: int = 128
    residual: MXFP4Tensor | None = None
    alpha: float = 0.0
    block_size: int = 32
    pre_scale: float = 1.0
    hadamard: int | None = None

    def block_scales(self) -> torch.Tensor:
        return exp2_byte(self.scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """x_hat in the original shape, computed in float32, then cast to `dtype`."""
        kernels = _kernels() if self.codes.is_cuda and dtype in (torch.float32, torch.bfloat16, torch.float16) else None
        return kernels.dequantize(self, dtype) if kernels and kernels.supports(self) else super().dequantize(dtype)

    def _dequantize_rows(self, r: slice, rows: int) -> torch.Tensor:
        x = super()._dequantize_rows(r, rows)
        if self.residual is not None:
            x += self.residual._dequantize_rows(r, rows).mul_(self.alpha)
        if self.macro is not None:
            factor = per_block(self.macro.view(rows, -1)[r], self.macro_size // self.block_size, x.shape[1])
            x /= (factor * self.pre_scale).unsqueeze(-1)
        elif self.pre_scale != 1:
            x = divided(x, self.pre_scale)
        return x


@dataclass
class NVFP4Tensor(QuantizedTensor):
    """A tensor in NVFP4: E2M1 codes, one E4M3 scale per 16, one float32 scale for all.

    Attributes:
        codes: uint8 (..., ceil(K/16)*8), two E2M1 codes a byte, low nibble = even index; the tail is zero codes.
        scales: uint8 (..., ceil(K/16)), the bits of float8_e4m3fn; 127 (NaN) marks a block that held NaN or Inf.
        shape, axis, block_size, hadamard: as in MXFP4Tensor.
        tensor_scale: float32 (), x_hat = E2M1 * (tensor_scale * scale).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: torch.Size
    axis: int
    tensor_scale: torch.Tensor
    block_size: int = 16
    hadamard: int | None = None

    def block_scales(self) -> torch.Tensor:
        return self.scales.view(torch.float8_e4m3fn).float() * self.tensor_scale


@dataclass
class StackedTensor(QuantizedTensor):
    """Matrices of one shape, each quantised as a tensor of its own: experts, where a recipe looks at whole tensors.

    Attributes:
        parts: at least one quantised tensor, in order.
        axis: the quantised axis of the stack, of which axis 0 numbers the parts.
    """

    parts: tuple[QuantizedTensor, ...]
    axis: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.parts), *self.parts[0].shape))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.stack([part.dequantize(dtype) for part in self.parts])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    def to(self, device) -> StackedTensor:
        return StackedTensor(tuple(part.to(device) for part in self.parts), self.axis)


def _kernels():
    try:
        from mxfp4_kernels.quantize import dequantize
    except ImportError:
        return None
    return dequantize


def saturated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x`, with finite values kept finite in `dtype`: float16 ends at 65504, and rounding up passes it."""
    return x.clamp(-65504, 65504) if dtype == torch.float16 else x


def row_chunks(rows: int, width: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Slices of rows of `width` elements, as many as suit the device, each (but the last) a multiple of `multiple` rows."""
    size = CHUNK if device.type == "cpu" else GPU_CHUNK
    step = max(1, size // max(width, 1) // multiple) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def axis_back(rows: torch.Tensor, shape: torch.Size, axis: int) -> torch.Tensor:
    """(rows, K) with the quantised axis last -> `shape`."""
    moved = [*shape[:axis], *shape[axis + 1 :], shape[axis]]
    return rows.view(moved).movedim(-1, axis)
