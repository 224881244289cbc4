"""FP8 W8A8, the rival: the reference's bits, and products of what they stand for."""

import pytest
import torch

from tests.kernels.common import DEVICE, OUT, assert_same, data  # isort: skip

from mxfp4_kernels.matmul.w8a8 import Operand, product, quantize_rows, reference


def awkward(shape, dtype):
    """Also a row that is all infinite, one of subnormal numbers, and largest numbers."""
    x = data(shape, dtype)
    if shape[0] > 8:
        x[4], x[5, -1] = float("inf"), -float("inf")
        x[7, 0] = torch.finfo(dtype).max
        if dtype == torch.float32:
            x[6] = torch.linspace(-9, 9, shape[1]) * 2.0**-140
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 33), (1, 576), (70, 700), (12, 1), (2, 20000)], ids=str)
def test_rows_and_columns_are_the_reference_s(shape, dtype):
    x = awkward(shape, dtype)
    views = (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: t[:, ::2], lambda t: t[1:, 1:])
    for view in views if shape[1] < 16384 else views[:1]:
        payload, scale = reference(view(x))
        got_payload, got_scale = quantize_rows(view(x.to(DEVICE)))
        assert got_payload.is_contiguous()
        assert_same(got_scale, scale)
        assert torch.equal(got_payload.float().cpu().isnan(), payload.float().isnan())
        assert_same(got_payload.view(torch.uint8), payload.view(torch.uint8), payload.float().isnan())


def test_what_the_reference_does():
    x = torch.tensor([[0.0, -0.0], [1.0, -448.0], [float("nan"), 1.0], [float("inf"), 1.0], [2.0**-140, -(2.0**-149)]])
    payload, scale = reference(x)
    assert scale.isnan().tolist() == [False, False, True, True, False]
    assert scale[[0, 1, 4]].tolist() == [1.0, 1.0, 2.0**-126]
    assert payload.float()[1].tolist() == [1.0, -448.0] and payload.float()[2:4].isnan().all()
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.linspace(-112, 120, 64)).unsqueeze(
        1
    )
    payload, scale = reference(x)
    assert (payload.float().abs().amax(1) == 448).all(), "the largest element is E4M3's"
    error = (payload.double() * scale.double().unsqueeze(1) - x.double()).abs()
    # Half a step: 2^-4 of normal numbers, 2^-10 scales below them; and the roundings of 1 / s and of the product.
    assert (error <= x.abs().double() * (2**-4 + 2**-22) + 2**-10 * scale.double().unsqueeze(1)).all()


def test_products_are_those_of_the_dequantised_operands():
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, 96, generator=g).to(torch.bfloat16).to(DEVICE) for n in (70, 48))
    for fast in (False, True):
        a, b = Operand(x), Operand(w)
        exact = a.dequantize(torch.float64).cpu() @ b.dequantize(torch.float64).cpu().t()
        size = a.dequantize().cpu().abs().double() @ b.dequantize().cpu().abs().double().t()
        # BF16 output, and the tensor core's 14-bit partial sums.
        assert ((product(a, b, OUT, fast).cpu().double() - exact).abs() <= 2**-8 * exact.abs() + 2**-11 * size).all()
    x[3, 5] = float("inf")
    y = product(Operand(x), Operand(w), OUT)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


def test_products_that_cannot_be_and_empty_ones():
    a, b = (Operand(torch.ones(n, 64, device=DEVICE)) for n in (16, 48))
    with pytest.raises(ValueError, match="A has 64 columns and B 32"):
        product(a, Operand(torch.ones(48, 32, device=DEVICE)))
    with pytest.raises(ValueError, match="N=47 must be multiples of 16"):
        product(a, Operand(torch.ones(47, 64, device=DEVICE)))
    assert product(Operand(torch.ones(0, 64, device=DEVICE)), b, OUT).shape == (0, 48)
    nothing = Operand(torch.ones(3, 0, device=DEVICE))
    assert (
        nothing.scale.tolist() == [[1, 1, 1]] and (product(nothing, Operand(torch.ones(16, 0, device=DEVICE)), OUT) == 0).all()
    )
