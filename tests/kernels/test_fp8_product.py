"""Products of FP8 containers against float64 products of the dequantised operands."""

import pytest
import torch

from tests.kernels.common import DEVICE, OUT  # isort: skip

from mxfp4_kernels.matmul.fp8 import Operand, product

from mxfp4_rl import QuantRecipe
from mxfp4_rl.quant import fake_quantize


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
