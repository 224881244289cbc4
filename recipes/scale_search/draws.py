"""Is one NVFP4 scale rule better than another on a text, or was it luck? `python recipes/scale_search/draws.py --help`.

A quantised model is one draw: move the scale of a tensor a little and all its elements round otherwise, with the same squared
error and another perplexity. The standard error over a text's tokens, which `mxfp4-rl ptq` prints, knows nothing of that. Here
every tensor's scale g is c times as large as it has to be, c from [1, 2) by tensor and draw and the same for all rules (an
export's rounding of g to a power of two is such a c; soar starts from it), and the rules are compared over the draws.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

RULES = ("nvfp4", "nvfp4+four-over-six", "nvfp4+soar", "nvfp4+search")


def quantised(weights: list[torch.Tensor], words: str, c: float) -> list[torch.Tensor]:
    """Weights of one served product, dequantised, with a scale of the tensor for a largest element c times as large."""
    from mxfp4_rl import QuantRecipe
    from mxfp4_rl.quant import fake_quantize

    rows = torch.cat([*weights, torch.zeros_like(weights[0][:1])]).float()
    rows[-1, 0] = rows.abs().max() * c  # its row is cut off again
    operand = fake_quantize(rows, QuantRecipe.parse(words), dtype=torch.bfloat16)[:-1]
    return list(operand.split([len(weight) for weight in weights]))


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over the draws; None for one."""
    t = torch.tensor(values, dtype=torch.float64)
    return t.mean().item(), t.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, help="UTF-8; default: every other topic of Python's help(), as docs/ptq.md has it")
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024, help="windows do not overlap")
    parser.add_argument("--rules", nargs="+", default=RULES, help="the first one is the base")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the losses as JSON, after every draw")
    options = parser.parse_args()

    from mxfp4_rl.evaluation.command import find_device, load
    from mxfp4_rl.evaluation.sources import find_model
    from mxfp4_rl.export.formats import served_together
    from mxfp4_rl.ptq.perplexity import token_losses, windows_of
    from mxfp4_rl.ptq.weights import Weights

    device = find_device(None)
    tokenizer, model, _ = load(find_model(options.model), device)
    ids = torch.tensor(tokenizer(_text(options.text), verbose=False)["input_ids"], device=device)[: options.text_tokens]
    windows = windows_of(len(ids), options.context, options.context)
    weights = Weights(model)
    groups = list({tuple(other for other in served_together(n) if other in weights.layers): None for n in weights.layers})
    base = token_losses(model, ids, windows).double().mean().item()
    print(f"BF16: perplexity {math.exp(base):.3f} on {len(ids)} tokens")
    losses: dict[str, list[float]] = {words: [] for words in options.rules}
    for draw in range(options.draws):
        for words in options.rules:
            generator = torch.Generator().manual_seed(draw)
            for group in groups:
                c = 1 + torch.rand((), generator=generator).item()
                operands = quantised([weights.originals[name] for name in group], words, c)
                for name, operand in zip(group, operands, strict=True):
                    weights.layers[name].weight.data.copy_(operand)
            losses[words].append(token_losses(model, ids, windows).double().mean().item() - base)
            print(f"draw {draw}: {words:20} loss {losses[words][-1]:+.4f}", flush=True)
        if options.out:
            record = {"model": options.model, "tokens": len(ids), "base": base, "losses": losses, "device": device}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    for words, own in losses.items():
        mean, error = mean_and_error(own)
        against, its_error = mean_and_error([a - b for a, b in zip(own, losses[options.rules[0]], strict=True)])
        spread = f" ± {error:.4f}, draws from {min(own):+.4f} to {max(own):+.4f}" if error is not None else ""
        difference = f"; against {options.rules[0]} {against:+.4f}" + (f" ± {its_error:.4f}" if its_error is not None else "")
        print(f"{words:20} loss {mean:+.4f}{spread}" + (difference if words != options.rules[0] else ""))


def _text(file: Path | None) -> str:
    if file is not None:
        return file.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[::2])


if __name__ == "__main__":
    main()
