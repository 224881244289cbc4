"""Quantised layers: products and gradients against float64 of the dequantised operands, conversion, kept operands."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mxfp4_rl import ModelRecipe, QuantRecipe, RecipeError, convert
from mxfp4_rl.nn import MXFP4Linear, convert_for_rollout, converted_layers, plan, release_operands, unconvert
from mxfp4_rl.nn.linear import spaced_rows
from mxfp4_rl.quant import fake_quantize, quantize

FULL = QuantRecipe(macro_block="static", fallback_alpha=0.5)
GRAD = QuantRecipe(scale_rule="oas")


def converted(recipe, inputs=70, outputs=48):
    """One quantised layer with float32 masters."""
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(inputs, outputs))
    convert(holder, recipe)
    return holder[0]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "dgrad, wgrad, grad",
    [
        (d, w, g)
        for d, w, g in itertools.product(("ste", "bf16", "mx"), ("ste", "bf16", "mx"), (None, GRAD))
        if g is not None or "mx" not in (d, w)
    ],
)
def test_every_switch_computes_its_formula(dgrad, wgrad, grad, bias):
    torch.manual_seed(0)
    recipe = ModelRecipe(weight=FULL, activation=FULL, grad=grad, dgrad=dgrad, wgrad=wgrad)
    model = nn.Sequential(nn.Linear(70, 48, bias=bias))
    w, b = model[0].weight.detach().clone(), model[0].bias.detach().clone() if bias else 0.0
    convert(model, recipe)
    x = torch.randn(3, 11, 70, requires_grad=True)
    y = model(x)
    g = torch.randn_like(y)
    y.backward(g)

    def q(t, r, axis=-1):
        return fake_quantize(t, r, axis).double()

    def grad_operand(axis):
        return g.flatten(0, 1).double() if grad is None else q(g.flatten(0, 1), grad, axis)

    flat = x.detach().flatten(0, 1)
    expected = q(flat, FULL) @ q(w, FULL).T + b
    w_back = {"ste": q(w, FULL), "bf16": w.double(), "mx": q(w, FULL, 0)}[dgrad]
    x_back = {"ste": q(flat, FULL), "bf16": flat.double(), "mx": q(flat, FULL, 0)}[wgrad]
    assert relative(y.flatten(0, 1), expected) < 1e-6
    assert relative(x.grad.flatten(0, 1), grad_operand(-1) @ w_back) < 1e-6
    assert relative(model[0].weight.grad, grad_operand(0).T @ x_back) < 1e-6
    if bias:
        assert relative(model[0].bias.grad, g.flatten(0, 1).sum(0)) < 1e-6


@pytest.mark.parametrize("weight, activation", [(FULL, None), (None, FULL)])
def test_one_operand_alone(weight, activation):
    layer = converted(ModelRecipe(weight=weight, activation=activation))
    x = torch.randn(5, 70)
    w_hat = fake_quantize(layer.weight, weight) if weight else layer.weight
    x_hat = fake_quantize(x, activation) if activation else x
    assert torch.equal(layer(x), nn.functional.linear(x_hat, w_hat) + layer.bias)


def test_an_mx_product_rotates_and_rounds_both_operands_like_the_gradient():
    """The rotations cancel in the product and every rounding is unbiased: the mean of many draws is the exact gradient."""
    torch.manual_seed(0)
    grad = QuantRecipe(rounding="stochastic", hadamard=32)
    recipe = ModelRecipe(weight=FULL, activation=FULL, grad=grad, dgrad="mx", wgrad="mx")
    model = nn.Sequential(nn.Linear(70, 48, bias=False))
    w = model[0].weight.detach().clone()
    convert(model, recipe)
    draws, exact_dx, exact_dw = [], None, None
    for _ in range(300):
        x = torch.randn(3, 11, 70, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        model[0].weight.grad = None
        y.backward(g)
        draws.append((x.grad.double(), model[0].weight.grad.double()))
    flat_g, flat_x = g.flatten(0, 1).double(), x.detach().flatten(0, 1).double()
    exact_dx, exact_dw = flat_g @ w.double(), flat_g.T @ flat_x
    assert not torch.equal(draws[0][0], draws[1][0])
    mean_dx = torch.stack([d[0] for d in draws]).mean(0).flatten(0, 1)
    mean_dw = torch.stack([d[1] for d in draws]).mean(0)
    # W and X keep FULL's fallback, whose second pass is drawn independently and is unbiased for any alpha.
    assert relative(mean_dx, exact_dx) < 0.03 and relative(mean_dw, exact_dw) < 0.03
    assert relative(draws[0][0].flatten(0, 1), exact_dx) > 0.08


def test_an_inference_pass_leaves_nothing_that_breaks_training():
    layer = nn.Sequential(nn.Linear(64, 64))
    convert(layer, ModelRecipe())
    x = torch.randn(4, 64)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer[0].weight.grad is not None


def test_a_report_says_what_quantises_on_a_device():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    report = plan(model, ModelRecipe(grad=QuantRecipe(rounding="stochastic")))
    assert report.backends(torch.device("cpu")) == "weight reference, activation reference, grad reference, products bf16"


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"fallback_alpha": 0.5}, r"weight of 0 \(mxfp4 rceil \+ OF 0.5: it has a fallback\). .* fallback_alpha=null"),
        ({"macro_block": "dynamic"}, r"weight of 0 \(.*: its macro blocks are dynamic\). .*macro_block=null or"),
        ({"macro_block": "static", "macro_size": 96}, r"weight of 0 \(.*: its macro blocks have 96 elements\)"),
        ({"activation": None}, r"activation of 0 \(unquantised\)"),
        (
            {"product": "fp8_fast", "grad": {"macro_block": "static"}, "dgrad": "mx"},
            "macro blocks of 0's grad are scaled every 128",
        ),
        ({"product": "fp8_fast", "macro_block": "static"}, "macro blocks of 0's weight are scaled every 128 .* product='fp8'"),
    ],
)
def test_fp8_products_are_refused_where_they_cannot_be(recipe, message):
    pytest.importorskip("triton")
    with pytest.raises(RecipeError, match=message):
        plan(nn.Sequential(nn.Linear(72, 48)), ModelRecipe.from_dict({"product": "fp8", **recipe}))


def test_fp8_products_on_a_cpu_are_bf16_and_the_report_says_so():
    pytest.importorskip("triton")
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    x, plain = torch.randn(5, 64), copy.deepcopy(model)
    report = convert(model, ModelRecipe(product="fp8"))
    convert(plain, ModelRecipe())
    assert report.backends(torch.device("cpu")).endswith("products bf16")
    assert torch.equal(model(x), plain(x))


def test_measured_rows_are_spread_out_and_keep_tiles_whole():
    t = torch.arange(200.0).unsqueeze(1).expand(200, 64)
    assert spaced_rows(t, None, FULL) is t and spaced_rows(t, 200, FULL) is t
    assert spaced_rows(t, 5, FULL)[:, 0].tolist() == [0, 50, 100, 149, 199]
    tiled = spaced_rows(t, 70, QuantRecipe(tile=True))[:, 0]
    assert tiled.tolist() == [*range(32), *range(160, 192)]
    assert spaced_rows(t[:20], 8, QuantRecipe(tile=True)).shape[0] == 20


def test_straight_through_gradients_flow_to_fp32_masters_in_bf16_compute():
    layer = converted(ModelRecipe(weight=FULL, activation=FULL))
    x = torch.randn(4, 70, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    # the operand is quantised from the BF16 bits of the master, not from the master
    assert torch.equal(layer.weight_operand(torch.bfloat16), fake_quantize(layer.weight.bfloat16(), FULL))


def test_autocast_decides_the_compute_dtype():
    layer = converted(ModelRecipe())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 70)).dtype == torch.bfloat16


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    convert(model, ModelRecipe(weight=FULL, activation=FULL, grad=GRAD))
    again = copy.deepcopy(model)
    x = torch.randn(8, 64)
    model(x).square().sum().backward()
    checkpoint(again, x, use_reentrant=False).square().sum().backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_weight_operand_is_made_once_a_step_and_never_stale(monkeypatch):
    import mxfp4_rl.nn.operand as module

    quantised = []
    original = module.fake_quantize
    monkeypatch.setattr(module, "fake_quantize", lambda t, *a, **k: quantised.append(t.shape) or original(t, *a, **k))
    layer = converted(ModelRecipe(activation=None))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 70)
    for _ in range(3):
        layer(x).sum().backward()
    assert len(quantised) == 1
    optimizer.step()
    after = layer(x)
    assert len(quantised) == 2
    assert torch.equal(after, nn.functional.linear(x, original(layer.weight)) + layer.bias)
    with torch.no_grad():
        layer.weight.mul_(2)
    layer(x)
    layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
    layer(x)
    assert len(quantised) == 4
    layer.gathered = True  # as under FSDP: only optimiser steps and `release` are seen
    layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    layer(x)
    assert len(quantised) == 5
    release_operands(nn.Sequential(layer))
    layer(x)
    torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).step()
    layer(x)
    assert len(quantised) == 7


def test_inputs_shared_by_several_layers_are_quantised_once(monkeypatch):
    import mxfp4_rl.nn.linear as module

    count = []
    original = module.fake_quantize
    monkeypatch.setattr(module, "fake_quantize", lambda t, *a, **k: count.append(1) or original(t, *a, **k))
    model = nn.ModuleList([nn.Linear(64, 32) for _ in range(3)])
    convert(model, ModelRecipe(weight=None))
    x = torch.randn(4, 64)
    first = [layer(x) for layer in model]
    assert len(count) == 1
    x.mul_(2)  # an in-place change is seen
    second = [layer(x) for layer in model]
    assert len(count) == 2
    for layer, a, b in zip(model, first, second, strict=True):
        assert torch.equal(a, nn.functional.linear(original(x / 2), layer.weight) + layer.bias)
        assert torch.equal(b, nn.functional.linear(original(x), layer.weight) + layer.bias)
    with torch.inference_mode():
        y = torch.randn(4, 64)
        assert torch.equal(model[0](y), nn.functional.linear(original(y), model[0].weight) + model[0].bias)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = dict(vocab_size=64, hidden_size=96, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**(size | dict(num_key_value_heads=2) | changes)))


def test_convert_swaps_every_linear_but_the_output_and_unconvert_restores():
    model = llama()
    names, values = list(model.state_dict()), [p.clone() for p in model.parameters()]
    tokens = torch.randint(0, 64, (2, 9))
    before = model(tokens).logits
    report = convert(model, ModelRecipe())
    assert len(report.converted) == 14 and report.skipped == {"lm_head": "output embedding"}
    assert "7 " not in report.describe() and "2 q_proj" in report.describe()
    assert list(model.state_dict()) == names
    assert not torch.equal(model(tokens).logits, before)
    assert set(converted_layers(model)) == set(report.converted)
    assert unconvert(model) == 14
    assert torch.equal(model(tokens).logits, before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
    assert not any(isinstance(m, MXFP4Linear) for m in model.modules())


def test_routers_stay_and_gate_projections_do_not():
    model = nn.ModuleDict({"gate": nn.Linear(64, 4), "gate_proj": nn.Linear(64, 64), "router": nn.Linear(64, 4)})
    report = convert(model, ModelRecipe())
    assert list(report.converted) == ["gate_proj"] and set(report.skipped.values()) == {"router"}


def test_overrides_and_excludes_by_name_and_expression():
    model = llama()
    recipe = ModelRecipe(
        weight=QuantRecipe(),
        activation=QuantRecipe(),
        overrides={"re:layers\\.1\\..*down_proj$": {"fallback_alpha": 1.0}, "o_proj": {"scale_rule": "oas"}},
        exclude=["model.layers.0.self_attn.q_proj"],
    )
    report = convert(model, recipe)
    layers = converted_layers(model)
    assert layers["model.layers.1.mlp.down_proj"].recipe.weight.fallback_alpha == 1.0
    assert layers["model.layers.0.mlp.down_proj"].recipe.weight.fallback_alpha is None
    assert layers["model.layers.0.self_attn.o_proj"].recipe.activation.scale_rule == "oas"
    assert "model.layers.0.self_attn.q_proj" not in layers and "model.layers.1.self_attn.q_proj" in layers
    assert report.by_pattern == {"re:layers\\.1\\..*down_proj$": 1, "o_proj": 2, "model.layers.0.self_attn.q_proj": 1}


@pytest.mark.parametrize("recipe", [ModelRecipe(exclude=["layers.2"]), ModelRecipe(overrides={"re:experts": {}})])
def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing(recipe):
    model = llama()
    with pytest.raises(RecipeError, match="matches no Linear layer"):
        convert(model, recipe)
    assert not converted_layers(model)


def test_other_linear_classes_are_reported():
    class Other(nn.Linear):
        pass

    report = plan(nn.ModuleDict({"a": nn.Linear(32, 32), "b": Other(32, 32)}), ModelRecipe())
    assert list(report.converted) == ["a"] and report.skipped == {"b": "of class Other"}


def test_overrides_change_only_their_keys_of_each_operand():
    recipe = ModelRecipe.from_dict(
        {
            "fallback_alpha": 0.5,
            "weight": {"fallback_alpha": None},
            "overrides": {"q_proj": {"macro_size": 64}, "re:layers\\.0\\.": {"macro_block": "static"}},
        }
    )
    model = llama()
    convert(model, recipe)
    both = converted_layers(model)["model.layers.0.self_attn.q_proj"].recipe
    assert both.weight == QuantRecipe(macro_size=64, macro_block="static")
    assert both.activation == QuantRecipe(macro_size=64, macro_block="static", fallback_alpha=0.5)
    assert converted_layers(model)["model.layers.1.self_attn.k_proj"].recipe.activation == QuantRecipe(fallback_alpha=0.5)


def test_a_vector_is_a_batch_of_one():
    layer = converted(ModelRecipe())
    x = torch.randn(70, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (70,) and layer.weight.grad.shape == (48, 70)


def test_nothing_to_quantise_is_an_error():
    with pytest.raises(RecipeError, match="nothing to quantise"):
        convert(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), ModelRecipe())
    with torch.device("meta"):
        assert len(plan(llama(), ModelRecipe()).converted) == 14


@pytest.mark.parametrize("tie", [True, False])
def test_rollout_multiplies_by_the_actors_weights_bit_for_bit(tie):
    recipe = ModelRecipe(weight=FULL, activation=FULL, overrides={"down_proj": {"macro_block": "dynamic"}})
    actor = llama(tie_word_embeddings=tie).bfloat16()
    rollout = copy.deepcopy(actor)
    convert(actor, recipe)
    convert_for_rollout(rollout, recipe)
    layers = converted_layers(rollout)
    with pytest.raises(RuntimeError, match="has no weights"):
        rollout(torch.zeros(1, 1, dtype=torch.long))
    for name, layer in converted_layers(actor).items():
        layers[name].hold(quantize(layer.weight, layer.recipe.weight), torch.bfloat16)
        ours, theirs = layer.weight_operand(torch.bfloat16), layers[name].weight_operand(torch.bfloat16)
        assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
    tokens = torch.randint(0, 64, (2, 9))
    assert torch.equal(actor(tokens).logits, rollout(tokens).logits)


def test_a_report_says_what_the_kept_operands_take(monkeypatch):
    pytest.importorskip("triton")
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    elements, cpu = 64 * 48 + 48 * 32, torch.device("cpu")
    ste, mx = ModelRecipe(product="fp8"), ModelRecipe(grad=QuantRecipe(), dgrad="mx", wgrad="mx", product="fp8")
    assert plan(model, ste).bytes_kept(cpu, torch.bfloat16) == 2 * elements
    monkeypatch.setattr("mxfp4_rl.nn.fp8.runs_on", lambda device, dtype: True)
    assert plan(model, ste).bytes_kept(cpu, torch.bfloat16) == 5 * elements
    assert plan(model, mx).bytes_kept(cpu, torch.bfloat16) == 4 * elements
    assert plan(model, ModelRecipe()).bytes_kept(cpu, torch.bfloat16) == 2 * elements
