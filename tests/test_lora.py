"""LoRA on a quantised model: the base layers are quantised, the adapters are not."""

import pytest
import torch

from mxfp4_rl import ModelRecipe, QuantRecipe, convert
from mxfp4_rl.nn import MXFP4Linear, converted_layers

peft = pytest.importorskip("peft")


def adapted(recipe):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(64, 48), "o_proj": torch.nn.Linear(48, 64)})
    model.forward = lambda x: model["o_proj"](model["q_proj"](x))
    convert(model, recipe)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))


def test_base_layers_are_quantised_and_adapters_are_not():
    recipe = ModelRecipe(weight=QuantRecipe(), activation=QuantRecipe.parse("mxfp4+mbs"))
    model = adapted(recipe)
    layers = converted_layers(model)
    assert layers.keys() == {"q_proj", "o_proj"}
    adapters = [m for n, m in model.named_modules() if "lora_" in n and isinstance(m, torch.nn.Linear)]
    assert len(adapters) == 4 and not any(isinstance(m, MXFP4Linear) for m in adapters)
    wrapped, x = model.base_model.model["q_proj"], torch.randn(5, 64)
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    base = layers["q_proj"](x)
    assert torch.allclose(wrapped(x), base + wrapped.scaling["default"] * (x @ a.t() @ b.t()), atol=1e-5)


def test_only_adapters_learn_and_gradients_pass_the_quantised_base():
    model = adapted(ModelRecipe())
    model(torch.randn(5, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0


def test_the_base_is_quantised_once_and_adapters_step():
    model = adapted(ModelRecipe())
    layer, optimizer = (
        converted_layers(model)["q_proj"],
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1),
    )
    before = layer.weight_operand(torch.float32)
    model(torch.randn(5, 64)).sum().backward()
    optimizer.step()
    assert layer.weight_operand(torch.float32) is before
