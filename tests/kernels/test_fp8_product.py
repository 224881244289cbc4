"""Products of FP8 containers against float64 products of the dequantised operands."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, OUT  # isort: skip

from mxfp4_kernels.matmul import w8a8
from mxfp4_kernels.matmul.fp8 import operands, product

from mxfp4_rl import QuantRecipe
from mxfp4_rl.quant import fake_quantize

BACKENDS = ["triton", "cublas"] if GPU else ["triton", "reference"]
ROWS = ["triton", "row-wise"]  # where rows share a scale


def exact_product(a, b, bias=None):
    """float64 product of the dequantised operands, and of their magnitudes."""
    a_hat, b_hat = (fake_quantize(o.source.cpu().float(), o.recipe).double() for o in (a, b))
    exact = a_hat @ b_hat.t()
    return exact if bias is None else exact + bias.double().cpu(), a_hat.abs() @ b_hat.abs().t()


def assert_is_product(y, a, b, bias=None, backend=None):
    """Up to BF16 output and the tensor core's 14-bit partial sums; cuBLAS rounds to BF16 before a bias is added too."""
    (exact, size), y = exact_product(a, b, bias), y.cpu().double()
    rounded = exact.abs()
    if bias is not None and backend == "cublas":
        rounded = rounded + (exact - bias.double().cpu()).abs()
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= 2**-8 * rounded + 2**-11 * size).all()


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
    assert_is_product(product(a, b, OUT, bias, backend), a, b, bias, backend)


@pytest.mark.parametrize("backend", ROWS)
@pytest.mark.parametrize("names", [("mxfp4", "mxfp4"), ("mxfp4+oas", "mxfp4+floor")], ids=str)
@pytest.mark.parametrize("shape", [(33, 47, 64), (1, 16, 576), (70, 130, 200), (17, 5, 33)], ids=str)
def test_products_of_rows_that_share_a_scale(shape, names, backend):
    (x, w), (recipe_x, recipe_w) = matrices(*shape), map(QuantRecipe.parse, names)
    a, b = (operands(t, rows=r, whole_rows=True)[0] for t, r in ((x, recipe_x), (w, recipe_w)))
    assert not a.container.wide.any() and not b.container.wide.any()
    bias = torch.randn(shape[1], generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    assert_is_product(product(a, b, OUT, backend=backend), a, b)
    assert_is_product(product(a, b, OUT, bias, backend), a, b, bias, backend)
    assert_is_product(product(a, b, torch.float32, bias), a, b, bias)


@pytest.mark.skipif(not GPU, reason="a CPU sums in float32")
def test_fast_accumulation_is_no_worse_than_that_of_any_fp8_product():
    """Errors against float64 of the same operands, in units of sum |a b|; long sums of one sign, whose lost bits add up."""
    x, w = (t.abs() for t in matrices(1024, 512, 16384))
    a, b = (operands(t, rows=QuantRecipe(), whole_rows=True)[0] for t in (x, w))
    exact, size = exact_product(a, b)
    eight = w8a8.Operand(x), w8a8.Operand(w)
    e, f = (o.dequantize().double().cpu() for o in eight)
    errors = {}
    for fast in (False, True):
        ours = (product(a, b, fast=fast).double().cpu() - exact).abs() / size
        theirs = (w8a8.product(*eight, fast=fast).double().cpu() - e @ f.t()).abs() / (e.abs() @ f.abs().t())
        assert ours.pow(2).mean() <= 1.1 * theirs.pow(2).mean()  # both are rounded to BF16 in the end
        errors[fast] = ours.pow(2).mean()
    assert errors[False] < errors[True]


@pytest.mark.parametrize(
    "names", [("mxfp4+mbs32", "mxfp4+mbs32"), ("mxfp4", "mxfp4+mbs64"), ("mxfp4+mbs32", "mxfp4+mbs")], ids=str
)
def test_products_with_small_macro_blocks(names):
    (x, w), (recipe_x, recipe_w) = matrices(33, 47, 200), map(QuantRecipe.parse, names)
    (a, _, _), (b, _, _) = operands(x, rows=recipe_x), operands(w, rows=recipe_w)
    assert_is_product(product(a, b, OUT, backend="triton"), a, b)
    with pytest.raises(ValueError, match="cuBLAS scales every 128 elements, not every"):
        product(a, b, OUT, backend="cublas")


@pytest.mark.parametrize("name, whole_rows", [("mxfp4", True), ("mxfp4", False), ("mxfp4+mbs", False)])
def test_rows_that_no_container_holds_are_multiplied_all_the_same(name, whole_rows):
    x, w = matrices(70, 96, 256, wide_a=(0, 3, 69), wide_b=(5, 95))
    recipe = QuantRecipe.parse(name)
    a, b = (operands(t, rows=recipe, whole_rows=whole_rows)[0] for t in (x, w))
    assert a.container.wide.nonzero().flatten().tolist() == [0, 3, 69] and a.container.any_wide
    assert b.container.wide.nonzero().flatten().tolist() == [5, 95] and b.container.any_wide
    bias = torch.randn(96, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    assert_is_product(product(a, b, OUT, bias), a, b, bias, "cublas")


def wide_sides(M, N, K, wide_a, wide_b, name="mxfp4", whole_rows=True):
    """Operands (M, K) and (N, K) with so many wide rows, spread over each."""
    rows = [[i * size // max(n, 1) for i in range(n)] for n, size in ((wide_a, M), (wide_b, N))]
    x, w = matrices(M, N, K, *rows)
    a, b = (operands(t, rows=QuantRecipe.parse(name), whole_rows=whole_rows)[0] for t in (x, w))
    for operand, own in ((a, rows[0]), (b, rows[1])):
        assert operand.container.wide.nonzero().flatten().tolist() == own
    return a, b


@pytest.mark.parametrize(
    "wide", [(1, 0), (0, 1), (5, 3), (16, 17), (0, 45), (70, 45)] + [(1, 1), (0, 5), (70, 5), (17, 0)] * GPU, ids=str
)
def test_any_number_of_rows_that_no_container_holds(wide):
    """One to all, in tiles of few and of many, whose contraction is shared."""
    a, b = wide_sides(70, 45, 520, *wide)
    bias = torch.randn(45, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    y = product(a, b, torch.float32, bias)
    (exact, size), y64 = exact_product(a, b, bias), y.cpu().double()
    repaired = (a.container.wide[:70, None] | b.container.wide[None, :45]).bool().cpu()
    assert ((y64 - exact).abs() <= 2**-23 * exact.abs() + 2**-19 * size)[repaired].all()
    if GPU:
        assert torch.equal(product(a, b, torch.float32, bias), y)
        assert_is_product(product(a, b, OUT), a, b)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+mbs", "mxfp4+mbs256"])
def test_any_number_of_groups_that_no_container_holds(name):
    a, b = wide_sides(40, 35, 520, 20, 3, name, whole_rows=False)
    assert_is_product(product(a, b, OUT), a, b)


@pytest.mark.skipif(not GPU, reason="takes the interpreter a minute")
def test_one_side_with_many_more_tiles_than_programs():
    a, b = wide_sides(1200, 640, 256, 1, 640)
    assert_is_product(product(a, b, OUT), a, b)


def test_wide_columns_as_a_backward_needs_them():
    x, g = (torch.randn(1100, n, generator=torch.Generator().manual_seed(n)) for n in (96, 40))
    for t in (x, g):
        t[:, 3] *= torch.exp2(torch.linspace(-40, 0, 1100))
    recipe = QuantRecipe(scale_rule="oas")
    a, b = (operands(t.bfloat16().to(DEVICE), columns=recipe, whole_rows=True)[1] for t in (g, x))
    assert a.container.wide.sum() == b.container.wide.sum() == 1
    assert_is_product(product(a, b, OUT), a, b)


@pytest.mark.skipif(not GPU, reason="graphs need a GPU")
def test_repairs_in_a_graph():
    """Captured while no row is wide, replayed with wide rows, twice: counters are left as they were found."""
    x, w = matrices(300, 200, 4096)
    wide = matrices(300, 200, 4096, range(40), [7])
    recipe = QuantRecipe()

    def run():
        return product(*(operands(t, rows=recipe, whole_rows=True)[0] for t in (x, w)))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for mine, theirs in zip((x, w), wide):
        mine.copy_(theirs)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert torch.equal(first, y)
    assert_is_product(y, *(operands(t, rows=recipe, whole_rows=True)[0] for t in wide))


@pytest.mark.parametrize("whole_rows", [True, False])
def test_products_of_columns_as_a_backward_needs_them(whole_rows):
    x, g = (torch.randn(72, n, generator=torch.Generator().manual_seed(n)).bfloat16().to(DEVICE) for n in (96, 40))
    recipe = QuantRecipe(scale_rule="oas")
    _, x_t, _ = operands(x, columns=recipe, whole_rows=whole_rows)
    _, g_t, _ = operands(g, columns=recipe, whole_rows=whole_rows)
    assert_is_product(product(g_t, x_t, OUT), g_t, x_t)


@pytest.mark.parametrize("whole_rows", [True, False])
def test_nan_stays_in_its_row_and_empty_products_are_empty(whole_rows):
    def operand(t):
        return operands(t, rows=QuantRecipe(), whole_rows=whole_rows)[0]

    x, w = matrices(64, 48, 64)
    x[2, 40] = float("nan")
    x[5, 3] = float("inf")
    b = operand(w)
    y = product(operand(x), b)
    broken = y.isnan().any(1).cpu()
    assert broken.nonzero().flatten().tolist() == [2, 5] and y[2].isnan().all() and y[5].isnan().all()
    assert product(operand(x[:0]), b).shape == (0, 48)
    assert (product(operand(x[:, :0]), operand(w[:, :0])) == 0).all()


def test_what_cannot_be_is_refused():
    x, w = matrices(16, 48, 64)
    a = operands(x, rows=QuantRecipe())[0]
    with pytest.raises(ValueError, match="A has 64 columns and B 32"):
        product(a, operands(w[:, :32], rows=QuantRecipe())[0])
    with pytest.raises(ValueError, match="one side has a scale a row and the other"):
        product(a, operands(w, rows=QuantRecipe(), whole_rows=True)[0])
    b = operands(w, rows=QuantRecipe())[0]
    with pytest.raises(ValueError, match="backend='cuda' is not one of 'row-wise', 'cublas'"):
        product(a, b, backend="cuda")
    with pytest.raises(ValueError, match=r"a bias of shape \(16,\) does not fit 48"):
        product(a, b, bias=torch.ones(16, device=DEVICE))
    x, w = matrices(16, 48, 256)
    a, b = (operands(t, rows=QuantRecipe())[0] for t in (x, w))
    with pytest.raises(ValueError, match="a scale a row: make containers of whole rows"):
        product(a, b, backend="row-wise")


@pytest.mark.parametrize("backend", ["row-wise", *BACKENDS])
def test_biases_may_be_strided(backend):
    x, w = matrices(16, 48, 64)
    a, b = (operands(t, rows=QuantRecipe(), whole_rows=backend == "row-wise")[0] for t in (x, w))
    bias = torch.arange(96.0, device=DEVICE, dtype=torch.bfloat16)[::2]
    assert_is_product(product(a, b, OUT, bias, backend), a, b, bias, backend)
