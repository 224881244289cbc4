"""Replies to questions, their scores, and what the scores amount to.

Every sample has a seed of its own, made from (seed, question, how many-th), so that neither the batch size nor the order
changes what is drawn. Samples of one question are not independent, so an accuracy's interval counts questions.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mxfp4_rl.generation import Sampling, generate

Z90 = 1.6448536269514722  # of a standard normal, 90 % within +-


@dataclass(frozen=True)
class Question:
    """One row: `prompt` are its token ids; the rest is what the reward function gets."""

    prompt: list[int]
    data_source: str
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """How replies are drawn.

    Args:
        samples: replies to a question. sampling: temperature 0 is greedy. max_new_tokens: where a reply is cut.
        batch: replies at a time. seed: of all of them.
    """

    samples: int
    sampling: Sampling
    max_new_tokens: int
    batch: int
    seed: int = 0


@dataclass
class Measured:
    """What one model answered.

    Attributes:
        scores: of each question, one a sample. replies: likewise, their texts.
        tokens: of all replies. ended: replies that ended by themselves. seconds: of generation.
    """

    scores: list[list[float]]
    replies: list[list[str]]
    tokens: int
    ended: int
    seconds: float


def wilson(rate: float, n: int, z: float = Z90) -> tuple[float, float] | None:
    """Wilson's interval of a rate among n independent trials; None where there is none (n = 0, or no rate)."""
    if n < 1 or not 0 <= rate <= 1:
        return None
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def answer(
    model: torch.nn.Module,
    tokenizer,
    questions: Sequence[Question],
    reward: Callable[[Question, str], float],
    draw: Draw,
    stop_ids: set[int],
    advance: Callable[[int], None] = lambda replies: None,
) -> Measured:
    """Draw replies to all questions and score them.

    Args:
        model: a causal LM in eval mode. tokenizer: its own.
        reward: the score of a reply's text, without special tokens, as verl gives it to a reward function.
        stop_ids: what ends a reply.
        advance: told of so many more replies, after each batch.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # The longest first: a batch that does not fit fails at once, and neighbours need little padding.
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    wanted = [(i, k) for i in order for k in range(draw.samples)]
    out = Measured([[0.0] * draw.samples for _ in questions], [[""] * draw.samples for _ in questions], 0, 0, 0.0)
    for start in range(0, len(wanted), draw.batch):
        part = wanted[start : start + draw.batch]
        began = time.perf_counter()
        drawn = generate(
            model,
            [questions[i].prompt for i, _ in part],
            [draw.max_new_tokens] * len(part),
            [_seed(draw.seed, i, k) for i, k in part],
            draw.sampling,
            stop_ids,
            pad,
        )
        out.seconds += time.perf_counter() - began
        for (i, k), (tokens, _) in zip(part, drawn, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            out.replies[i][k], out.scores[i][k] = text, reward(questions[i], text)
            out.tokens += len(tokens)
            out.ended += tokens[-1] in stop_ids
        advance(len(part))
    return out


def summary(questions: Sequence[Question], measured: Measured) -> dict[str, Any]:
    """Plain numbers: of all questions, and under "by_source" of each data source.

    accuracy: mean score. interval: 90 %, of the accuracy (None for scores outside [0, 1]). solved_once: questions with a
    score above 0 in at least one sample. tokens: mean length of a reply. ended: replies that ended by themselves, as a share.
    """
    replies = sum(map(len, measured.scores))
    sources: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        sources.setdefault(question.data_source, []).append(i)
    return {
        **_pool(measured.scores),
        "replies": replies,
        "mean_tokens": measured.tokens / replies,
        "ended": measured.ended / replies,
        "tokens": measured.tokens,
        "seconds": round(measured.seconds, 3),
        "tokens_per_second": measured.tokens / measured.seconds if measured.seconds else None,
        "by_source": {name: _pool([measured.scores[i] for i in rows]) for name, rows in sorted(sources.items())},
    }


def _pool(scores: list[list[float]]) -> dict[str, Any]:
    mean = sum(map(sum, scores)) / sum(map(len, scores))
    inside = all(0 <= score <= 1 for of_question in scores for score in of_question)
    return {
        "questions": len(scores),
        "accuracy": mean,
        "interval": wilson(mean, len(scores)) if inside else None,
        "solved_once": sum(max(of_question) > 0 for of_question in scores) / len(scores),
    }


def _seed(seed: int, question: int, sample: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{question}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
