"""What is exported: SmolLM2 as it is, SmolLM2 widened by zeros to a width that Marlin has a tiling for, a random gpt-oss.

vLLM multiplies 4-bit weights by Marlin on GPUs without FP4 tensor cores (`mxfp4_rl.export.serving`), whose tiles must divide a
product as it is served: SmolLM2's query, key and value (576 inputs, 960 outputs)
fit none. With 576 channels of zeros more, all of its products fit one and it computes what it did: RMSNorm's mean is over 1152
channels then, which its weights and epsilon take back, up to the BF16 rounding of the weights. (640 would do for Marlin, but
transformers wants a multiple of the heads.)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_READS_HIDDEN = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", "lm_head.weight")
_WRITES_HIDDEN = ("o_proj.weight", "down_proj.weight")


def widen(source: Path, out: Path, hidden: int) -> Path:
    """A Llama checkpoint with more channels between its layers, the new ones zero; writes to `out` and returns it."""
    config = json.loads((source / "config.json").read_text())
    own = config["hidden_size"]
    shrink = own / hidden
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    for name, t in tensors.items():
        if "norm" in name:
            wider = torch.zeros(hidden, dtype=t.dtype)
            wider[:own] = (t.double() * shrink**0.5).to(t.dtype)
        elif name.endswith(_READS_HIDDEN) or "embed_tokens" in name:
            wider = torch.nn.functional.pad(t, (0, hidden - own))
        elif name.endswith(_WRITES_HIDDEN):
            wider = torch.nn.functional.pad(t, (0, 0, 0, hidden - own))
        else:
            raise ValueError(f"{name} {tuple(t.shape)}: not a tensor of a Llama")
        tensors[name] = wider.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config["head_dim"] = config.get("head_dim") or own // config["num_attention_heads"]
    config |= {"hidden_size": hidden, "rms_norm_eps": config["rms_norm_eps"] * shrink}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def random_gpt_oss(tokenizer_of: Path, out: Path, vocabulary: int = 49152) -> Path:
    """Two layers of eight experts with random weights, and somebody's tokenizer; writes to `out` and returns it."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = dict(hidden_size=512, intermediate_size=512, num_hidden_layers=2, vocab_size=vocabulary)
    heads = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_local_experts=8, num_experts_per_tok=4)
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # logits far enough apart for a greedy choice to mean something
                parameter.normal_(std=1.0 if "embed" in name else 0.06)
    model.to(torch.bfloat16).save_pretrained(out)
    for file in tokenizer_of.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out
