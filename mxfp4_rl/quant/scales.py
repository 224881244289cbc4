"""E8M0 block scales: from a block's largest magnitude to a power of two.

Every rule is s = 2^ceil(log2(amax / c)) for a constant c (spec section 1.3), computed without a logarithm: adding a constant
to the bits of a float32 and shifting out the mantissa rounds its exponent up exactly when the mantissa is above a threshold,

    byte = ((bits(amax) + carry) >> 23) - 2,      s = 2^(byte - 127)

    rule    c   amax/s in   carry       rounds the exponent up when the mantissa of amax is
    floor   8-  [4, 8)      0           never                      (OCP Microscaling v1.0; clips above 6)
    oas     7   (3.5, 7]    0x1FFFFF    above 1.75                 (overflow-aware, arXiv 2603.08713)
    even    7   [3.5, 7)    0x200000    1.75 or above              (round amax to one mantissa bit, then floor)
    rceil   6   (3, 6]      0x3FFFFF    above 1.5                  (never clips; arXiv 2605.20402)
    ceil    4   (2, 4]      0x7FFFFF    above 1.0
"""

import torch

# Written scales stay within 2^-126 (byte 0 is decoded, but its reciprocal overflows) and 2^124: there the largest element and a
# second pass on top of it are still float32 numbers. Magnitudes above 1.28e38 saturate instead of becoming infinite.
MIN_BYTE, MAX_BYTE, NAN_BYTE = 1, 251, 255

_CARRY = {"floor": 0, "oas": 0x1FFFFF, "even": 0x200000, "rceil": 0x3FFFFF, "ceil": 0x7FFFFF}
_INF_BITS = 0x7F800000


def scale_byte(amax: torch.Tensor, rule: str) -> torch.Tensor:
    """Largest magnitudes, float32 (...) -> biased scale exponents, int32 (...), 1..251; 255 (NaN) if amax is not finite.

    A zero or vanishing amax gets byte 1, so a zero block has one canonical form.
    """
    bits = amax.view(torch.int32)
    # int32 cannot overflow: the largest finite bits plus the largest carry is below 2^31.
    finite = bits < _INF_BITS
    byte = ((torch.where(finite, bits, 0) + _CARRY[rule]) >> 23).sub_(2).clamp_(MIN_BYTE, MAX_BYTE)
    return torch.where(finite, byte, NAN_BYTE)


def exp2_byte(byte: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes (any integer dtype) -> float32 scales 2^(byte - 127), exactly: byte 0 is 2^-127, byte 255 is NaN."""
    byte = byte.to(torch.int32)
    bits = torch.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is subnormal in float32
    return torch.where(byte == NAN_BYTE, 0x7FC00000, bits).view(torch.float32)


def inverse_scale(byte: torch.Tensor) -> torch.Tensor:
    """1 / 2^(byte - 127) as float32, for int32 bytes 1..251; NaN for 255. Exact."""
    return torch.where(byte == NAN_BYTE, 0x7FC00000, (254 - byte) << 23).view(torch.float32)
