"""The error components of a model in training, from its layers to the metrics of a step.

Weights are measured as they are at the end of the step; activations and gradients while they pass. Per layer at most
`max_rows` evenly spaced rows (tokens) are measured: the energies are ratios of sums, which a sample of 64 rows a layer
estimates closely at a small part of the cost. Of fused experts those count that got tokens while they were measured; each
expert's own errors are measured too (`monitor.experts`).
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from mxfp4_rl.monitor import experts
from mxfp4_rl.nn import ExpertsProjection, by_group, converted_layers
from mxfp4_rl.nn.linear import LayerStats, spaced_rows
from mxfp4_rl.nn.operand import looks_at_other_rows
from mxfp4_rl.quant import ErrorStats, error_stats

# Layer name -> operand ("weight", "activation", "grad") -> sums; of fused experts also "tokens" -> int64 (E,), their counts,
# and "experts/weight", "experts/activation" -> float64 (E, 6), the energies of each expert (`nn.by_group`).
LayerErrors = dict[str, dict[str, ErrorStats | torch.Tensor]]

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
        stats, layer.stats = layer.stats, None
        sums = dict(stats.sums) if stats is not None else {}
        if stats is not None and stats.tokens is not None:
            sums["tokens"] = stats.tokens.cpu()
            sums |= {f"experts/{operand}": energies.cpu() for operand, energies in stats.by_expert.items()}
        if layer.recipe.weight is not None:
            weight = layer.weight.detach()
            if isinstance(layer, ExpertsProjection):
                tokens = None if stats is None else stats.tokens
                sums["weight"] = _experts_error(layer, weight, tokens, max_rows, dtype)
                if tokens is not None:
                    sums["experts/weight"] = _error_of_each(layer, weight, max_rows, dtype).cpu()
            else:
                weight = weight.to_local() if hasattr(weight, "to_local") else weight
                sums["weight"] = error_stats(spaced_rows(weight, max_rows, layer.recipe.weight).to(dtype), layer.recipe.weight)
        errors[name] = sums
    return errors


def _experts_error(layer: ExpertsProjection, weight, tokens, max_rows: int | None, dtype: torch.dtype) -> ErrorStats:
    """Of the weights of the experts that got tokens, on this rank those that it holds; of all where nothing was measured."""
    recipe = layer.recipe.weight
    visited = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
    if tokens is not None:
        visited = tokens > 0
    if isinstance(weight, DTensor):  # cut between experts, like the numbers of their tokens on all ranks together
        mesh, placements = weight.device_mesh, weight.placements
        if tokens is not None:
            visited = DTensor.from_local(tokens, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor() > 0
        visited = distribute_tensor(visited, mesh, placements, src_data_rank=None).to_local()
        weight = weight.to_local()
    own = weight.transpose(1, 2) if layer.axis == -2 else weight
    visited = visited.to(own.device)
    if looks_at_other_rows(recipe):
        held = visited.nonzero().flatten().tolist()
        most = None if max_rows is None else max(1, max_rows // max(1, len(held)))
        return sum((error_stats(spaced_rows(own[e], most, recipe).to(dtype), recipe) for e in held), ErrorStats())
    # The rows to measure are chosen by number: a copy of all visited experts' FP32 weights can take gigabytes.
    experts, outputs = own.shape[:2]
    numbers = torch.arange(experts * outputs, device=own.device).view(experts, outputs)[visited].view(-1, 1)
    chosen = spaced_rows(numbers, max_rows, recipe).squeeze(-1)
    return error_stats(own[chosen // outputs, chosen % outputs].to(dtype), recipe)


def _error_of_each(layer: ExpertsProjection, weight, max_rows: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Energies of every expert's weight (`nn.by_group`); zero for those that other ranks hold."""
    experts = weight.shape[0]
    own = torch.arange(experts, device=weight.device)
    if isinstance(weight, DTensor):
        own = distribute_tensor(own, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
        weight = weight.to_local()
    matrices = weight.transpose(1, 2) if layer.axis == -2 else weight
    energies = torch.zeros(experts, 1 + len(by_group.COMPONENTS), dtype=torch.float64, device=matrices.device)
    if len(matrices):
        most, recipe = by_group.rows_each(max_rows, experts), layer.recipe.weight
        if looks_at_other_rows(recipe):  # whole tiles of each
            matrices = torch.stack([spaced_rows(matrix, most, recipe) for matrix in matrices])
        elif most is not None and most < matrices.shape[1]:
            matrices = matrices[:, torch.linspace(0, matrices.shape[1] - 1, most, device=matrices.device).round().long()]
        own = own.to(matrices.device)
        expert = own.repeat_interleave(matrices.shape[1])
        energies = by_group.energies_by_group(matrices.flatten(0, 1).to(dtype), recipe, expert, experts)
    return energies


def pool(errors: list[LayerErrors]) -> LayerErrors:
    """Sum the statistics of several ranks."""
    pooled: LayerErrors = {}
    for one in errors:
        for name, sums in one.items():
            into = pooled.setdefault(name, {})
            for operand, stats in sums.items():
                into[operand] = into[operand] + stats if operand in into else stats
    return pooled


def error_metrics(errors: LayerErrors, layers: bool = True) -> dict[str, float]:
    """The step's metrics: `mxfp4/...` and `mxfp4_share/...` over all layers, `mxfp4_layers/<name>/...` of the weights.

    And the tokens an expert got, `mxfp4_layers/<name>/tokens_...`, with the experts that got none; over all layers' experts
    `mxfp4_experts/...`, few numbers however many experts there are (`experts.metrics`).
    """
    metrics: dict[str, float] = {}
    for operand, prefix in _PREFIX.items():
        total = sum((sums[operand] for sums in errors.values() if operand in sums), ErrorStats())
        metrics |= {f"{prefix}/{k}": v for k, v in total.metrics().items()}
        metrics |= {f"{_SHARE_PREFIX[operand]}/{k}": v for k, v in total.shares().items()}
    metrics |= experts.metrics(errors)
    if layers:
        for name, sums in errors.items():
            values = sums["weight"].metrics() if "weight" in sums else {}
            metrics |= {f"mxfp4_layers/{name}/{k}": values[k] for k in _PER_LAYER if k in values}
            if "tokens" in sums:
                metrics |= {f"mxfp4_layers/{name}/{k}": v for k, v in _token_metrics(sums["tokens"]).items()}
    return metrics


def _token_metrics(tokens: torch.Tensor) -> dict[str, float]:
    return {
        "tokens_min": float(tokens.min()),
        "tokens_mean": float(tokens.double().mean()),
        "tokens_max": float(tokens.max()),
        "tokens_none": float((tokens == 0).sum()),
        "tokens_imbalance": experts.imbalance(tokens),
    }
