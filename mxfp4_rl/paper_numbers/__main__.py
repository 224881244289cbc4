"""`python -m mxfp4_rl.paper_numbers`: measure everything and write docs/paper_numbers.md with its figures."""

import argparse
import sys
from pathlib import Path

from mxfp4_rl.paper_numbers import page
from mxfp4_rl.paper_numbers.data import FULL, REDUCED
from mxfp4_rl.paper_numbers.measure import measure_all


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=page.COMMAND,
        description="Recompute the published numbers about MXFP4 and write them as a page.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR", help="folder of the page; default: docs")
    parser.add_argument(
        "--reduced",
        action="store_true",
        help="a few seconds' worth of samples: shows that it runs; the numbers are too noisy to keep",
    )
    options = parser.parse_args(argv)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; name a folder")
    if options.reduced and options.out == Path("docs"):
        parser.error("--reduced would overwrite docs with noisy numbers; name another folder with --out")
    results = measure_all(REDUCED if options.reduced else FULL, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"wrote {page.write(results, options.out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
