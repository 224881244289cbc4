"""Attention of one query a sequence to its packed keys and values: the definition of `decode.attend`.

    out = sum_t softmax_t(scale * q . k_t) v_t,    over sinks, packed blocks dequantised, and the open block

in float64. Query head i reads the keys and values of head i // (Hq / H) (grouped queries).
"""

from __future__ import annotations

import torch

from mxfp4_rl.kv_cache.blocks import Stored, unpack


def attend(q: torch.Tensor, held: Stored, scale: float) -> torch.Tensor:
    """q (R, Hq, D), any floating type -> float64 (R, Hq, D). Every sequence holds at least one token."""
    keys = unpack(held.keys, held.recipe, torch.float64).flatten(2, 3)
    values = unpack(held.values, held.recipe, torch.float64).transpose(-1, -2).flatten(2, 3)
    sinks, heads, block = held.sink_keys.shape[2], keys.shape[1], held.open_keys.shape[2]
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for r, (length, count) in enumerate(zip(held.lengths.tolist(), held.packed.tolist(), strict=True)):
        parts = min(length, sinks), count * block, max(length - sinks, 0) - count * block

        def whole(sink, packed, is_open, parts=parts, r=r):
            cut = [t[r, :, :n].double() for t, n in zip((sink, packed, is_open), parts, strict=True)]
            return torch.cat(cut, 1)  # (H, length, D)

        k, v = whole(held.sink_keys, keys, held.open_keys), whole(held.sink_values, values, held.open_values)
        grouped = q[r].double().unflatten(0, (heads, -1))  # (H, G, D)
        weights = (scale * grouped @ k.mT).softmax(-1)
        out[r] = (weights @ v).flatten(0, 1)
    return out
