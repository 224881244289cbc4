"""A number with its sampling error: the mean over independent seeds and the standard error of that mean.

Ratios and differences are formed within a seed, on the same elements, before they are averaged: much of the sampling error
cancels there, and what is left shows in the scatter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its standard error (NaN for a single seed)."""

    value: float
    error: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """Mean and standard error of the values of several seeds."""
        values = list(values)
        mean = math.fsum(values) / len(values)
        if len(values) < 2:
            return cls(mean)
        variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return cls(mean, math.sqrt(variance / len(values)))

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.error * abs(factor))

    def __str__(self) -> str:
        """Value(error in the last digit): 0.013305(4) is 0.013305 with a standard error of 0.000004."""
        if self.error == 0 or not math.isfinite(self.error):
            return f"{self.value:.4g}"
        decimals = min(max(-math.floor(math.log10(self.error)), 0), 6)
        last = round(self.error * 10**decimals)
        if last >= 10 and decimals:  # 0.00096 rounds to 0.0010: one digit fewer
            decimals, last = decimals - 1, round(self.error * 10 ** (decimals - 1))
        return f"{self.value:.{decimals}f}({max(last, 1)})"

    def signed(self) -> str:
        """As `str`, with a plus sign."""
        return f"+{self}" if self.value >= 0 else str(self)

    def short(self, decimals: int) -> str:
        """The value alone."""
        return f"{self.value:.{decimals}f}"


def over_seeds(measure: Callable[[int], dict], seeds: int) -> dict:
    """Call measure(seed), a dict of floats (with any keys), for seeds 0 .. seeds - 1, and average each entry."""
    found = [measure(seed) for seed in range(seeds)]
    return {key: Estimate.of(one[key] for one in found) for key in found[0]}
