"""Blocks of tokens as codes and scales.

A block is the keys, or the values, of B tokens of one head, (B, D). Each is quantised along what its product contracts: keys
along the channels (Q K^T), values along the tokens (P V), so that a product in FP4 could read them as they are. NVFP4's
second scale belongs to the block and is a power of two:

    g = 2^ceil(log2(amax(block) / (6 * 256)))     s = E4M3(amax(16) / 6 / g), or searched from there     x_hat = E2M1 * s * g

It depends on nothing but the block, so a sequence's cache is the same whoever else is in the batch and however the prompt was
cut, and it costs 8 bits for B * D values. With 256 in place of E4M3's 448 the largest s leaves an octave for the search above
it, and 13 below until E4M3 turns subnormal. E2M1 times E4M3 has six significant bits, so x_hat is exact in BF16. MXFP4's scales
reach everywhere by themselves and need no second one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxfp4_rl.quant import quantize
from mxfp4_rl.quant.elements import decode_packed
from mxfp4_rl.quant.scales import exp2_byte, inverse_scale, scale_byte
from mxfp4_rl.recipe import QuantRecipe

_TOP = 6.0 * 256  # of a block's largest magnitude, in units of g


@dataclass
class Blocks:
    """Quantised blocks; the leading axes number them.

    Attributes:
        codes: uint8 (..., A, W / 2), two E2M1 codes a byte, low nibble = even index, along the quantised axis W: A x W is
            B x D for keys and D x B for values.
        scales: uint8 (..., A, W / 16 or 32): the bits of E4M3 (nvfp4) or E8M0 (mxfp4).
        exponents: uint8 (...), g as 2^(byte - 127), 255 for a block that held NaN or Inf; None for mxfp4.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    exponents: torch.Tensor | None

    @classmethod
    def empty(cls, lead: tuple[int, ...], rows: int, width: int, recipe: QuantRecipe, device) -> Blocks:
        """Zeros for `lead` blocks of rows x width values."""

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.uint8, device=device)

        exponents = zeros(*lead) if recipe.format == "nvfp4" else None
        return cls(zeros(*lead, rows, width // 2), zeros(*lead, rows, width // recipe.block_size), exponents)

    def map(self, function) -> Blocks:
        """`function` of every tensor."""
        return Blocks(*(None if t is None else function(t) for t in (self.codes, self.scales, self.exponents)))

    def put(self, rows: torch.Tensor, numbers: torch.Tensor, new: Blocks) -> None:
        """Write blocks (P, H, ...) to (R, H, N, ...) at these P rows and block numbers."""
        for ours, theirs in zip(self.tensors(), new.tensors(), strict=True):
            ours[rows, :, numbers] = theirs

    def grown(self, count: int) -> Blocks:
        """(R, H, N, ...) with room for `count` blocks, the new ones zero; itself where there is room."""
        more = count - self.codes.shape[2]
        if more <= 0:
            return self
        return self.map(lambda t: torch.cat((t, t.new_zeros(*t.shape[:2], more, *t.shape[3:])), dim=2))

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.codes, self.scales, self.exponents) if t is not None]


@dataclass
class Stored:
    """All that a layer holds of R sequences, H heads of D channels, N blocks of B tokens, S sinks: what a kernel reads.

    Token p < S of a sequence is a sink; the next packed[r] * B are in its first packed[r] blocks; the rest, up to lengths[r],
    in its open block.

    Attributes:
        keys, values: Blocks (R, H, N, B, D) and (R, H, N, D, B).
        sink_keys, sink_values: (R, H, S, D). open_keys, open_values: (R, H, B, D), of the same floating type.
        lengths, packed: int32 (R,).
        recipe: of the blocks.
    """

    keys: Blocks
    values: Blocks
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    open_keys: torch.Tensor
    open_values: torch.Tensor
    lengths: torch.Tensor
    packed: torch.Tensor
    recipe: QuantRecipe


@torch.no_grad()
def pack(x: torch.Tensor, recipe: QuantRecipe) -> Blocks:
    """Quantise blocks along their last axis, float (..., A, W)."""
    x = x.float()
    if recipe.format != "nvfp4":
        q = quantize(x, recipe)
        return Blocks(q.codes, q.scales, None)
    exponents = scale_byte(x.abs().amax((-1, -2)), _TOP)
    q = quantize(x * inverse_scale(exponents)[..., None, None], recipe, tensor_scale=1.0)
    return Blocks(q.codes, q.scales, exponents.to(torch.uint8))


def unpack(blocks: Blocks, recipe: QuantRecipe, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x_hat of all blocks, (..., A, W); computed in float32, then cast to `dtype`."""
    x = decode_packed(blocks.codes).unflatten(-1, (-1, recipe.block_size))
    if blocks.exponents is None:
        scales = exp2_byte(blocks.scales)
    else:
        scales = blocks.scales.view(torch.float8_e4m3fn).float() * exp2_byte(blocks.exponents)[..., None, None]
    return x.mul_(scales.unsqueeze(-1)).flatten(-2).to(dtype)
