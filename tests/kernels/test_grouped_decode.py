"""Products of few tokens with packed experts."""

import itertools

import pytest
import torch
from mxfp4_kernels.matmul.grouped_decode import grouped_decode_product

from mxfp4_rl import QuantRecipe, quantize
from tests.kernels.common import DEVICE, OUT

RECIPES = ["mxfp4", "mxfp4+mbs", "mxfp4+mbs32", "mxfp4+of", "mxfp4+mbs+of"]


def _case(words, counts, N, K):
    """Tokens, quantised weights and offsets; tokens behind the last expert's are three more than counted."""
    g = torch.Generator().manual_seed(0)
    w = quantize(torch.randn(len(counts), N, K, generator=g).bfloat16(), QuantRecipe.parse(words)).to(DEVICE)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=DEVICE)
    return torch.randn(sum(counts) + 3, K, generator=g).bfloat16().to(DEVICE), w, offsets


@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 40, 0, 2), (70, 1)], ids=str)
@pytest.mark.parametrize("words", RECIPES)
def test_every_token_meets_its_own_experts_operand(words, counts):
    x, w, offsets = _case(words, counts, 72, 160)  # tails of tiles and chunks
    y = grouped_decode_product(x, w, offsets, OUT)
    y, y_dtype = y.double(), y.dtype
    w_hat = w.dequantize(torch.bfloat16).double()
    bounds = offsets.tolist()
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = x[first:last].double()
        exact, size = own @ w_hat[e].t(), own.abs() @ w_hat[e].abs().t()
        rounding = 0 if y_dtype == torch.float32 else 2**-8
        assert ((y[first:last] - exact).abs() <= rounding * exact.abs() + 2**-18 * size).all()
    assert not y[bounds[-1] :].any()


@pytest.mark.parametrize("words", RECIPES)
def test_the_operand_is_the_dequantised_weight_bit_for_bit(words):
    K = 128
    _, w, offsets = _case(words, (K, 0, K), 64, K)
    ones = torch.eye(K, device=DEVICE).bfloat16().repeat(2, 1)  # each product is one element of the operand
    y = grouped_decode_product(ones, w, offsets, torch.float32)
    w_hat = w.dequantize(torch.bfloat16).float()
    assert torch.equal(y, torch.cat([w_hat[0].t(), w_hat[2].t()]))


def test_scales_of_any_size_and_broken_blocks():
    K, N = 64, 16
    _, w, offsets = _case("mxfp4", (K,), N, K)
    w.scales[0, :5] = torch.tensor([[1, 10], [254, 200], [128, 129], [130, 120], [255, 127]], device=DEVICE).byte()
    y = grouped_decode_product(torch.eye(K, device=DEVICE).bfloat16(), w, offsets, torch.float32).t()
    w_hat = w.dequantize(torch.bfloat16).float()[0]
    assert y[4].isnan().all()  # 0 * NaN too
    keep = torch.arange(N, device=DEVICE) != 4
    keep[1] = False  # 6 * 2^127 is infinite, and 0 times that NaN
    assert torch.equal(y[keep], w_hat[keep])


def test_no_tokens_and_wrong_arguments():
    x, w, offsets = _case("mxfp4", (2, 1), 16, 64)
    assert grouped_decode_product(x[:0], w, torch.zeros_like(offsets)).shape == (0, 16)
    for wrong in ((x.float(), w, offsets), (x[:, :32], w, offsets), (x, w, offsets.long()), (x, w, offsets[:-1])):
        with pytest.raises(ValueError, match="must be"):
            grouped_decode_product(*wrong)
