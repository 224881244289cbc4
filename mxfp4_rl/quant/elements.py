"""E2M1 elements: rounding, 4-bit codes, packing.

An E2M1 number is one of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}; its code is sign | 2 exponent bits | 1 mantissa bit, so codes
0..7 are the eight magnitudes in order and -0 exists. Rounding is to nearest, ties to even code, saturating at 6
(OCP Microscaling v1.0; CUDA's cvt.rn.satfinite.e2m1x2).
"""

import torch

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# (integer type, mask of the exponent bits, 1.0 as bits, magic factor): see round_e2m1_.
_LAYOUT = {
    torch.float32: (torch.int32, 0x7F800000, 0x3F800000, 1.5 * 2.0**22),
    torch.float64: (torch.int64, 0x7FF0000000000000, 0x3FF0000000000000, 1.5 * 2.0**51),
}


def round_e2m1(t: torch.Tensor, out: torch.Tensor | None = None, scratch: torch.Tensor | None = None) -> torch.Tensor:
    """Round `t` (float32 or float64, any shape) to the nearest E2M1 value, ties to even code; NaN stays NaN.

    Adding and subtracting M = 1.5 * 2^(p-2) * 2^e, with e the exponent of t (at least 0) and p the bits of the
    significand, rounds t to a multiple of 2^(e-1): the E2M1 step there. The addition's own ties-to-even is the
    element's, since even multiples of the step are the even codes. The result keeps the sign of zero.

    Args:
        t: values in units of the block scale, below 2^100 in magnitude (NaN allowed).
        out: buffer of the same shape and dtype for the result, not `t` itself.
        scratch: buffer of the same shape and dtype to overwrite, not `t` or `out`.
    """
    int_type, exponent_mask, one, factor = _LAYOUT[t.dtype]
    magic = torch.empty_like(t) if scratch is None else scratch
    bits = magic.view(int_type)
    torch.bitwise_and(t.view(int_type), exponent_mask, out=bits).clamp_(min=one)
    magic.mul_(factor)
    out = torch.add(t, magic, out=out)
    out.sub_(magic).clamp_(-E2M1_MAX, E2M1_MAX)
    return torch.copysign(out, t, out=out)


def round_e2m1_stochastic(t: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Round `t` (float32, any shape) to one of its two E2M1 neighbours, up in magnitude with probability distance / step.

    Unbiased for |t| <= 6; larger values saturate. NaN stays NaN.

    Args:
        t: values in units of the block scale.
        uniform: float32 in [0, 1), of the shape of `t`: |t| rounds up where `uniform` is below its distance from the lower
            neighbour, in steps.
    """
    magnitude = t.abs().clamp_(max=E2M1_MAX)
    exponent_bits = (magnitude.view(torch.int32) & 0x7F800000).clamp_(min=0x3F800000)
    step = exponent_bits.view(torch.float32) / 2  # 0.5 below 2, 1 below 4, 2 below 8: exact, like all that follows
    steps = magnitude / step
    lower = steps.floor()
    rounded = (lower + (uniform < steps - lower)) * step
    return torch.copysign(torch.where(magnitude.isnan(), magnitude, rounded), t)


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """E2M1 values (float, any shape) -> uint8 codes 0..15 of the same shape. NaN becomes code 7 (its block is NaN)."""
    u = values.abs().mul_(2).nan_to_num_(nan=12.0).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    code = u.clamp(max=4) + ((u.clamp(4, 8) - 4) >> 1) + ((u.clamp(min=8) - 8) >> 2)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes (..., K), K even -> uint8 (..., K/2); the low nibble holds the even index."""
    if not codes.numel():
        return codes[..., ::2]
    pairs = codes.contiguous().view(torch.int16)  # little endian: the even code is the low byte
    return ((pairs | (pairs >> 4)) & 0xFF).to(torch.uint8)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_codes`: uint8 (..., K/2) -> uint8 codes (..., K)."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode_packed(packed: torch.Tensor) -> torch.Tensor:
    """Packed codes, uint8 (..., K/2) -> float32 E2M1 values (..., K)."""
    # One table of all 256 pairs, read as 64-bit words: one gather moves two elements.
    pairs = _PAIRS.to(packed.device).index_select(0, packed.reshape(-1).int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], packed.shape[-1] * 2)


def _pair_table() -> torch.Tensor:
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
    byte = torch.arange(256)
    return torch.stack((values[byte & 0xF], values[byte >> 4]), dim=-1).view(torch.float64).squeeze(-1)


_PAIRS = _pair_table()
