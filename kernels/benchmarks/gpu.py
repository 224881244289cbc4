"""Every kernel beside its rivals on a GPU: `python kernels/benchmarks/gpu.py [--only SECTION ...] [--out FOLDER]`.

Writes results.json, results.md and roofline.png into the folder. Compiling takes longer than measuring: `--warm` calls all
of it once and times nothing, so that the cache holds the kernels; several sections can warm up at the same time. Without a GPU
it tries the code on tiny shapes, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import decode
import dense
import experts
import report
import shapes
import tensors
import timing
import torch
from timing import median_ms  # noqa: F401

GPU = torch.cuda.is_available()
DENSE, TOKENS = (shapes.DENSE, shapes.TOKENS) if GPU else (shapes.TINY, 16)

SECTIONS = {
    "tensors": lambda: tensors.bandwidths(((8192, 2048), (8192, 4096), (8192, 11008), (8192, 14336)) if GPU else ((32, 64),)),
    "products": lambda: dense.products({**DENSE, **(shapes.SMALL if GPU else {})}, TOKENS),
    "sweep": lambda: dense.sweep(
        ("Llama-3.1-8B o", DENSE["Llama-3.1-8B o"]) if GPU else ("tiny", (48, 64)), shapes.SWEEP[: 99 if GPU else 1]
    ),
    "decode": lambda: decode.products({**shapes.SQUARE, **DENSE} if GPU else DENSE, (1, 4, 16, 32, 64) if GPU else (2,)),
    "experts": lambda: (
        experts.products(
            shapes.EXPERTS, shapes.EXPERT_COUNT, tuple(n * shapes.EXPERTS_PER_TOKEN for n in (1, 64, 1024, TOKENS))
        )
        if GPU
        else experts.products(shapes.TINY, 3, (40,))
    ),
    "steps": lambda: dense.steps(DENSE, TOKENS),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="some of the sections")
    parser.add_argument("--out", type=Path, help="folder for results.json, results.md and roofline.png")
    parser.add_argument("--warm", action="store_true", help="only compile")
    options = parser.parse_args()
    timing.WARM_ONLY = options.warm
    torch.manual_seed(0)
    about, rows = timing.about(), []
    print(", ".join(about.values()), flush=True)
    for section in options.only:
        for row in SECTIONS[section]():
            rows.append(row)
            print(f"{row.section} | {row.case} | {row.variant} | {row.error or row.cell()}", flush=True)
        if options.out:  # after every section, so that a later failure loses nothing
            report.write(options.out, about, rows)
    print(report.tables(rows))


if __name__ == "__main__":
    main()
