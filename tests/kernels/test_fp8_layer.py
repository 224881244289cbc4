"""A layer whose products are FP8 against the same layer in the compute dtype: same operands, so the same results."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.common import DEVICE, GPU  # isort: skip

from mxfp4_rl import ModelRecipe, QuantRecipe
from mxfp4_rl.nn import MXFP4Linear, fp8

DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter's BF16 truncates
MBS, PLAIN = QuantRecipe.parse("mxfp4+mbs"), QuantRecipe(scale_rule="oas")
RECIPES = {
    "ste": ModelRecipe(),
    "mx": ModelRecipe(grad=PLAIN, dgrad="mx", wgrad="mx"),
    "mbs ste": ModelRecipe(weight=MBS, activation=MBS),
    "mbs mx": ModelRecipe(weight=MBS, activation=MBS, grad=PLAIN, dgrad="mx", wgrad="mx"),
    "half": ModelRecipe(weight=PLAIN, activation=MBS, grad=PLAIN, dgrad="mx", wgrad="ste"),
    "other half": ModelRecipe(weight=MBS, activation=PLAIN, grad=PLAIN, dgrad="bf16", wgrad="mx"),
    "bf16": ModelRecipe(dgrad="bf16", wgrad="bf16"),
    "small": ModelRecipe(weight=QuantRecipe.parse("mxfp4+mbs32"), grad=PLAIN, dgrad="mx", wgrad="mx"),
    "stochastic": ModelRecipe(weight=MBS, grad=QuantRecipe.parse("mxfp4+of1"), dgrad="mx", wgrad="mx"),
}


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """On a CPU too, where the layers themselves would choose BF16 products: the product is a float32 one there."""
    monkeypatch.setattr(fp8, "runs_on", lambda device, dtype: True)


def layer_of(product, recipe, features, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(*features, bias=bias, device=DEVICE, dtype=DTYPE)
    MXFP4Linear.swap(linear, "layer", ModelRecipe.from_dict({**recipe.to_dict(), "product": product}))
    return linear


def step(layer, x, g, through=lambda layer, x: layer(x)):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = through(layer, x)
    y.backward(g)
    return [y.detach(), x.grad, layer.weight.grad] + ([layer.bias.grad] if layer.bias is not None else [])


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= (4e-3 if GPU else 1e-6) * b.double().norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tokens, features", [((2, 8), (64, 48)), ((3, 7), (72, 40))], ids=str)
def test_fp8_steps_are_those_of_the_dequantised_operands(tokens, features, name, bias):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*tokens, features[0], generator=g).to(DTYPE)
    x[0, 3] *= torch.exp2(torch.linspace(-40, 0, features[0])).to(DTYPE)  # a row that no container holds
    grad = torch.randn(*tokens, features[1], generator=g).to(DTYPE)
    eight, sixteen = (layer_of(product, RECIPES[name], features, bias) for product in ("fp8", "bf16"))
    ours, theirs = (step(layer, x.to(DEVICE), grad.to(DEVICE)) for layer in (eight, sixteen))
    assert_close(ours, theirs)
    with torch.no_grad():
        for layer in (eight, sixteen):
            layer.weight.mul_(3)
    assert_close(step(eight, x.to(DEVICE), grad.to(DEVICE)), step(sixteen, x.to(DEVICE), grad.to(DEVICE)))


@pytest.mark.parametrize("name", ["ste", "mbs mx"])
def test_checkpointed_steps_are_the_same(name):
    x, g = (torch.randn(16, n, device=DEVICE, dtype=DTYPE) for n in (64, 48))
    layer = layer_of("fp8", RECIPES[name], (64, 48), True)
    recomputed = step(layer, x, g, lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    for ours, theirs in zip(recomputed, step(layer, x, g), strict=True):
        assert torch.equal(ours, theirs)


def test_an_input_that_several_layers_read_is_quantised_once(monkeypatch):
    from mxfp4_kernels.matmul import blocks

    made, original = [], blocks.operands

    def counted(x, **kinds):
        made.append(tuple(x.shape))
        return original(x, **kinds)

    monkeypatch.setattr(blocks, "operands", counted)
    query, key = (layer_of("fp8", RECIPES["mbs mx"], (64, n), False) for n in (48, 32))
    x = torch.randn(2, 8, 64, device=DEVICE, dtype=DTYPE, requires_grad=True)
    (query(x).sum() + key(x).sum()).backward()
    assert made.count((16, 64)) == 1 and made.count((48, 64)) == made.count((32, 64)) == 1
    with torch.no_grad():
        x.add_(1)
    query(x)
    assert made.count((16, 64)) == 2 and made.count((48, 64)) == 1
