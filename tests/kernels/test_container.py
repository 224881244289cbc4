"""FP8 containers: the reference's bits, and no bit of the operand lost."""

import pytest
import torch

from tests.kernels.common import DEVICE, NAMES, assert_same, data  # isort: skip

from mxfp4_kernels.container import reference
from mxfp4_kernels.container import triton as container_kernel

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(33, 33), (1, 9000)], ids=str)
def test_containers_are_the_reference_s(shape, name):
    recipe = QuantRecipe.parse(name)
    x = data(shape, torch.float32)
    for axis, view in ((1, x), (0, x.t())) if shape[1] < 8192 else ((1, x),):  # long rows are read twice
        expected = reference.container(quantize(x, recipe, axis))
        got = container_kernel.container(view.to(DEVICE), recipe)
        passes = [(got, expected)] + ([(got.residual, expected.residual)] if recipe.fallback_alpha else [])
        for a, b in passes:
            for field in ("payload", "scale", "wide"):
                assert_same(getattr(a, field), getattr(b, field))
        if recipe.macro_block:
            assert_same(got.factor, expected.factor)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+oas", "mxfp4+mbs", "mxfp4+of0.5"])
def test_containers_lose_no_bit(name):
    """What a container stands for is the operand, bit for bit, in every row that fits; others are zero and flagged."""
    recipe = QuantRecipe.parse(name)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    x[3] = torch.exp2(torch.linspace(-20, 20, 256))
    x[4, 64:96] *= 2.0**-9
    got = container_kernel.container(x.to(DEVICE), recipe)
    operand = fake_quantize(x, recipe)
    wide = got.wide.cpu()
    assert wide.nonzero().flatten().tolist() == [3]
    values = got.dequantize().cpu()
    assert torch.equal(values[~wide], operand[~wide])
    assert (got.payload.float().cpu()[wide] == 0).all()


def test_every_code_at_every_offset_of_the_window():
    """16 codes x 15 offsets: one row with its largest scale in one block and every code at the offset in another."""
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    block = torch.cat((codes, -codes, codes, -codes))
    rows = []
    for offset in range(16):
        rows.append(torch.cat((block, block * 2.0**-offset)))
    x = torch.stack(rows)
    got = container_kernel.container(x.to(DEVICE), QuantRecipe())
    assert got.wide.tolist() == [False] * 15 + [True]
    for offset in range(15):
        assert torch.equal(got.dequantize()[offset].cpu(), x[offset])
        signs = torch.signbit(got.payload[offset].float().cpu())
        assert torch.equal(signs, torch.signbit(x[offset])), "-0 stays -0 at every offset"
