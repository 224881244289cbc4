"""MXFP4 reinforcement learning on verl: quantised training and rollout, with the error of every layer in view."""

from mxfp4_rl.recipe import ModelRecipe, QuantRecipe, RecipeError

__version__ = "0.1.0"
__all__ = ["ModelRecipe", "QuantRecipe", "RecipeError", "convert", "decompose", "quantize"]


def __getattr__(name: str):
    # torch is imported on first use: `import verl` loads this package in every Ray process.
    if name in ("quantize", "decompose"):
        from mxfp4_rl import quant

        return getattr(quant, name)
    if name == "convert":
        from mxfp4_rl.nn import convert

        return convert
    raise AttributeError(f"module 'mxfp4_rl' has no attribute {name!r}")
