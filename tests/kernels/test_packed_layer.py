"""The rollout's layer on packed weights: decoded while multiplied with few tokens, dequantised for many."""

import pytest
import torch

from tests.kernels.common import DEVICE  # isort: skip

from mxfp4_kernels.matmul import decode

from mxfp4_rl import ModelRecipe, QuantRecipe, quantize
from mxfp4_rl.nn import PackedLinear, packed
from mxfp4_rl.quant import fake_quantize

CPU = DEVICE == "cpu"


def layer_of(recipe, out, features, bias=True):
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(features, out, bias=bias, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(out, features, generator=g).bfloat16().to(DEVICE)
    PackedLinear.swap(layer, "model.layer", recipe)
    return layer, w


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+mbs", "mxfp4+mbs+of0.5"])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 5), (1, 64), (3, 30)], ids=str)
def test_products_are_those_of_the_dequantised_operands(monkeypatch, name, tokens):
    if CPU:  # the interpreter runs the kernel there
        monkeypatch.setattr(packed, "decodes", lambda weight, dtype: True)
    calls, original = [], decode.decode_product
    monkeypatch.setattr(decode, "decode_product", lambda x, *rest: calls.append(x.shape[0]) or original(x, *rest))
    recipe = QuantRecipe.parse(name)
    layer, w = layer_of(ModelRecipe(weight=recipe, activation=recipe), 48, 256)
    assert layer.path == "no weights yet"
    layer.hold(quantize(w, recipe), torch.bfloat16)
    assert "packed weights by the decode kernel" in layer.path
    assert not any(isinstance(held, torch.Tensor) for held in layer._held.values()), "nothing dequantised is kept"
    operand = fake_quantize(w, recipe)
    assert torch.equal(layer.weight_operand(torch.bfloat16), operand)
    x = torch.randn(*tokens, 256, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    y, x_hat = layer(x), fake_quantize(x, recipe)
    exact = x_hat.double() @ operand.double().t() + layer.bias.double()
    size = x_hat.double().abs() @ operand.double().abs().t() + layer.bias.double().abs()
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    # BF16 outputs, with the bias added to one on the dequantised path; OF's second pass is not rounded with the first here.
    assert ((y.double() - exact).abs() <= 2**-7 * exact.abs() + 2**-8 * size).all()
    rows = tokens[0] * tokens[1]
    assert calls == ([rows] if rows <= decode.MOST_ROWS else [])


def test_its_weights_have_one_shape_and_are_not_released():
    recipe = QuantRecipe()
    layer, w = layer_of(ModelRecipe(), 48, 256)
    with pytest.raises(ValueError, match=r"model.layer holds \(48, 256\), not \(32, 256\): ship those of the same model"):
        layer.hold(quantize(w[:32], recipe), torch.bfloat16)
    layer.hold(quantize(w, recipe), torch.bfloat16)
    layer.load_state_dict(layer.state_dict())
    x = torch.randn(3, 256, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_weights_that_the_kernel_cannot_decode_are_kept_dequantised():
    recipe = QuantRecipe.parse("mxfp4+hadamard64")
    layer, w = layer_of(ModelRecipe(weight=recipe, activation=recipe), 48, 256)
    layer.hold(quantize(w, recipe), torch.bfloat16)
    assert layer.path == "dequantised weights"
    assert torch.equal(layer._held["operand"], layer.weight_operand(torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"no weights in torch.float32: load them with hold"):
        layer(torch.ones(1, 256, device=DEVICE))
