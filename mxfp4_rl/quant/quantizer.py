"""The quantiser: a tensor and a `QuantRecipe` to codes and scales, or straight to the operand they stand for.

Weights, activations, gradients, the rollout's weights, the monitor and the command line all come here. `quantize` returns the
codes, `fake_quantize` the operand x_hat; both run the same passes of the recipe's format (`mxfp4.py`, `nvfp4.py`), chunk by
chunk, and agree to the bit. On CUDA, recipes that the Triton kernels know run there instead, with the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from mxfp4_rl.quant.elements import encode_e2m1, pack_codes
from mxfp4_rl.quant.hadamard import rotate_back
from mxfp4_rl.quant.mxfp4 import MXFP4Quantizer
from mxfp4_rl.quant.nvfp4 import NVFP4Quantizer
from mxfp4_rl.quant.passes import Chunk, Rows, error_weights
from mxfp4_rl.quant.tensor import MXFP4Tensor, NVFP4Tensor, QuantizedTensor, axis_back, saturated
from mxfp4_rl.recipe import QuantRecipe

_QUANTIZERS = {"mxfp4": MXFP4Quantizer, "nvfp4": NVFP4Quantizer}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def kernels_of(recipe: QuantRecipe) -> str:
    """The module of mxfp4_kernels that quantises by a recipe, if any does."""
    return "quantize.search" if recipe.format == "nvfp4" or recipe.scale_rule == "search" else "quantize.triton"


@torch.no_grad()
def quantize(
    x: torch.Tensor,
    recipe: QuantRecipe | None = None,
    axis: int = -1,
    backend: str | None = None,
    seed: int | None = None,
    tensor_scale: float | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Quantise `x` along `axis`.

    Args:
        x: float32, bfloat16 or float16, any shape with at least one axis. float16 and bfloat16 are widened exactly.
        recipe: defaults to `QuantRecipe()`, plain MXFP4 with the rceil rule.
        axis: the contraction axis of the product that consumes `x`; it need not be a multiple of the block size.
        backend: "reference", "triton", or None for the best one for the tensor's device and the recipe.
        seed: of stochastic rounding, 64 bits; None draws one from PyTorch's default generator.
        tensor_scale: g of nvfp4, for who keeps one elsewhere (`mxfp4_rl.kv_cache`); None takes it from `x`.
        importance: float32 (K,), K elements along `axis`, not negative: what the elements' squared errors are multiplied by
            where a rule compares scales by them. For a weight, the mean squares of its inputs. None weighs all alike.

    Returns:
        MXFP4Tensor or NVFP4Tensor, by the recipe's format.

    Raises:
        TypeError: `x` is not one of the floating types above. IndexError: no such axis. ValueError: a backend that does not
        exist, is not there, or does not know the recipe; a tensor scale for a recipe that has none or chooses its own; an
        importance of another shape, negative or not finite, or for a recipe that does not weigh errors.
    """
    recipe = recipe or QuantRecipe()
    check(x, axis)
    if importance is not None:
        _check_importance(importance, x.shape[axis], recipe)
    if tensor_scale is not None and (recipe.format != "nvfp4" or recipe.scale_rule == "soar"):
        raise ValueError(f"tensor_scale={tensor_scale!r} is for nvfp4's rules but soar, not {recipe.describe()}: give None")
    if kernels := triton_module(kernels_of(recipe), x, recipe, backend):
        given: dict[str, Any] = {} if tensor_scale is None else {"tensor_scale": tensor_scale}
        if importance is not None:
            given["importance"] = importance
        return kernels.packed(x.detach(), recipe, axis % x.ndim, **given)
    rows = Rows(x.detach(), axis, recipe)
    quantizer, chunks = _passes(rows, recipe, seed, tensor_scale=tensor_scale, importance=importance)

    def store(width, dtype=torch.uint8):
        return torch.empty(rows.count, width, dtype=dtype, device=x.device)

    stored = [(store(rows.width // 2), store(rows.blocks)) for _ in range(1 + (recipe.fallback_alpha is not None))]
    macro = store(-(-rows.width // recipe.macro_size), torch.float32) if recipe.macro_block else None
    for r, chunk in chunks:
        for (codes, scales), values, code in zip(stored, chunk.values, chunk.scale_codes, strict=True):
            codes[r] = pack_codes(encode_e2m1(values.view(values.shape[0], -1)))
            scales[r] = code.to(torch.uint8)
        if macro is not None:
            macro[r] = chunk.macro

    def shaped(t):
        return t.view(*rows.lead, t.shape[-1])

    common = {"shape": x.shape, "axis": axis % x.ndim, "block_size": recipe.block_size, "hadamard": recipe.hadamard}
    if recipe.format == "nvfp4":
        ((codes, scales),) = stored
        return NVFP4Tensor(shaped(codes), shaped(scales), tensor_scale=quantizer.tensor_scale, **common)
    first, *second = [MXFP4Tensor(shaped(c), shaped(s), **common) for c, s in stored]
    first.macro_size, first.pre_scale = recipe.macro_size, recipe.pre_scale  # both passes live in the scaled domain
    if macro is not None:
        first.macro = shaped(macro)
    if second:
        first.residual, first.alpha = second[0], recipe.fallback_alpha
    return first


@torch.no_grad()
def fake_quantize(
    x: torch.Tensor,
    recipe: QuantRecipe | None = None,
    axis: int = -1,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`quantize(x, recipe, axis, seed=seed).dequantize(dtype)` to the bit, without building the codes.

    Args and errors as `quantize`; `dtype` defaults to that of `x`. The result has the shape of `x` and no gradient.
    """
    recipe = recipe or QuantRecipe()
    check(x, axis)
    if kernels := triton_module(kernels_of(recipe), x, recipe, backend, draws=True):
        return kernels.operand(x.detach(), recipe, axis % x.ndim, dtype or x.dtype, _drawn(seed, recipe))
    rows = Rows(x.detach(), axis, recipe)
    out = torch.empty(rows.count, rows.length, dtype=dtype or x.dtype, device=x.device)
    for r, chunk in _passes(rows, recipe, seed)[1]:
        x_hat = chunk.operand().flatten(-2)
        if recipe.hadamard:
            x_hat = rotate_back(x_hat, recipe.hadamard)
        out[r] = saturated(x_hat[:, : rows.length], out.dtype)
    return axis_back(out, x.shape, axis % x.ndim)


def passes(
    x: torch.Tensor, recipe: QuantRecipe, axis: int, seed: int | None = None
) -> tuple[Rows, Iterator[tuple[torch.Tensor, Chunk]]]:
    """The rows of `x`, and per chunk its blocks as they were (rotated, if the recipe rotates) with the Chunk they became.

    The blocks are float32 (R, blocks, block_size), valid until the next chunk. Args and errors as `quantize`.
    """
    rows = rows_of(x, axis, recipe)
    return rows, _passes(rows, recipe, seed, keep_source=True)[1]


def _passes(
    rows: Rows,
    recipe: QuantRecipe,
    seed: int | None,
    keep_source: bool = False,
    tensor_scale: float | None = None,
    importance: torch.Tensor | None = None,
):
    """The tensor's quantiser, and an iterator over (rows or the chunk's source, Chunk)."""
    fixed: dict[str, Any] = {} if tensor_scale is None else {"fixed_scale": tensor_scale}
    if importance is not None:
        fixed["error_weights"] = error_weights(importance.to(rows.flat.device), rows.width, recipe.block_size)
    quantizer = _QUANTIZERS[recipe.format](recipe, rows, _drawn(seed, recipe), **fixed)

    def chunks():
        for r, b in rows.chunks():
            key = b.x.clone() if keep_source else r
            yield key, quantizer.chunk(b, r.start * rows.width)

    return quantizer, chunks()


def _drawn(seed: int | None, recipe: QuantRecipe) -> int | None:
    """The seed of stochastic rounding, drawn from PyTorch's default generator if it was not given."""
    return int(torch.randint(2**63 - 1, ())) if seed is None and recipe.rounding == "stochastic" else seed


def rows_of(x: torch.Tensor, axis: int, recipe: QuantRecipe) -> Rows:
    """`x` as rows along `axis`; errors as `quantize`."""
    check(x, axis)
    return Rows(x.detach(), axis, recipe)


def backend_for(recipe: QuantRecipe, device: torch.device) -> str:
    """What makes an operand of a recipe on a device (`fake_quantize`, `backend=None`): "triton" or "reference"."""
    kernels = triton_module(kernels_of(recipe), torch.empty(0, device=device), recipe, None, draws=True)
    return "reference" if kernels is None else "triton"


def triton_module(name: str, x: torch.Tensor, recipe: QuantRecipe, backend: str | None, draws: bool = False):
    """Module `name` of mxfp4_kernels if `backend` and the recipe have Triton run on x, or None for the reference.

    Args:
        draws: its kernel rounds stochastically where the recipe says so.

    Raises:
        ValueError: as `quantize`.
    """
    if backend not in (None, "reference", "triton"):
        raise ValueError(f"backend={backend!r} is not one of 'reference', 'triton', None")
    if backend == "reference" or (backend is None and not x.is_cuda):
        return None
    try:
        from mxfp4_kernels.device import INTERPRETED, unsupported

        kernels = importlib.import_module(f"mxfp4_kernels.{name}")
    except ImportError as error:
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot be loaded ({error}): install triton, or use 'reference'") from error
        return None
    if backend == "triton" and not x.is_cuda and not INTERPRETED.value:
        raise ValueError(f"backend='triton' runs on CUDA, not on {x.device.type}: use 'reference', or set TRITON_INTERPRET=1")
    if why := getattr(kernels, "unsupported", unsupported)(recipe, draws):
        if backend == "triton":
            raise ValueError(f"backend='triton' has no kernel for {recipe.describe()} ({why}): use 'reference' or None")
        return None
    return kernels


def _check_importance(importance: torch.Tensor, length: int, recipe: QuantRecipe) -> None:
    if why := recipe.why_not_weighed():
        raise ValueError(f"importance is not for {recipe.describe()}: {why}")
    if importance.dtype != torch.float32 or importance.shape != (length,):
        raise ValueError(f"importance is {importance.dtype} {tuple(importance.shape)}, not float32 ({length},)")
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError("importance holds a number that is negative or not finite")


def check(x: torch.Tensor, axis: int) -> None:
    """Raise `quantize`'s TypeError or IndexError."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"cannot quantise {x.dtype}; give float32, bfloat16 or float16")
    if not -x.ndim <= axis < x.ndim:
        raise IndexError(f"axis={axis} is out of range for a tensor of shape {tuple(x.shape)}")
