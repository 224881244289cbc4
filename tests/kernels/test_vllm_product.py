"""The operators that vLLM's layers call."""

import pytest
import torch

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.vllm_plugin.product import as_text
from tests.kernels.common import DEVICE


@pytest.mark.parametrize("rows", [(3,), (2, 5), (130,), (0,)], ids=str)
@pytest.mark.parametrize("activation", [None, "mxfp4", "mxfp4+mbs+of"])
@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+mbs", "mxfp4+mbs+of"])
def test_the_layer_multiplies_the_operands_of_its_recipes(words, activation, rows):
    g = torch.Generator().manual_seed(0)
    recipe, K, N = QuantRecipe.parse(words), 160, 24
    own = activation and QuantRecipe.parse(activation)
    w = quantize(torch.randn(N, K, generator=g).bfloat16(), recipe)
    x, bias = torch.randn(*rows, K, generator=g).bfloat16().to(DEVICE), torch.randn(N, generator=g).bfloat16().to(DEVICE)
    w = w.to(DEVICE)
    second = w.residual
    y = torch.ops.mxfp4_rl.linear(
        x,
        w.codes,
        w.scales,
        w.macro,
        second and second.codes,
        second and second.scales,
        bias,
        w.macro_size,
        w.alpha,
        as_text(own),
    )
    x_hat = (fake_quantize(x, own) if own else x).double()
    exact = x_hat @ w.dequantize().double().t() + bias.double()
    size = x_hat.abs() @ w.dequantize().double().abs().t() + bias.double().abs()
    assert y.shape == (*rows, N) and y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-8 * size).all()


def test_activations_are_the_trainers_bit_for_bit():
    x, recipe = torch.randn(4, 96, device=DEVICE).bfloat16(), QuantRecipe.parse("mxfp4+mbs+of")
    assert torch.equal(torch.ops.mxfp4_rl.quantized(x, as_text(recipe)), fake_quantize(x, recipe))


def test_the_operators_can_be_traced_without_data():
    with torch.device("meta"):
        x, codes, scales = torch.empty(7, 64).bfloat16(), torch.empty(24, 32).byte(), torch.empty(24, 2).byte()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, codes, scales = (
            mode.from_tensor(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)) for t in (x, codes, scales)
        )
        y = torch.ops.mxfp4_rl.linear(x, codes, scales, None, None, None, None, 128, 0.0, "")
    assert y.shape == (7, 24) and y.dtype == torch.bfloat16
