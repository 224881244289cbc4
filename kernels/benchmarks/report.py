"""What a benchmark measured: one row a number, as JSON, as tables of ratios, and as a roofline.

`python kernels/benchmarks/report.py FOLDER` draws tables and roofline anew from the folder's results.json.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# One H100 SXM: dense tensor-core peaks in TFLOP/s, and memory in TB/s.
PEAKS = {"FP8": 1979.0, "BF16": 989.0}
MEMORY = 3.35


@dataclass
class Row:
    """One measurement.

    Attributes:
        section: the table that it belongs to; case: its row; variant: its column.
        ms: milliseconds of a call.
        ratio: how many times as fast as the rival named in the table's title (for bandwidths: share of a copy's).
        flops, bytes: what an ideal kernel computes and moves in a call.
        error: why there is no number.
    """

    section: str
    case: str
    variant: str
    ms: float | None = None
    ratio: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    error: str | None = None

    def cell(self) -> str:
        """For a table: the ratio, a rate where there is no ratio, or that it failed."""
        if self.ms is None:
            return "failed"
        if self.ratio is not None:
            return f"{self.ratio:.0%}" if self.section.endswith("of a copy") else f"{self.ratio:.2f}x"
        if self.flops:
            return f"{self.flops / self.ms / 1e9:.0f} TFLOP/s"
        return f"{self.bytes / self.ms / 1e9:.2f} TB/s" if self.bytes else f"{self.ms * 1e3:.1f} us"


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
    heading = ", ".join(f"{k} {v}" if k in ("torch", "triton", "python") else v for k, v in about.items())
    (folder / "results.md").write_text(f"{heading}\n{tables(rows)}")
    if importlib.util.find_spec("matplotlib"):
        roofline(rows, folder / "roofline.png", heading)
    else:
        print(f"no roofline: matplotlib is not installed (later: python kernels/benchmarks/report.py {folder})")


def roofline(rows: Iterable[Row], path: Path, title: str) -> None:
    """TFLOP/s over arithmetic intensity for everything that multiplies, under the chip's roofs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    by_variant: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.ms and row.flops and row.bytes:
            by_variant.setdefault(row.variant, []).append((row.flops / row.bytes, row.flops / row.ms / 1e9))
    colours = plt.get_cmap("tab20")
    for i, (variant, points) in enumerate(by_variant.items()):
        axes.scatter(*zip(*points), s=22, color=colours(i % 20), marker="osD^v"[i % 5], label=variant, zorder=3)
    ends = [0.5, 2e4]
    for name, peak in PEAKS.items():
        knee = peak / MEMORY
        axes.plot([ends[0], knee, ends[1]], [ends[0] * MEMORY, peak, peak], color="0.4", lw=1, zorder=1)
        axes.text(ends[1], peak * 1.05, f"{name} {peak:.0f}", ha="right", color="0.3", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(0.5, 3500))
    axes.set(xlabel="FLOP per byte that an ideal kernel moves", ylabel="TFLOP/s")
    axes.set_title(title, fontsize=9)
    if by_variant:
        axes.legend(fontsize=7, loc="upper left", ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
