"""`QuantizedCache`: transformers' cache with complete blocks of tokens packed.

A layer holds four things of R sequences, H heads of D channels: the packed blocks of keys and values (`blocks.py`), the sinks
(R, H, S, D) and the open block (R, H, B, D), both in the model's dtype. `layout.py` says which token is where. What attention
reads in a call is in `View`: for one new token the stored form itself, which a kernel can read; for several, plain tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mxfp4_rl.kv_cache.attention import ATTENTION, View, rotated
from mxfp4_rl.kv_cache.blocks import Blocks, pack, unpack
from mxfp4_rl.kv_cache.layout import Layout, Step
from mxfp4_rl.kv_cache.recipe import KVCacheRecipe
from mxfp4_rl.recipe import RecipeError


class QuantizedLayer(CacheLayerMixin):
    """One layer's keys and values. Made by `QuantizedCache`."""

    is_sliding = False

    def __init__(self, recipe: KVCacheRecipe, views: bool):
        super().__init__()
        self.recipe, self.views = recipe, views
        self.layout: Layout | None = None
        self.packed: tuple[Blocks, Blocks]
        self.sinks: tuple[torch.Tensor, torch.Tensor]
        self.open: tuple[torch.Tensor, torch.Tensor]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, width = key_states.shape
        if value_states.shape[-1] != width:
            raise RecipeError(
                f"kv_cache: keys have {width} channels and values {value_states.shape[-1]}: there is no cache for that"
            )
        self.recipe.check_heads(width)
        self.dtype, self.device = key_states.dtype, key_states.device
        block, quant = self.recipe.block, self.recipe.quant
        self.packed = (
            Blocks.empty((rows, heads, 0), block, width, quant, self.device),
            Blocks.empty((rows, heads, 0), width, block, quant, self.device),
        )
        self.sinks = tuple(key_states.new_zeros(rows, heads, self.recipe.sink, width) for _ in range(2))
        self.open = tuple(key_states.new_zeros(rows, heads, block, width) for _ in range(2))
        self.is_initialized = True

    @torch.no_grad()
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, mask: torch.Tensor | None = None):
        """Take new tokens, (R, H, T, D); return what attention reads.

        `mask`: (R, T), false for padding; for the first call only. Returns a `View`, twice, or keys and values
        (R, H, columns, D).
        """
        if self.recipe.transform:
            key_states = rotated(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        count, first = key_states.shape[-2], not self.layout.columns
        step = self.layout.append(count, mask, self.device)
        self.layout = step.after
        if step.flush:
            rows, numbers = step.flush
            self._pack(rows, numbers, [t[rows] for t in self.open])
        if step.to_sink:
            rows, places, columns = step.to_sink
            for sinks, tokens in zip(self.sinks, new, strict=True):
                sinks[rows, :, places] = tokens[rows, :, columns]
        stage = self.open
        if step.stage > 1:
            more = (step.stage - 1) * self.recipe.block
            stage = tuple(torch.cat((t, t.new_zeros(*t.shape[:2], more, t.shape[3])), dim=2) for t in self.open)
        if step.to_open:
            rows, places, columns = step.to_open
            for tokens, held in zip(new, stage, strict=True):
                held[rows, :, places] = tokens[rows, :, columns]

        if first:  # the prompt's tokens see each other as they came
            seen = new
        elif count > 1 or not self.views:
            seen = self.materialized(step, stage)
        else:
            seen = None
        if step.stage > 1:
            in_blocks = [t.unflatten(2, (step.stage, self.recipe.block)) for t in stage]
            if step.full:
                rows, places, numbers = step.full
                self._pack(rows, numbers, [t[rows, :, places] for t in in_blocks])
            every = torch.arange(key_states.shape[0], device=self.device)
            self.open = tuple(t[every, :, step.last] for t in in_blocks)
        if not self.views:
            return seen
        view = View(self, step, *(seen or (None, None)))
        return view, view

    def _pack(self, rows: torch.Tensor, numbers: torch.Tensor, tokens: list[torch.Tensor]) -> None:
        """Pack blocks of tokens, keys and values (P, H, B, D) each, as blocks `numbers` of `rows`."""
        count = int(self.layout.packed.max())
        self.packed = tuple(blocks.grown(count) for blocks in self.packed)
        keys, values = tokens
        for blocks, x in zip(self.packed, (keys, values.transpose(-1, -2)), strict=True):
            blocks.put(rows, numbers, pack(x, self.recipe.quant))

    def materialized(self, step: Step, stage: tuple[torch.Tensor, torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """Keys and values that the call of `step` sees, (R, H, columns, D) in the model's dtype."""
        out = []
        for i, (sinks, blocks, held) in enumerate(zip(self.sinks, self.packed, stage or self.open, strict=True)):
            blocks = blocks.map(lambda t: t[:, :, : step.blocks_before])
            x = unpack(blocks, self.recipe.quant, self.dtype)
            x = (x.transpose(-1, -2) if i else x).flatten(2, 3)
            whole, index = torch.cat((sinks, x, held), dim=2), step.index()
            if index.ndim == 1:
                out.append(whole.index_select(2, index))
            else:
                out.append(whole.gather(2, index[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])))
        return tuple(out)

    def select(self, rows: torch.Tensor, layout: Layout) -> None:
        """Keep these sequences, whose layout is `layout`."""
        self.layout = layout
        self.packed = tuple(blocks.map(lambda t: t[rows]) for blocks in self.packed)
        self.sinks, self.open = (tuple(t[rows] for t in pair) for pair in (self.sinks, self.open))

    def get_seq_length(self) -> int:
        """Columns so far, padding included: what masks and positions are counted in."""
        return self.layout.columns if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized, self.layout = False, None


@dataclass(frozen=True)
class Memory:
    """Bytes of a cache, and of the same tokens in BF16.

    Attributes:
        packed: codes and scales of complete blocks. sinks, open: what is held as it came. All with the room that is not filled:
            short sequences have as many blocks as the longest of the batch.
        values: numbers that the packed blocks stand for. tokens: of all sequences. bf16: of those tokens' keys and values.
        bits_per_value: of the complete blocks, scales included; None where there is none yet.
    """

    packed: int
    sinks: int
    open: int
    values: int
    tokens: int
    bf16: int

    @property
    def total(self) -> int:
        return self.packed + self.sinks + self.open

    @property
    def bits_per_value(self) -> float | None:
        return 8 * self.packed / self.values if self.values else None


class QuantizedCache(Cache):
    """What a transformers model takes as `past_key_values`; grows as `DynamicCache` does.

    Args:
        config: the model's. Where its attention implementation is `ATTENTION` (`model.set_attn_implementation(ATTENTION)`), a
            single new token reads the packed form; any other one gets tensors, dequantised in every call, and cannot transform.
        recipe: how tokens are kept.
        attention_mask: (R, T) of the first call, 0 for padding on any side; None if nothing is padding.

    Raises:
        RecipeError: the recipe does not fit the model: sliding windows, linear attention, the channels of a head, or the
            transform without the attention function that rotates the queries.
    """

    def __init__(self, config, recipe: KVCacheRecipe | None = None, attention_mask: torch.Tensor | None = None):
        recipe = recipe or KVCacheRecipe()
        recipe.check_model(config)
        config = config.get_text_config(decoder=True)
        views = config._attn_implementation == ATTENTION
        if recipe.transform and not views:
            raise RecipeError(
                f"kv_cache: transform={recipe.transform!r} has to rotate the queries, and attention is "
                f"{config._attn_implementation!r}: call model.set_attn_implementation({ATTENTION!r}), or give transform=null"
            )
        self.recipe = recipe
        self._mask = attention_mask
        super().__init__(layers=[QuantizedLayer(recipe, views) for _ in range(config.num_hidden_layers)])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        layer = self.layers[layer_idx]
        if layer.is_initialized:
            return layer.update(key_states, value_states)
        rows, count = key_states.shape[0], key_states.shape[-2]
        if self._mask is not None and tuple(self._mask.shape) != (rows, count):
            raise ValueError(
                f"the cache was made with an attention mask of shape {tuple(self._mask.shape)}, and the first call has "
                f"{rows} sequences of {count} columns: give QuantizedCache the first call's mask"
            )
        if layer.layout is None:  # all layers begin with one layout, so that they share what follows from it
            layout = Layout.empty(rows, self.recipe.sink, self.recipe.block)
            for each in self.layers:
                each.layout = layout
        return layer.update(key_states, value_states, self._mask)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order, some perhaps more than once."""
        held = [layer for layer in self.layers if layer.is_initialized]
        if not held:
            raise ValueError("the cache is empty: there is no sequence to select")
        if any(layer.layout is not held[0].layout for layer in held):
            raise RuntimeError("a forward pass was cut off between two layers: the cache cannot be used any more")
        listed = torch.arange(held[0].layout.lengths.numel())[indices.cpu()].tolist()
        layout = held[0].layout.select(listed)
        for layer in held:
            layer.select(torch.tensor(listed, device=layer.device), layout)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, one after the other."""
        held = [layer for layer in self.layers if layer.is_initialized]
        if held:
            self.batch_select_indices(torch.arange(held[0].layout.lengths.numel()).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def crop(self, max_length: int) -> None:
        raise NotImplementedError("a packed block cannot be cut: a quantised cache has no crop (assisted decoding needs BF16)")

    def memory(self) -> Memory:
        """What the cache takes now; all layers together."""
        packed = sinks = open_ = values = tokens = bf16 = 0
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            heads, width = layer.open[0].shape[1], layer.open[0].shape[3]
            packed += sum(t.nbytes for blocks in layer.packed for t in blocks.tensors())
            values += sum(2 * blocks.codes.numel() for blocks in layer.packed)
            sinks += sum(t.nbytes for t in layer.sinks)
            open_ += sum(t.nbytes for t in layer.open)
            tokens = int(layer.layout.lengths.sum())
            bf16 += tokens * heads * width * 2 * 2
        return Memory(packed, sinks, open_, values, tokens, bf16)
