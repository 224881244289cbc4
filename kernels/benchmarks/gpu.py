"""Every kernel beside its rivals on a GPU: `python kernels/benchmarks/gpu.py [--only SECTION ...] [--out FOLDER]`.

Writes results.json, results.md and roofline.png into the folder. Compiling takes longer than measuring: `--warm` calls all of
it once and times nothing, so that Triton's cache holds the kernels; several sections can warm up at the same time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import attention
import decode
import dense
import experts
import report
import shapes
import tensors
import timing
import torch
from report import Row


def sections(tiny: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    """Name -> what measures it."""
    if tiny:
        ((name, shape),) = shapes.TINY.items()
        return {
            "tensors": lambda: tensors.bandwidths(((32, 64),)),
            "products": lambda: dense.products(shapes.TINY, 16),
            "sweep": lambda: dense.sweep((name, shape), (1,)),
            "steps": lambda: dense.steps(shapes.TINY, 16),
            "decode": lambda: decode.products(shapes.TINY, (2,)),
            "attention": lambda: attention.products({"tiny": (4, 2, 32)}, ((2, 100),)),
            "experts": lambda: experts.products(shapes.TINY, 3, (48,)),
        }
    of_experts = tuple(tokens * shapes.EXPERTS_PER_TOKEN for tokens in (1, 64, 1024, shapes.TOKENS))
    swept = "Llama-3.1-8B o"
    return {
        "tensors": lambda: tensors.bandwidths(tuple((shapes.TOKENS, features) for features in (2048, 4096, 11008, 14336))),
        "products": lambda: dense.products({**shapes.DENSE, **shapes.SMALL}, shapes.TOKENS),
        "sweep": lambda: dense.sweep((swept, shapes.DENSE[swept]), shapes.SWEEP),
        "steps": lambda: dense.steps(shapes.DENSE, shapes.TOKENS),
        "decode": lambda: decode.products({**shapes.SQUARE, **shapes.DENSE}, (1, 4, 16, 32, 64)),
        "attention": lambda: attention.products(attention.HEADS, attention.SIZES),
        "experts": lambda: experts.products(shapes.EXPERTS, shapes.EXPERT_COUNT, of_experts),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = tuple(sections(tiny=False))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the sections")
    parser.add_argument("--out", type=Path, help="folder for results.json, results.md and roofline.png")
    parser.add_argument("--warm", action="store_true", help="only compile, and print nothing but errors")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the code: all that runs without a GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not (options.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("there is no GPU: to try the code, give --tiny and set TRITON_INTERPRET=1 in the environment")
    if options.warm and options.out:
        parser.error("--warm measures nothing that --out could hold: give one of them")
    chosen = sections(options.tiny)
    timing.WARM_ONLY = options.warm
    torch.manual_seed(0)
    about = timing.about()
    if options.tiny:
        about["note"] = "tiny shapes: not measurements"
    if not options.warm:
        print(report.heading(about), flush=True)
    rows = []
    for section in options.only:
        for row in _to_the_end(section, chosen[section]):
            rows.append(row)
            if row.error or not options.warm:
                print(f"{row.section} | {row.case} | {row.variant} | {row.error or row.cell()}", flush=True)
        if options.out:  # after every section, so that a later failure loses nothing
            report.write(options.out, about, rows)
    if not options.warm:
        print(f"\n{report.heading(about)}\n{report.tables(rows)}")


def _to_the_end(name: str, section: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """A section's rows; where it fails outside what it measures, a row that says so instead of the rest."""
    try:
        yield from section()
    except Exception as error:
        yield Row(f"Section {name}", "ended early", "the rest", error=report.failure(error))


if __name__ == "__main__":
    main()
