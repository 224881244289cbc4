"""The Triton kernels against the reference, bit for bit: on a GPU, or on a CPU under Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, so on a CPU this file runs in a process of its own:
`TRITON_INTERPRET=1 pytest tests/test_kernels.py` (`make test` does). The interpreter's BF16 has two defects, which the GPU does
not share: it reads subnormal numbers wrongly and truncates where it should round. So a CPU compares BF16 data without
subnormals, and BF16 results only where they are exact.
"""

# ruff: noqa: E402  (what the imports need is looked for first)

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from mxfp4_kernels.container import reference
from mxfp4_kernels.container import triton as container_kernel
from mxfp4_kernels.device import supports
from mxfp4_kernels.matmul.fp8 import Operand, product
from mxfp4_kernels.quantize import triton as quantize_kernel

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.quant.tensor import MXFP4Tensor
from tests.test_quant import RECIPES, awkward

DEVICE = "cuda" if GPU else "cpu"
NAMES = ["mxfp4", "mxfp4+c7.25", "mxfp4+mbs32", "mxfp4+of0.3", "mxfp4+floor+mbs256+of1"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter, on NaN and 6 / 0


def data(shape, dtype, seed=0):
    """Awkward numbers, a broken block, a row of zeros and one whose scales spread too far for E4M3."""
    rows = shape[0]
    flat = awkward(rows=max(rows, 32), length=torch.Size(shape[1:]).numel(), seed=seed)[-rows:].clone()
    flat[0] = 0
    if rows > 2 and flat.shape[1] > 40:
        flat[1, 35] = float("nan")
        flat[2] = torch.exp2(torch.linspace(-20, 20, flat.shape[1]))
    x = flat.view(shape).to(dtype)
    return torch.where(x.abs() < 2.0**-100, torch.zeros_like(x), x) if not GPU and dtype == torch.bfloat16 else x


def assert_same(ours, theirs, broken=None):
    """Equal bits, but for what a NaN looks like and for the codes of broken blocks."""
    ours = ours.cpu()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if ours.dtype.is_floating_point:
        assert torch.equal(ours.isnan(), theirs.isnan())
        broken = theirs.isnan() if broken is None else broken
        ours, theirs = (
            t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]) for t in (ours, theirs)
        )
    keep = ~broken if broken is not None else slice(None)
    assert torch.equal(ours[keep], theirs[keep])


SHAPES = [(33, 33), (3, 576), (1, 70), (5, 3, 64)]


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
    assert container_kernel.container(torch.empty(0, 64, device=DEVICE), recipe).payload.shape == (0, 64)


def test_backends_are_chosen_by_name():
    x, plain, search = torch.randn(4, 64, device=DEVICE), QuantRecipe(), QuantRecipe(scale_rule="search")
    assert_same(fake_quantize(x, plain, backend="triton"), fake_quantize(x.cpu(), plain))
    assert_same(quantize(x, plain, backend="triton").codes, quantize(x.cpu(), plain).codes)
    with pytest.raises(ValueError, match="no kernel for mxfp4 search"):
        quantize(x, search, backend="triton")
    with pytest.raises(ValueError, match="Triton kernel for mxfp4 search"):
        container_kernel.container(x, search)
    assert [supports(r) for r in RECIPES[:2]] == [True, True] and not supports(QuantRecipe(tile=True))


# ---- products ---------------------------------------------------------------------------------------------------------------


OUT = torch.bfloat16 if GPU else torch.float32  # the interpreter truncates


def operands(M, N, K, rule_a="mxfp4", rule_b="mxfp4", wide_a=(), wide_b=(), dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(M + N + K)
    a, b = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g)
    for x, wide in ((a, wide_a), (b, wide_b)):
        for row in wide:
            x[row] *= torch.exp2(torch.linspace(-20, 0, K))
    a, b = a.to(dtype).to(DEVICE), b.to(dtype).to(DEVICE)
    return Operand(a, QuantRecipe.parse(rule_a)), Operand(b, QuantRecipe.parse(rule_b))


def exact_product(a, b):
    """float64 product of the dequantised operands."""
    a_hat, b_hat = (fake_quantize(o.source.cpu().float(), o.recipe).double() for o in (a, b))
    return a_hat @ b_hat.t(), a_hat.abs() @ b_hat.abs().t()


@pytest.mark.parametrize("rules", [("mxfp4", "mxfp4"), ("mxfp4+oas", "mxfp4+floor")], ids=str)
@pytest.mark.parametrize("shape", [(33, 48, 64), (1, 16, 576), (70, 128, 96)], ids=str)
def test_products_are_those_of_the_dequantised_operands(shape, rules):
    a, b = operands(*shape, *rules)
    assert not a.container.wide.any() and not b.container.wide.any()
    y, (exact, size) = product(a, b, OUT).cpu().double(), exact_product(a, b)
    # BF16 output, and the tensor core's 14-bit partial sums.
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 2**-11 * size).all()


def test_rows_that_no_container_holds_are_multiplied_all_the_same():
    a, b = operands(70, 96, 256, wide_a=(0, 3, 69), wide_b=(5, 95))
    assert a.container.wide.nonzero().flatten().tolist() == [0, 3, 69]
    assert b.container.wide.nonzero().flatten().tolist() == [5, 95]
    y, (exact, size) = product(a, b, OUT).cpu().double(), exact_product(a, b)
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 2**-11 * size).all()
    assert (y[3] != 0).all() and (y[:, 5] != 0).all()


def test_products_of_views_and_nan():
    a, b = operands(64, 48, 64)
    columns = Operand(a.source.t(), a.recipe)  # quantised along the other axis, as a backward product needs it
    other = Operand(torch.randn(32, 64, device=DEVICE, dtype=torch.bfloat16), a.recipe)
    exact, size = exact_product(columns, other)
    assert ((product(columns, other, OUT).cpu().double() - exact).abs() <= 2**-8 * exact.abs() + 2**-11 * size).all()
    a.source[2, 40] = float("nan")
    y = product(Operand(a.source, a.recipe), b)
    assert y[2].isnan().all() and y[:2].isfinite().all() and y[3:].isfinite().all()
    assert product(Operand(a.source[:0], a.recipe), b).shape == (0, 48)


def test_products_that_cannot_be_are_refused():
    a, b = operands(16, 48, 64)
    with pytest.raises(ValueError, match=r"plain MXFP4 recipe, not mxfp4 rceil \+ OF 0.5"):
        Operand(a.source, QuantRecipe(fallback_alpha=0.5))
    with pytest.raises(ValueError, match="A has 64 columns and B 32"):
        product(a, Operand(b.source[:, :32], b.recipe))
    with pytest.raises(ValueError, match="N=47 must be multiples of 16"):
        product(a, Operand(b.source[:47], b.recipe))
