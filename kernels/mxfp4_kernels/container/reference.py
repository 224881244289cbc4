"""The FP8 container: an MXFP4 operand as E4M3 numbers and one power of two a row, without losing a bit.

E2M1 times 2^k is an E4M3 number for k = -8 .. 6. With top the largest scale byte of a row and b a block's, the payload

    P = E2M1 * 2^(b - top + 6)        x_hat = P * 2^(top - 6 - 127)

is exact while b >= top - 14 in every block that is not zero: an MXFP4 x MXFP4 product is then an FP8 product whose scales wait
for the epilogue. Rows of larger spread are rare (random tensors spread over 10 exponents at most); they are flagged, not
rounded: their payload is zero, and whoever multiplies has to add them from elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxfp4_rl.quant.blocks import per_block
from mxfp4_rl.quant.elements import decode_packed
from mxfp4_rl.quant.scales import NAN_BYTE, exp2_byte
from mxfp4_rl.quant.tensor import MXFP4Tensor

WINDOW = 14  # exponents between the largest and the smallest scale of a row
HEADROOM = 6  # 6 * 2^6 = 384 is the largest payload


@dataclass
class Container:
    """An operand for FP8 products: contraction axis last and contiguous.

    Attributes:
        payload: float8_e4m3fn (rows, K).
        scale: float32 (rows,), powers of two.
        wide: bool (rows,), rows that did not fit: their payload is zero.
        factor: float32 (ceil(K / macro_size), rows), MBS factors to divide by, or None.
        macro_size: elements of a macro block.
        residual: the second pass of the outlier fallback, or None; alpha: its weight.
    """

    payload: torch.Tensor
    scale: torch.Tensor
    wide: torch.Tensor
    factor: torch.Tensor | None = None
    macro_size: int = 128
    residual: Container | None = None
    alpha: float = 0.0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """x_hat, (rows, K); rows that did not fit are zero."""
        x = self.payload.float() * self.scale.unsqueeze(-1)
        if self.residual is not None:
            x += self.residual.payload.float() * self.residual.scale.unsqueeze(-1) * self.alpha
        if self.factor is not None:
            x /= per_block(self.factor.t(), self.macro_size, x.shape[-1])
        return x.to(dtype)


def container(q: MXFP4Tensor) -> Container:
    """The container of a quantised matrix (rows, K), quantised along either axis.

    Raises:
        ValueError: not a matrix, or rotated (a rotated operand is no tensor of 4-bit numbers).
    """
    if q.codes.ndim != 2 or q.hadamard:
        raise ValueError(f"a container holds an unrotated matrix, not one of shape {tuple(q.shape)}, hadamard={q.hadamard}")
    length = q.shape[q.axis]
    first = _one_pass(q, length)
    factor = q.macro.t().contiguous() if q.macro is not None else None
    residual = _one_pass(q.residual, length) if q.residual is not None else None
    return Container(*first, factor, q.macro_size, residual and Container(*residual), q.alpha)


def _one_pass(q: MXFP4Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = decode_packed(q.codes).unflatten(-1, (-1, q.block_size))
    byte = q.scales.int()
    valid = byte != NAN_BYTE
    used = valid & (values != 0).any(-1)
    top = torch.where(used, byte, 0).amax(-1).clamp_(min=HEADROOM + 1)
    low = torch.where(used, byte, NAN_BYTE).amin(-1)
    wide = low < top - WINDOW
    shift = exp2_byte(torch.where(used, byte - top.unsqueeze(-1) + HEADROOM, 0).clamp_(min=-126) + 127)
    payload = torch.where(valid.unsqueeze(-1), values * shift.unsqueeze(-1), torch.nan)
    payload = torch.where(wide.view(-1, 1, 1), 0.0, payload).flatten(-2)[:, :length]
    return payload.to(torch.float8_e4m3fn), exp2_byte(top - HEADROOM), wide
