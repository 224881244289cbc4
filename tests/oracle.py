"""An independent MXFP4 oracle in exact rational arithmetic: slow, scalar, and written from the definitions alone."""

import math
from fractions import Fraction

GRID = [Fraction(v) for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]


def scale_exponent(amax: float, rule: str | float) -> int:
    """Unbiased exponent of the block scale, clamped to what is written here (2^-126 to 2^123)."""
    if amax == 0:
        return -126
    m = Fraction(amax)
    floor_log2 = math.frexp(amax)[1] - 1
    if rule == "floor":
        e = floor_log2 - 2
    elif rule == "even":  # amax to one mantissa bit, halves up, then floor
        steps = math.floor(m / Fraction(2) ** floor_log2 * 2 + Fraction(1, 2))  # 2, 3 or 4 half-steps
        e = floor_log2 - 2 + (steps == 4)
    else:
        bound = {"rceil": Fraction(6), "ceil": Fraction(4), "oas": Fraction(6)}.get(rule) or Fraction(rule)
        e = next(e for e in range(floor_log2 - 5, floor_log2 + 2) if m <= bound * Fraction(2) ** e)
        if rule == "oas" and m / Fraction(2) ** e <= Fraction(7, 2):
            e -= 1
    return min(max(e, -126), 123)


def e2m1_code(t: Fraction, negative: bool) -> int:
    """Nearest grid point, ties to the even code, saturating; the sign is kept for zero too."""
    t = abs(t)
    best = min(range(8), key=lambda c: (abs(GRID[c] - t), c % 2))
    return best | (8 if negative else 0)


def quantize_block(values: list[float], rule: str | float) -> tuple[int, list[int], list[Fraction]]:
    """One block of finite float32 values -> (scale byte, codes, dequantised values)."""
    e = scale_exponent(max(map(abs, values)), rule)
    scale = Fraction(2) ** e
    codes = [e2m1_code(Fraction(v) / scale, math.copysign(1, v) < 0) for v in values]
    return e + 127, codes, [GRID[c & 7] * scale * (-1 if c & 8 else 1) for c in codes]
