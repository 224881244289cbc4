"""Kernels of NVFP4 and of searched scales against the reference, bit for bit."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, assert_same, data  # isort: skip

from mxfp4_kernels.quantize import search

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.quant.nvfp4 import e4m3_code, e4m3_value

RECIPES = ["nvfp4", "nvfp4+static4", "nvfp4+four-over-six", "nvfp4+search", "mxfp4+search"]
SHAPES = [(33, 33), (3, 576), (1, 70), (5, 3, 64), (130, 64)]  # the last is several tiles


def same(x, recipe, axis, dtype=torch.float32, **scale):
    q, packed = quantize(x, recipe, axis, **scale), quantize(x.to(DEVICE), recipe, axis, backend="triton", **scale)
    assert type(packed) is type(q) and packed.shape == q.shape and packed.axis == q.axis
    theirs, ours = q.tensors(), packed.tensors()
    assert ours.keys() == theirs.keys()
    broken = (theirs["scales"] == (255 if recipe.format == "mxfp4" else 127)).repeat_interleave(recipe.block_size // 2, -1)
    for key, tensor in theirs.items():
        assert_same(ours[key], tensor, broken if key == "codes" else None)
    if not scale:  # what `quantize` alone takes
        got = fake_quantize(x.to(DEVICE), recipe, axis, dtype=dtype, backend="triton")
        assert_same(got, fake_quantize(x, recipe, axis, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_operands_are_the_reference_s(shape, name, dtype):
    x = data(shape, dtype)
    for axis in range(len(shape)):
        same(x, QuantRecipe.parse(name), axis)


@pytest.mark.parametrize("name", RECIPES)
def test_on_weights_as_they_are_and_on_ties(name):
    recipe = QuantRecipe.parse(name)
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(64, 256, generator=generator) * 0.05
    few_values = torch.randint(-6, 7, (64, 256), generator=generator).float() / 4  # many candidates are equally good
    for x in (gaussian, few_values, gaussian * torch.logspace(-4, 2, 256), torch.zeros(3, 64)):
        same(x, recipe, 1)
        same(x.bfloat16(), recipe, 1, torch.bfloat16 if GPU else torch.float32)


@pytest.mark.parametrize(("name", "window"), [("nvfp4", (-1, 1)), ("nvfp4", (0, 0)), ("nvfp4", (-16, 16)), ("mxfp4", (-3, 2))])
def test_windows(name, window):
    recipe = QuantRecipe(format=name, scale_rule="search", search_window=window)
    same(data((9, 64), torch.float32), recipe, 1)


@pytest.mark.parametrize("rule", ["static", "static4", "four_over_six", "search"])
@pytest.mark.parametrize("scale", [2.0**-9, 0.003, 1e30])
def test_a_scale_of_the_tensor_that_is_given(rule, scale):
    same(data((6, 64), torch.float32), QuantRecipe(format="nvfp4", scale_rule=rule), 1, tensor_scale=scale)


@pytest.mark.parametrize("name", ["nvfp4+four-over-six", "nvfp4+search", "mxfp4+search"])
@pytest.mark.parametrize("length", [33, 64, 576])
def test_weighed_errors(name, length):
    x = data((70, length), torch.float32)
    importance = torch.rand(length, generator=torch.Generator().manual_seed(2)) ** 8
    importance[5:21] = 0
    same(x, QuantRecipe.parse(name), 1, importance=importance)
    same(x.T, QuantRecipe.parse(name), 0, importance=importance)


def test_views_empty_tensors_and_float16():
    base = torch.randn(48, 160, generator=torch.Generator().manual_seed(0))
    for name in ("nvfp4+search", "mxfp4+search"):
        recipe = QuantRecipe.parse(name)
        for view in (base[:, ::2], base[3:, 5:].t(), base.half() * 1e4):
            for axis in (0, 1):
                same(view, recipe, axis, view.dtype)
        for shape in ((0, 64), (4, 0)):
            same(torch.empty(shape), recipe, 1)


def test_what_they_do_not_compute_runs_the_reference():
    for words in ("nvfp4+soar", "nvfp4+sr", "mxfp4+search+of", "mxfp4+search+mbs"):
        recipe = QuantRecipe.parse(words)
        assert search.unsupported(recipe)
        with pytest.raises(ValueError, match="has no kernel for"):
            quantize(torch.randn(2, 64, device=DEVICE), recipe, backend="triton")


def test_e4m3_is_rounded_as_pytorch_does():
    """Through blocks of one number each: all codes, all middles between them, and their neighbours."""
    values = e4m3_value(torch.arange(1, 127))
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([middles, middles * (1 + 2.0**-22), middles * (1 - 2.0**-22), values, torch.tensor([1e-6, 2.0**-10])])
    x = torch.zeros(len(near), 16)
    x[:, 0] = near * 6
    got = quantize(x.to(DEVICE), QuantRecipe.parse("nvfp4"), backend="triton", tensor_scale=1.0).scales.cpu()
    assert torch.equal(got.view(-1).int(), e4m3_code(near * 6 / torch.tensor(6.0)))
