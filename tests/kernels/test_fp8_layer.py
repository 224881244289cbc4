"""A layer whose products are FP8 against the same layer in the compute dtype: same operands, so the same results."""

import copy
import io

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
    "gradient not in FP8": ModelRecipe(weight=MBS, grad=QuantRecipe.parse("mxfp4+of1"), dgrad="mx", wgrad="mx"),
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
    from mxfp4_kernels.matmul import fp8

    made, original = [], fp8.operands

    def counted(x, *kinds):
        made.append(tuple(x.shape))
        return original(x, *kinds)

    monkeypatch.setattr(fp8, "operands", counted)
    query, key = (layer_of("fp8", RECIPES["mbs mx"], (64, n), False) for n in (48, 32))
    x = torch.randn(2, 8, 64, device=DEVICE, dtype=DTYPE, requires_grad=True)
    (query(x).sum() + key(x).sum()).backward()
    assert made.count((16, 64)) == 1 and made.count((48, 64)) == made.count((32, 64)) == 1
    with torch.no_grad():
        x.add_(1)
    query(x)
    assert made.count((16, 64)) == 2 and made.count((48, 64)) == 1


@pytest.mark.parametrize("name", ["ste", "mx", "mbs ste", "mbs mx", "bf16"])
def test_a_weight_that_changes_before_the_backward_is_noticed_or_does_not_matter(name):
    x, g = (torch.randn(16, n, device=DEVICE, dtype=DTYPE) for n in (64, 48))
    layer = layer_of("fp8", RECIPES[name], (64, 48), False)
    expected = step(layer, x, g)[1]
    inputs = x.clone().requires_grad_()
    y = layer(inputs)
    with torch.no_grad():
        layer.weight.mul_(2)
    if name == "bf16":  # multiplies with the weight itself
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(g)
    else:
        y.backward(g)
        assert torch.equal(inputs.grad, expected)


@pytest.mark.parametrize("name", ["ste", "mbs mx"])
def test_layers_are_copied_pickled_unswapped_and_read_like_any_other(name):
    layer = layer_of("fp8", RECIPES[name], (64, 48), True)
    x = torch.randn(5, 64, device=DEVICE, dtype=DTYPE)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    assert layer(x[0]).shape == (48,)
    assert torch.allclose(layer(x[0]), y[0], rtol=1e-5, atol=1e-2 if GPU else 1e-6)
    assert (layer(x).relu_() >= 0).all(), "an output may be changed in place"
    y = layer(x.requires_grad_())
    layer.unswap()
    y.sum().backward()
    assert x.grad is not None


def test_a_second_derivative_is_refused_and_frozen_sides_get_no_gradient():
    layer = layer_of("fp8", RECIPES["mx"], (64, 48), False)
    x = torch.randn(16, 64, device=DEVICE, dtype=DTYPE, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        dx.square().sum().backward()
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


def test_the_number_of_tokens_does_not_change_what_is_kept_of_a_weight():
    layer = layer_of("fp8", RECIPES["ste"], (64, 48), False)
    for tokens in (16, 17, 32, 33):
        layer(torch.randn(tokens, 64, device=DEVICE, dtype=DTYPE))
    assert len(layer._held) == 1


def test_master_weights_under_autocast():
    results = {}
    x, g = (torch.randn(16, n, generator=torch.Generator().manual_seed(0)).to(DEVICE) for n in (64, 48))
    g = g.bfloat16()
    for product in ("fp8", "bf16"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 48, device=DEVICE)
        MXFP4Linear.swap(layer, "layer", ModelRecipe.from_dict({**RECIPES["mbs mx"].to_dict(), "product": product}))
        inputs = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(inputs)
        assert y.dtype == torch.bfloat16
        y.backward(g)  # the same for both: what is quantised must not differ by a rounding of y
        assert inputs.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
        results[product] = [y, inputs.grad, layer.weight.grad]
    for ours, theirs in zip(results["fp8"], results["bf16"], strict=True):
        assert (ours.double() - theirs.double()).norm() <= 1e-2 * theirs.double().norm()
