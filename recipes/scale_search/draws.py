"""Is one NVFP4 scale rule better than another on a text, or was it luck? `python recipes/scale_search/draws.py --help`.

A quantised model is one draw: move the scale of a tensor a little and all its elements round otherwise, with the same squared
error and another perplexity. The standard error over a text's tokens, which `mxfp4-rl ptq` prints, knows nothing of that. Here
every tensor's scale g is c times as large as it has to be, c from [1, 2) by tensor and draw and the same for all rules (an
export's rounding of g to a power of two is such a c; soar starts from it), and the rules are compared over the draws.

To find what makes a rule better or worse, a rule can be changed, `nvfp4+soar:no-clip`, also twice, `nvfp4+soar:signs:only=mlp`:

    no-clip        of the rule's scales only those that hold the block's largest element (soar: of DSS's last three; where there
                   is none, the next E4M3 number that does)
    power=P        the rule's choice among its scales by squared errors that weigh |w|^P (soar: of DSS's last three)
    inputs         ... that weigh the mean square of the input they meet on --calibration
    keep=N         the N columns of each layer whose inputs on --calibration are the largest (in mean square) are not quantised
    reflected      the opposite error: W - (W_hat - W). Half the difference to the rule is what depends on the error's sign
    largest        ... for the largest element of each block alone
    signs          each element's error with a random sign, the same for all rules: what its size alone does
    only=PATTERN   in layers whose names the regular expression finds; the others as the first rule has them
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

RULES = ("nvfp4", "nvfp4+four-over-six", "nvfp4+soar", "nvfp4+search")
ERRORS = ("reflected", "largest", "signs")
BLOCK = 16
_VALUES = {"power": float, "keep": int, "only": str}


@dataclass(frozen=True)
class Variant:
    """A recipe's words and what is changed about it, as above."""

    words: str
    no_clip: bool = False
    inputs: bool = False
    power: float = 0.0
    keep: int = 0
    error: str = ""  # one of ERRORS
    only: str = ""

    @property
    def needs_inputs(self) -> bool:
        """Whether it looks at the layers' inputs."""
        return self.inputs or self.keep > 0

    @classmethod
    def parse(cls, text: str) -> Variant:
        words, *changes = text.split(":")
        given: dict = {}
        for change in changes:
            key, _, value = change.partition("=")
            if change in ("no-clip", "inputs"):
                given[change.replace("-", "_")] = True
            elif change in ERRORS:
                given["error"] = change
            elif key in _VALUES and value:
                given[key] = _VALUES[key](value)
            else:
                known = ", ".join(("no-clip", "inputs", *ERRORS, *(f"{key}=" for key in _VALUES)))
                raise ValueError(f"{text}: {change!r} is none of {known}")
        return cls(words, **given)


def packed(weights: list[torch.Tensor], words: str, c: float):
    """Weights of one served product with a scale of the tensor for a largest element c times as large, and a row more."""
    from mxfp4_rl import QuantRecipe
    from mxfp4_rl.quant import quantize

    rows = torch.cat([*weights, torch.zeros_like(weights[0][:1])]).float()
    rows[-1, 0] = rows.abs().max() * c
    return quantize(rows, QuantRecipe.parse(words))


def operands(weights: list[torch.Tensor], variant: Variant, rule, squares: torch.Tensor | None = None, seed: int = 0):
    """The weights dequantised, BF16, changed as the variant has it (but for `only`).

    Args:
        rule: `packed` of them. squares: mean squares of the inputs, float32 (K,), for `inputs` and `keep`. seed: of `signs`.
    """
    w = torch.cat(weights).float()
    if variant.no_clip or variant.power or variant.inputs:
        w_hat = _chosen_anew(w, variant, rule, squares)
    else:
        w_hat = rule.dequantize(torch.float32)[: len(w)]
    if variant.error == "reflected":
        w_hat = 2 * w - w_hat
    elif variant.error == "largest":
        w_hat = torch.where(largest_of_blocks(w), 2 * w - w_hat, w_hat)
    elif variant.error == "signs":
        signs = torch.randint(0, 2, w.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(w.device)
        w_hat = w + (w_hat - w) * (2 * signs - 1)
    if variant.keep:
        columns = squares.topk(variant.keep).indices
        w_hat[:, columns] = w[:, columns]
    return list(w_hat.bfloat16().split([len(weight) for weight in weights]))


def largest_of_blocks(w: torch.Tensor) -> torch.Tensor:
    """Which elements are the largest of their blocks, the first of equals; bool, of w's shape."""
    blocks = w.abs().unflatten(-1, (-1, BLOCK))
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, blocks.argmax(-1, keepdim=True), True).flatten(-2)


def _chosen_anew(w: torch.Tensor, variant: Variant, rule, squares: torch.Tensor | None) -> torch.Tensor:
    """W_hat, float32, with the best of the rule's block scales in the variant's metric, of those that it allows."""
    from mxfp4_rl import QuantRecipe
    from mxfp4_rl.quant.elements import round_e2m1
    from mxfp4_rl.quant.nvfp4 import MAX_CODE, MIN_CODE, e4m3_code, e4m3_value

    recipe, g = QuantRecipe.parse(variant.words), rule.tensor_scale
    x = w.unflatten(-1, (-1, BLOCK))
    amax = x.abs().amax(-1)
    six = e4m3_code(amax / 6 / g)
    around = {"static": [six], "four_over_six": [six, e4m3_code(amax / 4 / g)], "search": [six + f for f in recipe.window]}
    own = rule.scales[: len(w)].int()
    candidates = around.get(recipe.scale_rule, [own, own - 1, own + 1])
    least = six + (e4m3_value(six) * g * 6 < amax) if variant.no_clip else torch.full_like(six, MIN_CODE)
    weight = (squares if variant.inputs else torch.ones_like(w)).expand_as(w).unflatten(-1, (-1, BLOCK))
    if variant.power:
        weight = weight * x.abs() ** variant.power
    best, best_error = torch.empty_like(x), torch.full_like(amax, torch.inf)
    for code in candidates:
        worth = (e4m3_value(code.maximum(least).clamp(MIN_CODE, MAX_CODE)) * g).unsqueeze(-1)
        x_hat = round_e2m1(x / worth) * worth
        error = (weight * ((x_hat - x) / g).square()).sum(-1)
        best = torch.where((error < best_error).unsqueeze(-1), x_hat, best)
        best_error = torch.minimum(error, best_error)
    return best.flatten(-2)


@dataclass
class Moments:
    """Of a layer's inputs on a text: mean (K,) and mean of x x^T (K, K), float32."""

    mean: torch.Tensor
    second: torch.Tensor

    def errors(self, change: torch.Tensor, w: torch.Tensor) -> dict[str, float]:
        """Energies of the outputs' change over those of the outputs, for float32 (out, K) weights.

        output: all. mean: of its mean over the text. apart: if no two elements' errors had to do with each other. And of the
        weights themselves: weight, of all; largest, how much the largest elements of blocks grew, by their sum.
        """
        energy = ((w @ self.second) * w).sum()
        parts = {
            "output": ((change @ self.second) * change).sum(),
            "mean": (change @ self.mean).square().sum(),
            "apart": (change.square() @ self.second.diagonal()).sum(),
        }
        top = largest_of_blocks(w)
        own = {
            "weight": change.square().sum() / w.square().sum(),
            "largest": (change * w.sign())[top].sum() / w[top].abs().sum(),
        }
        return {key: value.item() for key, value in (own | {k: v / energy for k, v in parts.items()}).items()}


@torch.no_grad()
def moments_of(model, layers: dict[str, torch.nn.Linear], ids: torch.Tensor, context: int) -> dict[str, Moments]:
    """Layer -> the moments of its inputs on a text."""
    found: dict[str, Moments] = {}

    def keep(name: str):
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            own = found.setdefault(name, Moments(x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])))
            own.mean += x.sum(0) / len(ids)
            own.second += x.T @ x / len(ids)

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        for part in ids.split(context):
            model(input_ids=part.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def noisy(weight: torch.Tensor, size: float, generator: torch.Generator) -> torch.Tensor:
    """The weight with Gaussian noise of `size` times the root mean square of each 32 elements, BF16."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    noise = torch.randn(blocks.shape, generator=generator).to(weight.device)
    return (blocks + size * blocks.square().mean(-1, keepdim=True).sqrt() * noise).flatten(-2).bfloat16()


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
    parser.add_argument("--noise", type=float, help="first add to weights so many times each 32 elements' root mean square")
    parser.add_argument("--errors", action="store_true", help="also the errors of weights and of outputs on --calibration")
    parser.add_argument("--calibration", type=Path, help="UTF-8, for --errors, `inputs` and `keep`; default: the other topics")
    parser.add_argument("--calibration-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, help="write the losses as JSON, after every draw")
    options = parser.parse_args()
    variants = {text: Variant.parse(text) for text in options.rules}

    from mxfp4_rl.evaluation.command import find_device, load
    from mxfp4_rl.evaluation.sources import find_model
    from mxfp4_rl.export.formats import served_together
    from mxfp4_rl.ptq.perplexity import token_losses, windows_of
    from mxfp4_rl.ptq.weights import Weights

    device = find_device(None)
    tokenizer, model, _ = load(find_model(options.model), device)

    def tokens(file: Path | None, half: int, count: int) -> torch.Tensor:
        return torch.tensor(tokenizer(_text(file, half), verbose=False)["input_ids"], device=device)[:count]

    ids = tokens(options.text, 0, options.text_tokens)
    windows = windows_of(len(ids), options.context, options.context)
    weights = Weights(model)
    if options.noise:
        generator = torch.Generator().manual_seed(0)
        weights.originals = {name: noisy(weight, options.noise, generator) for name, weight in weights.originals.items()}
        weights.restore()
    groups = list({tuple(other for other in served_together(n) if other in weights.layers): None for n in weights.layers})
    base = token_losses(model, ids, windows).double().mean().item()
    print(f"BF16: perplexity {math.exp(base):.3f} on {len(ids)} tokens")
    moments = {}
    if options.errors or any(v.needs_inputs for v in variants.values()):
        first = {group[0]: weights.layers[group[0]] for group in groups}
        moments = moments_of(model, first, tokens(options.calibration, 1, options.calibration_tokens), options.context)
    losses: dict[str, list[float]] = {text: [] for text in variants}
    errors: dict[str, list[dict[str, float]]] = {text: [] for text in variants}
    for draw in range(options.draws):
        rules: dict[str, list] = {}  # words -> each group's packed weights

        def in_groups(variant: Variant, draw=draw, rules=rules):
            """Each group, and its operands."""
            if variant.words not in rules:
                generator = torch.Generator().manual_seed(draw)
                factors = [1 + torch.rand((), generator=generator).item() for _ in groups]
                rules[variant.words] = [
                    packed([weights.originals[name] for name in group], variant.words, c)
                    for group, c in zip(groups, factors, strict=True)
                ]
            for k, (group, rule) in enumerate(zip(groups, rules[variant.words], strict=True)):
                squares = moments[group[0]].second.diagonal() if variant.needs_inputs else None
                seed = draw * len(groups) + k
                yield group, operands([weights.originals[name] for name in group], variant, rule, squares, seed)

        for text, variant in variants.items():
            if variant.only:
                set_weights(weights, in_groups(variants[options.rules[0]]))
            set_weights(weights, in_groups(variant), variant.only)
            losses[text].append(token_losses(model, ids, windows).double().mean().item() - base)
            print(f"draw {draw}: {text:20} loss {losses[text][-1]:+.4f}", flush=True)
            if options.errors:
                errors[text].append(mean_errors(weights, groups, moments))
        if options.out:
            record = {"model": options.model, "tokens": len(ids), "base": base, "losses": losses, "device": device}
            if options.errors:
                record["errors"] = errors
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    for text, own in losses.items():
        mean, error = mean_and_error(own)
        against, its_error = mean_and_error([a - b for a, b in zip(own, losses[options.rules[0]], strict=True)])
        spread = f" ± {error:.4f}, draws from {min(own):+.4f} to {max(own):+.4f}" if error is not None else ""
        difference = f"; against {options.rules[0]} {against:+.4f}" + (f" ± {its_error:.4f}" if its_error is not None else "")
        print(f"{text:20} loss {mean:+.4f}{spread}" + (difference if text != options.rules[0] else ""))
    for text, own_errors in errors.items():
        if own_errors:
            means = {key: mean_and_error([e[key] for e in own_errors])[0] for key in own_errors[0]}
            print(f"{text:20} errors " + ", ".join(f"{key} {value:.5f}" for key, value in means.items()))


def set_weights(weights, in_groups, only: str = "") -> None:
    """Put operands into the layers whose names `only` finds."""
    for group, own in in_groups:
        for name, operand in zip(group, own, strict=True):
            if re.search(only, name):
                weights.layers[name].weight.data.copy_(operand)


def mean_errors(weights, groups: list[tuple[str, ...]], moments: dict[str, Moments]) -> dict[str, float]:
    """`Moments.errors` of the weights that the layers have now, the mean over layers."""
    own = []
    for group in groups:
        for name in group:
            w = weights.originals[name].float()
            own.append(moments[group[0]].errors(weights.layers[name].weight.data.float() - w, w))
    return {key: sum(errors[key] for errors in own) / len(own) for key in own[0]}


def _text(file: Path | None, first: int = 0) -> str:
    if file is not None:
        return file.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[first::2])


if __name__ == "__main__":
    main()
