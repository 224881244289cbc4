"""Error statistics in one kernel against the reference's."""

import dataclasses

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, NAMES, data  # isort: skip

from mxfp4_kernels.error_stats import triton as kernel

from mxfp4_rl import QuantRecipe
from mxfp4_rl.quant import ErrorStats, error_stats

COUNTS = ("zero_elements", "final_zeros", "elements", "broken", "blocks")
RECIPES = [*NAMES, "mxfp4+oas", "mxfp4+even+mbs64", "mxfp4+ceil", "mxfp4+floor+of1"]


def assert_stats(got: ErrorStats, expected: ErrorStats, dead_margin=0):
    """Counts equal; energies within float32 rounding of the sums that they are taken from."""
    for name in COUNTS:
        assert getattr(got, name) == getattr(expected, name), name
    assert abs(got.dead_elements - expected.dead_elements) <= dead_margin
    errors = expected.first_error + expected.deadzone + expected.grid_noise + expected.error
    for field in dataclasses.fields(ErrorStats):
        ours, theirs = getattr(got, field.name), getattr(expected, field.name)
        if field.name in ("energy", "product"):
            size = expected.energy
        elif field.name == "delta":
            size = max(expected.blocks, abs(theirs))
        elif field.name in (*COUNTS, "dead_elements"):
            continue
        else:
            size = errors
        assert abs(ours - theirs) <= 2e-6 * size, (field.name, ours, theirs)


def near_the_deadzone_s_end(x, axis):
    """Elements whose side of the deadzone's end float32 may see wrongly."""
    moved = x.movedim(axis, -1).double()
    blocks = torch.nn.functional.pad(moved, (0, -moved.shape[-1] % 32)).unflatten(-1, (-1, 32)).abs()
    u = 24 * blocks / blocks.amax(-1, keepdim=True)
    return int(((u - 1).abs() <= 2.0**-21).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(33, 33), (40, 256)] if GPU else [(33, 128)], ids=str)
def test_statistics_are_the_reference_s(shape, name, dtype):
    """Ties, zeros, a NaN and rows over 40 binades; beyond 6.4e37, where every rule clips, and infinite in float16."""
    x, recipe = data(shape, dtype), QuantRecipe.parse(name)
    for axis in (0, 1):
        margin = near_the_deadzone_s_end(x, axis) if dtype == torch.float32 else 0
        assert_stats(kernel.error_stats(x.to(DEVICE), recipe, axis), error_stats(x, recipe, axis, backend="reference"), margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16] if GPU else [torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(64, 256), (40, 160)], ids=str)
def test_finite_numbers(shape, name, dtype):
    """Which no program takes a second time: whole tiles along both axes, and padded ones."""
    g = torch.Generator().manual_seed(0)
    x, recipe = torch.randn(shape, generator=g), QuantRecipe.parse(name)
    x = (x * torch.exp2(torch.randint(-6, 6, (shape[0], 1), generator=g))).to(dtype)
    for axis in (0, 1):
        margin = near_the_deadzone_s_end(x, axis) if dtype == torch.float32 else 0
        assert_stats(kernel.error_stats(x.to(DEVICE), recipe, axis), error_stats(x, recipe, axis, backend="reference"), margin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_pair_of_significands_is_decided_exactly(dtype):
    """The elements nearest to each midpoint of the grid, for all 2^7 largest elements of BF16 and some of float16's 2^10."""
    bits = 7 if dtype == torch.bfloat16 else 10
    g = torch.Generator().manual_seed(0)
    tops = torch.arange(2**bits, 2 ** (bits + 1))
    tops = tops if bits == 7 else tops[torch.randperm(len(tops), generator=g)[:192]]
    midpoint = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = tops.float()[:, None] * midpoint / 6  # of u = 6 x / top
    unit = torch.exp2(near.log2().floor() - bits)
    steps = torch.arange(-2, 2)
    x = torch.zeros(len(tops), 32)
    x[:, 0] = tops
    x[:, 1:29] = ((near / unit).round()[:, :, None] + steps).mul(unit[:, :, None]).flatten(1)
    x = x.to(dtype)
    expected = error_stats(x.float(), QuantRecipe(), backend="reference")  # decides in float64
    assert_stats(kernel.error_stats(x.to(DEVICE), QuantRecipe(), 1), expected)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+floor+mbs64"])
def test_views_and_empty_tensors(name):
    recipe = QuantRecipe.parse(name)
    base = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    batch = base.view(12, 2, 96)
    for view in (base[:, ::2], base[3:, 5:].t(), batch.transpose(0, 1), batch[:2, :, 32:], base[:, 0]):
        for axis in range(view.ndim):
            margin = near_the_deadzone_s_end(view, axis)
            assert_stats(kernel.error_stats(view.to(DEVICE), recipe, axis), error_stats(view, recipe, axis), margin)
    for shape in ((0, 64), (64, 0), (0,)):
        assert kernel.error_stats(torch.empty(shape, device=DEVICE), recipe, len(shape) - 1) == ErrorStats()
    assert kernel.error_stats(torch.zeros(3, 40, device=DEVICE), recipe, 1) == error_stats(torch.zeros(3, 40), recipe)


def test_programs_of_many_steps_and_of_two_matrices(monkeypatch):
    monkeypatch.setattr(kernel, "_MULTIPROCESSORS", 0)  # as few programs as can be
    x = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1, 40, 5] = float("inf")
    for axis in range(3):
        got = kernel.error_stats(x.to(DEVICE), QuantRecipe(), axis)
        assert_stats(got, error_stats(x, QuantRecipe(), axis, backend="reference"))
        assert got == kernel.error_stats(x.to(DEVICE), QuantRecipe(), axis), "the same bits every time"


@pytest.mark.parametrize("shift", [-112, 60, 100, 124])
def test_tiny_and_huge_numbers(shift):
    x = (torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) * 2.0**shift).bfloat16()
    assert x.isfinite().all()
    for recipe in (QuantRecipe(), QuantRecipe(scale_rule="floor")):
        assert_stats(kernel.error_stats(x.to(DEVICE), recipe, 1), error_stats(x, recipe, backend="reference"))


def test_backends_are_chosen_by_name():
    x = torch.randn(4, 64).bfloat16()
    assert_stats(error_stats(x.to(DEVICE), backend="triton"), error_stats(x, backend="reference"))
    with pytest.raises(ValueError, match="no kernel for mxfp4 search"):
        error_stats(x.to(DEVICE), QuantRecipe(scale_rule="search"), backend="triton")
    with pytest.raises(ValueError, match="'cuda' is not one of"):
        error_stats(x, backend="cuda")
    with pytest.raises(TypeError, match="cannot quantise"):
        error_stats(x.int(), backend="triton")
