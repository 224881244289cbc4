"""`mxfp4-rl eval CHECKPOINT`: accuracy on held-out problems, in BF16 and as the recipe quantises it.

What can be wrong with the arguments is told before the model is read; the JSON is written at the very end, by a rename.
Exit codes: 0 done; 2 a mistake in the arguments, a model or data that cannot be used; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.recipe import SHORT_WORDS, RecipeError
from mxfp4_rl.settings import RECIPE_FILE
from mxfp4_rl.tasks.common import take_turns

OUT_ROOT = Path("runs") / "eval"
FILE = "eval.json"
SCHEMA = 1  # of the JSON: raised when a key changes its meaning
_EXAMPLES = 12  # questions whose replies the JSON keeps
_WORDS = "\n".join(
    textwrap.fill(words, 118, initial_indent=f"  {format:<8}", subsequent_indent=" " * 10)
    for format, words in SHORT_WORDS.items()
)
EPILOG = f"""\
CHECKPOINT is a folder of transformers, verl's global_step_N (with hf_model saved, or merged), a name on the hub, or
smollm2-135m-instruct, the model that comes along. The recipe stored with it ({RECIPE_FILE}) is used unless another one
is given; with a recipe the model is measured without and with it.

a recipe is a format and words joined by "+":
{_WORDS}

examples:
  mxfp4-rl eval smollm2-135m-instruct --task word_problems --recipe mxfp4+mbs+of
  mxfp4-rl eval checkpoints/global_step_100 --task word_problems --limit 64
  mxfp4-rl eval model/ --weight mxfp4+mbs --samples 8 --temperature 1       W4A16, eight samples a problem
  mxfp4-rl eval model/ --data test.parquet --reward my_reward.py:compute_score --max-new-tokens 512
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, a hub name or smollm2-135m-instruct")
    data = parser.add_argument_group("questions")
    data.add_argument("--task", metavar="NAME", help="a built-in task, its held-out problems; default: arithmetic")
    data.add_argument(
        "--task-option", action="append", default=[], metavar="KEY=VALUE", help="as mxfp4.task.KEY in training, e.g. seed=1"
    )
    data.add_argument("--data", metavar="FILE", help="a Parquet file in verl's schema instead of a task")
    data.add_argument("--reward", metavar="FILE:NAME", help="its reward, or pkg://MODULE:NAME; default: verl's own")
    data.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    recipe = parser.add_argument_group("quantiser")
    recipe.add_argument("--recipe", metavar="WORDS", help='of weights and activations, e.g. "mxfp4+mbs+of"; or a JSON file')
    recipe.add_argument("--weight", metavar="WORDS", help="of weights; activations stay as they are unless given too")
    recipe.add_argument("--activation", metavar="WORDS", help="of activations")
    only = recipe.add_mutually_exclusive_group()
    only.add_argument("--bf16", action="store_true", help="without the quantiser only")
    only.add_argument("--no-bf16", action="store_true", help="with the quantiser only")
    draw = parser.add_argument_group("replies")
    draw.add_argument("--samples", type=int, default=1, metavar="N", help="replies to a question; default: 1")
    draw.add_argument("--temperature", type=float, metavar="T", help="0: greedy; default: 0 for one sample, else 1")
    draw.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the task's own, 256 with --data")
    draw.add_argument("--batch", type=int, default=64, metavar="N", help="replies at a time; default: 64")
    draw.add_argument("--seed", type=int, default=0, help="of the samples; default: 0")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda where there is one")
    parser.add_argument("--out", metavar="PATH", help=f"a folder or a .json file; default: {OUT_ROOT}/<name of the checkpoint>")


def run(options: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """Run the command and return its exit code.

    Args:
        options: of `add_arguments`. arguments: the command line, for the record.

    Raises:
        LaunchError: an argument, the checkpoint or the data is wrong; the message is the sentence to show.
    """
    try:
        return _run(options, arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from mxfp4_rl.evaluation.sources import find_data, find_model, find_recipe, read_questions, scorer

    temperature = _check_numbers(options)
    out = _out_file(options)
    path = find_model(options.checkpoint)
    recipe, recipe_source = find_recipe(options, path)
    if recipe is None and options.no_bf16:
        raise LaunchError("--no-bf16 needs a recipe, and none is stored beside the checkpoint: give --recipe mxfp4+mbs+of")
    data, function, reward_name, tokens, what = find_data(options)

    # Only now: torch takes seconds to import, and a mistake above should be told at once.
    import torch

    from mxfp4_rl.evaluation.measure import Draw, Sampling, answer, summary
    from mxfp4_rl.launch.records import versions
    from mxfp4_rl.nn import convert, plan

    device = find_device(options.device)
    tokenizer, model, stop_ids = load(path, device)
    if recipe is not None:
        try:
            plan(model, recipe)
        except RecipeError as error:
            raise LaunchError(f"recipe ({recipe_source}): {error}") from error
    questions = read_questions(data, tokenizer, options.limit)
    reward = scorer(function, reward_name)
    for question in {q.data_source: q for q in questions}.values():
        reward(question, "")  # a reward that does not know the data says so before minutes of sampling

    draw = Draw(options.samples, Sampling(temperature), options.max_new_tokens or tokens, options.batch, options.seed)
    how = "greedy" if temperature == 0 else f"{draw.samples} samples at temperature {temperature:g}"
    print(
        f"{options.checkpoint}: {len(questions)} questions of {what}, {how}, at most {draw.max_new_tokens} tokens, on {device}"
    )
    if recipe is None and not options.bf16:
        print("no recipe given or stored with the checkpoint: BF16 only")
    results, examples = {}, {}
    for name in [*([] if options.no_bf16 else ["bf16"]), *(["quantised"] if recipe is not None else [])]:
        if name == "quantised":
            print(f"quantised: {convert(model, recipe).describe().splitlines()[0]}; {recipe.describe()}")
        try:
            measured = answer(
                model, tokenizer, questions, reward, draw, stop_ids, progress(name, len(questions) * draw.samples)
            )
        except torch.OutOfMemoryError as error:
            raise LaunchError(f"--batch {options.batch} does not fit {device}: give a smaller one ({error})") from error
        results[name] = summary(questions, measured)
        examples[name] = measured
    _print_table(results, draw.samples)

    record = {
        "schema": SCHEMA,
        "checkpoint": options.checkpoint,
        "path": path,
        "questions": {"from": what, "file": str(data), "reward": reward_name, "task_options": options.task_option},
        "draw": {**vars(draw), "sampling": vars(draw.sampling)},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads",
        "recipe": recipe and recipe.to_dict(),
        "recipe_source": recipe_source,
        "results": results,
        "examples": _examples(questions, examples, tokenizer),
        "versions": versions(arguments),
    }
    write(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", out)
    print(f"written: {out}")
    return 0


def _check_numbers(options: argparse.Namespace) -> float:
    """The temperature; the other numbers are at least 1."""
    for name in ("samples", "batch", "limit", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise LaunchError(f"--{name.replace('_', '-')} {value} leaves nothing to do: give 1 or more")
    temperature = options.temperature if options.temperature is not None else float(options.samples > 1)
    if not 0 <= temperature <= 100:
        raise LaunchError(f"--temperature {temperature:g}: give 0 (greedy) or more, up to 100")
    if options.samples > 1 and temperature == 0:
        raise LaunchError(f"--samples {options.samples} at temperature 0 are all the same: give --temperature 1, or one sample")
    return temperature


def _out_file(options: argparse.Namespace) -> Path:
    if options.out is None:
        parts = [part for part in Path(options.checkpoint).parts if part not in ("/", "..", ".", "~")]
        name = "--".join(parts[-3:] if len(parts) > 2 else parts)
        out = OUT_ROOT / (re.sub(r"[^A-Za-z0-9._-]+", "-", name) or "model") / FILE
    else:
        out = Path(options.out).expanduser()
        out = out if out.suffix == ".json" else out / FILE
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise LaunchError(f"--out {out}: {nearest} is no folder that can be written; give another one")
    return out


def find_device(given: str | None) -> str:
    """The device of --device; a GPU where there is one, if it was not given.

    Raises:
        LaunchError: no such device.
    """
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", given):
        raise LaunchError(f"--device {given!r}: give cpu, cuda or cuda:1")
    if given != "cpu" and int(given.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise LaunchError(f"--device {given}: this machine has {torch.cuda.device_count()} GPUs; give cpu or leave it out")
    return given


def load(path: str, device: str):
    """(tokenizer, model in BF16 in eval mode, ids that end a reply) of what transformers loads from `path`.

    A gpt-oss whose experts are stored in MXFP4 is loaded as the BF16 values that they stand for.

    Raises:
        LaunchError: it loads no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        stored = getattr(AutoConfig.from_pretrained(path), "quantization_config", None) or {}
        own = {"quantization_config": Mxfp4Config(dequantize=True)} if stored.get("quant_method") == "mxfp4" else {}
        # Its parameters keep requires_grad, see `verl_plugin.rollout.RolloutModel`.
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **own).to(device).eval()
    except Exception as error:  # transformers and the hub's client raise many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LaunchError(f"checkpoint {path} cannot be loaded as a causal language model: {reason[0]}") from error
    eos = getattr(model.generation_config, "eos_token_id", None)
    return tokenizer, model, {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


def progress(name: str, total: int, what: str = "replies"):
    """Says how many of `total` are done, on stderr, at most every ten seconds."""
    done, began, said = 0, time.monotonic(), time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        if now - said >= 10 and done < total:
            said = now
            print(f"{name}: {done} of {total} {what}, {(now - began) / done * (total - done):.0f} s left", file=sys.stderr)

    return advance


def _print_table(results: dict[str, dict], samples: int) -> None:
    first = next(iter(results.values()))
    sources = first["by_source"]
    width = max(len("all"), *map(len, sources))
    print(f"\n{'':{width}}  questions" + "".join(f"  {name + ': accuracy [90 %]':>28}" for name in results))
    for source in [*(sources if len(sources) > 1 else []), "all"]:
        cells, questions = "", 0
        for result in results.values():
            row = result if source == "all" else result["by_source"][source]
            span = "[{:.3f}, {:.3f}]".format(*row["interval"]) if row["interval"] else ""
            cells, questions = cells + f"  {row['accuracy']:>12.3f} {span:>15}", row["questions"]
        print(f"{source:{width}}  {questions:>9}{cells}")
    print()
    for name, result in results.items():
        once = f", {result['solved_once']:.3f} solved in at least one sample" if samples > 1 else ""
        print(
            f"{name}: {result['tokens_per_second']:.0f} tokens/s, {result['mean_tokens']:.1f} tokens a reply, "
            f"{result['ended']:.0%} end by themselves{once}"
        )


def _examples(questions, measured: dict, tokenizer) -> list[dict]:
    """A few questions of every data source, in turns, with their first replies."""
    rows: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        rows.setdefault(question.data_source, []).append(i)
    return [
        {
            "data_source": questions[i].data_source,
            "prompt": tokenizer.decode(questions[i].prompt),
            "ground_truth": questions[i].ground_truth,
            **{name: {"reply": m.replies[i][0], "score": m.scores[i][0]} for name, m in measured.items()},
        }
        for i in take_turns(list(rows.values()))[:_EXAMPLES]
    ]


def write(content: str | bytes, out: Path) -> None:
    """A file, whole or not at all, its folder made where needed.

    Raises:
        LaunchError: it cannot be written.
    """
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, out)
    except OSError as error:
        raise LaunchError(f"--out {out} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
