"""What vLLM will not serve of a compressed-tensors export, told when it is written.

vLLM 0.22 multiplies query, key and value as one product, gate and up too: all or none of its parts may be quantised. Without
FP4 tensor cores (before Blackwell) it multiplies 4-bit weights by its Marlin kernel, whose tiles of inputs x outputs must
divide the product.
"""

from __future__ import annotations

from collections.abc import Mapping

from mxfp4_rl.export.formats import served_together

_MARLIN_TILES = (
    (128, 128),
    (128, 64),
    (64, 128),
    (64, 256),
)  # csrc/quantization/marlin/marlin.cu, both lists of configurations


def marlin_has_a_tiling(inputs: int, outputs: int) -> bool:
    """Of vLLM's Marlin kernel for a product as it is served, on one GPU."""
    return any(inputs % k == 0 and outputs % n == 0 for k, n in _MARLIN_TILES)


def notes(quantised: Mapping[str, tuple[int, ...]], others: set[str]) -> list[str]:
    """Sentences on what vLLM would refuse, one a reason.

    Args:
        quantised: Linear layer -> (outputs, inputs), without experts. others: Linear layers that are not quantised.
    """
    products = {tuple(served_together(name)): None for name in quantised}
    mixed, untiled = [], []
    for group in products:
        own = [name for name in group if name in quantised]
        if any(name in others for name in group):
            mixed.append(f"{own[0]} but not {next(name for name in group if name in others)}")
            continue
        inputs, outputs = quantised[own[0]][1], sum(quantised[name][0] for name in own)
        if not marlin_has_a_tiling(inputs, outputs):
            untiled.append(f"{' + '.join(name.rpartition('.')[2] for name in own)} with {inputs} inputs, {outputs} outputs")
    found = []
    if mixed:
        found.append(
            f"vLLM takes all or none of a product's parts and will refuse this: {mixed[0]} is quantised ({len(mixed)} such)"
        )
    if untiled:
        kinds = ", ".join(dict.fromkeys(untiled))
        found.append(f"vLLM's Marlin kernel, which GPUs before Blackwell need, has no tiling for {kinds} (on one GPU)")
    return found
