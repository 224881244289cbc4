"""`mxfp4-rl ptq MODEL`: what each scale rule makes of a model's weights, and what it costs.

What can be wrong with the arguments is told before the model is read; both files are written at the very end, each by a rename.
Exit codes: 0 done; 2 a mistake in the arguments, a model, text or task that cannot be used; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.ptq.rules import BY_INPUTS, rules_of
from mxfp4_rl.recipe import FORMATS

OUT_ROOT = Path("runs") / "ptq"
FILES = ("ptq.json", "ptq.md")
IMPORTANCE = "importance.safetensors"  # beside them, if a rule weighed errors with it
SCHEMA = 1  # of the JSON: raised when a key changes its meaning
LIKE = ("export", "training")
EPILOG = """\
MODEL is a folder of transformers, verl's global_step_N (with hf_model saved, or merged), a name on the hub, or
smollm2-135m-instruct. Its Linear weights are quantised, lm_head and routers left out; activations stay in BF16.

scale rules by format, all of them by default:
  nvfp4    static, 4over6 (Four Over Six), soar (SOAR: CJSO and DSS), scalesearch (ScaleSearch, codes -2 to +6)
  mxfp4    static (rceil), oas (overflow-aware), scalesearch (exponents -1 and 0)
With --calibration also scalesearch+inputs, whose squared errors are weighed with the mean squares of each layer's
inputs on that text (4over6+inputs likewise). And any other rule or correction that `mxfp4-rl decompose --help`
lists, e.g. floor, c7.25, oas+mbs-dynamic.

examples:
  mxfp4-rl ptq smollm2-135m-instruct --format nvfp4 mxfp4                       errors of the weights, and seconds
  mxfp4-rl ptq model/ --format nvfp4 --text text.txt --calibration other.txt    ... of layers' outputs, and perplexity
  mxfp4-rl ptq model/ --format nvfp4 --scales static scalesearch --task arithmetic
  mxfp4-rl ptq model/ --format nvfp4 --scales scalesearch --export out/         measure one rule and export it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name or smollm2-135m-instruct")
    parser.add_argument("--format", nargs="+", required=True, choices=FORMATS, help="of the weights")
    parser.add_argument(
        "--scales", nargs="+", metavar="RULE", help="scale rules, the first one is the base; default: all below"
    )
    parser.add_argument(
        "--like",
        choices=LIKE,
        default="export",
        help="NVFP4's scale of the tensor: as an export has it, for layers that are served as one (the default), or as "
        "training, a weight each",
    )
    text = parser.add_argument_group("texts, in UTF-8")
    text.add_argument("--text", metavar="FILE", help="measure its perplexity")
    text.add_argument("--text-tokens", type=int, metavar="N", help="its first N tokens only")
    text.add_argument("--context", type=int, default=1024, metavar="N", help="tokens of a window; default: 1024")
    text.add_argument("--stride", type=int, metavar="N", help="from one window to the next; default: half the context")
    text.add_argument(
        "--calibration", metavar="FILE", help="measure the error of each layer's output on it; +inputs weighs by it"
    )
    text.add_argument("--calibration-tokens", type=int, default=2048, metavar="N", help="its first N tokens; default: 2048")
    task = parser.add_argument_group("accuracy before and after, as mxfp4-rl eval measures it, greedy")
    task.add_argument("--task", metavar="NAME", help="a built-in task, its held-out problems")
    task.add_argument("--task-option", action="append", default=[], metavar="KEY=VALUE", help="as mxfp4.task.KEY in training")
    task.add_argument("--data", metavar="FILE", help="a Parquet file in verl's schema instead of a task")
    task.add_argument("--reward", metavar="FILE:NAME", help="its reward, or pkg://MODULE:NAME; default: verl's own")
    task.add_argument("--limit", type=int, metavar="N", help="the first N questions only")
    task.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the task's own, 256 with --data")
    task.add_argument("--batch", type=int, default=64, metavar="N", help="replies at a time; default: 64")
    parser.add_argument(
        "--soar-parts",
        type=int,
        metavar="ROWS",
        help="also what CJSO and DSS give by themselves, on so many rows of each weight",
    )
    parser.add_argument("--export", metavar="OUT", help="with one format and one rule: hand over to mxfp4-rl export")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: cuda where there is one")
    parser.add_argument("--out", metavar="DIR", help=f"where {' and '.join(FILES)} go; default: {OUT_ROOT}/<name of the model>")


def run(options: argparse.Namespace, arguments: Sequence[str] = ()) -> int:
    """Run the command and return its exit code.

    Args:
        options: of `add_arguments`. arguments: the command line, for the record.

    Raises:
        LaunchError: an argument, the model, a text or the task is wrong; the message is the sentence to show.
    """
    try:
        return _run(options, arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from mxfp4_rl.evaluation.sources import find_model

    _check(options)
    rules, left_out = rules_of(options.format, options.scales, options.calibration is not None)
    recipes = {name: rule.recipe for name, rule in rules.items()}
    if options.export is not None and len(recipes) > 1:
        raise LaunchError(
            f"--export {options.export} is of one rule, and {', '.join(recipes)} would be measured: give one --format and one "
            "of --scales, e.g. the best of a run without --export"
        )
    if options.export is not None and Path(options.export).expanduser().exists():
        raise LaunchError(f"--export {options.export} exists: give another folder, or remove it")
    out = _folder(options)
    texts = {name: _read(f"--{name}", getattr(options, name)) for name in ("text", "calibration")}
    path = find_model(options.model)
    task = _Task(options) if options.task or options.data else None

    # Only now: torch takes seconds to import, and a mistake above should be told at once.
    import torch

    from mxfp4_rl.evaluation.command import find_device, load, progress, write
    from mxfp4_rl.export.importance import importance_file
    from mxfp4_rl.launch.records import versions
    from mxfp4_rl.ptq.outputs import LayerOutputs, mean_and_worst
    from mxfp4_rl.ptq.page import page
    from mxfp4_rl.ptq.perplexity import difference, perplexity, token_losses, windows_of
    from mxfp4_rl.ptq.soar_parts import soar_parts
    from mxfp4_rl.ptq.weights import Weights

    device = find_device(options.device)
    tokenizer, model, stop_ids = load(path, device)
    _check_context(options, model)
    ids = {name: _tokens(tokenizer, f"--{name}", text, device) for name, text in texts.items() if text is not None}
    weights = Weights(model)
    elements = sum(weight.numel() for weight in weights.originals.values())
    print(f"{options.model}: {len(weights.layers)} weights, {elements / 1e6:.1f} M elements, on {device}", flush=True)
    for sentence in left_out:
        print(sentence)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": options.model,
        "path": path,
        "like": options.like,
        "weights": len(weights.layers),
        "elements": elements,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads",
        "text": None,
        "calibration": None,
        "questions": None,
        "left_out": left_out,
    }
    outputs = windows = None
    importance: dict[str, Any] | None = None
    if "text" in ids:
        text = ids["text"] = ids["text"][: options.text_tokens]
        stride = options.stride or max(1, options.context // 2)
        windows = windows_of(len(text), options.context, stride)
        record["text"] = {
            **_file(options.text, texts["text"]),
            "tokens": len(text),
            "scored": sum(window.scored for window in windows),
            "context": options.context,
            "stride": stride,
        }
    if "calibration" in ids:
        calibration = ids["calibration"][: options.calibration_tokens]
        record["calibration"] = {**_file(options.calibration, texts["calibration"]), "tokens": len(calibration)}
        outputs = LayerOutputs(model, weights, calibration, options.context)
        if any(rule.by_inputs for rule in rules.values()):
            importance = outputs.mean_squares()
    if task is not None:
        record["questions"] = task.prepare(tokenizer)

    def measure(row: dict[str, Any], base, first) -> Any:
        """Adds what the model does now to the row, against the losses of BF16 and of the first rule; returns its own."""
        losses = None
        if windows is not None:
            say = progress(row["recipe"], sum(w.stop - w.start for w in windows), "tokens read")
            losses = token_losses(model, ids["text"], windows, say)
            row["perplexity"] = {"value": perplexity(losses)}
            for key, other in (("loss", base), ("vs_first", first)):
                change, error = difference(losses, losses if other is None else other)
                row["perplexity"] |= {key: change, f"{key}_standard_error": error}
        if task is not None:
            row["accuracy"] = task.measure(model, tokenizer, stop_ids, row["recipe"])
        return losses

    rows = record["results"] = [{"recipe": "BF16", "bits": 16.0}]
    try:
        base = measure(rows[0], None, None)
        first: dict[str, float] = {}
        first_losses: dict[str, Any] = {}
        for name, rule in rules.items():
            recipe = rule.recipe
            done = weights.quantise(recipe, options.like, importance if rule.by_inputs else None)
            first.setdefault(recipe.format, done.rel_mse)
            of_weights = {
                "rel_mse": done.rel_mse,
                "vs_first": done.rel_mse / first[recipe.format] - 1 if first[recipe.format] else 0.0,
                "seconds": done.seconds,
                "cpu_seconds": done.cpu_seconds,
                # A weight sync has no calibration text.
                "seconds_at_sync": None if rule.by_inputs else weights.seconds_at_sync(recipe),
                "layers": done.errors,
            }
            row = {"recipe": name, "bits": recipe.bits_per_element, "weights": of_weights}
            if outputs is not None:
                errors = outputs.errors()
                mean, worst_layer, worst = mean_and_worst(errors)
                row["outputs"] = {"mean": mean, "worst": worst, "worst_layer": worst_layer, "layers": errors}
            rows.append(row)
            losses = measure(row, base, first_losses.get(recipe.format))
            first_losses.setdefault(recipe.format, losses)
            print(f"{name}: weight MSE {done.rel_mse:.4g}, {done.seconds:.1f} s", file=sys.stderr, flush=True)
    except FloatingPointError as error:
        raise LaunchError(f"{options.model}, {rows[-1]['recipe']}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise LaunchError(f"--context {options.context}, --batch {options.batch} do not fit {device}: {error}") from error
    finally:
        weights.restore()
    if options.soar_parts:
        record["soar_parts"] = soar_parts(weights, options.soar_parts)
    record["exports"] = [_export_command(options, name, rules[name], out) for name in _best(rows[1:], recipes)]
    record["versions"] = versions(arguments)
    text = page(record)
    print(f"\n{text}")
    if importance is not None:
        write(importance_file(importance), out / IMPORTANCE)
    write(json.dumps(record, indent=1, ensure_ascii=False) + "\n", out / FILES[0])
    write(text, out / FILES[1])
    print(f"written: {out / FILES[0]}, {FILES[1]}", flush=True)
    if options.export is not None:
        return _export(options, *next(iter(rules.items())), out)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("text_tokens", "context", "stride", "calibration_tokens", "limit", "max_new_tokens", "batch", "soar_parts"):
        value, least = getattr(options, name), 2 if name in ("text_tokens", "context") else 1
        if value is not None and value < least:
            raise LaunchError(f"--{name.replace('_', '-')} {value} leaves nothing to do: give {least} or more")
    if options.stride is not None and options.stride > options.context:
        raise LaunchError(f"--stride {options.stride} skips tokens: give at most the context, {options.context}")
    if len(set(options.format)) < len(options.format):
        raise LaunchError(f"--format names {options.format[0]} twice; leave one of them out")
    for name, needs in (("text_tokens", "text"), ("stride", "text")):
        if getattr(options, name) is not None and getattr(options, needs) is None:
            raise LaunchError(f"--{name.replace('_', '-')} is of --{needs}: give that file too")
    asked = [name for name in ("limit", "reward", "max_new_tokens", "task_option") if getattr(options, name)]
    if asked and not (options.task or options.data):
        raise LaunchError(f"--{asked[0].replace('_', '-')} is of a task: give --task NAME or --data FILE too")
    if options.soar_parts and "nvfp4" not in options.format:
        raise LaunchError("--soar-parts is of NVFP4: give --format nvfp4")


def _folder(options: argparse.Namespace) -> Path:
    from mxfp4_rl.analysis.command import check_writable, folder_name

    out = Path(options.out).expanduser() if options.out else OUT_ROOT / folder_name(options.model)
    check_writable(out)
    return out


def _read(option: str, file: str | None) -> str | None:
    if file is None:
        return None
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{option} {file} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise LaunchError(f"{option} {file} is empty: give a text")
    return text


def _tokens(tokenizer, option: str, text: str, device: str):
    """Token ids as the tokenizer gives them for the whole text, with what it puts before a text (BOS, for some)."""
    import torch

    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise LaunchError(f"{option} has {len(ids)} token: give a longer text")
    return torch.tensor(ids, device=device)


def _check_context(options: argparse.Namespace, model) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and options.context > longest and (options.text or options.calibration):
        raise LaunchError(f"--context {options.context}: this model reads {longest} tokens at most; give that or less")


def _file(name: str, text: str) -> dict[str, Any]:
    return {"file": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)}


class _Task:
    """The questions of `mxfp4-rl eval`, asked greedily."""

    def __init__(self, options: argparse.Namespace):
        from mxfp4_rl.evaluation.sources import find_data, scorer

        self._options = options
        self._file, function, where, self._tokens, self._what = find_data(options)
        self._reward = scorer(function, where)

    def prepare(self, tokenizer) -> dict[str, Any]:
        """Read the questions; what the record says about them."""
        from mxfp4_rl.evaluation.sources import read_questions

        self._questions = read_questions(self._file, tokenizer, self._options.limit)
        for question in {q.data_source: q for q in self._questions}.values():
            self._reward(question, "")  # a reward that does not know the data says so before minutes of sampling
        return {"from": self._what, "count": len(self._questions), "task_options": self._options.task_option}

    def measure(self, model, tokenizer, stop_ids: set[int], name: str) -> dict[str, Any]:
        from mxfp4_rl.evaluation.command import progress
        from mxfp4_rl.evaluation.measure import Draw, Sampling, answer, summary

        draw = Draw(1, Sampling(0.0), self._options.max_new_tokens or self._tokens, self._options.batch)
        say = progress(name, len(self._questions))
        return summary(self._questions, answer(model, tokenizer, self._questions, self._reward, draw, stop_ids, say))


def _export_format(options: argparse.Namespace, recipe) -> str:
    """The packed format that holds the recipe; "bf16" where none does, or where weights are quantised as in training."""
    from mxfp4_rl.export.formats import FORMATS as EXPORTS

    packed = f"{recipe.format}-pack-quantized"
    as_training = options.like == "training" and EXPORTS[packed].shares_scale
    return "bf16" if as_training or EXPORTS[packed].refuses(recipe) else packed


def _best(rows: list[dict[str, Any]], recipes: dict[str, Any]) -> list[str]:
    """Of each format the recipe of lowest perplexity; of least error in the weights, where no text was measured."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = best.setdefault(recipes[row["recipe"]].format, row)
        if _merit(row) < _merit(own):
            best[recipes[row["recipe"]].format] = row
    return [row["recipe"] for row in best.values()]


def _merit(row: dict[str, Any]) -> float:
    return row["perplexity"]["value"] if "perplexity" in row else row["weights"]["rel_mse"]


def _export_options(options: argparse.Namespace, name: str, rule, out: Path) -> list[str]:
    """What `mxfp4-rl export` is given for weights quantised by the rule of this name."""
    given = ["--format", _export_format(options, rule.recipe), "--recipe", name.removesuffix(f"+{BY_INPUTS}")]
    return given + (["--importance", str(out / IMPORTANCE)] if rule.by_inputs else [])


def _export_command(options: argparse.Namespace, name: str, rule, out: Path) -> str:
    return " ".join(["mxfp4-rl export", options.model, "OUT", *_export_options(options, name, rule, out)])


def _export(options: argparse.Namespace, name: str, rule, out: Path) -> int:
    from mxfp4_rl.export import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    device = [] if options.device is None else ["--device", options.device]
    given = [*_export_options(options, name, rule, out), *device, "--", options.model, options.export]
    return command.run(parser.parse_args(given))
