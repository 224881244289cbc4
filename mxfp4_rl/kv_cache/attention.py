"""Attention over a quantised cache, as transformers calls it: `model.set_attn_implementation(ATTENTION)`.

With R an orthogonal matrix over the channels of a head, (R q) . (R k) = q . k: the cache keeps R k, and the queries are rotated
here, after RoPE and before the product. R is the randomised Hadamard transform of `quant.hadamard`, the whole head at once.

The function is registered with transformers' AttentionInterface. Calls without a quantised cache are plain `sdpa`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mxfp4_rl.kv_cache.blocks import Stored
from mxfp4_rl.quant.hadamard import rotate

if TYPE_CHECKING:
    from mxfp4_rl.kv_cache.cache import QuantizedLayer
    from mxfp4_rl.kv_cache.layout import Step
    from mxfp4_rl.kv_cache.recipe import KVCacheRecipe

ATTENTION = "mxfp4_kv"
_UNSUPPORTED = ("s_aux", "softcap", "sliding_window")  # what some models give to attention beside a scale


@dataclass
class View:
    """What one call sees of a layer's cache: it takes the place of keys and values between the cache and `attention`.

    Attributes:
        layer, step: the stored form, and where its tokens are.
        keys, values: (R, H, columns, D) in the model's dtype, or None where the stored form is what is read.
    """

    layer: QuantizedLayer
    step: Step
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def __getattr__(self, name: str):  # what a view lacks, a tensor may have
        raise AttributeError(
            f"a 4-bit KV cache gives attention a view, not a tensor with {name!r}: this model works on its keys after the "
            "cache, so keep it in BF16 (mxfp4.kv_cache=null)"
        )

    def stored(self) -> Stored:
        """The packed form, for a call of one token."""
        layer, step = self.layer, self.step
        keys, values = layer.packed
        return Stored(keys, values, *layer.sinks, *layer.open, step.lengths, step.packed, layer.recipe.quant)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """R x over the last axis, (..., D) with D a power of two; computed in float32, then cast back."""
    return (x.float() @ _matrix(x.shape[-1], x.device)).to(x.dtype)


@functools.cache
def _matrix(width: int, device: torch.device) -> torch.Tensor:
    # Of so few channels one product is faster on a GPU than the butterflies, each of which is several launches.
    return rotate(torch.eye(width, device=device), width)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | View,
    value: torch.Tensor | View,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of `query` (R, Hq, T, D) to what the cache holds: (R, T, Hq, D), as transformers' own functions return it.

    One new token on a GPU is read from the packed form by the Triton kernel; all else is `sdpa` of dequantised keys and values.

    Raises:
        ValueError: the mask hides tokens that the cache holds, or the model asks for what is not there.
    """
    if not isinstance(key, View):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(asked)}: attention over a 4-bit cache has no such thing")
    view = key
    if view.layer.recipe.transform:
        query = rotated(query)
    if view.keys is None:
        if query.is_cuda and why_no_kernel(view.layer.recipe, query.shape[-1]) is None:
            from mxfp4_kernels.attention.decode import attend

            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return attend(query.squeeze(2), view.stored(), scale).unsqueeze(1), None
        view.keys, view.values = view.layer.materialized(view.step)
    elif view.step.after.later == 0 and getattr(module, "layer_idx", 0) == 0:
        _check_mask(attention_mask, view)
    return sdpa_attention_forward(
        module, query, view.keys, view.values, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


def _check_mask(mask: torch.Tensor | None, view: View) -> None:
    """The first call's mask has to show just the tokens that the cache took: later calls go by the cache's own account."""
    held = view.step.after.lengths
    shown = mask[:, 0, -1].sum(-1).cpu() if mask is not None else torch.full_like(held, view.keys.shape[2])
    if not torch.equal(shown, held):
        raise ValueError(
            f"the attention mask shows {shown.tolist()} tokens and the cache holds {held.tolist()}: give QuantizedCache the "
            "attention_mask of the first call"
        )


def why_no_kernel(recipe: KVCacheRecipe, head_dim: int) -> str | None:
    """Why single tokens are read from dequantised tensors on a GPU too; None if the Triton kernel reads the packed form."""
    if head_dim & (head_dim - 1) or not 32 <= head_dim <= 256:
        return f"heads have {head_dim} channels, and the kernel takes 32, 64, 128 or 256"
    if recipe.block & (recipe.block - 1):
        return f"blocks have {recipe.block} tokens, and the kernel takes powers of two"
    return None


def path(recipe: KVCacheRecipe, head_dim: int, device: torch.device) -> str:
    """What reads the cache for a single token, for logs."""
    if device.type != "cuda":
        return f"dequantised for every token on {device.type}"
    why = why_no_kernel(recipe, head_dim)
    return f"dequantised for every token ({why})" if why else "read packed by the Triton kernel"


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
