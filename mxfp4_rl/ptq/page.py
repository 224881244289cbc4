"""The table of a `mxfp4-rl ptq` run, in Markdown, from what its JSON holds."""

from __future__ import annotations

from typing import Any

_READING = {
    "weight MSE": "energy of what the weights lost over their energy, all weights together",
    "vs": "that, against the first rule of the format",
    "output MSE": "the same of each layer's output X W^T on the calibration text, its inputs from the BF16 model: mean over "
    "layers, and the worst layer",
    "perplexity": "of the text, every token scored once",
    "loss": "nats a token more than BF16, with the standard error of that difference",
    "loss vs": "nats a token more than the first rule of the format, likewise; within two standard errors it is noise",
    "accuracy": "share of the questions, greedy, with a 90 % interval",
    "quantise": "seconds from BF16 weights to codes and scales",
    "sync": "seconds that a weight sync of RL takes for the same: each weight by itself, and dequantised for the actor",
}


def page(record: dict[str, Any]) -> str:
    """The tables of a run and how to read them.

    Args:
        record: what `ptq.json` holds, see `command`.
    """
    rows = record["results"]
    has = {key: any(key in row for row in rows) for key in ("outputs", "perplexity", "accuracy")}
    heads = ["recipe", "bits", "weight MSE", "vs"]
    heads += ["output MSE", "worst"] if has["outputs"] else []
    heads += ["perplexity", "loss", "loss vs"] if has["perplexity"] else []
    heads += ["accuracy"] if has["accuracy"] else []
    heads += ["quantise", "sync"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row, has)) + " |")
    lines += ["", *_facts(record), ""]
    lines += [f"- {name}: {text}" for name, text in _READING.items() if name in heads]
    if parts := record.get("soar_parts"):
        lines += ["", *_parts(parts)]
    if record["exports"]:
        lines += ["", "To export the best of each format (another rule: its name as --recipe):", ""]
        lines += ["```bash", *record["exports"], "```"]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], has: dict[str, bool]) -> list[str]:
    quantised = "weights" in row
    cells = [row["recipe"], f"{row['bits']:.4g}"]
    cells += [_number(row["weights"]["rel_mse"]), _percent(row["weights"]["vs_first"])] if quantised else ["0", ""]
    if has["outputs"]:
        own = row.get("outputs")
        cells += (
            [_number(own["mean"]), f"{_number(own['worst'])} ({own['worst_layer'].removeprefix('model.')})"]
            if own
            else ["0", ""]
        )
    if has["perplexity"]:
        own = row["perplexity"]
        cells += [f"{own['value']:.3f}"]
        cells += [_change(own, "loss"), _change(own, "vs_first") if own["vs_first"] else ""] if quantised else ["", ""]
    if has["accuracy"]:
        own = row["accuracy"]
        span = " [{:.3f}, {:.3f}]".format(*own["interval"]) if own["interval"] else ""
        cells.append(f"{own['accuracy']:.3f}{span}")
    if not quantised:
        return [*cells, "", ""]
    sync = row["weights"]["seconds_at_sync"]
    return [*cells, f"{row['weights']['seconds']:.1f}", "" if sync is None else f"{sync:.1f}"]


def _facts(record: dict[str, Any]) -> list[str]:
    like = {
        "export": "as `mxfp4-rl export` writes them (layers that are served as one share NVFP4's scale of the tensor)",
        "training": "as trainer and rollout of a run see them (each weight by itself)",
    }[record["like"]]
    packages = record["versions"]["packages"]
    lines = [
        f"{record['model']}: {record['weights']} weights, {record['elements'] / 1e6:.1f} M elements, {like}; activations in "
        f"BF16. {record['device']}, {record['versions']['started'][:10]}, Python {record['versions']['python']}, "
        f"torch {packages.get('torch')}, transformers {packages.get('transformers')}.",
        f"`{' '.join(record['versions']['command'])}`",
    ]
    if text := record["text"]:
        lines.append(
            f"Text: {text['file']} ({text['sha256'][:12]}), {text['tokens']} tokens, {text['scored']} scored, context "
            f"{text['context']}, stride {text['stride']}."
        )
    if calibration := record["calibration"]:
        lines.append(f"Calibration text: {calibration['file']} ({calibration['sha256'][:12]}), {calibration['tokens']} tokens.")
    if questions := record["questions"]:
        lines.append(f"Questions: {questions['count']} of {questions['from']}.")
    lines += [f"{sentence}." for sentence in record["left_out"]]
    return [part for line in lines for part in (line, "")][:-1]


def _parts(parts: dict[str, Any]) -> list[str]:
    errors = parts["rel_mse"]
    return [
        f"The parts of SOAR, on {parts['rows']} rows of each weight, each weight by itself:",
        "",
        "| | weight MSE | vs static |",
        "|---|---:|---:|",
        *(
            f"| {name} | {_number(e)} | {_percent(e / errors['static'] - 1 if name != 'static' else 0)} |"
            for name, e in errors.items()
        ),
        "",
        f"A scale other than the stored one to round at had the least error in {parts['other_beta_won']} of "
        f"{parts['blocks_and_rounds']:,} choices.",
    ]


def _change(own: dict[str, Any], key: str) -> str:
    error = own[f"{key}_standard_error"]
    return f"{own[key]:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 0.01 else f"{value:.3g}"


def _percent(change: float) -> str:
    return "" if change == 0 else f"{100 * change:+.1f} %"
