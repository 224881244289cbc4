"""DAPO-Math-17k and AIME 2024 as verl's parquet files: `python recipes/dapo_math/prepare.py --out data/dapo_math`.

Reads BytedTsinghua-SIA's datasets from the hub, or local files of the same schema (`--train`, `--val`). Both are in verl's
schema already, but repeat their problems (DAPO-Math-17k holds each about a hundred times, AIME 2024 32 times): here each is
kept once, since a step's repetitions come from `rollout.n` and validation's from `val_kwargs.n`.

A row of a local file (parquet, or JSON lines, one object a line) needs two columns; others are left out:

  prompt        messages: [{"role": "user", "content": "Solve ... Answer: $Answer ..."}]
  reward_model  {"ground_truth": "34"}, the answer that the reward compares with

data_source is set here, whatever the file says: "math_dapo" in train.parquet and "aime_2024" in val.parquet. verl's reward
scores both alike; the name is what validation is logged under, val-core/aime_2024/acc/...
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_files import DataError, check_files, read_rows, write_rows

SETS = {  # name -> (dataset, split, data_source of verl's reward)
    "train": ("BytedTsinghua-SIA/DAPO-Math-17k", "train", "math_dapo"),
    "val": ("BytedTsinghua-SIA/AIME-2024", "train", "aime_2024"),
}


def converted(row: dict, source: str, index: int) -> dict:
    """The columns that verl reads.

    Raises:
        DataError: one is missing, or has another form.
    """
    where, prompt, truth = f"row {index} ({source})", None, None
    with contextlib.suppress(KeyError, TypeError):
        prompt = [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
    with contextlib.suppress(KeyError, TypeError):
        truth = row["reward_model"]["ground_truth"]
    if lacks := [name for name, value in (("prompt messages", prompt), ("reward_model.ground_truth", truth)) if value is None]:
        raise DataError(
            f'{where} lacks {" and ".join(lacks)}: every row needs prompt, [{{"role": "user", "content": ...}}], and '
            'reward_model, {"ground_truth": "34"}'
        )
    if not prompt or not str(truth).strip():
        raise DataError(f"{where} has an empty {'ground truth' if prompt else 'prompt'}")
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(truth)},
        "extra_info": {"index": index},
    }


def unique(rows: list[dict], source: str) -> tuple[list[dict], int]:
    """Each problem once, in the order of its first appearance, and how many were left out for having two answers."""
    kept: dict[str, dict] = {}
    contradictory = set()
    for i, row in enumerate(rows):
        new = converted(row, source, i)
        key = new["prompt"][-1]["content"]
        if kept.setdefault(key, new)["reward_model"] != new["reward_model"]:
            contradictory.add(key)
    return [row for key, row in kept.items() if key not in contradictory], len(contradictory)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="a local file instead of the hub's DAPO-Math-17k")
    parser.add_argument("--val", type=Path, help="a local file instead of the hub's AIME 2024")
    parser.add_argument("--out", type=Path, default=Path("data/dapo_math"), help="folder of train.parquet and val.parquet")
    options = parser.parse_args(arguments)
    try:
        check_files(options.train, options.val)
        rows = {name: read_rows(getattr(options, name), dataset, split=split) for name, (dataset, split, _) in SETS.items()}
        ready = {name: unique(rows[name], source) for name, (_, _, source) in SETS.items()}
        for name, (kept, left_out) in ready.items():  # both or none
            without = f", without {left_out} that have two answers" if left_out else ""
            print(
                f"{write_rows(kept, options.out / f'{name}.parquet')}: {len(kept)} problems of {len(rows[name])} rows{without}"
            )
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
