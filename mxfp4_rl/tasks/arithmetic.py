"""Arithmetic with a verifiable reward: problems made from a seed, and a score that only the right number gets.

A problem is ``a op b`` in words a chat model understands. A small pretrained model solves some of them at the start, so
that reinforcement learning has a signal from the first step, and far from all, so that there is something to learn.
Everything follows from the options and the seed; nothing is downloaded.

Training and validation share no problem, in either order of the operands: ``3 + 4`` in one keeps ``4 + 3`` out of the
other.

verl finds the score by ``reward.custom_reward_function``: ``path=pkg://mxfp4_rl.tasks.arithmetic``,
``name=compute_score``.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .common import CONTROL_TOKEN, NUMERAL, is_int, make_row, take_turns, write_once

__all__ = [
    "DATA_SOURCE",
    "DEFAULT_OPS",
    "DEFAULT_RANGES",
    "DEFAULT_TEMPLATE",
    "DEFAULT_VAL_SIZE",
    "RECOMMENDED_RESPONSE_TOKENS",
    "Problem",
    "compute_score",
    "make_problems",
    "write_parquet",
]

logger = logging.getLogger(__name__)

DATA_SOURCE = "arithmetic"  # verl puts it in the names of the validation metrics

_APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}

# With these defaults SmolLM2-135M-Instruct in BF16 starts at a score of 0.11 sampled at temperature 1 and 0.52 greedy
# (128 held-out problems, 4 samples each), with replies of at most 12 tokens. It answers "9 + 14 = 23", where each digit
# is a token, and with its end token that can take 12; a cap of 8 leaves 0.04 and 0.31.
RECOMMENDED_RESPONSE_TOKENS = 12
# Operand ranges, both ends included.
DEFAULT_OPS = ("+", "*")
DEFAULT_RANGES: Mapping[str, tuple[int, int]] = {"+": (1, 15), "-": (1, 15), "*": (1, 12)}
DEFAULT_TEMPLATE = "What is {a} {op} {b}? Answer briefly."
DEFAULT_VAL_SIZE = 64
# Part of the data folder's hash: raise it when the same options give other rows.
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Problem:
    """``a op b``; ``text`` is what the model is asked, ``answer`` what it must say."""

    a: int
    op: str
    b: int
    template: str = DEFAULT_TEMPLATE

    @property
    def text(self) -> str:
        return self.template.format(a=self.a, op=self.op, b=self.b)

    @property
    def answer(self) -> int:
        return _APPLY[self.op](self.a, self.b)

    @property
    def pair(self) -> tuple[str, int, int]:
        """The operation and its operands in ascending order: equal for ``3 + 4`` and ``4 + 3``."""
        return (self.op, min(self.a, self.b), max(self.a, self.b))


def make_problems(
    seed: int = 0,
    *,
    ops: Sequence[str] = DEFAULT_OPS,
    ranges: Mapping[str, Sequence[int]] | None = None,
    train_size: int | None = None,
    val_size: int = DEFAULT_VAL_SIZE,
    template: str = DEFAULT_TEMPLATE,
) -> tuple[list[Problem], list[Problem]]:
    """Distinct training and validation problems, the same for the same arguments on every machine.

    The operations take turns in both lists while each has problems left, so that a beginning of a list is balanced.
    Differences are only asked where they are not negative.

    Args:
        seed: decides which problems are held out, and the order.
        ops: out of ``"+"``, ``"-"``, ``"*"``; a string such as ``"+*"`` will do.
        ranges: operation -> (lowest, highest) operand, both included, not negative; an operation that is not given has
            its :data:`DEFAULT_RANGES`.
        train_size: number of training problems; None: all that are not held out.
        val_size: number of validation problems.
        template: the prompt, with ``{a}``, ``{op}`` and ``{b}``.

    Returns:
        (training problems, validation problems).

    Raises:
        ValueError: an option is out of its range, or the ranges hold fewer problems than the sizes ask for.
    """
    options = _validated(seed, ops, ranges, train_size, val_size, template)
    rng = random.Random(seed)

    # What is held out is a pair with both its orders, or validation would ask what training has shown.
    orders_by_op: dict[str, list[list[Problem]]] = {}
    for op, (low, high) in options["ranges"].items():
        by_pair: dict[tuple, list[Problem]] = {}
        for a in range(low, high + 1):
            for b in range(low, high + 1):
                if op == "-" and a < b:
                    continue
                problem = Problem(a, op, b, template)
                by_pair.setdefault(problem.pair, []).append(problem)
        pairs = list(by_pair.values())
        for orders in pairs:
            rng.shuffle(orders)
        rng.shuffle(pairs)
        orders_by_op[op] = pairs

    held_out = take_turns(list(orders_by_op.values()))
    val: list[Problem] = []
    train_pairs: dict[str, list[Problem]] = {op: [] for op in orders_by_op}
    for orders in held_out:
        if len(val) < val_size:
            val.extend(orders[: val_size - len(val)])
        else:
            train_pairs[orders[0].op].extend(orders)
    for problems in train_pairs.values():
        rng.shuffle(problems)
    train = take_turns(list(train_pairs.values()))

    wanted = train_size if train_size is not None else 1
    if len(val) < val_size or len(train) < wanted:
        total = sum(len(orders) for pairs in orders_by_op.values() for orders in pairs)
        raise ValueError(
            f"ranges={options['ranges']} hold {total} problems, which do not give val_size={val_size} held-out and "
            f"{wanted} training ones without overlap (got {len(val)} and {len(train)}): widen the ranges, add an "
            f"operation, or lower val_size or train_size."
        )
    return train[:train_size], val


def write_parquet(out_dir: str | os.PathLike, seed: int = 0, **options) -> tuple[Path, Path]:
    """Writes :func:`make_problems` as verl's Parquet files, once per set of options.

    The folder's name carries a hash of the options and the seed, so other options never meet old data; it appears by
    a rename when both files are written, so a folder that is there is whole. Any number of processes may call this.

    Columns: ``data_source``, ``prompt`` (list of ``{"role", "content"}``), ``ability``, ``reward_model``
    (``{"style": "rule", "ground_truth": str}``), ``extra_info`` (``{"index", "split"}``).

    Args:
        out_dir: where to put the folder; made if missing.
        seed, **options: as for :func:`make_problems`.

    Returns:
        (path of the training file, path of the validation file).

    Raises:
        ValueError, TypeError: as :func:`make_problems`.
        OSError: ``out_dir`` cannot be written.
    """
    train, val = make_problems(seed, **options)
    # The problems are the options' whole effect: hashing them also tells defaults apart that changed between versions.
    identity = [_FORMAT_VERSION, [p.text for p in train], [p.text for p in val]]
    rows = (
        [make_row(DATA_SOURCE, p.text, p.answer, split, index) for index, p in enumerate(problems)]
        for split, problems in (("train", train), ("val", val))
    )
    return write_once(out_dir, DATA_SOURCE, identity, *rows)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict[str, float]:
    """1 if the reply gives the right integer, once, as its last word; else 0. verl's custom reward function.

    Rule: take away chat control tokens and at most one restatement ``a op b`` of a problem; what is left must hold
    exactly one integer, in its usual notation, equal to the ground truth, and after it nothing but closing punctuation.

    So these score for 7: ``7``, ``= 7``, ``7.``, ``**7**``, ``+7``, ``3 + 4 = 7``, ``The answer is 7.``
    And these do not: ``7 8 9 10 11`` and ``6 or 7`` (guessing), ``7 apples`` and ``7, because`` (does not end),
    ``3 + 4`` (no answer), ``7.0``, ``07``, ``14/2`` (another notation), ``seven``. Thousands separators are allowed
    where they belong (``1,234``). A restatement counts because that is how small models answer from the start; it gives
    no second guess, since only the one number behind it is read.

    Args:
        data_source, extra_info, kwargs: not used; verl passes them.
        solution_str: the reply's text.
        ground_truth: the right integer, as text or int.

    Returns:
        ``{"score": s, "acc": s}`` with s 1.0 or 0.0. Never raises: a ground truth that is not an integer scores 0.0 and
        is logged once.
    """
    truth = _final_integer(str(ground_truth))
    if truth is None:
        _warn_once(str(ground_truth)[:80])
    reply = _final_integer(solution_str) if isinstance(solution_str, str) else None
    score = float(truth is not None and reply == truth)
    return {"score": score, "acc": score}


_RESTATEMENT = re.compile(
    rf"(?<![\w.,])[+-]?{NUMERAL}\s*(?:[+\-*x\u00d7\u00b7]|plus|minus|times)\s*{NUMERAL}(?![\w]|[.,][0-9])"
)
_CLOSING = r"[\s.!*_`'\")\]}$]*"
# What may stand right before the number: nothing, a space, "=" or an opening mark, so not "x7", ".7" or a root sign.
_ANSWER = re.compile(rf"(|\D*?[\s=:*_`'\"(\[{{$])([+-]?)({NUMERAL}){_CLOSING}")
# Far beyond any right reply; keeps the cost of a degenerate one small.
_MAX_REPLY_CHARS = 2000


def _final_integer(text: str) -> str | None:
    """The one integer of a reply, canonical ("-7", "1234"), or None if the reply breaks the rule of the score."""
    text = CONTROL_TOKEN.sub(" ", text).replace("\u2212", "-").strip()
    if len(text) > _MAX_REPLY_CHARS:
        return None
    text = _RESTATEMENT.sub(" ", text, count=1)
    match = _ANSWER.fullmatch(text)
    if match is None:
        return None
    before, sign, numeral = match.groups()
    if not sign and before.rstrip().endswith(("-", "+", "/", "*")) and not before.endswith("**"):
        return None  # "- 7" or "/ 7": part of an expression, not an answer
    digits = numeral.replace(",", "")  # compared as text: int() refuses very long ones
    return f"-{digits}" if sign == "-" and digits != "0" else digits


@lru_cache(maxsize=8)
def _warn_once(ground_truth: str) -> None:
    logger.warning("ground truth %r is not an integer, its rows always score 0: is this arithmetic data?", ground_truth)


def _validated(seed, ops, ranges, train_size, val_size, template) -> dict:
    if not is_int(seed):
        raise ValueError(f"seed={seed!r} is not an integer: give one, e.g. seed=0.")
    ops = list(ops)
    if not ops or len(set(ops)) != len(ops) or any(op not in _APPLY for op in ops):
        raise ValueError(f"ops={ops!r}: give one or more of {list(_APPLY)}, each once.")
    ranges = dict(ranges or {})
    for op in ranges:
        if op not in ops:
            raise ValueError(f"ranges has {op!r}, which is not among ops={ops!r}: add it to ops or drop it.")
    checked = {}
    for op in ops:
        bounds = list(ranges.get(op, DEFAULT_RANGES[op]))
        if len(bounds) != 2 or not all(is_int(x) for x in bounds) or not 0 <= bounds[0] <= bounds[1] <= 9999:
            raise ValueError(
                f"ranges[{op!r}]={bounds!r}: give two integers, 0 <= low <= high <= 9999, e.g. {DEFAULT_RANGES[op]}."
            )
        if (bounds[1] - bounds[0] + 1) ** 2 > 1_000_000:
            raise ValueError(f"ranges[{op!r}]={bounds!r} spans more than 1000 numbers, over a million problems: narrow it.")
        checked[op] = tuple(bounds)
    for name, value in (("train_size", train_size), ("val_size", val_size)):
        if not (is_int(value) and value >= 1) and not (name == "train_size" and value is None):
            raise ValueError(f"{name}={value!r} is not a positive integer{' or None' if name == 'train_size' else ''}.")
    try:
        one, other = template.format(a=1, op="+", b=2), template.format(a=3, op="*", b=4)
        complete = all(x in one for x in "1+2") and all(x in other for x in "3*4")
    except (AttributeError, KeyError, IndexError, ValueError):
        complete = False
    if not complete:
        raise ValueError(f"template={template!r} must hold {{a}}, {{op}} and {{b}} and no other field.")
    return {"ranges": checked}
