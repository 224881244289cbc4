"""Log-probs of labels without flash-attn, in place of verl's fallback.

verl takes flash-attn's cross entropy if it is installed. Without it, it calls log_softmax once for every token, in the logits'
dtype: on a GPU 30,000 tokens are that many launches, forward and backward, 60 % of a step of a small model, and BF16 rounds
log-probs to 8 bits. Here rows are taken many at a time, in float32, and nothing of the logits' size is kept but the logits.
"""

from __future__ import annotations

import os

import torch
from verl.utils import torch_functional
from verl.workers.engine.fsdp import transformer_impl

CHUNK_ELEMENTS = 1 << 26  # of float32 at once: 256 MiB


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        normaliser = torch.cat([rows.float().logsumexp(-1) for rows in _chunks(logits)])
        ctx.save_for_backward(logits, labels, normaliser)
        return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float() - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels, normaliser = ctx.saved_tensors
        out, start = torch.empty_like(logits), 0
        for rows in _chunks(logits):
            part = slice(start, start := start + len(rows))
            g = grad[part].float().unsqueeze(-1)
            p = rows.float().sub_(normaliser[part].unsqueeze(-1)).exp_()
            out[part] = p.mul_(-g).scatter_add_(-1, labels[part].unsqueeze(-1), g)
        return out, None


def _chunks(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return logits.split(max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1])))


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[label], float32 (float64 logits are computed in float32 too).

    Args:
        logits: [..., vocabulary], floating point. labels: int64 [...].
    """
    flat = _LabelLogProbs.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return flat.view(labels.shape)


def install() -> None:
    """Make verl's FSDP engine call `label_log_probs` wherever verl would take its loop."""
    verls = torch_functional.logprobs_from_logits

    def logprobs_from_logits(logits, labels, inplace_backward=True):
        flash = torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE  # verl's spelling
        flash = flash and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
        if flash or torch_functional.NPU_CROSS_ENTROPY_LOSS_AVAILABLE:
            return verls(logits, labels, inplace_backward)
        return label_log_probs(logits, labels)

    transformer_impl.logprobs_from_logits = logprobs_from_logits
