"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens.

The text is tokenised once and read in windows of `context` tokens that begin every `stride` tokens. Each window scores the
tokens that no window before it did, so each token but the text's first is scored once, with context - stride tokens before it
at least (the first window aside). With stride = context windows do not overlap, and the first token of each is not scored:
cheaper, and worse for every model.

Two models on one text are compared token by token: texts differ far more than rules do, and that cancels in the difference. Its
standard error takes stretches of 64 tokens as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mxfp4_rl.ptq.outputs import keeping_logits

_STRETCH = 64
_ROWS = 256  # of logits that are float32 at a time


@dataclass(frozen=True)
class Window:
    """Tokens start to stop - 1 are read, the last `scored` of them are scored."""

    start: int
    stop: int
    scored: int


def windows_of(tokens: int, context: int, stride: int) -> list[Window]:
    """The windows over a text of so many tokens.

    Raises:
        ValueError: fewer than two tokens, or not 1 <= stride <= context, or a context below 2.
    """
    if tokens < 2 or context < 2 or not 1 <= stride <= context:
        raise ValueError(f"{tokens} tokens, context {context}, stride {stride}: give 2 tokens, and 1 <= stride <= context")
    windows, done = [], 1  # nothing predicts the first token
    for start in range(0, tokens, stride):
        stop = min(start + context, tokens)
        if stop > done:
            # With stride = context, a window's first token has nothing before it to be predicted from.
            windows.append(Window(start, stop, min(stop - done, stop - start - 1)))
            done = stop
    return [w for w in windows if w.scored]


@torch.no_grad()
def token_losses(
    model: nn.Module, ids: torch.Tensor, windows: list[Window], advance: Callable[[int], None] = lambda tokens: None
) -> torch.Tensor:
    """Negative log-likelihood of every scored token, float32 (tokens,), in the order of the text.

    Args:
        model: a causal LM in eval mode. ids: of the text, int64 (tokens,), on the model's device.
        advance: told of so many more tokens read, after each window.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    out = []
    for w in windows:
        part = ids[w.start : w.stop]
        logits = model(input_ids=part.unsqueeze(0), use_cache=False, **keeping_logits(model, w.scored + 1)).logits[0]
        logits, wanted = logits[-w.scored - 1 : -1], part[-w.scored :]
        for rows, targets in zip(logits.split(_ROWS), wanted.split(_ROWS), strict=True):
            out.append(nn.functional.cross_entropy(rows.float(), targets, reduction="none"))
        if not out[-1].isfinite().all():
            raise FloatingPointError(f"the model's logits are not finite in tokens {w.start} to {w.stop - 1} of the text")
        advance(len(part))
    return torch.cat(out).cpu()


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean, in float64."""
    return math.exp(losses.double().mean().item())


def difference(losses: torch.Tensor, base: torch.Tensor) -> tuple[float, float | None]:
    """Mean of losses - base, in nats a token, and its standard error; None for a text too short to tell."""
    change = (losses - base).double()
    stretches = [part.mean().item() for part in change.split(_STRETCH) if len(part) == _STRETCH]
    if len(stretches) < 2:
        return change.mean().item(), None
    return change.mean().item(), torch.tensor(stretches).std().item() / math.sqrt(len(stretches))
