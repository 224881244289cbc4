"""Markdown pieces: paragraphs, tables, numbers in sentences."""

from __future__ import annotations

import textwrap

from mxfp4_rl.paper_numbers.estimate import Estimate

WIDTH = 124


def text(paragraph: str) -> str:
    """One paragraph, its lines filled anew; no line starts with what markdown would take for a list or a heading."""
    lines = textwrap.wrap(" ".join(paragraph.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join("\\" + line if line.startswith(("+ ", "- ", "# ")) else line for line in lines)


def table(header: tuple, cells: list[tuple]) -> str:
    """A table; cells are anything with a `str`.

    Raises:
        ValueError: a row with more or fewer cells than the header, or a cell with "|" in it.
    """
    lines = [header, ("---",) * len(header), *cells]
    for line in lines:
        if len(line) != len(header) or any("|" in str(cell) for cell in line):
            raise ValueError(f"a table of {len(header)} columns cannot hold the row {line!r}")
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(value: Estimate | float, decimals: int = 0, sign: str = "") -> str:
    """ "12.3(4) %" for an estimate, "12 %" for a number; `sign` "+" shows a plus."""
    if isinstance(value, Estimate):
        return f"{(value * 100).signed() if sign else value * 100} %"
    rounded = round(100 * value, decimals) + 0.0  # + 0.0: no "-0"
    return f"{rounded:{sign}.{decimals}f} %"
