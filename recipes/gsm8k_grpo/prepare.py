"""GSM8K as verl's parquet files: `python recipes/gsm8k_grpo/prepare.py --out data/gsm8k`.

Reads openai/gsm8k from the hub, or local files of the same schema (parquet or JSON lines with "question" and "answer", whose
last line is "#### 72"): `--train train.jsonl --val test.jsonl`. verl's own reward for "openai/gsm8k" wants the answer behind
"####".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_files import DataError, check_files, read_rows, write_rows

INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


def converted(row: dict, split: str, index: int) -> dict:
    """A row in verl's schema.

    Raises:
        DataError: a field is missing, or the answer has no number behind "####".
    """
    question, answer = row.get("question"), row.get("answer")
    if not question or not answer:
        lacks = " and no ".join(name for name, value in (("question", question), ("answer", answer)) if not value)
        raise DataError(f'{split} row {index} has no {lacks}: every row needs a text in "question" and one in "answer"')
    _, mark, number = answer.rpartition("####")
    truth = number.strip().replace(",", "")
    if not mark or not truth:
        raise DataError(f"{split} row {index}: no number behind '####' in the answer {answer[-60:]!r}")
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="a local file instead of the hub's train split")
    parser.add_argument("--val", type=Path, help="a local file instead of the hub's test split")
    parser.add_argument("--out", type=Path, default=Path("data/gsm8k"), help="folder of train.parquet and val.parquet")
    options = parser.parse_args(arguments)
    try:
        check_files(options.train, options.val)
        ready = {}
        for name, split, file in (("train", "train", options.train), ("val", "test", options.val)):
            rows = read_rows(file, "openai/gsm8k", config="main", split=split)
            ready[name] = [converted(row, split, i) for i, row in enumerate(rows)]
        for name, rows in ready.items():  # both or none
            print(f"{write_rows(rows, options.out / f'{name}.parquet')}: {len(rows)} problems")
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
