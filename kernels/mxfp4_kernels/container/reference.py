"""FP8 containers: MXFP4 operands as E4M3 numbers and few float32 scales, without losing a bit.

E2M1 times 2^k is an E4M3 number for k = -8 .. 6. Let `top` be the largest scale byte of the blocks in a group of elements that
share a scale, b a block's own, f the macro block's factor. Then

    P = E2M1 * 2^(b - top + 6)        x_hat = P * scale        scale = 2^(top - 6 - 127) / f

with P exact while b >= top - 14 in every block that is not zero. A group is either

- a row, of recipes without macro blocks: a product is then a row-wise FP8 product, whose scales wait for the epilogue; or
- 128 elements, which macro blocks of 128 or 256 fold their factors into: the block scaling of DeepSeek-V3, which cuBLAS
  computes on Hopper. Macro blocks of 64 and 32 are groups of that size.

Blocks further below their group's top are rare (rows of random tensors spread over 10 exponents at most). They are left out,
zero in the payload, and their rows are flagged: a product computes those again (`matmul/repair.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxfp4_kernels.device import BLOCK, supports
from mxfp4_rl.quant.elements import decode_packed
from mxfp4_rl.quant.scales import NAN_BYTE, exp2_byte
from mxfp4_rl.quant.tensor import MXFP4Tensor
from mxfp4_rl.recipe import QuantRecipe

GROUP = 128  # elements that share a scale, where rows do not, unless macro blocks are smaller
WINDOW = 14  # exponents between the largest and the smallest scale of a group
HEADROOM = 6  # 6 * 2^6 = 384 is the largest payload
LEAST_TOP = HEADROOM + 2  # keeps the scale, divided by a factor below 2, a normal number
MULTIPLE = 16  # rows, and the contraction of whole rows, are padded to this with zeros, others to GROUP: as cuBLAS asks


@dataclass
class Container:
    """One operand of an FP8 product: contraction axis last and contiguous, zero-padded.

    Attributes:
        payload: float8_e4m3fn (rows up to a multiple of 16, K up to a multiple of 16, or of 128 if rows share no scale).
        scale: float32 (groups of a row, padded rows).
        wide: uint8 (padded rows,), 1 for rows with a block that did not fit; any_wide: uint8 (1,), whether there is one.
        shape: (rows, K) before padding; group: elements that share a scale, the padded K if rows do.
    """

    payload: torch.Tensor
    scale: torch.Tensor
    wide: torch.Tensor
    any_wide: torch.Tensor
    shape: tuple[int, int]
    group: int

    def dequantize(self) -> torch.Tensor:
        """x_hat (rows, K), float32; zero in blocks that did not fit."""
        x = self.payload.float().unflatten(-1, (-1, self.group)) * self.scale.t().unsqueeze(-1)
        return x.flatten(-2)[: self.shape[0], : self.shape[1]]


def fits(recipe: QuantRecipe | None) -> bool:
    """Whether containers hold operands of this recipe: MXFP4 with a fixed scale rule, static macro blocks or none."""
    return recipe is not None and supports(recipe) and recipe.fallback_alpha is None


def fits_rows(recipe: QuantRecipe | None) -> bool:
    """Whether rows of operands of this recipe can share a scale: without macro blocks."""
    return fits(recipe) and recipe.macro_block is None


def macro_size(recipe: QuantRecipe) -> int:
    """Elements of a macro block, 0 without."""
    return recipe.macro_size if recipe.macro_block else 0


def group_of(recipe: QuantRecipe) -> int:
    """Elements that share a scale where rows do not."""
    return min(GROUP, macro_size(recipe) or GROUP)


def padded(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def container(q: MXFP4Tensor, group: int | None = GROUP) -> Container:
    """The container of a quantised matrix along its quantised axis: what the kernel computes, to the bit.

    Args:
        group: elements that share a scale; None for whole rows.
    """
    length, rows = q.shape[q.axis], q.codes.shape[0]
    pad_rows, long = -rows % MULTIPLE, padded(length, GROUP if group else MULTIPLE)
    size = group or max(long, MULTIPLE)
    blocks = padded(long, group or BLOCK) // BLOCK
    in_group = group // BLOCK if group else max(blocks, 1)
    pad = (0, blocks - q.scales.shape[1], 0, pad_rows)
    byte = torch.nn.functional.pad(q.scales.int(), pad, value=1).unflatten(-1, (-1, in_group))
    values = torch.nn.functional.pad(decode_packed(q.codes).unflatten(-1, (-1, BLOCK)), (0, 0, *pad)).unflatten(
        1, byte.shape[1:]
    )
    valid = byte != NAN_BYTE
    used = valid & (values != 0).any(-1)
    top = torch.where(used, byte, 0).amax(-1).clamp_(min=LEAST_TOP)
    left_out = used & (byte < top.unsqueeze(-1) - WINDOW)
    shift = exp2_byte((torch.where(used, byte - top.unsqueeze(-1) + HEADROOM, 0) + 127).clamp_(min=1))
    shift = torch.where(left_out, 0.0, shift)
    payload = torch.where(valid.unsqueeze(-1), values * shift.unsqueeze(-1), torch.nan).flatten(1)[:, :long]
    scale = exp2_byte(top - HEADROOM)
    if q.macro is not None:
        factor = q.macro.repeat_interleave(max(1, q.macro_size // size), -1)[:, : scale.shape[1]]
        factor = torch.nn.functional.pad(factor, (0, scale.shape[1] - factor.shape[1], 0, pad_rows), value=1.0)
        scale = scale / factor
    wide = left_out.flatten(1).any(-1).to(torch.uint8)
    any_wide = wide.amax().view(1)
    return Container(payload.contiguous().to(torch.float8_e4m3fn), scale.t().contiguous(), wide, any_wide, (rows, length), size)
