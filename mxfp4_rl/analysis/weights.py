"""Which tensors of a checkpoint are the Linear weights that MXFP4 training quantises, by name and shape.

The rule is `mxfp4_rl.nn.convert.plan`'s, without a model: every matrix named `.weight` is a Linear layer's unless its name says
otherwise (embedding, output head, router, LoRA, convolution). Experts in fused tensors count too, which have no `.weight`.

The contraction axis, along which MXFP4's blocks run, is the last one of nn.Linear's (out, in). It is the first one of GPT-2's
Conv1D (in, out). Fused experts are (E, out, in) in most models and (E, in, out) in others (gpt-oss, Llama 4, Qwen3-VL-MoE on
the hub), and one model_type can have been saved both ways, so shapes decide: gate_up_proj has twice as many outputs as
down_proj has inputs.

GGUF's names become Llama's (model.layers.N.self_attn.q_proj, mlp.experts.gate_proj, ...) whatever the architecture.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from mxfp4_rl.analysis.checkpoint import Checkpoint, CheckpointError, TensorInfo
from mxfp4_rl.nn.convert import ROUTER_NAMES

__all__ = ["LinearWeight", "linear_weights"]


@dataclass(frozen=True)
class LinearWeight:
    """A tensor that is the weight of a Linear layer, or of all experts' layers of one kind.

    Attributes:
        info: the tensor.
        name: dotted name of its module, e.g. model.layers.3.self_attn.q_proj.
        kind: what it projects: q_proj, down_proj, ...; with `experts.` or `shared_experts.` in front where it is theirs
            (Mixtral's w1, w2, w3 are experts.gate_proj, .down_proj, .up_proj), with the parent's name where the last part says
            too little (attn.c_proj).
        layer: number of the decoder layer, or None outside of layers.
        axis: contraction axis of `info.shape`.
    """

    info: TensorInfo
    name: str
    kind: str
    layer: int | None
    axis: int


def linear_weights(checkpoint: Checkpoint) -> tuple[list[LinearWeight], dict[str, str]]:
    """The Linear weights in the checkpoint's order, and why every other tensor was left out (name -> reason).

    Raises:
        CheckpointError: no Linear weight is left; the message counts the reasons.
    """
    rule = _GGUFRule(checkpoint) if checkpoint.format == "gguf" else _SafetensorsRule(checkpoint)
    weights, left_out = [], {}
    for info in checkpoint.tensors:
        found = rule.classify(info)
        if isinstance(found, str):
            left_out[info.name] = found
        else:
            weights.append(found)
    if not weights:
        reasons = Counter(left_out.values()).most_common()
        raise CheckpointError(
            f"{checkpoint.source} holds no Linear weight to measure. Its tensors: "
            + "; ".join(f"{count} {reason}" for reason, count in reasons)
        )
    return weights, left_out


# ------------------------------------------------------------------------------------------------------- safetensors

_EMBEDDING = re.compile(r"(?:^|_)(?:embed|embeds|embedding|embeddings|embedder|embd|emb|wte|wpe)(?:_|$)")
_LINEAR_WORDS = re.compile(r"(?:^|_)(?:proj|project|projection|projector|linear|dense|fc|mapping_in)\d*$")
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)")
_HEADS = ("lm_head", "embed_out", "output_layer")
_TOP_LEVEL_HEADS = ("output", "head", "unembedding")  # the same words name projections inside layers
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_IN_OUT_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "openai_privacy_filter", "aria", "aria_text")
_FROM_HIDDEN = ("gate_up_proj", "gate_proj", "up_proj", "fc1", "w1", "w3")
_TO_HIDDEN = ("down_proj", "fc2", "w2")
_MIXTRAL_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# What a quantised checkpoint keeps in place of a weight or beside it, and what kind of checkpoint that is.
_PACKED = (
    (re.compile(r"\.(qweight|qzeros|scales|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_(packed|shape|zero_point|g_idx)$"), "compressed-tensors"),
    (re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$"), "bitsandbytes"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes"),
    (re.compile(r"\.weight_scale_inv$"), "FP8"),
    (re.compile(r"\.(weight_scale\w*|input_scale\w*|output_scale)$"), "FP8 or FP4"),
)
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "mxfp4": "MXFP4",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
}
_FLOATS = ("BF16", "F16", "F32", "F64")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|blk|resblocks)\.(\d+)\.")
_DECODER_LAYER = re.compile(r"^(?:model\.|language_model\.|transformer\.)*layers\.(\d+)\.")


class _SafetensorsRule:
    """transformers' names."""

    def __init__(self, checkpoint: Checkpoint):
        self.config = checkpoint.config
        text = self.config.get("text_config")
        self.text = self.config | text if isinstance(text, dict) else self.config
        self.shapes = {info.name: info.shape for info in checkpoint.tensors}
        quantisation = self.config.get("quantization_config")
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        self.method = _METHODS.get(str(method), method)
        self.conv1d = self._stores_conv1d()

    def classify(self, info: TensorInfo) -> LinearWeight | str:
        """The weight, or why it is none."""
        module = info.name.removesuffix(".weight")
        last = module.rsplit(".", 1)[-1]
        reason = self._not_linear(info, module, last)
        if reason:
            return reason
        axis: int | None = -1
        if len(info.shape) == 3:
            axis = self._experts_axis(info, module, last)
            if axis is None:
                return "experts in a fused tensor whose orientation neither shapes nor model_type tell"
        elif self.conv1d and last in _CONV1D_NAMES:
            axis = 0
        return LinearWeight(info, module, _kind(module), _layer(module), axis)

    def _not_linear(self, info: TensorInfo, module: str, last: str) -> str | None:
        name, shape = info.name, info.shape
        if "bias" in last:  # or a table of them, as T5's relative_attention_bias
            return "bias"
        quantised = self._already_quantised(info)
        if quantised:
            return f"already quantised ({quantised}): give the BF16 checkpoint"
        if info.dtype not in _FLOATS:
            return f"not floating point ({info.dtype})"
        if "lora_" in name:
            return "LoRA adapter"
        if _NORM.search(last):  # Cohere's have a row for each head
            return "norm"
        if len(shape) < 2:
            return "one-dimensional (scale, bias or other vector)"
        if not info.elements:
            return "empty"
        if self._is_vocabulary(module, last, shape):
            return "output head" if last in (*_HEADS, *_TOP_LEVEL_HEADS) else "embedding"
        if last in ROUTER_NAMES or "router" in module.split("."):
            return "router"
        beyond = self._beyond_last_layer(module)
        if beyond:
            return beyond
        if last.startswith("conv") or "conv1d" in last:
            return "convolution"
        if len(shape) == 3 and ("experts" in module or last in ("input_linear", "output_linear")):
            return None  # fused experts; Granite and JetMoE call them input_linear and output_linear
        if len(shape) > 2:
            return f"{len(shape)}-dimensional, not experts (convolution or table)"
        if name == module:
            return "not a Linear layer's weight (a parameter or buffer of its own)"
        return None

    def _already_quantised(self, info: TensorInfo) -> str | None:
        for pattern, kind in _PACKED:
            if pattern.search(info.name):
                return self.method or kind
        if info.dtype == "U8" and info.name.endswith(("_blocks", "_scales")):
            return "MXFP4"
        if info.dtype.startswith("F8"):
            return "FP8"
        if info.dtype.startswith(("F4_", "F6_")):
            return self.method or info.dtype
        # Position ids, masks and counters are integers too, but no matrices of weights.
        if info.dtype in ("U8", "I8", "I32") and len(info.shape) >= 2 and info.name.endswith((".weight", "_proj")):
            return self.method or f"{info.dtype} codes"
        return None

    def _is_vocabulary(self, module: str, last: str, shape: tuple[int, ...]) -> bool:
        if last in _HEADS or module.endswith("shared_head.head"):
            return True
        if module.removeprefix("model.") in _TOP_LEVEL_HEADS:
            return True
        if _EMBEDDING.search(last) and not _LINEAR_WORDS.search(last):
            return True
        # Whatever it is called (T5's `shared`): a matrix outside of the layers with a row for each token.
        return _layer(module) is None and len(shape) == 2 and shape[0] == self.text.get("vocab_size")

    def _beyond_last_layer(self, module: str) -> str | None:
        """DeepSeek-V3, GLM-4.5 and others append layers that predict more tokens, which training does not load."""
        if re.match(r"(model\.)?mtp\b", module):
            return "multi-token prediction, which training does not load"
        match, count = _DECODER_LAYER.match(module), self.text.get("num_hidden_layers")
        if match and isinstance(count, int) and int(match[1]) >= count:
            return f"beyond the model's {count} layers (multi-token prediction, which training does not load)"
        return None

    def _stores_conv1d(self) -> bool:
        """Whether c_attn, c_proj and c_fc are (in, out); GPT-BigCode and Qwen-1 use these names for (out, in)."""
        model_type = self.config.get("model_type")
        if model_type:
            return model_type in _CONV1D_MODELS
        # Both have more outputs than inputs.
        widening = [s for n, s in self.shapes.items() if n.endswith((".c_attn.weight", ".c_fc.weight")) and len(s) == 2]
        return bool(widening) and all(shape[0] < shape[1] for shape in widening)

    def _experts_axis(self, info: TensorInfo, module: str, last: str) -> int | None:
        if last in ("input_linear", "output_linear"):
            return -1
        gate_up, down = (self._beside(info.name, module, last, part) for part in ("gate_up_proj", "down_proj"))
        if gate_up and down and len(gate_up) == len(down) == 3:
            if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:  # (E, 2I, H) and (E, H, I)
                return -1
            if gate_up[2] == 2 * down[1] and gate_up[1] == down[2]:  # (E, H, 2I) and (E, I, H)
                return -2
            return None
        inward, outward = last in _FROM_HIDDEN, last in _TO_HIDDEN
        if not inward and not outward:
            return None
        hidden, (_, rows, columns) = self.text.get("hidden_size"), info.shape
        if hidden in (rows, columns) and rows != columns:
            return -1 if (columns == hidden) == inward else -2
        return -2 if {self.config.get("model_type"), self.text.get("model_type")} & set(_IN_OUT_EXPERTS) else None

    def _beside(self, name: str, module: str, last: str, other: str) -> tuple[int, ...] | None:
        """Shape of the tensor `other` in the same experts."""
        return self.shapes.get(module[: -len(last)] + other + name[len(module) :])


def _layer(module: str) -> int | None:
    match = _LAYER.search(module + ".")
    return int(match[1]) if match else None


def _kind(module: str) -> str:
    parts = module.split(".")
    last = parts[-1]
    if last == "base_layer" and len(parts) > 1:  # what PEFT calls the layer beside its adapter
        last = parts[-2]
        del parts[-1]
    if "experts" in parts[:-1]:
        return f"experts.{_MIXTRAL_NAMES.get(last, last)}"
    if len(parts) > 1 and parts[-2] in ("shared_expert", "shared_experts", "shared_mlp"):
        return f"shared_experts.{last}"
    if len(parts) > 1 and (last.isdigit() or last in ("c_proj", "dense", "proj")):
        return f"{parts[-2]}.{last}"  # GPT-2's attn.c_proj and mlp.c_proj are different matrices
    return last


# -------------------------------------------------------------------------------------------------------------- GGUF

_GGUF_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>.+)\.weight")
_GGUF_FFN = re.compile(r"ffn_(?P<which>gate_up|gate|up|down)(?P<group>_exps|_chexps|_shexp)?(?:\.(?P<expert>\d+))?")
_GGUF_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_gate": "self_attn.g_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "ssm_in": "mixer.in_proj",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_out": "mixer.out_proj",
    "ssm_ba": "mixer.ba_proj",
    "ssm_alpha": "mixer.a_proj",
    "ssm_beta": "mixer.b_proj",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_latent_down": "mlp.latent_down_proj",
    "ffn_latent_up": "mlp.latent_up_proj",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
}
_GGUF_GROUPS = {None: "mlp", "_exps": "mlp.experts", "_chexps": "mlp.chunk_experts", "_shexp": "mlp.shared_experts"}


class _GGUFRule:
    """llama.cpp's names. They are a closed list, so what is not on it is left out."""

    def __init__(self, checkpoint: Checkpoint):
        self.layers = checkpoint.config.get("num_hidden_layers")
        self.unreadable = checkpoint.unreadable
        self.shapes = {info.name: info.shape for info in checkpoint.tensors}

    def classify(self, info: TensorInfo) -> LinearWeight | str:
        """The weight, or why it is none."""
        match = _GGUF_LAYER.fullmatch(info.name)
        part = match["part"] if match else info.name.removesuffix(".weight")
        reason = self._not_linear(info, part, int(match["layer"]) if match else None)
        if reason:
            return reason
        place = self._projection(info.name, part)
        if not match or place is None:
            return "not a projection of a decoder layer that llama.cpp's names tell"
        if info.dtype.startswith("I") and info.dtype[1:].isdigit():
            return f"not floating point ({info.dtype})"
        if info.dtype in self.unreadable:
            return f"stored as {info.dtype}, which the installed gguf cannot dequantise: pip install -U gguf"
        axis = -1
        if part in ("attn_k_b", "attn_v_b"):
            # Halves of kv_b_proj, one matrix a head; k_b's are transposed (llama.cpp absorbs them into the query).
            if info.name.replace(part, "attn_kv_b") in self.shapes:
                return "a copy of a part of kv_b_proj"
            axis = -2 if part == "attn_k_b" else -1
        name = f"model.layers.{match['layer']}.{place}"
        return LinearWeight(info, name, _kind(name), int(match["layer"]), axis)

    def _not_linear(self, info: TensorInfo, part: str, layer: int | None) -> str | None:
        if info.name.endswith(".bias"):
            return "bias"
        if "norm" in part:
            return "norm"
        if len(info.shape) < 2:
            return "one-dimensional (scale, bias or other vector)"
        if not info.elements:
            return "empty"
        if "embd" in part or "embed" in part or part == "token_types":
            return "embedding"
        if part in ("output", "cls.output") or part.endswith("shared_head_head"):
            return "output head"
        if part.startswith("ffn_gate_inp") or part == "altup_router":
            return "router"
        if "conv1d" in part or part.endswith(".conv"):
            return "convolution"
        if layer is not None and isinstance(self.layers, int) and layer >= self.layers:
            return f"beyond the model's {self.layers} layers (multi-token prediction, which training does not load)"
        if "lora" in part:
            return "LoRA adapter"
        return None

    def _projection(self, name: str, part: str) -> str | None:
        ffn = _GGUF_FFN.fullmatch(part)
        if ffn is None:
            return _GGUF_PROJECTIONS.get(part)
        which, group = ffn["which"], ffn["group"]
        if which == "up" and self._is_gate_and_up(name):
            which = "gate_up"
        if ffn["expert"] is not None:  # Mixtral's first GGUFs: one tensor an expert
            return f"mlp.experts.{ffn['expert']}.{which}_proj"
        return f"{_GGUF_GROUPS[group]}.{which}_proj"

    def _is_gate_and_up(self, name: str) -> bool:
        """Phi-3's and GLM-4's ffn_up is gate_up_proj: no gate beside it, and twice as many rows as ffn_down has columns."""
        down = self.shapes.get(name.replace("ffn_up", "ffn_down"))
        alone = name.replace("ffn_up", "ffn_gate") not in self.shapes
        return alone and down is not None and self.shapes[name][-2] == 2 * down[-1]
