"""Quantise and operand kernels against the reference, bit for bit."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, NAMES, assert_same, data  # isort: skip

from mxfp4_kernels.device import supports
from mxfp4_kernels.quantize import triton as quantize_kernel

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.quant.tensor import MXFP4Tensor
from tests.test_quant import RECIPES

SHAPES = [(33, 33), (3, 576), (1, 70), (5, 3, 64), (5, 1024), (200, 70)]  # the last two are several tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_operands_are_the_reference_s(shape, name, dtype):
    recipe = QuantRecipe.parse(name)
    x = data(shape, dtype)
    for axis in range(len(shape)):
        q = quantize(x, recipe, axis)
        packed = quantize_kernel.packed(x.to(DEVICE), recipe, axis)
        assert isinstance(packed, MXFP4Tensor) and packed.shape == x.shape and packed.alpha == (recipe.fallback_alpha or 0)
        broken = (q.scales == 255).repeat_interleave(16, -1)  # a NaN has no code: the scale says it all
        for key, tensor in q.tensors().items():
            assert_same(packed.tensors()[key], tensor, broken if key.endswith("codes") else None)
        for out in (torch.float32, torch.bfloat16):
            exact = dtype == torch.bfloat16 and not recipe.macro_block and not recipe.fallback_alpha
            if GPU or out == torch.float32 or exact:
                assert_same(quantize_kernel.operand(x.to(DEVICE), recipe, axis, out), fake_quantize(x, recipe, axis, dtype=out))


@pytest.mark.parametrize("name", ["mxfp4+sr", "mxfp4+sr+mbs+of", "mxfp4+sr+oas+of1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_rounding_draws_what_the_reference_draws(shape, name):
    recipe, x = QuantRecipe.parse(name), data(shape, torch.float32)
    for seed in (12345, 2**62 + 7):
        for axis in range(len(shape)):
            got = quantize_kernel.operand(x.to(DEVICE), recipe, axis, torch.float32, seed)
            assert_same(got, fake_quantize(x, recipe, axis, seed=seed))


def test_stochastic_rounding_without_a_seed_takes_it_from_pytorch_as_the_reference_does():
    recipe, x = QuantRecipe.parse("mxfp4+sr"), torch.randn(5, 64)
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        results.append([fake_quantize(x.to(DEVICE), recipe, backend=backend).cpu() for _ in range(2)])
    (a, b), reference = results
    assert torch.equal(a, reference[0]) and torch.equal(b, reference[1]) and not torch.equal(a, b)


@pytest.mark.parametrize("alpha", [None, 0.5, 1e-30])
@pytest.mark.parametrize("macro_size", [32, 128])
def test_quotients_by_factors_are_rounded_correctly(macro_size, alpha):
    """Of ordinary numbers, of those with subnormal quotients, of both in a tile; of large blocks with tiny second passes."""
    recipe = QuantRecipe(macro_block="static", macro_size=macro_size, fallback_alpha=alpha)
    ordinary = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    scales = [torch.tensor(2.0**e) for e in (0, -84, -104, -124, -130)] + [torch.exp2(-6 * torch.arange(24).unsqueeze(1))]
    alone = torch.where(torch.arange(256) % 32 == 5, 6.0, ordinary * 2.0**-110)
    for x in (*(ordinary * by for by in scales), alone):
        for axis in (0, 1):
            got = quantize_kernel.operand(x.to(DEVICE), recipe, axis, torch.float32)
            assert_same(got, fake_quantize(x, recipe, axis))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+mbs+of1"])
def test_views_and_empty_tensors(name):
    recipe = QuantRecipe.parse(name)
    base = torch.randn(48, 160, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for view in (base[:, ::2], base[3:, 5:].t(), base.view(4, 12, 160).transpose(0, 1)):
        for axis in (0, view.ndim - 1):
            assert_same(quantize_kernel.operand(view, recipe, axis, torch.float32), fake_quantize(view.cpu(), recipe, axis))
            packed, q = quantize_kernel.packed(view, recipe, axis), quantize(view.cpu(), recipe, axis)
            for key, tensor in q.tensors().items():
                assert_same(packed.tensors()[key], tensor)
    for shape in ((0, 64), (64, 0), (0,)):
        assert quantize_kernel.operand(torch.empty(shape, device=DEVICE), recipe, len(shape) - 1, torch.float32).shape == shape
        assert quantize_kernel.packed(torch.empty(shape, device=DEVICE), recipe, len(shape) - 1).dequantize().shape == shape


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (3, 1, 0, 2), (1, 0, 3, 2)], ids=str)
def test_views_of_four_axes(order):
    view = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE).permute(order)
    for axis in range(4):
        got = quantize_kernel.operand(view, QuantRecipe(), axis, torch.float32)
        assert_same(got, fake_quantize(view.cpu(), QuantRecipe(), axis))
        packed, q = quantize_kernel.packed(view, QuantRecipe(), axis), quantize(view.cpu(), QuantRecipe(), axis)
        assert_same(packed.codes, q.codes)
        assert_same(packed.dequantize(), q.dequantize())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensor_is():
    x = torch.randn(64, 96, device="cuda:1")
    with torch.cuda.device(0):
        assert_same(fake_quantize(x, QuantRecipe()), fake_quantize(x.cpu(), QuantRecipe()))
        assert_same(quantize(x, QuantRecipe()).dequantize(), fake_quantize(x.cpu(), QuantRecipe()))


def test_long_axes_have_programs_enough():
    """134 M elements would be 65537 tiles of a row: more than a second axis of programs may have."""

    class Recorded(Exception):
        pass

    def record(grid):
        raise Recorded(grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(quantize_kernel._operand_kernel), "__getitem__", lambda _, grid: record(grid))
        for shape, axis in (((2**27 + 1,), 0), ((2**21 + 1, 64), 0)):
            with pytest.raises(Recorded) as grid:
                quantize_kernel.operand(torch.empty(shape, device="meta"), QuantRecipe(), axis, torch.bfloat16)
            assert len(grid.value.args[0]) == 1


def test_backends_are_chosen_by_name():
    x, plain = torch.randn(4, 64, device=DEVICE), QuantRecipe()
    search = QuantRecipe(scale_rule="search", macro_block="static")
    assert_same(fake_quantize(x, plain, backend="triton"), fake_quantize(x.cpu(), plain))
    assert_same(quantize(x, plain, backend="triton").codes, quantize(x.cpu(), plain).codes)
    with pytest.raises(ValueError, match=r"no kernel for mxfp4 .*search"):
        quantize(x, search, backend="triton")
    assert [supports(r) for r in RECIPES[:2]] == [True, True] and not supports(QuantRecipe(tile=True))
