"""Do trainer and rollout send the same tokens to the same experts? The chosen experts of two forwards, compared.

A router sees hidden states that are rounded to 4 bits layer after layer. Where two experts' scores lie close, another kernel's
last bit, or noise on the norms, chooses another expert, and the token's output changes by much more than rounding does. So two
numbers, on the same tokens:

    router_agreement  = share of (token, layer) whose sets of chosen experts are equal
    router_overlap    = mean over (token, layer) of |A & B| / k

Choices are read where they arrive, at a family's experts in fused tensors (quantised or not).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Cache

from mxfp4_rl.nn import MXFP4Experts
from mxfp4_rl.nn.experts import PROJECTIONS

Choices = dict[str, list[torch.Tensor]]


def routed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts of a model, by name: those that are called with the router's choice."""
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, MXFP4Experts) or (hasattr(m, "_apply_gate") and all(hasattr(m, own) for own in PROJECTIONS))
    }


@contextmanager
def recorded(model: nn.Module) -> Iterator[Choices]:
    """Yields module name -> the chosen experts (tokens, k) of each forward while this is open."""
    choices: Choices = defaultdict(list)

    def keep(name):
        def hook(module, args, kwargs):
            index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            choices[name].append(index.detach().clone())

        return hook

    hooks = [m.register_forward_pre_hook(keep(name), with_kwargs=True) for name, m in routed_modules(model).items()]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def choices_of(
    model: nn.Module,
    sequences: list[list[int]],
    pad_id: int,
    cached_from: list[int] | None = None,
    cache: Callable[[torch.Tensor], Cache] | None = None,
) -> torch.Tensor:
    """Chosen experts of every token of the sequences but their last, int64 (tokens, layers, k), sequence after sequence.

    Args:
        model: a causal LM in eval mode. sequences: token ids.
        cached_from: where each sequence's response begins. Prompts are then read at once and the rest token by token with a
            KV cache, as a rollout does it; None reads whole sequences, as a trainer does.
        cache: makes that cache, as in `generation.generate`.
    """
    device = next(model.parameters()).device
    heads = [len(s) - 1 for s in sequences] if cached_from is None else cached_from
    width, tail = max(heads), max(len(s) - 1 - head for s, head in zip(sequences, heads))
    ids = torch.full((len(sequences), width + tail), pad_id, device=device)
    seen = torch.zeros_like(ids)
    for row, (s, head) in enumerate(zip(sequences, heads)):  # prompts end in one column, responses begin in the next
        ids[row, width - head : width + len(s) - 1 - head] = torch.tensor(s[:-1], device=device)
        seen[row, width - head : width + len(s) - 1 - head] = 1
    if cached_from is None:  # a trainer's padding is on the right
        order = seen.argsort(dim=1, descending=True, stable=True)
        ids, seen = ids.gather(1, order), seen.gather(1, order)
    place = (seen.cumsum(-1) - 1).clamp(min=0)
    with recorded(model) as choices:
        if not (cached := cached_from is not None):
            # The whole model, of whose logits one is made: FSDP takes what is called first for its root.
            model(input_ids=ids, attention_mask=seen, position_ids=place, use_cache=False, logits_to_keep=1)
        else:
            held = cache and cache(seen[:, :width])
            for first, last in [(0, width), *((c, c + 1) for c in range(width, width + tail))]:
                mask = seen[:, :last].clone()
                mask[:, width:last] = 1  # sequences that have ended go on with padding, whose choices are dropped
                out = model(
                    input_ids=ids[:, first:last], attention_mask=mask, use_cache=True, past_key_values=held, logits_to_keep=1,
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, first:last],
                )  # fmt: skip
                held = out.past_key_values
    rows = len(sequences)
    layers = [torch.cat([one.reshape(rows, -1, one.shape[-1]) for one in parts], 1) for parts in choices.values()]
    if not layers:
        return torch.empty(int(seen.sum()), 0, 0, dtype=torch.long, device=device)
    assert not cached or layers[0].shape[1] == seen.shape[1]
    return torch.stack([layer[seen.bool()] for layer in layers], 1)


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """The two numbers of two `choices_of` the same tokens; {} where nothing was routed.

    Raises:
        ValueError: they are of other tokens, layers or numbers of experts.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"choices of {tuple(ours.shape)} and {tuple(theirs.shape)} (tokens, layers, experts) do not compare")
    if not ours.numel():
        return {}
    shared = (ours.unsqueeze(-1) == theirs.to(ours.device).unsqueeze(-2)).any(-1).double().mean(-1)
    return {"router_agreement": (shared == 1).double().mean().item(), "router_overlap": shared.mean().item()}
