"""The plugin that vLLM loads by entry point (group `vllm.general_plugins`) in every one of its processes.

It adds the quantisation method "mxfp4_rl": linear layers and experts that hold packed MXFP4 weights and multiply them with the
kernels of `mxfp4_kernels`. With it, `LLM(..., quantization="mxfp4_rl", hf_overrides={"quantization_config": ...})` works
outside verl too (`quantization_config`). vLLM goes on after an exception raised here, so it is reported first.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from typing import Any

from packaging.requirements import Requirement

from mxfp4_rl.recipe import ModelRecipe

METHOD = "mxfp4_rl"
SUPPORTED = ">=0.22,<0.25"  # versions of vLLM: 0.22.0 was run on GPUs and CPUs, 0.24.0 on CPUs

_ALWAYS_IMPORTED = {"humming-kernels": "humming"}  # by vLLM 0.22 for any quantised model: package -> module


def lacks() -> list[str]:
    """Requirements of the installed vLLM that it imports for any quantised model, and that are not there.

    An installation without dependencies would otherwise fail minutes later, with the trainer's model loaded.
    """
    try:
        asked = importlib.metadata.requires("vllm") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    missing = []
    for requirement in map(Requirement, asked):
        module = _ALWAYS_IMPORTED.get(requirement.name)
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if module and here and importlib.util.find_spec(module) is None:
            requirement.marker = None  # it holds, and pip needs no reminder
            missing.append(str(requirement))
    return missing


def is_for_cpus(version: str) -> bool:
    """Whether vLLM of this version is the build that runs on CPUs (and on nothing else)."""
    return version.endswith("+cpu")


def register() -> None:
    """Register the method with the vLLM of this process; vLLM may call this several times."""
    try:
        from vllm.platforms import current_platform

        from mxfp4_rl.vllm_plugin import quantization  # noqa: F401  (registers itself)

        if current_platform.is_cpu():
            from mxfp4_rl.vllm_plugin.on_cpu import keep_weights

            keep_weights()
    except Exception as error:
        print(f"[mxfp4] the vLLM plugin failed to load: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise


def quantization_config(recipe: ModelRecipe) -> dict[str, Any]:
    """What a model's `quantization_config` says, so that vLLM builds its layers for `recipe`."""
    return {"quant_method": METHOD, "recipe": recipe.to_dict()}


def compile_key(recipe: ModelRecipe) -> dict[str, str]:
    """For vLLM's `additional_config`: its cache of compiled graphs, which hold a recipe's numbers, tells runs apart by this."""
    return {"mxfp4_recipe": json.dumps(recipe.to_dict(), sort_keys=True)}
