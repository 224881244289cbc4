"""Dequantise kernel against `MXFP4Tensor.dequantize`, bit for bit."""

import dataclasses

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, NAMES, assert_same, data  # isort: skip

from mxfp4_kernels.quantize import dequantize as kernel

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant.tensor import MXFP4Tensor, QuantizedTensor


def reference(q, dtype=torch.float32):
    return QuantizedTensor.dequantize(q, dtype)  # the class's own goes to the kernel on a GPU


@pytest.mark.parametrize("name", [*NAMES, "mxfp4+mbs96", "mxfp4+prescale", "mxfp4+prescale+mbs64+of0.5"])
@pytest.mark.parametrize("shape", [(33, 33), (3, 576), (1, 70), (5, 3, 64), (9, 1024), (200, 70)], ids=str)
def test_values_are_the_reference_s(shape, name):
    x = data(shape, torch.float32)
    for axis in range(len(shape)):
        q = quantize(x, QuantRecipe.parse(name), axis)
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16):
            got = kernel.dequantize(q.to(DEVICE), dtype)
            assert got.is_contiguous()
            assert_same(got, reference(q, dtype))


def test_every_code_under_every_scale():
    """16 codes x 256 scale bytes, 0 (2^-127) and 255 (NaN) among them; in BF16 too, where only subnormal values round."""
    codes = (torch.arange(16, dtype=torch.uint8) | (torch.arange(16, dtype=torch.uint8).flip(0) << 4)).repeat(256, 1)
    q = MXFP4Tensor(codes, torch.arange(256, dtype=torch.uint8).unsqueeze(1), torch.Size((256, 32)), 1)
    assert_same(kernel.dequantize(q.to(DEVICE), torch.float32), reference(q))
    normal = slice(2, 253)
    expected, got = reference(q, torch.bfloat16), kernel.dequantize(q.to(DEVICE), torch.bfloat16)
    assert_same(got[normal], expected[normal])
    assert got[255].isnan().all()


@pytest.mark.parametrize("alpha", [None, 0.5, 1e-30])
def test_quotients_by_factors_are_rounded_correctly(alpha):
    """Ordinary ones, subnormal ones, both in a tile, and ordinary ones beside zero blocks, whose scales are the smallest."""
    recipe = QuantRecipe(macro_block="static", fallback_alpha=alpha)
    x = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    scales = [torch.tensor(2.0**e) for e in (0, -104, -124, -130)] + [torch.exp2(-6 * torch.arange(24).unsqueeze(1))]
    for by in (*scales, (torch.arange(256) // 32) % 2):
        for axis in (0, 1):
            q = quantize(x * by, recipe, axis)
            assert_same(kernel.dequantize(q.to(DEVICE), torch.float32), reference(q))


def test_codes_at_odd_addresses():
    q = quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    buffer = torch.empty(q.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    buffer[1:] = q.codes.flatten().to(DEVICE)
    odd = dataclasses.replace(q.to(DEVICE), codes=buffer[1:].view(q.codes.shape))
    assert_same(kernel.dequantize(odd, torch.float32), reference(q))


def test_strided_codes_empty_tensors_and_what_is_refused():
    x = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    q = quantize(x, QuantRecipe(macro_block="static", fallback_alpha=0.5))
    every_other = dataclasses.replace(
        q,
        codes=q.codes[::2],
        scales=q.scales[::2],
        macro=q.macro[::2],
        residual=dataclasses.replace(q.residual, codes=q.residual.codes[::2], scales=q.residual.scales[::2]),
        shape=torch.Size((12, 160)),
    )
    assert_same(kernel.dequantize(every_other.to(DEVICE), torch.float32), reference(q)[::2])
    for shape in ((0, 64), (64, 0), (0,)):
        assert kernel.dequantize(quantize(torch.empty(shape)).to(DEVICE), torch.float32).shape == shape
    rotated = quantize(x, QuantRecipe(hadamard=64))
    assert not kernel.supports(rotated) and not kernel.supports(quantize(x, QuantRecipe(block_size=16)))
    with pytest.raises(ValueError, match="no Triton kernel for blocks of 32, hadamard=64"):
        kernel.dequantize(rotated, torch.float32)


def test_quantised_tensors_dequantise_themselves_with_the_kernel_on_a_gpu():
    x = data((40, 96), torch.float32)
    for name in ("mxfp4+mbs+of0.5", "mxfp4+hadamard32", "nvfp4"):
        for axis in (0, 1):
            q = quantize(x, QuantRecipe.parse(name), axis)
            assert_same(q.to(DEVICE).dequantize(), reference(q))
