"""FP8 containers with a scale every 128 elements: the reference's bits; and products of them against float64."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, OUT, assert_same, data  # isort: skip

from mxfp4_kernels.container.blocks import containers, group_of, reference
from mxfp4_kernels.matmul.blocks import operands, product

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize

RECIPES = ["mxfp4", "mxfp4+c7.25+mbs256", "mxfp4+mbs", "mxfp4+floor+mbs64", "mxfp4+oas+mbs32"]
BACKENDS = ["triton", "cublas"] if GPU else ["triton", "reference"]


def assert_same_container(got, expected):
    assert got.shape == expected.shape and got.group == expected.group
    for field in ("payload", "scale", "wide", "any_wide"):
        assert_same(getattr(got, field), getattr(expected, field))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(33, 33), (3, 576), (300, 16), (160, 288)], ids=str)
def test_containers_of_rows_and_columns_are_the_reference_s(shape, name):
    x, recipe, other = data(shape, torch.float32), QuantRecipe.parse(name), QuantRecipe(scale_rule="ceil")
    of_rows = reference(quantize(x, recipe), group_of(recipe))
    of_columns = reference(quantize(x, recipe, 0), group_of(recipe))
    there = x.to(DEVICE)
    rows, columns, x_hat = containers(there, rows=recipe, columns=recipe, operand_dtype=torch.float32)
    assert_same_container(rows, of_rows)
    assert_same_container(columns, of_columns)
    assert_same(x_hat, fake_quantize(x, recipe))
    alone, nothing, no_operand = containers(there, rows=recipe)
    assert nothing is None and no_operand is None
    assert_same_container(alone, of_rows)
    nothing, alone, no_operand = containers(there.t().contiguous().t(), columns=recipe)
    assert nothing is None and no_operand is None
    assert_same_container(alone, of_columns)
    first, second, _ = containers(there, rows=recipe, columns=other)
    assert_same_container(first, of_rows)
    assert_same_container(second, reference(quantize(x, other, 0)))


@pytest.mark.parametrize("name", RECIPES)
def test_what_fits_loses_no_bit(name):
    """Plain operands come back bit for bit; with macro blocks 1 / factor is rounded once, as any float32 scale is."""
    recipe = QuantRecipe.parse(name)
    x = torch.randn(40, 400, generator=torch.Generator().manual_seed(0))
    x[3] = torch.exp2(torch.linspace(-200, 20, 400))
    x[4, 64:96] *= 2.0**-9
    container, _, _ = containers(x.to(DEVICE), rows=recipe)
    operand, got = fake_quantize(x, recipe), container.dequantize().cpu()
    wide = container.wide[:40].cpu().bool()
    assert wide.nonzero().flatten().tolist() == ([] if group_of(recipe) == 32 else [3])
    assert bool(container.any_wide) == bool(wide.any())
    if recipe.macro_block:
        assert ((got - operand).abs() <= 2**-23 * operand.abs())[~wide].all()
    else:
        assert torch.equal(got[~wide], operand[~wide])


def test_every_code_at_every_offset_of_the_window():
    """16 codes x 16 offsets: a group with its largest scale in one block and every code at the offset in another."""
    codes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    block = torch.cat((codes, -codes, codes, -codes))
    x = torch.stack([torch.cat((block, block * 2.0**-offset)) for offset in range(16)])
    got, _, _ = containers(x.to(DEVICE), rows=QuantRecipe())
    assert got.wide.tolist() == [0] * 15 + [1] and got.any_wide
    for offset in range(15):
        assert torch.equal(got.dequantize()[offset].cpu(), x[offset])
        assert torch.equal(torch.signbit(got.payload[offset, :64].float().cpu()), torch.signbit(x[offset])), "-0 stays -0"


def exact_product(a, b, bias=None):
    """float64 product of the dequantised operands, and of their magnitudes."""
    a_hat, b_hat = (fake_quantize(o.source.cpu().float(), o.recipe).double() for o in (a, b))
    exact = a_hat @ b_hat.t()
    return exact if bias is None else exact + bias.double().cpu(), a_hat.abs() @ b_hat.abs().t()


def assert_is_product(y, a, b, bias=None):
    """Up to BF16 output and the tensor core's 14-bit partial sums."""
    (exact, size), y = exact_product(a, b, bias), y.cpu().double()
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 2**-11 * size).all()


def matrices(M, N, K, wide_a=(), wide_b=(), dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(M + N + K)
    a, b = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g)
    for x, rows in ((a, wide_a), (b, wide_b)):
        for row in rows:
            x[row] *= torch.exp2(torch.linspace(-40, 0, 128)).repeat(-(-K // 128))[:K]
    return a.to(dtype).to(DEVICE), b.to(dtype).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "names", [("mxfp4", "mxfp4"), ("mxfp4+oas", "mxfp4+mbs"), ("mxfp4+mbs", "mxfp4+mbs256+floor")], ids=str
)
@pytest.mark.parametrize("shape", [(33, 47, 64), (1, 16, 576), (70, 130, 200)], ids=str)
def test_products_are_those_of_the_dequantised_operands(shape, names, backend):
    (x, w), (recipe_x, recipe_w) = matrices(*shape), map(QuantRecipe.parse, names)
    (a, _, _), (b, _, _) = operands(x, rows=recipe_x), operands(w, rows=recipe_w)
    assert not a.container.wide.any() and not b.container.wide.any()
    bias = torch.randn(shape[1], generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    assert_is_product(product(a, b, OUT, backend=backend), a, b)
    assert_is_product(product(a, b, OUT, bias, backend), a, b, bias)


@pytest.mark.parametrize(
    "names", [("mxfp4+mbs32", "mxfp4+mbs32"), ("mxfp4", "mxfp4+mbs64"), ("mxfp4+mbs32", "mxfp4+mbs")], ids=str
)
def test_products_with_small_macro_blocks(names):
    (x, w), (recipe_x, recipe_w) = matrices(33, 47, 200), map(QuantRecipe.parse, names)
    (a, _, _), (b, _, _) = operands(x, rows=recipe_x), operands(w, rows=recipe_w)
    assert_is_product(product(a, b, OUT, backend="triton"), a, b)
    with pytest.raises(ValueError, match="cuBLAS scales every 128 elements, not every"):
        product(a, b, OUT, backend="cublas")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+mbs"])
def test_groups_that_no_container_holds_are_multiplied_all_the_same(name):
    x, w = matrices(70, 96, 256, wide_a=(0, 3, 69), wide_b=(5, 95))
    recipe = QuantRecipe.parse(name)
    (a, _, _), (b, _, _) = operands(x, rows=recipe), operands(w, rows=recipe)
    assert a.container.wide.nonzero().flatten().tolist() == [0, 3, 69] and a.container.any_wide
    assert b.container.wide.nonzero().flatten().tolist() == [5, 95] and b.container.any_wide
    bias = torch.randn(96, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    assert_is_product(product(a, b, OUT, bias), a, b, bias)


def test_products_of_columns_as_a_backward_needs_them():
    x, g = (torch.randn(72, n, generator=torch.Generator().manual_seed(n)).bfloat16().to(DEVICE) for n in (96, 40))
    recipe = QuantRecipe(scale_rule="oas")
    _, x_t, _ = operands(x, columns=recipe)
    _, g_t, _ = operands(g, columns=recipe)
    assert_is_product(product(g_t, x_t, OUT), g_t, x_t)


def test_nan_stays_in_its_row_and_empty_products_are_empty():
    x, w = matrices(64, 48, 64)
    x[2, 40] = float("nan")
    x[5, 3] = float("inf")
    (a, _, _), (b, _, _) = operands(x, rows=QuantRecipe()), operands(w, rows=QuantRecipe())
    y = product(a, b)
    broken = y.isnan().any(1).cpu()
    assert broken.nonzero().flatten().tolist() == [2, 5] and y[2].isnan().all() and y[5].isnan().all()
    nothing, _, _ = operands(x[:0], rows=QuantRecipe())
    assert product(nothing, b).shape == (0, 48)
    short, _, _ = operands(x[:, :0], rows=QuantRecipe())
    assert (product(short, operands(w[:, :0], rows=QuantRecipe())[0]) == 0).all()


def test_what_cannot_be_is_refused():
    x, w = matrices(16, 48, 64)
    with pytest.raises(ValueError, match=r"holds mxfp4 rceil \+ OF 0.5 \(it has a fallback\)"):
        containers(x, rows=QuantRecipe(fallback_alpha=0.5))
    with pytest.raises(ValueError, match=r"holds mxfp4 search .*searched for"):
        containers(x, columns=QuantRecipe(scale_rule="search"))
    with pytest.raises(ValueError, match="give that recipe too"):
        containers(x, columns=QuantRecipe(), operand_dtype=torch.bfloat16)
    a, _, _ = operands(x, rows=QuantRecipe())
    b, _, _ = operands(w[:, :32], rows=QuantRecipe())
    with pytest.raises(ValueError, match="A has 64 columns and B 32"):
        product(a, b)
    w = operands(w, rows=QuantRecipe())[0]
    with pytest.raises(ValueError, match="backend='cuda' is not one of 'cublas'"):
        product(a, w, backend="cuda")
    with pytest.raises(ValueError, match=r"a bias of shape \(16,\) does not fit 48"):
        product(a, w, bias=torch.ones(16, device=DEVICE))


def test_operands_in_float16_saturate_and_biases_may_be_strided():
    x, w = matrices(16, 48, 64)
    large = torch.full((4, 64), 65504.0, dtype=torch.float16, device=DEVICE)
    got = containers(large, rows=QuantRecipe(), operand_dtype=torch.float16)[2]
    assert_same(got, fake_quantize(large.cpu(), QuantRecipe()))
    (a, _, _), (b, _, _) = operands(x, rows=QuantRecipe()), operands(w, rows=QuantRecipe())
    bias = torch.arange(96.0, device=DEVICE)[::2]
    for backend in BACKENDS:
        assert_is_product(product(a, b, torch.float32, bias, backend), a, b, bias)


def test_every_layout_of_a_tensor_with_a_macro_block_of_256():
    x = data((160, 288), torch.float32)
    recipe = QuantRecipe.parse("mxfp4+mbs256")
    rows, columns, x_hat = containers(x.to(DEVICE), rows=recipe, columns=QuantRecipe(), operand_dtype=torch.float32)
    assert_same_container(rows, reference(quantize(x, recipe)))
    assert_same_container(columns, reference(quantize(x, QuantRecipe(), 0)))
    assert_same(x_hat, fake_quantize(x, recipe))
