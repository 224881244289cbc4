"""Word problems with a verifiable reward, in five levels: stories whose answer is an integer, from a seed.

    1  sums and differences of one digit          "Tom has 7 apples and gives away 3. How many apples are left?"
    2  sums and differences of two digits, small products, the missing part of a sum
    3  two steps of adding and taking away        "... buys 5 more and gives away 3 ..."
    4  two steps with a product, change from a price, "3 more than", "4 times as many"
    5  three steps, some of them divided among friends

What a story computes is a small tree such as ``("-", ("*", "a", "b"), "c")``; its words (`word_templates`) are chosen apart
from its numbers. What is held out is the calculation: its canonical form (sums and products in any order are one, and so are
``12 + 5 - 3`` and ``12 - 3 + 5``) and the seed decide alone whether it belongs to training or to validation. So no calculation
is in both in any words, names or language, and a longer validation is one of the same run's.

verl finds the score by ``reward.custom_reward_function``: ``path=pkg://mxfp4_rl.tasks.word_problems``,
``name=compute_score``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .common import CONTROL_TOKEN, NUMERAL, is_int, make_row, write_once
from .word_templates import LANGUAGES

__all__ = [
    "DATA_SOURCE",
    "DEFAULT_LEVELS",
    "DEFAULT_TRAIN_SIZE",
    "DEFAULT_VAL_SIZE",
    "KINDS",
    "LEVELS",
    "RECOMMENDED_PROMPT_TOKENS",
    "RECOMMENDED_RESPONSE_TOKENS",
    "Kind",
    "Problem",
    "compute_score",
    "make_problems",
    "write_parquet",
]

logger = logging.getLogger(__name__)

DATA_SOURCE = "word_problems"  # and the level behind it: verl's validation metrics are a level's each
LEVELS = (1, 2, 3, 4, 5)
RECOMMENDED_PROMPT_TOKENS = 104  # with SmolLM2's tokens and chat template English takes up to 71, German 98
# Half of SmolLM2-135M-Instruct's sampled replies end within 48 tokens, 72 % of its greedy ones; training shortens them.
RECOMMENDED_RESPONSE_TOKENS = 48
# In BF16 the model answers 0.36, 0.23, 0.11, 0.03 and 0.03 of the levels greedily, 0.12, 0.04, 0.03, 0.02 and 0.01 sampled at
# temperature 1 (docs/eval.md): with these shares about 0.26 and 0.07. Level 5 waits for larger models.
DEFAULT_LEVELS: Mapping[int, float] = {1: 4, 2: 2, 3: 1, 4: 1}
DEFAULT_TRAIN_SIZE = 8192
DEFAULT_VAL_SIZE = 128
# The share of all calculations that training never sees.
_HELD_OUT = 0.25
_MOST = 1_000_000  # rows: beyond that it is a slip of the keyboard
# Part of the data folder's hash: raise it when the same options give other rows.
_FORMAT_VERSION = 1

Tree = str | tuple  # a number's letter, or (operation, tree, tree)


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Args:
        level: how hard, 1 to 5.
        story: which stories of a language tell it.
        tree: what they ask for, e.g. ``("-", ("*", "a", "b"), "c")``.
        numbers: the values of each letter. Only those are drawn where every step of the tree is a positive integer.
    """

    level: int
    story: str
    tree: Tree
    numbers: Mapping[str, Sequence[int]]


_DIGIT, _SMALL, _FEW, _TEENS, _TENS = range(2, 10), range(2, 8), range(2, 6), range(2, 16), range(10, 60)
_TWO_STEPS = {"a": range(3, 13), "b": _SMALL, "c": _SMALL}
_PAYMENT = (20, 30, 50, 100)

KINDS = (
    Kind(1, "sum", ("+", "a", "b"), {"a": _DIGIT, "b": _DIGIT}),
    Kind(1, "difference", ("-", "a", "b"), {"a": _DIGIT, "b": _DIGIT}),
    Kind(2, "sum", ("+", "a", "b"), {"a": _TENS, "b": _TENS}),
    Kind(2, "difference", ("-", "a", "b"), {"a": range(10, 100), "b": range(10, 100)}),
    Kind(2, "product", ("*", "a", "b"), {"a": _DIGIT, "b": _DIGIT}),
    Kind(2, "missing", ("-", "a", "b"), {"a": range(10, 61), "b": range(3, 51)}),
    Kind(3, "more and more", ("+", ("+", "a", "b"), "c"), _TWO_STEPS),
    Kind(3, "more, then less", ("-", ("+", "a", "b"), "c"), _TWO_STEPS),
    Kind(3, "less, then more", ("+", ("-", "a", "b"), "c"), _TWO_STEPS),
    Kind(3, "less and less", ("-", ("-", "a", "b"), "c"), _TWO_STEPS),
    Kind(4, "boxes and more", ("+", ("*", "a", "b"), "c"), {"a": _SMALL, "b": _SMALL, "c": _TEENS}),
    Kind(4, "boxes and less", ("-", ("*", "a", "b"), "c"), {"a": _SMALL, "b": _SMALL, "c": _TEENS}),
    Kind(4, "change", ("-", "c", ("*", "a", "b")), {"a": _SMALL, "b": _SMALL, "c": _PAYMENT}),
    Kind(4, "more than", ("+", "a", ("+", "a", "b")), {"a": range(2, 21), "b": _TEENS}),
    Kind(4, "times as many", ("+", "a", ("*", "a", "b")), {"a": _TEENS, "b": _FEW}),
    Kind(
        5,
        "boxes, more, less",
        ("-", ("+", ("*", "a", "b"), "c"), "d"),
        {"a": _SMALL, "b": _SMALL, "c": _TEENS, "d": _TEENS},
    ),
    Kind(5, "two prices", ("+", ("*", "a", "b"), ("*", "c", "d")), dict.fromkeys("abcd", _SMALL)),
    Kind(
        5,
        "change of two",
        ("-", ("-", "c", ("*", "a", "b")), "d"),
        {"a": _SMALL, "b": _SMALL, "c": _PAYMENT, "d": _TEENS},
    ),
    Kind(
        5,
        "shared",
        ("/", ("-", ("*", "a", "b"), "c"), "d"),
        {"a": _SMALL, "b": _SMALL, "c": _TEENS, "d": _FEW},
    ),
    Kind(
        5,
        "days",
        ("-", ("*", ("+", "a", "b"), "c"), "d"),
        {"a": _SMALL, "b": _SMALL, "c": _SMALL, "d": _TEENS},
    ),
)


@dataclass(frozen=True)
class Problem:
    """A problem: ``text`` is what the model is asked, ``answer`` what it must say, ``numbers`` maps the tree's letters."""

    kind: Kind
    numbers: Mapping[str, int]
    text: str

    @property
    def level(self) -> int:
        return self.kind.level

    @property
    def answer(self) -> int:
        return _value(self.kind.tree, self.numbers)

    @property
    def key(self) -> str:
        """The calculation in canonical form: equal for problems that differ in words or in the order of operands only."""
        return _canonical(self.kind.tree, self.numbers)


def make_problems(
    seed: int = 0,
    *,
    levels: Sequence[int] | Mapping[int, float] | None = None,
    train_size: int = DEFAULT_TRAIN_SIZE,
    val_size: int = DEFAULT_VAL_SIZE,
    language: str = "en",
    instruction: str | None = None,
) -> tuple[list[Problem], list[Problem]]:
    """Distinct training and validation problems, the same for the same arguments on every machine.

    Any beginning of a list has its levels in their shares. A larger size adds problems behind those of a smaller one, and
    which calculations are held out depends on the seed alone.

    Args:
        seed: decides which calculations are held out, and what is drawn.
        levels: level -> share of the problems, e.g. ``{1: 1, 3: 2}``; or a list of levels in equal shares, such as
            ``[2, 3]``. None: :data:`DEFAULT_LEVELS`.
        train_size, val_size: numbers of problems.
        language: of the stories, ``"en"`` or ``"de"``.
        instruction: what is said behind every story; "" for nothing. None: the language's "Answer briefly."

    Returns:
        (training problems, validation problems).

    Raises:
        ValueError: an option is out of its range, or a level has fewer distinct problems than the sizes ask for.
    """
    shares = _validated(seed, levels, train_size, val_size, language, instruction)
    words = LANGUAGES[language]
    instruction = words.instruction if instruction is None else instruction.strip()
    out = []
    for split, size in (("train", train_size), ("val", val_size)):
        turns = _turns(shares, size)
        drawn = {}
        for level in shares:
            rng = random.Random(f"{DATA_SOURCE}/{seed}/{language}/{split}/{level}")
            drawn[level] = iter(_draw(level, turns.count(level), split, seed, words, instruction, rng))
        out.append([next(drawn[level]) for level in turns])
    return out[0], out[1]


def write_parquet(out_dir: str | os.PathLike, seed: int = 0, **options) -> tuple[Path, Path]:
    """Writes :func:`make_problems` as verl's Parquet files, once per set of options.

    The folder's name carries a hash of the problems, so other options never meet old data; see
    :func:`mxfp4_rl.tasks.common.write_once`. Columns as :func:`mxfp4_rl.tasks.arithmetic.write_parquet`; ``data_source`` is
    ``word_problems_level<n>``, and ``extra_info`` also has ``level`` and ``kind``.

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
    identity = [_FORMAT_VERSION, [p.text for p in train], [p.text for p in val]]
    rows = (
        [
            make_row(f"{DATA_SOURCE}_level{p.level}", p.text, p.answer, split, index, level=p.level, kind=p.kind.story)
            for index, p in enumerate(problems)
        ]
        for split, problems in (("train", train), ("val", val))
    )
    return write_once(out_dir, DATA_SOURCE, identity, *rows)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict[str, float]:
    """1 if the last number of the reply is the right one; else 0. verl's custom reward function.

    Replies may calculate: only the last number counts, so a list of guesses is one guess. It must be a number of its own, in
    its usual notation: ``23``, ``= 23``, ``$23``, ``-23``, ``1,234``, ``23.00`` and ``so there are 23 apples left.`` give 23;
    ``20 + 3`` (the operand of a sum that nobody made), ``46/2``, ``23.5``, ``23%``, ``023``, ``23rd`` and ``twenty`` give
    nothing.

    Args:
        data_source, extra_info, kwargs: not used; verl passes them.
        solution_str: the reply's text.
        ground_truth: the right integer, as text or int.

    Returns:
        ``{"score": s, "acc": s}`` with s 1.0 or 0.0. Never raises: a ground truth that is not an integer scores 0.0 and
        is logged once.
    """
    truth = _last_integer(str(ground_truth))
    if truth is None:
        _warn_once(str(ground_truth)[:80])
    reply = _last_integer(solution_str) if isinstance(solution_str, str) else None
    score = float(truth is not None and reply == truth)
    return {"score": score, "acc": score}


# Runs of what may belong to one number; a fraction, a percentage, an ordinal is one that is no integer.
_RUN = re.compile(r"[\w.,/%^\u00b0]+")
_INTEGER = re.compile(rf"({NUMERAL})(?:\.0+)?")
# What makes the number behind it an operand: "20 + ", "4*", "8:", "5 apples - "; but not "= -", and not a line's dash.
_WORD_OPERATOR = r"\\?(?:times|cdot|div)|plus|minus|x"
_OPERATOR = re.compile(
    rf"(?:[\d)\]}}]\s*(?:{_WORD_OPERATOR}|[-+*/\u00d7\u00b7\u00f7^])\s*"
    rf"|[^\s=:][ \t]+(?:{_WORD_OPERATOR}|[-+*/\u00d7\u00b7\u00f7])\s+|\d:)[$({{\[]*$"
)
_SIGN = re.compile(r"(?:^|[\s=:(\[{*_`'\"$])([-+])\$?$")


def _last_integer(text: str) -> str | None:
    """The last number of a text, canonical ("-7", "1234"), or None if there is none or it is no integer."""
    text = CONTROL_TOKEN.sub(" ", text).replace("\u2212", "-").replace("**", " ")
    last = None
    for run in _RUN.finditer(text):
        if any(map(str.isdigit, run[0])):
            last = run
    if last is None:
        return None
    match = _INTEGER.fullmatch(last[0].strip("_").rstrip(".,"))
    before = text[max(0, last.start() - 40) : last.start()]
    if match is None or _OPERATOR.search(before):
        return None
    digits = match[1].replace(",", "")  # compared as text: int() refuses very long ones
    sign = _SIGN.search(before)
    return f"-{digits}" if sign is not None and sign[1] == "-" and digits != "0" else digits


@lru_cache(maxsize=8)
def _warn_once(ground_truth: str) -> None:
    logger.warning("ground truth %r is no integer, its rows always score 0: is this data of word_problems?", ground_truth)


def _draw(level: int, size: int, split: str, seed: int, words, instruction: str, rng: random.Random) -> list[Problem]:
    """``size`` problems of one level that belong to ``split``, no two with the same text."""
    kinds = [kind for kind in KINDS if kind.level == level]
    out: dict[str, Problem] = {}
    tries = 0
    while len(out) < size:
        tries += 1
        if tries > 2000 + 200 * size:
            raise ValueError(
                f"level {level} has no {size} distinct problems for {split} (found {len(out)}): lower {split}_size, or give "
                "levels more of the others."
            )
        kind = rng.choice(kinds)
        numbers = {letter: rng.choice(values) for letter, values in kind.numbers.items()}
        if _value(kind.tree, numbers) is None or _is_held_out(_canonical(kind.tree, numbers), seed) != (split == "val"):
            continue
        name, other = rng.sample(words.names, 2)
        things, others = rng.sample(words.things, 2)
        fields = {"name": name, "other": other, "things": things, "others": others, "boxes": rng.choice(words.boxes)}
        text = f"{rng.choice(words.stories[kind.story]).format(**fields, **numbers)} {instruction}".strip()
        out.setdefault(text, Problem(kind, numbers, text))
    return list(out.values())


def _turns(shares: Mapping[int, float], size: int) -> list[int]:
    """The level of each of ``size`` problems: always the one that is furthest behind its share."""
    total = sum(shares.values())
    given = dict.fromkeys(shares, 0)
    out = []
    for i in range(1, size + 1):
        level = max(shares, key=lambda level: shares[level] / total * i - given[level])
        given[level] += 1
        out.append(level)
    return out


@lru_cache(maxsize=1 << 16)
def _is_held_out(key: str, seed: int) -> bool:
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < _HELD_OUT * 2**64


def _value(tree: Tree, numbers: Mapping[str, int]) -> int | None:
    """What a tree comes to; None where a step of it is no positive integer."""
    if isinstance(tree, str):
        return numbers[tree]
    op, left, right = tree[0], _value(tree[1], numbers), _value(tree[2], numbers)
    if left is None or right is None:
        return None
    if op == "/":
        return left // right if left % right == 0 else None
    value = {"+": left + right, "-": left - right, "*": left * right}[op]
    return value if value > 0 else None


def _canonical(tree: Tree, numbers: Mapping[str, int]) -> str:
    """Sums as their sorted signed terms, products as their sorted factors."""
    if isinstance(tree, str):
        return str(numbers[tree])
    if tree[0] in "+-":
        return f"({' '.join(sorted(_terms(tree, numbers, '+')))})"
    parts = [_canonical(part, numbers) for part in tree[1:]]
    return "*".join(sorted(parts)) if tree[0] == "*" else "/".join(parts)


def _terms(tree: Tree, numbers: Mapping[str, int], sign: str) -> list[str]:
    if isinstance(tree, str) or tree[0] not in "+-":
        return [sign + _canonical(tree, numbers)]
    other = sign if tree[0] == "+" else {"+": "-", "-": "+"}[sign]
    return _terms(tree[1], numbers, sign) + _terms(tree[2], numbers, other)


def _validated(seed, levels, train_size, val_size, language, instruction) -> dict[int, float]:
    if not is_int(seed):
        raise ValueError(f"seed={seed!r} is not an integer: give one, e.g. seed=0.")
    for name, value in (("train_size", train_size), ("val_size", val_size)):
        if not is_int(value) or not 1 <= value <= _MOST:
            raise ValueError(f"{name}={value!r} is not an integer from 1 to {_MOST}.")
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r}: give one of {sorted(LANGUAGES)}.")
    if instruction is not None and (not isinstance(instruction, str) or re.search(r"\d", instruction)):
        raise ValueError(f"instruction={instruction!r}: give a text without digits, '' for none, or null for the language's.")
    wrong = ValueError(
        f"levels={levels!r}: give a list out of {list(LEVELS)}, each once, or a mapping of levels to positive shares."
    )
    shares = DEFAULT_LEVELS if levels is None else levels
    if not isinstance(shares, Mapping):
        if isinstance(shares, str) or not isinstance(shares, Sequence) or len({*map(str, shares)}) != len(shares):
            raise wrong
        try:
            shares = dict.fromkeys(shares, 1)
        except TypeError:
            raise wrong from None
    if not shares or any(not is_int(level) or level not in LEVELS for level in shares):
        raise wrong
    if any(isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1e9 for share in shares.values()):
        raise wrong
    return {level: float(shares[level]) for level in sorted(shares)}
