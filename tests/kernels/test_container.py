"""FP8 containers: the reference's bits, and no bit of the operand lost."""

import pytest
import torch

from tests.kernels.common import DEVICE, assert_same, data  # isort: skip

from mxfp4_kernels.container import triton as kernels
from mxfp4_kernels.container.reference import container, fits_rows, group_of
from mxfp4_kernels.container.triton import containers

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize

RECIPES = ["mxfp4", "mxfp4+c7.25+mbs256", "mxfp4+mbs", "mxfp4+floor+mbs64", "mxfp4+oas+mbs32"]
LAYOUTS = [(name, False) for name in RECIPES] + [(name, True) for name in ("mxfp4", "mxfp4+oas", "mxfp4+floor")]


def assert_same_container(got, expected):
    assert got.shape == expected.shape and got.group == expected.group
    for field in ("payload", "scale", "wide", "any_wide"):
        assert_same(getattr(got, field), getattr(expected, field))


def expected_container(x, recipe, axis, whole_rows):
    return container(quantize(x, recipe, axis), None if whole_rows else group_of(recipe))


@pytest.mark.parametrize("name, whole_rows", LAYOUTS)
@pytest.mark.parametrize("shape", [(33, 33), (3, 576), (300, 16), (160, 288)], ids=str)
def test_containers_of_rows_and_columns_are_the_reference_s(shape, name, whole_rows):
    x, recipe, other = data(shape, torch.float32), QuantRecipe.parse(name), QuantRecipe(scale_rule="ceil")
    of_rows, of_columns = (expected_container(x, recipe, axis, whole_rows) for axis in (1, 0))
    there = x.to(DEVICE)
    rows, columns, x_hat = containers(there, recipe, recipe, torch.float32, whole_rows)
    assert_same_container(rows, of_rows)
    assert_same_container(columns, of_columns)
    assert_same(x_hat, fake_quantize(x, recipe))
    alone, nothing, no_operand = containers(there, rows=recipe, whole_rows=whole_rows)
    assert nothing is None and no_operand is None
    assert_same_container(alone, of_rows)
    alone, nothing, x_hat = containers(there, recipe, None, torch.float32, whole_rows)
    assert nothing is None
    assert_same_container(alone, of_rows)
    assert_same(x_hat, fake_quantize(x, recipe))
    nothing, alone, no_operand = containers(there, columns=recipe, whole_rows=whole_rows)
    assert nothing is None and no_operand is None
    assert_same_container(alone, of_columns)
    first, second, _ = containers(there, rows=recipe, columns=other, whole_rows=whole_rows)
    assert_same_container(first, of_rows)
    assert_same_container(second, expected_container(x, other, 0, whole_rows))


@pytest.mark.parametrize("whole_rows", [True, False])
def test_views_whose_rows_lie_apart(whole_rows):
    x, recipe = data((72, 160), torch.float32), QuantRecipe()
    of_rows, of_columns = (expected_container(x, recipe, axis, whole_rows) for axis in (1, 0))
    transposed = x.t().contiguous().t().to(DEVICE)
    spaced = x.repeat_interleave(2, 1).to(DEVICE)[:, ::2]
    for view in (transposed, spaced):
        rows, columns, _ = containers(view, recipe, recipe, whole_rows=whole_rows)
        assert_same_container(rows, of_rows)
        assert_same_container(columns, of_columns)
        assert_same_container(containers(view, recipe, None, torch.float32, whole_rows)[0], of_rows)


def test_rows_longer_than_the_registers(monkeypatch):
    monkeypatch.setattr(kernels, "_IN_REGISTERS", 256)
    x, recipe = data((5, 1000), torch.float32), QuantRecipe()
    rows, _, x_hat = containers(x.to(DEVICE), rows=recipe, operand_dtype=torch.float32, whole_rows=True)
    assert_same_container(rows, expected_container(x, recipe, 1, True))
    assert_same(x_hat, fake_quantize(x, recipe))


@pytest.mark.parametrize("name, whole_rows", LAYOUTS)
def test_what_fits_loses_no_bit(name, whole_rows):
    """Plain operands come back bit for bit; with macro blocks 1 / factor is rounded once, as any float32 scale is."""
    recipe = QuantRecipe.parse(name)
    x = torch.randn(40, 400, generator=torch.Generator().manual_seed(0))
    x[3] = torch.exp2(torch.linspace(-200, 20, 400))
    x[4, 64:96] *= 2.0**-9
    got, _, _ = containers(x.to(DEVICE), rows=recipe, whole_rows=whole_rows)
    operand, values = fake_quantize(x, recipe), got.dequantize().cpu()
    wide = got.wide[:40].cpu().bool()
    assert wide.nonzero().flatten().tolist() == ([] if got.group == 32 else [3])
    assert bool(got.any_wide) == bool(wide.any())
    if recipe.macro_block:
        assert ((values - operand).abs() <= 2**-23 * operand.abs())[~wide].all()
    else:
        assert torch.equal(values[~wide], operand[~wide])
        assert ((values == operand) | (values == 0))[wide].all(), "what is left out is zero"


@pytest.mark.parametrize("whole_rows", [True, False])
def test_every_code_at_every_offset_of_the_window(whole_rows):
    """16 codes x 16 offsets: a group with its largest scale in one block and every code at the offset in another."""
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    block = torch.cat((codes, -codes, codes, -codes))
    x = torch.stack([torch.cat((block, block * 2.0**-offset)) for offset in range(16)])
    got, _, _ = containers(x.to(DEVICE), rows=QuantRecipe(), whole_rows=whole_rows)
    assert got.wide.tolist() == [0] * 15 + [1] and got.any_wide
    for offset in range(15):
        assert torch.equal(got.dequantize()[offset].cpu(), x[offset])
        assert torch.equal(torch.signbit(got.payload[offset, :64].float().cpu()), torch.signbit(x[offset])), "-0 stays -0"


def test_macro_blocks_of_256_beside_plain_columns():
    x, recipe = data((160, 288), torch.float32), QuantRecipe.parse("mxfp4+mbs256")
    rows, columns, x_hat = containers(x.to(DEVICE), rows=recipe, columns=QuantRecipe(), operand_dtype=torch.float32)
    assert_same_container(rows, expected_container(x, recipe, 1, False))
    assert_same_container(columns, expected_container(x, QuantRecipe(), 0, False))
    assert_same(x_hat, fake_quantize(x, recipe))


@pytest.mark.parametrize("whole_rows", [True, False])
def test_operands_in_float16_saturate_and_empty_matrices_have_empty_containers(whole_rows):
    large = torch.full((4, 64), 65504.0, dtype=torch.float16, device=DEVICE)
    got = containers(large, QuantRecipe(), None, torch.float16, whole_rows)[2]
    assert_same(got, fake_quantize(large.cpu(), QuantRecipe()))
    for shape in ((0, 64), (16, 0)):
        rows, columns, _ = containers(torch.ones(shape, device=DEVICE), QuantRecipe(), QuantRecipe(), whole_rows=whole_rows)
        assert rows.dequantize().shape == shape and columns.dequantize().shape == shape[::-1]
        assert not rows.any_wide and not columns.any_wide


def test_what_no_container_holds_is_refused():
    x = torch.ones(16, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"holds mxfp4 rceil \+ OF 0.5 \(it has a fallback\)"):
        containers(x, rows=QuantRecipe(fallback_alpha=0.5))
    with pytest.raises(ValueError, match=r"holds mxfp4 search .*searched for"):
        containers(x, columns=QuantRecipe(scale_rule="search"))
    with pytest.raises(ValueError, match=r"MBS static 128 .*rows share a scale"):
        containers(x, rows=QuantRecipe.parse("mxfp4+mbs"), whole_rows=True)
    with pytest.raises(ValueError, match="no recipe is given"):
        containers(x)
    with pytest.raises(ValueError, match=r"not a tensor of shape \(1, 16, 64\)"):
        containers(x.unsqueeze(0), rows=QuantRecipe())
    with pytest.raises(TypeError, match=r"cannot quantise torch.float64"):
        containers(x.double(), rows=QuantRecipe())
    with pytest.raises(ValueError, match="give that recipe too"):
        containers(x, columns=QuantRecipe(), operand_dtype=torch.bfloat16)
    assert not fits_rows(None)
