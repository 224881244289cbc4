"""`mxfp4-rl decompose MODEL`: what MXFP4 does to a model's weights, and what each correction repairs.

Everything that can be wrong with the arguments is told before a weight is read; files are written at the very end, all or
none, so Ctrl-C leaves no half of them. Exit codes: 0 done; 1 nothing could be measured;
2 a mistake in the arguments or a checkpoint that cannot be read; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mxfp4_rl
from mxfp4_rl.launch import LaunchError
from mxfp4_rl.recipe import SHORT_WORDS, QuantRecipe, RecipeError

# The paper's corrections; AQN, its third method, is noise for exploration and corrects no part of the error.
DEFAULT_RECIPES = "mxfp4,mxfp4+mbs,mxfp4+of,mxfp4+mbs+of"
OUT_ROOT = Path("runs") / "decompose"
_PIPED_WIDTH = 118

_WORDS = "\n".join(
    textwrap.fill(words, 118, initial_indent=f"  {format:<8}", subsequent_indent=" " * 10)
    for format, words in SHORT_WORDS.items()
)
EPILOG = f"""\
MODEL is a folder with safetensors, a .safetensors or .gguf file, a name on the Hugging Face hub, or smollm2-135m-instruct,
the model that comes along.

recipes are a format and words joined by "+" (docs/numerics.md says what each does):
{_WORDS}
the first one is the base, the others are compared with it; the default is
  {DEFAULT_RECIPES}

examples:
  mxfp4-rl decompose smollm2-135m-instruct
  mxfp4-rl decompose Qwen/Qwen2.5-3B --rows 64                        a quick look: 64 rows of each tensor
  mxfp4-rl decompose model.gguf --compare mxfp4,mxfp4+oas+mbs,nvfp4   formats and recipes side by side
  mxfp4-rl decompose checkpoint/ --layers 'layers\\.(0|1)\\.'           two layers only
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="a folder, a file, a hub name or smollm2-135m-instruct")
    parser.add_argument("--compare", metavar="A,B,...", help="recipes to measure instead of the default ones")
    parser.add_argument("--rows", type=int, metavar="N", help="measure at most N evenly spaced rows of each tensor")
    parser.add_argument("--layers", metavar="REGEX", help="only weights whose name matches, e.g. 'layers\\.0\\.|down_proj'")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="what weights are cast to first; training quantises BF16, the default",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub name")
    parser.add_argument("--out", metavar="DIR", help=f"where the files go; default: {OUT_ROOT}/<name of the model>")
    parser.add_argument("--no-figures", action="store_true", help="write no PNG files")
    parser.add_argument("--json", action="store_true", help="print the JSON to stdout instead of the tables")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises:
        LaunchError: an argument or the checkpoint is wrong; the message is the sentence to show.
    """
    with _noting_ctrl_c() as pressed:
        try:
            return _run(options, pressed)
        except KeyboardInterrupt:
            pass
        except Exception:
            if not pressed:
                raise
    print("interrupted", file=sys.stderr)
    return 130


@contextlib.contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """A list that Ctrl-C is noted in, beside the usual KeyboardInterrupt.

    Libraries in C++ turn a KeyboardInterrupt that reaches them into errors of their own, or lose it.
    """
    pressed: list[int] = []

    def note(number, frame):
        pressed.append(number)
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    # Jobs in the background ignore Ctrl-C: it is not meant for them.
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(options: argparse.Namespace, pressed: list[int]) -> int:
    began = time.monotonic()
    recipes = parse_recipes(DEFAULT_RECIPES if options.compare is None else options.compare)
    pattern = _pattern(options.layers)
    if options.rows is not None and options.rows < 1:
        raise LaunchError(f"--rows {options.rows} measures nothing: give 1 or more, or leave it out for all rows")
    out = Path(options.out) if options.out else OUT_ROOT / folder_name(options.model)
    check_writable(out)

    # Only now: torch takes seconds to import, and a mistake above should be told at once.
    import torch

    from mxfp4_rl.analysis.checkpoint import CheckpointError, open_checkpoint
    from mxfp4_rl.analysis.measure import Plan, measure_checkpoint
    from mxfp4_rl.analysis.output import PAGE_FILE, render, to_json
    from mxfp4_rl.analysis.progress import make_progress
    from mxfp4_rl.analysis.results import Results
    from mxfp4_rl.analysis.weights import linear_weights

    plan = Plan(recipes, getattr(torch, options.dtype), options.rows)
    source, note = _resolve(options.model)
    try:
        with open_checkpoint(source, options.revision) as checkpoint:
            weights, left_out = linear_weights(checkpoint)
            chosen = [weight for weight in weights if pattern is None or pattern.search(weight.name)]
            if not chosen:
                raise LaunchError(
                    f"--layers {options.layers!r} matches none of the {len(weights)} Linear weights, e.g. {weights[0].name}"
                )
            skipped = {weight.info.name for weight in weights} - {weight.info.name for weight in chosen}
            left_out |= dict.fromkeys(sorted(skipped), f"not matched by --layers {options.layers}")
            total = sum(weight.info.elements for weight in chosen)
            print(f"{options.model}: Linear weights: {len(chosen)}, elements: {total:,}", file=sys.stderr)
            with make_progress(total) as progress:

                def advance(elements: int) -> None:
                    if pressed:
                        raise KeyboardInterrupt
                    progress.advance(elements)

                tensors = measure_checkpoint(checkpoint, chosen, plan, advance)
            files = [{"name": str(file), "bytes": Path(file).stat().st_size} for file in checkpoint.files]
            note = note or checkpoint.note
    except CheckpointError as error:
        raise LaunchError(str(error)) from error

    facts = _facts(options, files, time.monotonic() - began)
    results = Results(options.model, plan, tensors, left_out, note, facts, compared=options.compare is not None)
    rendered = render(results, figures=not options.no_figures)
    _write(rendered, out)
    if options.json:
        print(to_json(results))
    else:
        _print(results)
    beside = ", ".join(name for name in rendered if name != PAGE_FILE)
    print(f"how to read all this: {out / PAGE_FILE}\nbeside it: {beside}", file=sys.stderr if options.json else sys.stdout)
    if not results.measured:
        print("mxfp4-rl: every weight holds NaN, infinity or nothing but zeros: there is nothing to measure", file=sys.stderr)
        return 1
    return 0


def parse_recipes(text: str) -> dict[str, QuantRecipe]:
    """Recipes by their names, in the order given.

    Raises:
        LaunchError: one of them is no recipe.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise LaunchError(f"--compare {text!r} has an empty name between its commas; try {DEFAULT_RECIPES}")
    try:
        recipes = {name: QuantRecipe.parse(name) for name in names}
    except RecipeError as error:
        raise LaunchError(f"--compare: {error}") from error
    for i, name in enumerate(names):
        twin = next((other for other in names[:i] if recipes[other] == recipes[name]), None)
        if twin:
            raise LaunchError(f"--compare names one recipe twice: {twin!r} and {name!r}; leave one of them out")
    return recipes


def _resolve(model: str) -> tuple[str, str]:
    """What to open for the MODEL that was given, and what a reader of its numbers must know."""
    from mxfp4_rl.tasks.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model

    if model != EMBEDDED_MODEL_NAME or Path(model).exists():
        return model, ""
    try:
        note = "the embedded model was converted from a 4-bit GGUF file: what is measured is on top of that error"
        return str(ensure_embedded_model()), note
    except (ImportError, OSError) as error:
        raise LaunchError(str(error)) from error


def _pattern(text: str | None) -> re.Pattern | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise LaunchError(f"--layers {text!r} is not a regular expression: {error}") from error


def folder_name(model: str) -> str:
    """What a model's folder under `runs/...` is called."""
    name = Path(model).resolve().name if Path(model).exists() else model
    name = re.sub(r"\.(safetensors|gguf)$", "", name)
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".-") or "model"


def check_writable(out: Path) -> None:
    """Raise LaunchError where `out` cannot be written: minutes of measuring should not end there."""
    nearest = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise LaunchError(f"--out {out}: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise LaunchError(f"--out {out}: {nearest} is not writable; give another folder")


def _write(rendered: dict[str, bytes], out: Path) -> None:
    from mxfp4_rl.analysis.figures import FIGURES
    from mxfp4_rl.analysis.output import write_files

    try:
        write_files(rendered, out, stale={section.file for section in FIGURES})
    except OSError as error:
        raise LaunchError(f"--out {out} cannot be written: {error}") from error


def _print(results) -> None:
    from rich.console import Console

    from mxfp4_rl.analysis.page import lead
    from mxfp4_rl.analysis.tables import print_tables

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    console = Console(width=width, highlight=False, soft_wrap=False)
    console.print(f"\n{lead(results)}\n", markup=False)
    print_tables(results, console)
    if results.left_out:
        reasons = "; ".join(f"{count} {reason}" for reason, count in results.reasons().items())
        console.print(f"Not measured: {reasons}.\n", markup=False)


def _facts(options: argparse.Namespace, files: list[dict], seconds: float) -> dict:
    """What a reader of the files wants to know about how they came about."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "device": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "versions": {
            "mxfp4-rl": mxfp4_rl.__version__,
            "torch": torch.__version__,
            "safetensors": importlib.metadata.version("safetensors"),
            "python": platform.python_version(),
        },
        "options": {"dtype": options.dtype, "rows": options.rows, "layers": options.layers, "revision": options.revision},
        "files": files,
    }
