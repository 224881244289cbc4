"""What a benchmark measured: one row a number, as JSON, as tables of ratios, and as a roofline.

`python kernels/benchmarks/report.py FOLDER` draws tables and roofline anew from the folder's results.json.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One H100 SXM: dense tensor-core peaks in TFLOP/s, and memory in TB/s.
PEAKS = {"FP8": 1979.0, "BF16": 989.0}
MEMORY = 3.35
MARKERS = {"dense": "o", "decode": "s", "grouped": "^"}


@dataclass
class Row:
    """One measurement.

    Attributes:
        section: the table that it belongs to; case: its row; variant: its column.
        ms: milliseconds of a call.
        ratio: how many times as fast as the rival named in the table's title (for bandwidths: share of a copy's).
        flops, bytes: what an ideal kernel computes and moves in a call.
        error: why there is no number, in one line.
        kind: "dense", "decode" or "grouped" for a product alone, which the roofline shows.
    """

    section: str
    case: str
    variant: str
    ms: float | None = None
    ratio: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    error: str | None = None
    kind: str | None = None

    def __post_init__(self):
        if self.error:
            self.error = " ".join(self.error.split())[:200].replace("|", "/")

    def cell(self) -> str:
        """For a table: the ratio, a rate where there is no ratio, or that it failed."""
        if self.ms is None:
            return "failed"
        if self.ratio is not None:
            return f"{self.ratio:.0%}" if self.section.endswith("of a copy") else f"{self.ratio:.2f}x"
        if self.flops:
            rate = self.flops / self.ms / 1e9
            return f"{rate:.0f} TFLOP/s" if rate >= 10 else f"{rate:.2g} TFLOP/s"
        return f"{self.bytes / self.ms / 1e9:.2f} TB/s" if self.bytes else f"{self.ms * 1e3:.1f} us"


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def measured(
    section: str,
    case: str,
    variant: str,
    ms: Callable[[], float],
    rival: float | None = None,
    flops: float = 0.0,
    bytes: float = 0.0,
    kind: str | None = None,
) -> Row:
    """The row of what `ms` measures, with its error if it fails: one that cannot run here must not end the rest.

    Args:
        ms: makes its inputs and returns milliseconds.
        rival: milliseconds that the ratio is to, or None for no ratio.
    """
    try:
        time = ms()
    except Exception as error:
        return Row(section, case, variant, error=failure(error), kind=kind)
    return Row(section, case, variant, time, None if rival is None else rival / time, flops, bytes, None, kind)


def heading(about: dict[str, str]) -> str:
    return ", ".join(f"{k} {v}" if k in ("torch", "triton", "python") else v for k, v in about.items())


def tables(rows: Iterable[Row]) -> str:
    """Markdown: a table a section, a line a case, a column a variant."""
    sections: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        sections.setdefault(row.section, {}).setdefault(row.case, {})[row.variant] = row
    out = []
    for section, cases in sections.items():
        variants = list(dict.fromkeys(v for columns in cases.values() for v in columns))
        out += [f"\n{section}\n", "| | " + " | ".join(variants) + " |", "|---" * (1 + len(variants)) + "|"]
        for case, columns in cases.items():
            out.append(f"| {case} | " + " | ".join(columns[v].cell() if v in columns else "" for v in variants) + " |")
        errors = [f"* {case}, {row.variant}: {row.error}" for case, c in cases.items() for row in c.values() if row.error]
        out += ["", *errors] if errors else []
    return "\n".join(out) + "\n"


def write(folder: Path, about: dict[str, str], rows: list[Row]) -> None:
    """results.json, results.md and roofline.png."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({k: v for k, v in dataclasses.asdict(row).items() if v}) for row in rows]
    head = json.dumps({**about, "rows": []})[:-2]
    (folder / "results.json").write_text(head + "\n" + ",\n".join(lines) + "\n]}\n")
    draw(folder)


def draw(folder: Path) -> None:
    """results.md and roofline.png of a folder's results.json; without matplotlib no roofline, and a word about it."""
    about = json.loads((folder / "results.json").read_text())
    rows = [Row(**row) for row in about.pop("rows")]
    (folder / "results.md").write_text(f"{heading(about)}\n{tables(rows)}")
    if importlib.util.find_spec("matplotlib"):
        roofline(rows, about).savefig(folder / "roofline.png", dpi=130)
    else:
        print(f"no roofline: matplotlib is not installed (later: python kernels/benchmarks/report.py {folder})")


def roofline(rows: Iterable[Row], about: dict[str, str]) -> Figure:
    """TFLOP/s over arithmetic intensity of products alone, a colour a variant, a marker a kind; roofs only of an H100."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in rows if row.kind and row.ms and row.flops and row.bytes]
    variants, kinds = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("variant", "kind"))
    colours = matplotlib.colormaps["tab20"]
    if len(variants) > colours.N:
        colours = matplotlib.colormaps["turbo"].resampled(len(variants))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, variant in enumerate(variants):
        for kind in kinds:
            points = [(r.flops / r.bytes, r.flops / r.ms / 1e9) for r in rows if (r.variant, r.kind) == (variant, kind)]
            if points:
                axes.scatter(*zip(*points), s=22, color=colours(i), marker=MARKERS[kind], label=f"{variant}, {kind}", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that an ideal kernel moves", ylabel="TFLOP/s")
    title = heading(about)
    if "H100" in about["device"]:
        ends = [0.5, 2e4]
        for name, peak in PEAKS.items():
            knee = peak / MEMORY
            axes.plot([ends[0], knee, ends[1]], [ends[0] * MEMORY, peak, peak], color="0.4", lw=1, zorder=1)
            axes.text(ends[1], peak * 1.05, f"{name} {peak:.0f}", ha="right", color="0.3", fontsize=8)
        axes.set(xlim=ends, ylim=(min([0.5, *(row.flops / row.ms / 1e9 / 2 for row in rows)]), 3500))
    else:
        title += "\nwithout roofs: only an H100's are known here"
    axes.set_title(title, fontsize=9)
    if rows:
        handles = [Line2D([], [], ls="", marker="o", color=colours(i), label=v) for i, v in enumerate(variants)]
        handles += [Line2D([], [], ls="", marker=MARKERS[kind], color="0.4", label=kind) for kind in kinds]
        axes.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
