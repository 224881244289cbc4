"""What the scripts share: real models' shapes for random weights, recipes by name, and measuring in a process of its own.

A child prints its result as one marked line of JSON among all that vLLM prints; the parent reads it there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

_MARK = "RESULT "

SHAPES = {
    "qwen2.5-3b": dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=True, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    ),
    "llama-3.1-8b": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=32768, rms_norm_eps=1e-5,
        rope_theta=5e5, tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip


def recipe_of(name: str, without: tuple[str, ...] = ("bf16",)):
    """ "w4a16 mxfp4+mbs" -> ModelRecipe; None for the names in `without`. Raises ValueError for any other."""
    from mxfp4_rl import ModelRecipe, QuantRecipe

    if name in without:
        return None
    kind, _, words = name.partition(" ")
    if kind not in ("w4a16", "w4a4"):
        raise ValueError(f"{name!r} is none of {', '.join(without)}, and no recipe such as 'w4a16 mxfp4+mbs' or 'w4a4 mxfp4'")
    quant = QuantRecipe.parse(words)
    return ModelRecipe(weight=quant, activation=quant if kind == "w4a4" else None)


def recipe_with(words: str, **others):
    """ModelRecipe with "mxfp4+mbs" for weights and activations, and other values of it; `grad` in words too."""
    from mxfp4_rl import ModelRecipe, QuantRecipe

    own = QuantRecipe.parse(words)
    if "grad" in others:
        others["grad"] = QuantRecipe.parse(others["grad"])
    return ModelRecipe(**{"weight": own, "activation": own, **others})


def tell(result: dict) -> None:
    """The child's side."""
    print(_MARK + json.dumps(result), flush=True)


def ask(name: str, script: str, *arguments: str, seconds: float | None = None, tail: int = 25) -> dict | None:
    """Run `script` in a process of its own; its result, or None after printing the end of its output under `name`.

    Args:
        seconds: after which it is ended; None: never. tail: lines that are printed of one that failed.
    """
    process = subprocess.Popen(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)  # an engine's own processes too
        output, _ = process.communicate()
    lines = output.splitlines()
    results = [line for line in lines if line.startswith(_MARK)]
    if not results:
        print(f"{name}: {f'ended after {seconds:.0f} s' if late else 'failed'}\n" + "\n".join(lines[-tail:]), flush=True)
        return None
    return json.loads(results[-1].removeprefix(_MARK))
