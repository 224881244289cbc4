"""E8M0 block scales: from a block's largest magnitude to a power of two.

Every rule but "search" is s = 2^ceil(log2(amax / c)) for a constant c, computed without a logarithm: adding a constant to the
bits of a float32 and shifting out the mantissa rounds its exponent up exactly when the mantissa is above a threshold. With
c / 4 = m 2^k, 1 <= m < 2,

    byte = ((bits(amax) + carry) >> 23) - 2 - k,    carry = 0x7FFFFF - mantissa bits of m,    s = 2^(byte - 127)

    rule    c     amax/s in   rounds the exponent up when the mantissa of amax is
    floor   8-    [4, 8)      never                      (OCP Microscaling v1.0; clips above 6)
    oas     7     (3.5, 7]    above 1.75                 (overflow-aware, arXiv 2603.08713)
    even    7-    [3.5, 7)    1.75 or above              (round amax to one mantissa bit, then floor)
    rceil   6     (3, 6]      above 1.5                  (never clips; arXiv 2605.20402)
    ceil    4     (2, 4]      above 1.0

c- is the float32 just below c. The squared error of Gaussian, Student-t and Laplace data is least at c = 7.25. "search" starts
from rceil and tries the exponents of a window around it, -1 and 0 by default, for the least squared error of the block
(ScaleSearch, arXiv 2605.12464; see `mxfp4.py`).
"""

import functools
import math
import struct

import torch

# Written scales stay within 2^-126 (byte 0 is decoded, but its reciprocal overflows) and 2^123: there the largest element, a
# second pass on top of it and a division by a pre-scale of 1/2 are still float32 numbers. Magnitudes above 6.38e37 saturate
# instead of becoming infinite.
MIN_BYTE, MAX_BYTE, NAN_BYTE = 1, 250, 255

CONSTANTS = {"floor": 8 - 2.0**-21, "oas": 7.0, "even": 7 - 2.0**-21, "rceil": 6.0, "ceil": 4.0, "search": 6.0}
_INF_BITS = 0x7F800000


@functools.cache
def carry_and_exponent(rule: str | float) -> tuple[int, int]:
    constant = CONSTANTS[rule] if isinstance(rule, str) else rule
    mantissa, exponent = math.frexp(constant / 4)  # mantissa in [0.5, 1)
    (bits,) = struct.unpack("<I", struct.pack("<f", 2 * mantissa))
    return 0x7FFFFF - (bits & 0x7FFFFF), exponent - 1


def scale_byte(amax: torch.Tensor, rule: str | float) -> torch.Tensor:
    """Largest magnitudes, float32 (...) -> biased scale exponents, int32 (...), 1..250; 255 (NaN) if amax is not finite.

    `rule` is a name of the table above or the constant c. A zero or vanishing amax gets byte 1, so a zero block has one
    canonical form.
    """
    bits = amax.view(torch.int32)
    carry, exponent = carry_and_exponent(rule)
    # int32 cannot overflow: the largest finite bits plus the largest carry is below 2^31.
    finite = bits < _INF_BITS
    byte = ((torch.where(finite, bits, 0) + carry) >> 23).sub_(2 + exponent).clamp_(MIN_BYTE, MAX_BYTE)
    return torch.where(finite, byte, NAN_BYTE)


def rounded_up_scale(amax: torch.Tensor, mantissa_bits: int) -> torch.Tensor:
    """amax / 6 rounded up to `mantissa_bits` bits, float32: the E8Mk scale of arXiv 2605.20402's Figure 2 (k = 0 is rceil)."""
    mask = (1 << (23 - mantissa_bits)) - 1
    return ((divided(amax, 6.0).view(torch.int32) + mask) & ~mask).view(torch.float32)


def divided(t: torch.Tensor, number: float) -> torch.Tensor:
    """t / number, correctly rounded everywhere. On CUDA PyTorch multiplies by the rounded reciprocal of a Python number."""
    return t / torch.full((), number, dtype=t.dtype, device=t.device)


def exp2_byte(byte: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes (any integer dtype) -> float32 scales 2^(byte - 127), exactly: byte 0 is 2^-127, byte 255 is NaN."""
    byte = byte.to(torch.int32)
    bits = torch.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is subnormal in float32
    return torch.where(byte == NAN_BYTE, 0x7FC00000, bits).view(torch.float32)


def inverse_scale(byte: torch.Tensor) -> torch.Tensor:
    """1 / 2^(byte - 127) as float32, for int32 bytes 1..250; NaN for 255. Exact."""
    return torch.where(byte == NAN_BYTE, 0x7FC00000, (254 - byte) << 23).view(torch.float32)
