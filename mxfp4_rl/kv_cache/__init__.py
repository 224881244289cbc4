"""A 4-bit KV cache for transformers' models: ScaleSearchAttention (arXiv 2605.12464) as a cache and an attention function.

recipe      KVCacheRecipe: format, scale rule, tokens a block, sinks, channel transform
blocks      a block of tokens to codes and scales, and back
layout      where each token of each sequence is: with the sinks, in a packed block, in the open one
cache       QuantizedCache, what a model's forward takes as `past_key_values`; its memory
attention   the function that transformers calls: rotates the queries, reads what the cache holds

model.set_attn_implementation(ATTENTION)
model(ids, attention_mask=mask, past_key_values=QuantizedCache(model.config, KVCacheRecipe(), mask), use_cache=True)
"""

from mxfp4_rl.kv_cache.recipe import KVCacheRecipe

__all__ = ["ATTENTION", "KVCacheRecipe", "Memory", "QuantizedCache"]


def __getattr__(name: str):
    # Recipes are checked where neither torch nor transformers is wanted.
    if name == "ATTENTION":
        from mxfp4_rl.kv_cache.attention import ATTENTION

        return ATTENTION
    if name in ("Memory", "QuantizedCache"):
        from mxfp4_rl.kv_cache import cache

        return getattr(cache, name)
    raise AttributeError(f"module 'mxfp4_rl.kv_cache' has no attribute {name!r}")
