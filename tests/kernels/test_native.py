"""The native MXFP4 product: its operands, its refusals, and its numbers without the tensor core it is for.

`multiply` runs wherever Triton has some way to compute `tl.dot_scaled`: natively on a GPU of compute capability 10 or more,
through BF16 on older ones, in NumPy under the interpreter of Triton 3.9. The last two prove everything but the instruction:
addresses, tails, the order of the scales, passes, the bias. That the instruction is chosen: `tests/test_aot.py`.
"""

import dataclasses

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, OUT  # isort: skip

from mxfp4_kernels.matmul import native
from mxfp4_kernels.matmul.native import Operand, core_order, multiply, product
from triton.runtime import interpreter

from mxfp4_rl import QuantRecipe, quantize

CAPABILITY = torch.cuda.get_device_capability()[0] if GPU else 0
TILE = native.tiling(CAPABILITY if GPU else 10, 1000)
# What the accumulator may lose, in units of sum |a b|: a tensor core's partial sums, or float32's.
LOST = 2**-11 if GPU else 2**-20
needs_dot = pytest.mark.skipif(
    CAPABILITY < 9 if GPU else not hasattr(interpreter.InterpreterBuilder, "create_dot_scaled"),
    reason="needs a GPU with TMA, or an interpreter that knows tl.dot_scaled",
)


def quantised(rows, length, recipe, seed, axis=1):
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    x *= torch.exp2(torch.linspace(-30, 30, rows)).unsqueeze(1)
    x[0] = 0
    return quantize(x if axis == 1 else x.t().contiguous(), QuantRecipe.parse(recipe), axis)


def assert_product(y, q_a, q_b, bias=None):
    a_hat, b_hat = (q.dequantize().double() if q.axis == 1 else q.dequantize().double().t() for q in (q_a, q_b))
    exact, size = a_hat @ b_hat.t(), a_hat.abs() @ b_hat.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    rounding = torch.finfo(OUT).eps / 2
    assert y.shape == exact.shape and y.dtype == OUT
    assert ((y.cpu().double() - exact).abs() <= rounding * exact.abs() + LOST * size).all()


@needs_dot
@pytest.mark.parametrize("shape", [(1, 16, 32), (33, 48, 65), (130, 260, 576), (129, 5, 300), (1100, 140, 32)], ids=str)
@pytest.mark.parametrize("recipes", [("mxfp4", "mxfp4+oas"), ("mxfp4+of0.5", "mxfp4"), ("mxfp4+of1", "mxfp4+of0.25")], ids=str)
def test_products_are_those_of_the_dequantised_operands(shape, recipes):
    M, N, K = shape
    q_a, q_b = quantised(M, K, recipes[0], 0), quantised(N, K, recipes[1], 1)
    y = multiply(Operand(q_a.to(DEVICE)), Operand(q_b.to(DEVICE)), OUT, None, **TILE)
    assert_product(y, q_a, q_b)


@needs_dot
def test_bias_narrow_tiles_and_matrices_quantised_along_their_columns():
    q_a, q_b = quantised(40, 96, "mxfp4", 2, axis=0), quantised(70, 96, "mxfp4", 3)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(4))
    tile = native.tiling(CAPABILITY if GPU else 10, 70)
    y = multiply(Operand(q_a.to(DEVICE)), Operand(q_b.to(DEVICE)), OUT, bias.to(DEVICE), **tile)
    assert_product(y, q_a, q_b, bias)
    spread = torch.stack((bias, bias), 1).to(DEVICE)[:, 0]
    assert torch.equal(multiply(Operand(q_a.to(DEVICE)), Operand(q_b.to(DEVICE)), OUT, spread, **tile), y)


@needs_dot
def test_codes_at_an_address_that_tma_does_not_take():
    q_a, q_b = quantised(40, 96, "mxfp4", 2).to(DEVICE), quantised(20, 96, "mxfp4", 3).to(DEVICE)
    shifted = torch.empty(q_a.codes.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(q_a.codes.shape).copy_(q_a.codes)
    odd = dataclasses.replace(q_a, codes=shifted)
    expected = multiply(Operand(q_a), Operand(q_b), OUT, None, **TILE)
    assert shifted.data_ptr() % 16 and Operand(odd).codes.data_ptr() % 16 == 0
    assert torch.equal(multiply(Operand(odd), Operand(q_b), OUT, None, **TILE), expected)


@needs_dot
def test_a_broken_block_breaks_its_row_and_nothing_else():
    x = torch.randn(34, 96, generator=torch.Generator().manual_seed(5))
    x[7, 40], x[33, 95] = float("nan"), float("inf")
    for recipe in ("mxfp4", "mxfp4+of0.5"):
        q = quantize(x, QuantRecipe.parse(recipe))
        y = multiply(Operand(q.to(DEVICE)), Operand(quantised(20, 96, "mxfp4", 6).to(DEVICE)), OUT, None, **TILE)
        assert y[7].isnan().all() and y[33].isnan().all()
        assert y[[i for i in range(33) if i != 7]].isfinite().all()


def test_empty_products():
    def of(rows, length):
        return Operand(quantize(torch.zeros(rows, length, device=DEVICE)))

    assert multiply(of(0, 64), of(8, 64), OUT, None, **TILE).shape == (0, 8)
    assert torch.equal(
        multiply(of(3, 0), of(2, 0), OUT, torch.ones(2, device=DEVICE), **TILE).cpu(), torch.ones(3, 2, dtype=OUT)
    )


def test_scales_lie_where_the_tensor_core_reads_them():
    scales = torch.randint(1, 256, (2, 150, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    tiles = core_order(scales)
    assert tiles.shape == (2, 2, 2, 2, 256)
    flat = tiles.flatten(-2)
    for p, row, block in ((0, 0, 0), (1, 37, 3), (0, 127, 4), (1, 128, 5), (1, 149, 2)):
        i, j = divmod(row % 128, 32)
        assert flat[p, row // 128, block // 4, 16 * j + 4 * i + block % 4] == scales[p, row, block]
    assert (tiles != 0).sum() == scales.numel(), "padded with zeros"


def test_the_fallback_s_weight_is_in_its_scales():
    q = quantised(8, 64, "mxfp4+of0.25", 8)
    q.residual.scales[0] = torch.tensor([1, 255])
    q.residual.scales[1] = torch.tensor([2, 250])
    scales = Operand(q).scales.flatten(-2)[1, 0, 0]
    assert [scales[16 * row + block].item() for row in (0, 1) for block in (0, 1)] == [0, 255, 0, 248]


@pytest.mark.parametrize(
    "recipe",
    [
        QuantRecipe(macro_block="static"),
        QuantRecipe(block_size=16),
        QuantRecipe(pre_scale=0.75),
        QuantRecipe(hadamard=32),
    ],
)
def test_operands_that_the_tensor_core_does_not_know_are_refused(recipe):
    with pytest.raises(ValueError, match="plain MXFP4"):
        Operand(quantize(torch.randn(4, 64), recipe))


def test_products_that_cannot_be_are_refused():
    a, b = (Operand(quantised(4, 64, "mxfp4", seed).to(DEVICE)) for seed in (0, 1))
    with pytest.raises(ValueError, match="plain MXFP4"):
        Operand(quantize(torch.randn(2, 4, 64)))
    with pytest.raises(ValueError, match=r"alpha=0\.3 is no power of two"):
        Operand(quantize(torch.randn(4, 64), QuantRecipe(fallback_alpha=0.3)))
    with pytest.raises(ValueError, match="A has 64 columns and B 63"):
        multiply(a, Operand(quantised(4, 63, "mxfp4", 2).to(DEVICE)), OUT, None, **TILE)
    with pytest.raises(ValueError, match=r"bias of shape \(5,\) does not fit 4"):
        multiply(a, b, OUT, torch.zeros(5, device=DEVICE), **TILE)
    with pytest.raises(ValueError, match=r"out_dtype=torch\.float16"):
        multiply(a, b, torch.float16, None, **TILE)
    if CAPABILITY < 10:
        with pytest.raises(ValueError, match=r"compute capability 10\.0 or more"):
            product(a, b)
