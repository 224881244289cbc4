"""Error of each layer's output on a text: how far X W_hat^T is from X W^T, for the inputs X that the layer has in BF16.

The inputs come from the unquantised model, so the error of one layer does not reach the next and layers can be compared. Both
products are float32 of BF16 operands. The error is |X (W_hat - W)^T|^2 / |X W^T|^2: weights that meet large inputs count more
than in the weight's own error.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from mxfp4_rl.ptq.weights import Weights, squares


class LayerOutputs:
    """The inputs of a model's layers on some text, kept: 2 bytes a token and feature, once for layers that share them.

    Args:
        model: unquantised as yet. weights: of it. tokens: ids, int64, any number. context: tokens of a forward at most.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, weights: Weights, tokens: torch.Tensor, context: int):
        self._weights = weights
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._shares: dict[str, str] = {}  # layer -> the layer whose inputs it reads too
        last: list = [None, None]  # query, key and value get the same tensor, one after the other

        def keep(name: str):
            def hook(module, args):
                x = args[0]
                if x is last[0]:
                    self._shares[name] = last[1]
                    return
                last[:] = x, name
                self._shares[name] = name
                self._inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).to(torch.bfloat16))

            return hook

        hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in weights.layers.items()]
        try:
            for part in tokens.split(context):
                model(input_ids=part.unsqueeze(0), use_cache=False, **keeping_logits(model, 1))
                last[:] = None, None
        finally:
            for hook in hooks:
                hook.remove()
        self._energy = {name: squares(self._input(name) @ weights.originals[name].float().T) for name in self._shares}

    def _input(self, name: str) -> torch.Tensor:
        return torch.cat(self._inputs[self._shares[name]]).float()

    @torch.no_grad()
    def mean_squares(self) -> dict[str, torch.Tensor]:
        """Layer -> mean squares of its inputs over the text, float32 (in,): llama.cpp's importance matrix."""
        own = {name: self._input(name).square().mean(0) for name in self._inputs}
        return {name: own[first] for name, first in self._shares.items()}

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Layer -> relative squared error of its output with the weights that the model has now."""
        out = {}
        for name, energy in self._energy.items():
            change = self._weights.layers[name].weight.float() - self._weights.originals[name].float()
            out[name] = squares(self._input(name) @ change.T) / energy if energy else 0.0
        return out


def keeping_logits(model: nn.Module, count: int) -> dict[str, int]:
    """What asks a model of transformers for the last `count` positions' logits only; nothing, where it takes no such wish."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def mean_and_worst(errors: dict[str, float]) -> tuple[float, str, float]:
    """The mean over layers, the worst layer and its error."""
    worst = max(errors, key=errors.__getitem__)
    return sum(errors.values()) / len(errors), worst, errors[worst]
