"""What a 4-bit KV cache is made of: the `mxfp4.kv_cache` block of a run, checked when it is built."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxfp4_rl.recipe import QuantRecipe, RecipeError, check_keys, plain

TRANSFORMS = (None, "hadamard")
_MOST_TOKENS = 256  # of a block: more would stay unquantised than most answers are long


@dataclass(frozen=True)
class KVCacheRecipe:
    """How the keys and values of past tokens are kept.

    Args:
        format: "nvfp4" (4.5 bits a value, and 8 more for a block's keys, or values, of one head) or "mxfp4" (4.25).
        scale_rule: of the format, as in `QuantRecipe`; null is "search", for both formats. "soar" fits a tensor scale of its
            own, which a block has none of.
        block: tokens that are quantised together, once all of them are there; until then they stay as they came. A multiple of
            the format's block size (16 or 32), because values share scales along the tokens; at most 256.
        sink: so many first tokens of every sequence are never quantised: attention leans on them whatever the text is.
        transform: "hadamard" rotates queries and keys over the channels of a head (after RoPE), which leaves their products
            as they are and spreads outliers; null does not.

    Raises:
        RecipeError: a value outside the above.
    """

    format: str = "nvfp4"
    scale_rule: str | float | None = None
    block: int = 64
    sink: int = 4
    transform: str | None = "hadamard"

    def __post_init__(self):
        rule = "search" if self.scale_rule is None else self.scale_rule
        try:
            recipe = QuantRecipe(format=self.format, scale_rule=rule)
        except RecipeError as error:
            raise RecipeError(f"kv_cache: {error}") from None
        if recipe.scale_rule == "soar":
            raise RecipeError(
                "kv_cache: scale_rule='soar' fits a tensor scale, which a block of tokens has none of: use 'search'"
            )
        object.__setattr__(self, "scale_rule", recipe.scale_rule)
        size = recipe.block_size
        if type(self.block) is not int or self.block < size or self.block % size or self.block > _MOST_TOKENS:
            raise RecipeError(
                f"kv_cache: block={self.block!r} must be a multiple of {size} up to {_MOST_TOKENS} with format={self.format!r} "
                f"(values share scales along the tokens): try {max(size, 64)}"
            )
        if type(self.sink) is not int or not 0 <= self.sink <= _MOST_TOKENS:
            raise RecipeError(f"kv_cache: sink={self.sink!r} must be a number of tokens from 0 to {_MOST_TOKENS}: try 4")
        if self.transform not in TRANSFORMS:
            raise RecipeError(f"kv_cache: transform={self.transform!r} is not one of null, 'hadamard'")

    @functools.cached_property  # asked for by every layer at every token
    def quant(self) -> QuantRecipe:
        """How a block's keys (along the channels) and values (along the tokens) are quantised."""
        return QuantRecipe(format=self.format, scale_rule=self.scale_rule)

    def check_heads(self, head_dim: int) -> None:
        """Raise RecipeError if heads of so many channels cannot be cached like this."""
        size = self.quant.block_size
        if head_dim % size:
            raise RecipeError(
                f"kv_cache: a head of {head_dim} channels is no multiple of {size}, {self.format}'s block: "
                + ("use format='nvfp4' (16)" if size > 16 and head_dim % 16 == 0 else "this model's cache stays in BF16")
            )
        if self.transform and head_dim & (head_dim - 1):
            raise RecipeError(f"kv_cache: transform='hadamard' needs a power of two of channels, not {head_dim}: use null")

    def check_model(self, config) -> None:
        """Raise RecipeError if a model of this transformers configuration cannot have such a cache."""
        text = config.get_text_config(decoder=True)
        name, kinds = type(text).__name__, getattr(text, "layer_types", None)
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        others = sorted(set(kinds or ()) - {"full_attention"})
        if others or (window and not kinds):
            what = ", ".join(others) or f"sliding_window={window}"
            raise RecipeError(f"kv_cache: {name} has {what}; only full attention can be cached in 4 bits: use null")
        if getattr(text, "num_kv_shared_layers", None):
            raise RecipeError(f"kv_cache: layers of {name} share their keys and values: use null")
        self.check_heads(head_channels(text))

    def describe(self) -> str:
        """One line for logs."""
        rotated = f", {self.transform} on queries and keys" if self.transform else ""
        return f"{self.quant.describe()} in blocks of {self.block} tokens, {self.sink} sinks{rotated}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | KVCacheRecipe | None, where: str = "kv_cache") -> KVCacheRecipe | None:
        """From a config block; None stays None (no quantised cache). An unknown key is an error that names the nearest."""
        if values is None or isinstance(values, KVCacheRecipe):
            return values
        if not isinstance(values, Mapping) and not hasattr(values, "items"):
            raise RecipeError(f"{where}={values!r} must be a block of keys ({', '.join(_KEYS)}), or null for a BF16 cache")
        values = plain(values)
        check_keys(values, set(_KEYS), where)
        return cls(**values)


_KEYS = tuple(field.name for field in dataclasses.fields(KVCacheRecipe))


def head_channels(config) -> int:
    """Channels of an attention head, of a text model's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
