"""Two models' greedy replies to the same prompts, and their log-probabilities of the same tokens.

A greedy choice flips where two tokens are about equally likely, whatever kernel computes them, and everything after it differs.
So equal replies are counted, and for those that differ how much the first flip costs: the difference of the two likeliest
tokens' log-probabilities in the reference. The log-probabilities themselves are compared along tokens that are given.
"""

from __future__ import annotations

import statistics
from typing import Any


def compare(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How far `ours` is from `reference`.

    Args:
        ours, reference: "replies": token ids of each prompt's reply; "forced": log-probabilities of given tokens, for each
            prompt; "margins", of the reference: log-probability of the likeliest token less that of the second, for each token.

    Returns:
        "replies"; "equal": the share of equal ones; "first_divergence": the earliest position, "median_divergence";
        "largest_margin": of the flips, in nats; "max_difference", "mean_difference": of log-probabilities, absolute.
    """
    places, margins = [], []
    for own, wanted, sure in zip(ours["replies"], reference["replies"], reference["margins"], strict=True):
        place = next((i for i, (a, b) in enumerate(zip(own, wanted, strict=True)) if a != b), None)
        if place is not None:
            places.append(place)
            margins.append(sure[place])
    apart = [
        abs(a - b)
        for own, wanted in zip(ours["forced"], reference["forced"], strict=True)
        for a, b in zip(own, wanted, strict=True)
    ]
    count = len(reference["replies"])
    return {
        "replies": count,
        "equal": 1 - len(places) / count,
        "first_divergence": min(places, default=None),
        "median_divergence": statistics.median(places) if places else None,
        "largest_margin": max(margins, default=None),
        "max_difference": max(apart),
        "mean_difference": sum(apart) / len(apart),
    }


def row_text(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    flips = "" if row["first_divergence"] is None else f", first at token {row['first_divergence']}"
    flips += "" if row["largest_margin"] is None else f", flips of up to {row['largest_margin']:.4f} nats"
    return (
        f"  {name:34} equal {row['equal']:6.1%} of {row['replies']}{flips}; log-probabilities apart by "
        f"{row['mean_difference']:.5f}, at most {row['max_difference']:.4f}"
    )
