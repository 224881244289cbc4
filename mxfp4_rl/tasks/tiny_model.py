"""A causal language model small enough for a test: random weights, one token per character, milliseconds a step.

It exercises what a large one does: a chat template, grouped-query attention, a fused-size MLP, and linears whose inner
dimension leaves a tail, both over macro blocks of 128 (the hidden size) and over MXFP4 blocks of 32 (the MLP's).
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["make_tiny_model"]

_SPECIAL = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
_CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tiny_model(
    out_dir: str | os.PathLike,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    intermediate: int = 200,
    heads: int = 4,
    kv_heads: int = 2,
    architecture: str = "qwen3",
    tie_word_embeddings: bool = False,
) -> Path:
    """Writes a random model with its tokenizer to ``out_dir``, as a normal BF16 checkpoint (defaults: 114k parameters).

    The defaults give linears with inner dimensions 64 (half a macro block of 128) and 200 (six MXFP4 blocks of 32 and a
    tail of 8, in ``down_proj``). The same arguments give the same weights; torch's global random state stays as it was.

    Args:
        out_dir: made if missing; files of an older model in it are overwritten.
        seed: of the weights.
        hidden: hidden size, a multiple of ``2 * heads`` (rotary embeddings turn pairs).
        layers, intermediate, heads, kv_heads: as in the transformers config; ``heads`` a multiple of ``kv_heads``.
        architecture: ``"qwen3"``, ``"llama"``, or ``"qwen3_moe"``, whose layers have four experts with ``intermediate``
            features each, two of them for a token.
        tie_word_embeddings: whether ``lm_head`` is the embedding, as in many small models.

    Returns:
        ``out_dir`` as a path.

    Raises:
        ValueError: the sizes do not fit each other, or the architecture is unknown.
    """
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    architectures = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }
    if architecture not in architectures:
        raise ValueError(f"architecture={architecture!r}: give one of {sorted(architectures)}.")
    sizes = {"hidden": hidden, "layers": layers, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive integer.")
    if hidden % (2 * heads):
        raise ValueError(f"hidden={hidden} is not a multiple of 2 * heads={2 * heads}: change one of them.")
    if heads % kv_heads:
        raise ValueError(f"heads={heads} is not a multiple of kv_heads={kv_heads}: change one of them.")

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _character_tokenizer()
    config_class, model_class = architectures[architecture]
    experts = {"moe_intermediate_size": intermediate, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config = config_class(
        **(experts if architecture == "qwen3_moe" else {}),
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=512,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _character_tokenizer():
    """Printable ASCII and newline, a token each; other characters are ``<unk>``. Decoding gives back the text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(_SPECIAL + _CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
