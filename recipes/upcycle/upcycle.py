"""A mixture of experts out of a dense model, that computes what the dense one does: `python recipes/upcycle/upcycle.py --help`.

Every MLP is cut along its intermediate features into S slices, which are G times there: G S experts, S of them for a token. A
router's rows are the same for all slices of a copy, so the S best experts are one whole copy; their routing weights are 1/S
each, which `down_proj` times S takes back. (Virtual groups, He et al. 2024, arXiv 2410.07524.) S is a power of two,
so nothing is rounded, and where a slice is of whole blocks its MXFP4 operands are the dense model's too.

Slices differ from the start; copies of a slice are equal, and two equal experts make routing meaningless until training has
pulled them apart. It does: a copy's gradient comes from its own tokens, and a slice's router row from its own output. With
`expert_noise` every expert differs from the first step: Gaussian noise of that fraction of its weights' RMS, after which the
mixture is only nearly the dense model; a few supervised steps heal that (the ladder's warm-up, or any fine-tuning).

Where two copies' router logits are equal in BF16, slices of both may be taken: such a token gets another answer than from the
dense model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mxfp4_rl.tasks.embedded_model import EMBEDDED_MODEL_NAME, ensure_embedded_model

FAMILIES = {"llama": "mixtral", "qwen3": "qwen3_moe"}  # dense -> the mixture with the same attention and norms
_OF_ATTENTION = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
)  # fmt: skip


def moe_config(dense, slices: int, copies: int):
    """The mixture's configuration.

    Raises:
        ValueError: of a family that has no mixture of the same attention, or an MLP that cannot be cut so.
    """
    from transformers import AutoConfig

    if dense.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type={dense.model_type!r}: no mixture has this model's attention; known: {known}")
    if getattr(dense, "mlp_bias", False) or getattr(dense, "attention_bias", False):
        raise ValueError("mlp_bias or attention_bias is set, which the mixture's layers do not have")
    if slices < 1 or slices & (slices - 1):
        raise ValueError(f"slices={slices} is not a power of two, by which down_proj could be scaled exactly")
    if copies < 2:
        raise ValueError(f"copies={copies}: with fewer than two there is nothing to route")
    if dense.intermediate_size % slices:
        raise ValueError(f"slices={slices} does not divide intermediate_size={dense.intermediate_size}")
    width, experts = dense.intermediate_size // slices, slices * copies
    family = FAMILIES[dense.model_type]
    values = {name: getattr(dense, name) for name in _OF_ATTENTION if hasattr(dense, name)}
    values["head_dim"] = values.get("head_dim") or dense.hidden_size // dense.num_attention_heads
    if family == "mixtral":
        values |= {"intermediate_size": width, "num_local_experts": experts, "num_experts_per_tok": slices}
    else:
        values |= {
            "moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": slices, "norm_topk_prob": True,
            "intermediate_size": dense.intermediate_size, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    return AutoConfig.for_model(family, **values)


@torch.no_grad()
def upcycle(
    dense: torch.nn.Module,
    slices: int = 4,
    copies: int = 2,
    router_std: float = 0.02,
    seed: int = 0,
    expert_noise: float = 0.0,
):
    """A mixture of experts of `slices` x `copies` experts, `slices` for a token, with the dense model's values.

    Args:
        dense: a causal LM of transformers, of a family in `FAMILIES`.
        router_std: standard deviation of the router's weights, drawn with `seed`, as is all noise.
        expert_noise: of every expert's own weights, as a fraction of their RMS; 0 leaves the copies of a slice equal.

    Raises:
        ValueError: as `moe_config`.
    """
    from transformers import AutoModelForCausalLM

    config = moe_config(dense.config, slices, copies)
    parameter = next(dense.parameters())
    with torch.device(parameter.device):
        moe = AutoModelForCausalLM.from_config(config, dtype=parameter.dtype).eval()
    missing, unexpected = moe.load_state_dict(dense.state_dict(), strict=False)
    wrong = [n for n in missing if ".experts." not in n and not n.endswith(".gate.weight") and n != "lm_head.weight"]
    wrong += [n for n in unexpected if ".mlp." not in n]
    if wrong:
        raise ValueError(f"{type(dense).__name__} and {type(moe).__name__} differ in {wrong[0]}")
    generator = torch.Generator().manual_seed(seed)
    for own, mlp in zip((layer.mlp for layer in moe.model.layers), (layer.mlp for layer in dense.model.layers), strict=True):
        of_slice = [weight.chunk(slices, dim=0) for weight in (mlp.gate_proj.weight, mlp.up_proj.weight)]
        gate_up = torch.stack([torch.cat(pair) for pair in zip(*of_slice)])
        down = torch.stack(mlp.down_proj.weight.chunk(slices, dim=1)) * slices
        own.experts.gate_up_proj.copy_(gate_up.repeat(copies, 1, 1))
        own.experts.down_proj.copy_(down.repeat(copies, 1, 1))
        router = router_std * torch.randn(copies, dense.config.hidden_size, generator=generator)
        own.gate.weight.copy_(router.repeat_interleave(slices, 0))
        for fused in (own.experts.gate_up_proj, own.experts.down_proj) if expert_noise else ():
            rms = fused.float().square().mean((1, 2), keepdim=True).sqrt()
            noise = torch.randn(fused.shape, generator=generator).to(fused.device)
            fused.copy_(fused.float() + expert_noise * rms * noise)
    moe.generation_config = dense.generation_config
    return moe


def write_mixture(model: str, out: Path, **options) -> int:
    """Upcycle a checkpoint (or the embedded model) in BF16 into the folder `out`, whole or not at all; its parameters.

    Args and errors as `upcycle`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(ensure_embedded_model()) if model == EMBEDDED_MODEL_NAME else model
    moe = upcycle(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), **options)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    moe.save_pretrained(part)
    AutoTokenizer.from_pretrained(path).save_pretrained(part)
    part.rename(out)
    return sum(p.numel() for p in moe.parameters())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a checkpoint's folder, a hub name, or {EMBEDDED_MODEL_NAME}")
    parser.add_argument("out", type=Path, help="folder of the new checkpoint; must not exist")
    parser.add_argument("--slices", type=int, default=4, help="of every MLP; experts for a token")
    parser.add_argument("--copies", type=int, default=2, help="of every slice")
    parser.add_argument("--router-std", type=float, default=0.02)
    parser.add_argument("--expert-noise", type=float, default=0.0, help="of each expert's weights, over their RMS")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args(arguments)
    if a.out.exists():
        parser.error(f"{a.out} exists: name a folder that does not")

    try:
        parameters = write_mixture(
            a.model, a.out, slices=a.slices, copies=a.copies, router_std=a.router_std, seed=a.seed, expert_noise=a.expert_noise
        )
    except ValueError as error:
        parser.error(str(error))
    experts = f"{a.slices * a.copies} experts a layer, {a.slices} for a token"
    print(f"{a.out}: {experts}, {parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
