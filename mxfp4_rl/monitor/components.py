"""The error components of a model in training, from its layers to the metrics of a step.

Weights are measured as they are at the end of the step; activations and gradients while they pass. Per layer at most
`max_rows` evenly spaced rows (tokens) are measured: the energies are ratios of sums, which a sample of 64 rows a layer
estimates closely at a small part of the cost.
"""

import torch
from torch import nn

from mxfp4_rl.nn import converted_layers
from mxfp4_rl.nn.linear import LayerStats, spaced_rows
from mxfp4_rl.quant import ErrorStats, error_stats

LayerErrors = dict[str, dict[str, ErrorStats]]  # layer name -> operand ("weight", "activation", "grad") -> sums

_PREFIX = {"weight": "mxfp4", "activation": "mxfp4/activation", "grad": "mxfp4/grad"}
_SHARE_PREFIX = {"weight": "mxfp4_share", "activation": "mxfp4_share/activation", "grad": "mxfp4_share/grad"}
_PER_LAYER = ("scale_bias", "deadzone", "grid_noise", "fallback", "rel_mse")


def start_measuring(model: nn.Module, max_rows: int | None) -> None:
    """Let every converted layer measure its activations and gradients from now on."""
    for layer in converted_layers(model).values():
        layer.stats = LayerStats(max_rows)


@torch.no_grad()
def collect_errors(model: nn.Module, max_rows: int | None, dtype: torch.dtype) -> LayerErrors:
    """Stop measuring; returns the sums, with those of the weights' local rows, cast to `dtype` as the forward does."""
    errors: LayerErrors = {}
    for name, layer in converted_layers(model).items():
        sums = dict(layer.stats.sums) if layer.stats is not None else {}
        layer.stats = None
        if layer.recipe.weight is not None:
            weight = layer.weight.detach()
            weight = weight.to_local() if hasattr(weight, "to_local") else weight
            sums["weight"] = error_stats(spaced_rows(weight, max_rows, layer.recipe.weight).to(dtype), layer.recipe.weight)
        errors[name] = sums
    return errors


def pool(errors: list[LayerErrors]) -> LayerErrors:
    """Sum the statistics of several ranks."""
    pooled: LayerErrors = {}
    for one in errors:
        for name, sums in one.items():
            into = pooled.setdefault(name, {})
            for operand, stats in sums.items():
                into[operand] = into.get(operand, ErrorStats()) + stats
    return pooled


def error_metrics(errors: LayerErrors, layers: bool = True) -> dict[str, float]:
    """The step's metrics: `mxfp4/...` and `mxfp4_share/...` over all layers, `mxfp4_layers/<name>/...` of the weights."""
    metrics: dict[str, float] = {}
    for operand, prefix in _PREFIX.items():
        total = sum((sums[operand] for sums in errors.values() if operand in sums), ErrorStats())
        metrics |= {f"{prefix}/{k}": v for k, v in total.metrics().items()}
        metrics |= {f"{_SHARE_PREFIX[operand]}/{k}": v for k, v in total.shares().items()}
    if layers:
        for name, sums in errors.items():
            values = sums["weight"].metrics() if "weight" in sums else {}
            metrics |= {f"mxfp4_layers/{name}/{k}": values[k] for k in _PER_LAYER if k in values}
    return metrics
