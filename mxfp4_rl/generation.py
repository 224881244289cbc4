"""Sampling from a transformers model, for a batch of prompts at once.

Two properties that `generate()` of transformers does not give and a GRPO rollout wants: equal prompts (the n samples of a
group) share one prefill, and a sample depends only on its own key, not on who else is in the batch: each token is the
distribution function's inverse at one uniform number, from a generator seeded by the request's key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k <= 0 and top_p = 1 switch the truncation off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1

    def warper(self) -> LogitsProcessorList:
        """What turns logits into those of the distribution that is sampled, in transformers' order."""
        warpers = LogitsProcessorList()
        if self.temperature not in (0.0, 1.0):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


@torch.no_grad()  # not inference_mode: its tensors have no version, and shared inputs would be quantised again
def generate(
    model: torch.nn.Module,
    prompts: list[list[int]],
    max_new_tokens: list[int],
    seeds: list[int],
    sampling: Sampling,
    stop_ids: set[int],
    pad_id: int,
    cache: Callable[[torch.Tensor], Cache] | None = None,
) -> list[tuple[list[int], list[float]]]:
    """Sample one response for every prompt.

    Args:
        model: a causal LM of transformers in eval mode.
        prompts: token ids; equal prompts are prefilled once.
        max_new_tokens, seeds: one for every prompt.
        stop_ids: a response ends with the first of these, which is part of it.
        cache: makes the KV cache from the prompts' attention mask (rows, columns); None is the model's own.

    Returns:
        For every prompt the new token ids and their log-probabilities under the sampled distribution (after temperature and
        truncation; what verl calls processed log-probs).
    """
    device = next(model.parameters()).device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    row = torch.tensor([unique.index(tuple(p)) for p in prompts], device=device)
    width = max(map(len, unique))
    ids = torch.full((len(unique), width), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(unique):  # left padding: every prompt ends in the last column
        ids[i, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[i, width - len(prompt) :] = 1

    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_(min=0),
        past_key_values=cache and cache(mask),
        use_cache=True,
        logits_to_keep=1,
    )
    held = out.past_key_values
    held.batch_select_indices(row)
    logits, mask, ids = out.logits[row, -1], mask[row], ids[row]

    warper = sampling.warper()
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    tokens: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the requests still in the batch, in its order
    while True:
        logp = warper(ids, logits.float()).log_softmax(-1)
        if sampling.temperature == 0:
            choice = logp.argmax(-1)
        else:
            choice = _draw(logp, torch.cat([torch.rand(1, generator=draws[i]) for i in active]))
        chosen = logp.gather(-1, choice.unsqueeze(-1)).squeeze(-1).tolist()
        if not all(map(math.isfinite, chosen)):
            raise FloatingPointError("the rollout's logits are not finite: weights or activations hold NaN or Inf")
        going = []
        for position, (i, token) in enumerate(zip(active, choice.tolist(), strict=True)):
            tokens[i].append(token)
            log_probs[i].append(chosen[position])
            if token not in stop_ids and len(tokens[i]) < max_new_tokens[i]:
                going.append(position)
        if not going:
            return list(zip(tokens, log_probs, strict=True))
        if len(going) < len(active):  # finished requests leave the batch
            keep = torch.tensor(going, device=device)
            held.batch_select_indices(keep)
            choice, mask, ids = choice[keep], mask[keep], ids[keep]
            active = [active[p] for p in going]
        ids = torch.cat((ids, choice.unsqueeze(-1)), dim=-1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=-1)
        out = model(
            input_ids=ids[:, -1:],
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=held,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1]


def _draw(logp: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token of every row [rows, vocabulary] whose share of [0, 1) holds the row's uniform number (float32)."""
    cumulative = logp.double().exp().cumsum(-1)
    # A float32 below 1 stays below 1 in float64: the target lies under the last sum, so the token's probability is not 0.
    target = uniform.to(logp.device).double().unsqueeze(-1) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return found.clamp_(max=logp.shape[-1] - 1)  # beyond the end only where a logit is NaN, which the caller refuses
