"""`mxfp4-rl export MODEL OUT --format F`: the command line.

Exit codes: 0 done (and verified, if asked); 1 the export differs from what it should be; 2 a mistake in the arguments, a model
or a recipe that the format cannot carry; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from mxfp4_rl.export import FORMAT_NAMES, ExportError
from mxfp4_rl.launch import LaunchError

EPILOG = """\
MODEL is a folder of transformers, verl's global_step_N (with hf_model saved, or merged), a name on the hub, or
smollm2-135m-instruct. The recipe stored with it is used unless --recipe names one; only its weight recipe matters here.

examples:
  mxfp4-rl export runs/mine/checkpoints/global_step_100 out/ --format bf16                what the trainer multiplied by
  mxfp4-rl export Qwen/Qwen2.5-3B out/ --format mxfp4-pack-quantized --recipe mxfp4       for vLLM, compressed-tensors
  mxfp4-rl export gpt-oss-in-bf16/ out/ --format gpt-oss --recipe mxfp4                   experts in MXFP4, as released
  mxfp4-rl export model/ out/ --format nvfp4-pack-quantized --recipe nvfp4+four-over-six --verify
"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name or smollm2-135m-instruct")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--format", required=True, choices=FORMAT_NAMES, help="what is written")
    parser.add_argument("--recipe", metavar="WORDS", help="words joined by +, or a JSON file; default: the stored recipe")
    parser.add_argument(
        "--importance",
        metavar="FILE",
        help="mean squares of the inputs, from mxfp4-rl ptq: weigh the squared errors that search and four-over-six compare",
    )
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file at most, e.g. 2GB; default: 5GB")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda where there is one; the bits are the same")
    parser.add_argument("--verify", action="store_true", help="read it back and compare bit for bit")


def run(options) -> int:
    """Make the export; returns the exit code."""
    import torch

    from mxfp4_rl.analysis.checkpoint import CheckpointError, open_checkpoint
    from mxfp4_rl.analysis.progress import make_progress
    from mxfp4_rl.evaluation.command import find_device
    from mxfp4_rl.evaluation.sources import find_model, find_recipe
    from mxfp4_rl.export.formats import FORMATS
    from mxfp4_rl.export.importance import read_importance
    from mxfp4_rl.export.plan import Plan
    from mxfp4_rl.export.verify import verify_export
    from mxfp4_rl.export.write import write_export

    out, shard_bytes = Path(options.out).expanduser(), _bytes(options.shard_size)
    device = find_device(options.device)
    model = find_model(options.model)
    options.bf16 = options.weight = options.activation = None
    recipe, where = find_recipe(options, model)
    if recipe is None:
        example = "nvfp4" if options.format.startswith("nvfp4") else "mxfp4"
        raise LaunchError(f"{options.model} has no recipe stored with it: give --recipe, e.g. --recipe {example}")
    began = time.monotonic()
    try:
        with open_checkpoint(model) as checkpoint:
            importance = None if options.importance is None else read_importance(options.importance)
            plan = Plan(checkpoint, recipe, FORMATS[options.format], importance, device)
            weighed = f"; errors weighed with {options.importance}" if importance is not None else ""
            print(f"recipe    {recipe.describe()} ({where}); weights only{weighed}")
            if checkpoint.note:
                print(f"source    {checkpoint.note}")
            elements = sum(info.elements for info in checkpoint.tensors)
            with make_progress(elements) as progress:
                counts = write_export(checkpoint, plan, out, torch.bfloat16, shard_bytes, progress.advance)
            bits = counts["quantised_bytes"] * 8 / counts["quantised_elements"]
            print(
                f"written   {out}: {counts['bytes'] / 1e6:.1f} MB in {counts['tensors']} tensors; {counts['quantised']} "
                f"weights with {bits:.2f} bits a value; {time.monotonic() - began:.1f} s on {device}"
            )
            if plan.left_alone:
                print(f"left      {len(plan.left_alone)} Linear layers unquantised, e.g. {next(iter(plan.left_alone))}")
            for note in plan.notes():
                print(f"note      {note}")
            if options.verify:
                return _verify(checkpoint, plan, out, verify_export, make_progress(elements))
    except CheckpointError as error:
        raise LaunchError(str(error)) from error
    except ExportError as error:
        raise LaunchError(str(error)) from error
    return 0


def _verify(checkpoint, plan, out, verify_export, progress) -> int:
    import torch

    try:
        with progress:
            counts = verify_export(checkpoint, plan, out, torch.bfloat16, progress.advance)
    except ExportError as error:
        print(f"mxfp4-rl: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        raise LaunchError(
            f"{out} was written but not verified, {plan.device} has no room for a weight ({error}): "
            "remove it, and give --device cpu"
        ) from error
    print(f"verified  {counts['tensors']} tensors bit for bit")
    if counts["decompressed"]:
        apart = counts["rounded_apart"]
        reader = "transformers" if plan.format.experts_only else "compressed-tensors"
        print(
            f"          {reader} reads {counts['decompressed']} weights, "
            + ("all values equal to ours in BF16" if not apart else f"{apart} values rounded apart in BF16")
        )
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    value = int(float(match[1]) * _UNITS.get(match[2], 1)) if match and match[2] in _UNITS else 0
    if value < 1:
        raise LaunchError(f"--shard-size {text} is no size: give e.g. 5GB or 500MB")
    return value
