"""Experts in MXFP4: products and gradients against Linear layers and float64, families of transformers, the rollout's side."""

import copy
import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from mxfp4_rl import ModelRecipe, QuantRecipe, RecipeError, convert
from mxfp4_rl.monitor.components import collect_errors, error_metrics, pool, start_measuring
from mxfp4_rl.nn import MXFP4Experts, MXFP4Linear, converted_layers, plan, release_operands, unconvert
from mxfp4_rl.nn.experts import PROJECTIONS, quantize_experts
from mxfp4_rl.nn.products import WeightPerExpert
from mxfp4_rl.noise import noise_targets
from mxfp4_rl.quant import StackedTensor, error_stats, fake_quantize, quantize
from mxfp4_rl.settings import Settings
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from mxfp4_rl.verl_plugin.packing import pack
from mxfp4_rl.verl_plugin.rollout import RolloutModel

E, H, INNER, K = 5, 72, 40, 2  # tails of blocks along every axis
FAMILIES = ("Qwen3Moe", "Mixtral", "Olmoe", "GptOss")
WORDS = ("mxfp4", "mxfp4+mbs-dynamic+of", "mxfp4+oas+of+top5%", "mxfp4+tile", "mxfp4+hadamard64", "nvfp4+search")
FULL = QuantRecipe(macro_block="static", fallback_alpha=0.5)
GRAD = QuantRecipe(scale_rule="oas")
PLAIN = ModelRecipe()
EDGE_RECIPES = (PLAIN, ModelRecipe(grad=GRAD, dgrad="mx", wgrad="mx"), ModelRecipe.from_dict({"format": "nvfp4"}))


def tiny(family, **changed):
    """A whole model with random weights, biases too."""
    sizes = dict(vocab_size=48, hidden_size=64, intermediate_size=40, moe_intermediate_size=40, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_local_experts=4)
    special = dict(num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **heads, **special, **changed})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate" in name or "router" in name:
                parameter.normal_(std=0.2)
    return model


def experts_of(family, dtype=torch.float32, hidden=H, inner=INNER):
    sizes = dict(hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner, num_experts=E, num_local_experts=E)
    model = tiny(family, num_hidden_layers=1, num_attention_heads=2, head_dim=hidden // 2, **sizes)
    return model.model.layers[0].mlp.experts.to(dtype)


def swapped(family, recipe, dtype=torch.float32):
    experts = experts_of(family, dtype)
    MXFP4Experts.swap(experts, "layer.experts", dict.fromkeys(PROJECTIONS, recipe))
    return experts


def routed(tokens, dtype=torch.float32, seed=0, experts=E):
    """Hidden states, an expert each for k choices, routing weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :K]
    weights = torch.rand(tokens, K, generator=generator).requires_grad_()
    return x, index, weights


def outputs_first(experts, t):
    return t.transpose(-1, -2) if experts.is_transposed else t


def by_linear_layers(experts, recipe, x, index, weights):
    """What the experts compute, as a Linear layer an expert on the tokens routed to it; the layers carry the gradients."""
    layers = {own: [] for own in PROJECTIONS}
    for own, e in itertools.product(PROJECTIONS, range(len(experts.gate_up_proj))):
        weight = outputs_first(experts, getattr(experts, own).detach()[e])
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=experts.has_bias, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        if experts.has_bias:
            layer.bias.data.copy_(getattr(experts, f"{own}_bias")[e])
        if recipe is not None:
            MXFP4Linear.swap(layer, f"{own}.{e}", recipe)
        layers[own].append(layer)
    total = 0.0
    for e, k in itertools.product(range(len(layers["down_proj"])), range(index.shape[1])):
        token = (index == e).any(1).nonzero()[:, 0] if k == 0 else None
        if token is None or not len(token):
            continue
        inner = experts._apply_gate(layers["gate_up_proj"][e](x[token]))
        weight = weights[token].masked_fill(index[token] != e, 0).sum(1, keepdim=True)
        total = total + torch.zeros(len(x), H).index_add(0, token, layers["down_proj"][e](inner) * weight)
    return total, layers


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_every_expert_has_the_operand_that_its_matrix_has_alone(family, words):
    """As bits, along the contraction axis, on the trainer's side and as codes for the rollout."""
    recipe, axis = QuantRecipe.parse(words), -2 if family == "GptOss" else -1
    experts = swapped(family, ModelRecipe(weight=recipe, activation=None), torch.bfloat16)
    for projection in experts.projections.values():
        held, packed = projection.weight_operand(torch.bfloat16), quantize_experts(projection.weight.detach(), recipe, axis)
        assert projection.axis == axis and held.shape == packed.shape == projection.weight.shape
        assert torch.equal(packed.dequantize(torch.bfloat16), held)
        for e, own in enumerate(projection.weight.detach()):
            assert torch.equal(held[e], quantize(own, recipe, axis).dequantize(torch.bfloat16))
        contracted = H if projection.own_name == "gate_up_proj" else INNER
        assert projection.weight.shape[axis] == contracted
    assert isinstance(packed, StackedTensor) is (words in ("mxfp4+oas+of+top5%", "nvfp4+search"))
    assert packed.to("cpu").nbytes == packed.nbytes > 0


SWITCHES = [
    (d, w, g)
    for d, w, g in itertools.product(("ste", "bf16", "mx"), ("ste", "bf16", "mx"), (None, GRAD))
    if g is not None or "mx" not in (d, w)
]


@pytest.mark.parametrize("dgrad, wgrad, grad", SWITCHES)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_a_projection_is_a_linear_layer_an_expert(family, dgrad, wgrad, grad):
    recipe = ModelRecipe(weight=FULL, activation=FULL, grad=grad, dgrad=dgrad, wgrad=wgrad)
    projection = swapped(family, recipe).projections["gate_up_proj"]
    bounds = [0, 40, 40, 41, 73, 80]  # an expert without tokens, one with one, one with a whole block
    x = torch.randn(80, H, requires_grad=True)
    products = WeightPerExpert(torch.tensor(bounds, dtype=torch.int32))
    y = projection(x, lambda: products.quantized_rows(x, recipe.activation), products)
    g = torch.randn_like(y)
    y.backward(g)
    assert not projection.weight.grad[1].any()
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        layer = nn.Linear(H, 2 * INNER, bias=False)
        layer.weight.data.copy_(outputs_first(projection.experts, projection.weight.detach()[e]))
        MXFP4Linear.swap(layer, "layer", recipe)
        own = x.detach()[first:last].clone().requires_grad_()
        expected = layer(own)
        expected.backward(g[first:last].clone())
        assert relative(y[first:last], expected) < 1e-6
        assert relative(x.grad[first:last], own.grad) < 1e-6
        assert relative(outputs_first(projection.experts, projection.weight.grad[e]), layer.weight.grad) < 1e-6


@pytest.mark.parametrize("words", ("mxfp4", "mxfp4+mbs+of", "mxfp4+mbs32-dynamic+of", "mxfp4+oas+b16", "mxfp4+search"))
@given(st.lists(st.integers(0, 140), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_columns_of_all_experts_at_once_are_those_of_each_by_itself(words, counts, behind):
    recipe, bounds = QuantRecipe.parse(words), [0, *itertools.accumulate(counts)]
    products = WeightPerExpert(torch.tensor(bounds, dtype=torch.int32))
    t = torch.randn(bounds[-1] + behind, 24, generator=torch.Generator().manual_seed(bounds[-1]))
    columns = products.quantized_columns(t, recipe)
    for first, last in itertools.pairwise(bounds):
        if first < last:
            assert torch.equal(columns[first:last], fake_quantize(t[first:last], recipe, axis=0))


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_experts_compute_what_linear_layers_on_their_tokens_do(family, words):
    """Recipes that look at other rows see those of one expert, as they do in a Linear layer."""
    one = QuantRecipe.parse(words)
    recipe = ModelRecipe(weight=one, activation=one, grad=GRAD, wgrad="mx")
    experts = swapped(family, recipe)
    x, index, weights = routed(50)
    y = experts(x, index, weights)
    g = torch.randn_like(y)
    y.backward(g)
    own = [t.detach().clone().requires_grad_() for t in (x, weights)]
    expected, layers = by_linear_layers(experts, recipe, own[0], index, own[1])
    expected.backward(g)
    assert relative(y, expected) < 1e-6
    assert relative(x.grad, own[0].grad) < 1e-6 and relative(weights.grad, own[1].grad) < 1e-6
    for projection, e in itertools.product(PROJECTIONS, range(E)):
        grad = outputs_first(experts, getattr(experts, projection).grad[e])
        assert relative(grad, layers[projection][e].weight.grad) < 2e-6
        if experts.has_bias:
            assert relative(getattr(experts, f"{projection}_bias").grad[e], layers[projection][e].bias.grad) < 2e-6


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_the_straight_through_gradient_is_that_of_the_dequantised_operands_in_float64(family):
    """Products of float64 copies of the operands, whose roundings are differences without a gradient."""
    recipe = ModelRecipe(weight=FULL, activation=FULL)
    experts, (x, index, weights) = swapped(family, recipe), routed(9)
    y = experts(x, index, weights)
    g = torch.randn_like(y)
    y.backward(g)

    def rounded(t, axis=-1):
        return t + (fake_quantize(t.detach().float(), FULL, axis).double() - t.detach())

    axis = -2 if experts.is_transposed else -1
    double = {name: p.detach().double().requires_grad_() for name, p in experts.named_parameters()}
    x64, weights64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    rows = []
    for token, choices in enumerate(index.tolist()):
        total = 0.0
        for k, e in enumerate(choices):
            inner = x64[token]
            for own in PROJECTIONS:
                inner = outputs_first(experts, rounded(double[own][e], axis)) @ rounded(inner)
                inner = inner + double[f"{own}_bias"][e] if experts.has_bias else inner
                inner = experts._apply_gate(inner) if own == "gate_up_proj" else inner
            total = total + weights64[token, k] * inner
        rows.append(total)
    expected = torch.stack(rows)
    expected.backward(g.double())
    # What enters the second quantiser differs in its last bits, which may move a value across a rounding boundary.
    assert relative(y, expected) < 2e-3
    assert relative(x.grad, x64.grad) < 2e-3 and relative(weights.grad, weights64.grad) < 2e-3
    for name, p in experts.named_parameters():
        assert relative(p.grad, double[name].grad) < 2e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_without_quantisers_it_is_transformers_module(family):
    experts, (x, index, weights) = experts_of(family), routed(33)
    expected = experts(x, index, weights)
    g = torch.randn_like(expected)
    expected.backward(g)
    theirs = {name: p.grad for name, p in experts.named_parameters()} | {"x": x.grad, "weights": weights.grad}
    experts.zero_grad()
    x.grad = weights.grad = None
    MXFP4Experts.swap(experts, "experts", {})
    y = experts(x, index, weights)
    y.backward(g)
    ours = {name: p.grad for name, p in experts.named_parameters()} | {"x": x.grad, "weights": weights.grad}
    assert relative(y, expected) < 1e-6
    for name, grad in theirs.items():
        assert relative(ours[name], grad) < 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_forward_and_backward_and_back_again(family):
    model = tiny(family)
    ids = torch.randint(3, 48, (2, 11))
    names, classes = [n for n, _ in model.named_parameters()], [type(m) for m in model.modules()]
    attributes = set(vars(model.model.layers[0].mlp.experts))
    before = model(ids).logits
    report = convert(model, PLAIN)
    fused = [f"model.layers.{i}.mlp.experts.{own}" for i in range(2) for own in PROJECTIONS]
    assert list(report.experts) == fused and set(report.experts.values()) == {4}
    assert set(fused) < set(report.converted) == set(converted_layers(model)) and len(report.converted) == 12
    assert report.sizes[fused[0]] == 4 * 80 * 64 and report.elements == sum(report.sizes.values())
    assert "4 fused tensors of experts quantised" in report.describe() and "2 down_proj of 4 experts" in report.describe()
    assert report.bytes_kept(torch.device("cpu"), torch.bfloat16) == 2 * report.elements
    assert [n for n, _ in model.named_parameters()] == names
    family_class = next(c for c in classes if c.__name__.endswith("Experts"))
    assert all(isinstance(layer.mlp.experts, family_class) for layer in model.model.layers)
    assert all(isinstance(layer.mlp.experts, MXFP4Experts) for layer in model.model.layers)
    after = model(ids).logits
    after.logsumexp(-1).mean().backward()
    assert 0.01 < relative(after, before) < 1
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name
    assert not any("mlp.gate" in n or "router" in n for n in report.converted)
    targets = noise_targets(model)
    assert targets and not any("post_attention_layernorm" in n for n in targets)  # it feeds the router
    assert unconvert(model) == 12
    assert [type(m) for m in model.modules()] == classes and set(vars(model.model.layers[0].mlp.experts)) == attributes
    assert torch.equal(model(ids).logits, before)


def test_conversion_knows_experts_by_the_names_of_their_parameters():
    recipe = ModelRecipe(
        overrides={"experts.gate_up_proj": {"macro_block": "static"}, "re:layers\\.1": {"macro_size": 64}},
        exclude=["layers.0.mlp.experts.down_proj"],
    )
    model = tiny("Qwen3Moe")
    report = convert(model, recipe)
    assert report.skipped["model.layers.0.mlp.experts.down_proj"].startswith("excluded by")
    assert report.by_pattern["experts.gate_up_proj"] == 2 and report.by_pattern["layers.0.mlp.experts.down_proj"] == 1
    layers = converted_layers(model)
    assert layers["model.layers.0.mlp.experts.gate_up_proj"].recipe.weight == QuantRecipe(macro_block="static")
    assert layers["model.layers.1.mlp.experts.gate_up_proj"].recipe.weight.macro_size == 64
    assert "model.layers.0.mlp.experts.down_proj" not in layers
    model(torch.randint(3, 48, (1, 5))).logits.sum().backward()
    assert model.model.layers[0].mlp.experts.down_proj.grad.any()
    convert(model, PLAIN)  # over what is converted already
    assert converted_layers(model)["model.layers.0.mlp.experts.down_proj"].recipe == PLAIN
    assert "gate_up_proj: W: mxfp4" in repr(model.model.layers[0].mlp.experts)


@pytest.mark.parametrize(("words", "expected"), [("mxfp4", "fp8"), ("mxfp4+mbs", "bf16")])
def test_the_report_says_which_products_of_experts_are_fp8(words, expected):
    """Macro blocks have an FP8 product for Linear layers only: a grouped one has a scale a row."""
    pytest.importorskip("triton")
    quant = QuantRecipe.parse(words)
    report = plan(tiny("Qwen3Moe"), ModelRecipe(weight=quant, activation=quant, product="fp8"))
    fitting = {n: all(w % 16 == 0 for w in shape) for n, shape in shapes_of(tiny("Qwen3Moe"), report.experts).items()}
    assert {n: report.converted[n].product for n in report.experts} == {
        n: expected if fits else "bf16" for n, fits in fitting.items()
    }
    assert {r.product for n, r in report.converted.items() if n not in report.experts} == {"fp8"}


def shapes_of(model, names):
    parameters = dict(model.named_parameters())
    return {name: parameters[name].shape[1:] for name in names}


class Batched(nn.Module):
    """As in Llama 4: no list of chosen experts."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 32))
        self.down_proj = nn.Parameter(torch.zeros(2, 16, 8))

    def forward(self, hidden_states):
        return hidden_states


def test_an_unknown_layout_is_an_error_that_names_class_and_parameter():
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "experts": Batched()})
    with pytest.raises(RecipeError, match=r"Batched .*\(experts\.gate_up_proj\).* does not record has_gate"):
        convert(model, PLAIN)
    assert type(model["q_proj"]) is nn.Linear
    report = convert(model, ModelRecipe(exclude=["re:experts"]))
    assert list(report.converted) == ["q_proj"] and set(report.skipped) == {"experts.gate_up_proj", "experts.down_proj"}

    experts = experts_of("Qwen3Moe")
    experts.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(RecipeError, match=r"Qwen3MoeExperts .*its parameters are gate_up_proj, down_proj, extra"):
        plan(nn.ModuleDict({"experts": experts}), PLAIN)
    experts = experts_of("Qwen3Moe")
    experts.is_transposed = True
    with pytest.raises(RecipeError, match="do not fit each other"):
        plan(nn.ModuleDict({"experts": experts}), PLAIN)
    with torch.device("meta"):
        config = transformers.NemotronHConfig(hidden_size=32, moe_intermediate_size=32, n_routed_experts=2)
        experts = transformers.models.nemotron_h.modeling_nemotron_h.NemotronHExperts(config)
    with pytest.raises(RecipeError, match="NemotronHExperts"):
        plan(nn.ModuleDict({"experts": experts}), PLAIN)


@pytest.mark.parametrize(
    "recipe", [PLAIN, ModelRecipe(grad=GRAD, dgrad="mx", wgrad="mx"), ModelRecipe.from_dict({"format": "nvfp4"})]
)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_experts_without_tokens_have_gradients_of_zero(family, recipe):
    experts, (x, _, weights) = swapped(family, recipe), routed(6)
    index = torch.tensor([[3, 0]] * 6)
    experts(x, index, weights).square().sum().backward()
    for name, p in experts.named_parameters():
        visited = p.grad.flatten(1).abs().sum(1) > 0
        assert visited.tolist() == [True, False, False, True, False], name
        assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize(
    "recipe", [PLAIN, ModelRecipe(grad=GRAD, dgrad="mx", wgrad="mx"), ModelRecipe.from_dict({"format": "nvfp4"})]
)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_no_tokens_at_all(family, recipe):
    experts, (x, index, weights) = swapped(family, recipe), routed(0)
    y = experts(x, index, weights)
    y.sum().backward()
    assert y.shape == (0, H) and x.grad.shape == (0, H)
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_a_choice_of_no_expert_adds_nothing(family):
    """As where experts live on other ranks: the number of experts stands for none of these, with a weight of zero."""
    experts, (x, index, weights) = swapped(family, PLAIN), routed(7)
    masked = weights.detach().clone()
    masked[:, 1] = 0
    index = index.clone()
    expected = experts(x, index[:, :1], masked[:, :1])
    index[:, 1] = E
    assert relative(experts(x, index, masked), expected) < 1e-6


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(0, 70), seed=st.integers(0, 2**16), crowded=st.booleans(), family=st.sampled_from(FAMILIES[::3]))
def test_any_number_of_tokens_spread_in_any_way(tokens, seed, crowded, family):
    recipe = ModelRecipe(weight=FULL, activation=QuantRecipe(tile=True), grad=GRAD, dgrad="mx", wgrad="mx")
    experts, (x, index, weights) = swapped(family, recipe), routed(tokens, seed=seed, experts=2 if crowded else E)
    y = experts(x, index, weights)
    y.sum().backward()
    own = [t.detach().clone().requires_grad_() for t in (x, weights)]
    expected, layers = by_linear_layers(experts, recipe, own[0], index, own[1])
    if not tokens:
        return
    expected.sum().backward()
    assert relative(y, expected) < 1e-6 and relative(x.grad, own[0].grad) < 1e-6
    for projection, e in itertools.product(PROJECTIONS, range(E)):
        theirs = layers[projection][e].weight.grad
        grad = outputs_first(experts, getattr(experts, projection).grad[e])
        assert not grad.any() if theirs is None else relative(grad, theirs) < 2e-6


def test_the_same_tokens_give_the_same_bits_every_time():
    experts, (x, index, weights) = swapped("Qwen3Moe", PLAIN, torch.bfloat16), routed(64, torch.bfloat16)
    results = []
    for _ in range(2):
        experts.zero_grad()
        x.grad = weights.grad = None
        y = experts(x, index, weights)
        y.float().square().sum().backward()
        assert y.dtype == x.grad.dtype == experts.down_proj.grad.dtype == torch.bfloat16
        results.append([y.detach(), x.grad, weights.grad, *(p.grad.clone() for p in experts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    experts, (x, index, weights) = swapped("GptOss", ModelRecipe(grad=GRAD, dgrad="mx", wgrad="mx")), routed(20)
    experts(x, index, weights).square().sum().backward()
    expected = [x.grad.clone(), weights.grad.clone(), *(p.grad.clone() for p in experts.parameters())]
    experts.zero_grad()
    x.grad = weights.grad = None
    model = nn.ModuleDict({"experts": experts})
    start_measuring(model, None)
    checkpoint(experts, x, index, weights, use_reentrant=reentrant).square().sum().backward()
    assert all(map(torch.equal, expected, [x.grad, weights.grad, *(p.grad for p in experts.parameters())]))
    tokens = collect_errors(model, None, torch.float32)["layer.experts.down_proj"]["tokens"]
    assert torch.equal(tokens, index.flatten().bincount(minlength=E))  # once, though they passed twice


def test_operands_are_made_once_a_step_and_anew_when_weights_change():
    model = nn.ModuleDict({"experts": swapped("Qwen3Moe", PLAIN)})
    experts, (x, index, weights) = model["experts"], routed(20)
    first = experts.projections["down_proj"].weight_operand(torch.float32)
    before = experts(x, index, weights)
    assert experts.projections["down_proj"].weight_operand(torch.float32) is first
    before.square().sum().backward()
    torch.optim.SGD(experts.parameters(), lr=0.1).step()
    assert not torch.equal(experts(x, index, weights), before)
    second = experts.projections["down_proj"].weight_operand(torch.float32)
    assert second is not first and torch.equal(second, fake_quantize(experts.down_proj, QuantRecipe()))
    state = {name: torch.zeros_like(p) for name, p in experts.state_dict().items()}
    experts.load_state_dict(state)
    assert not experts(x, index, weights).any()
    experts.down_proj.data.fill_(1.0)  # behind everyone's back
    release_operands(model)
    assert experts.projections["down_proj"].weight_operand(torch.float32).all()


def test_autocast_and_inference_and_copies():
    experts, (x, index, weights) = swapped("GptOss", PLAIN), routed(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = experts(x, index, weights)
        y.sum().backward()
    assert y.dtype == experts.down_proj.grad.dtype == torch.float32
    half = experts_of("GptOss", torch.bfloat16)
    MXFP4Experts.swap(half, "experts", dict.fromkeys(PROJECTIONS, PLAIN))
    assert relative(y, half(x.detach().bfloat16(), index, weights.detach())) < 1e-2
    y = experts(x, index, weights)
    experts.projections["down_proj"].release()
    with torch.inference_mode():
        assert torch.equal(experts(x, index, weights), y)
    experts(x, index, weights).sum().backward()  # with an operand that inference has made
    twin = copy.deepcopy(experts)
    assert twin.projections["down_proj"].experts is twin and torch.equal(twin(x, index, weights), experts(x, index, weights))


@pytest.mark.parametrize("words", ["mxfp4", "nvfp4"])
def test_errors_are_those_of_the_experts_that_got_tokens(words):
    recipe = QuantRecipe.parse(words)
    experts, (x, _, weights) = swapped("GptOss", ModelRecipe(weight=recipe, activation=recipe, grad=recipe)), routed(6)
    model = nn.ModuleDict({"experts": experts})
    with torch.no_grad():
        experts.gate_up_proj[1] *= 1e30  # whose error must not count
    start_measuring(model, None)
    experts(x, torch.tensor([[3, 0]] * 6), weights).sum().backward()
    errors = collect_errors(model, None, torch.float32)
    name = "layer.experts.gate_up_proj"
    visited = [experts.gate_up_proj.detach()[e].t() for e in (0, 3)]
    expected = error_stats(visited[0], recipe) + error_stats(visited[1], recipe)
    assert errors[name]["weight"].metrics() == pytest.approx(expected.metrics())
    assert errors[name]["tokens"].tolist() == [6, 0, 0, 6, 0]
    assert errors[name]["activation"].metrics()["rel_mse"] > 0 and errors[name]["grad"].metrics()["rel_mse"] > 0
    metrics = error_metrics(pool([errors, errors]))
    assert metrics[f"mxfp4_layers/{name}/tokens_max"] == 12 and metrics[f"mxfp4_layers/{name}/tokens_none"] == 3
    assert metrics[f"mxfp4_layers/{name}/rel_mse"] == pytest.approx(expected.metrics()["rel_mse"])
    assert experts.projections["down_proj"].stats is None
    some = collect_errors(model, 4, torch.float32)  # nothing was measured: a sample of all
    assert "tokens" not in some[name] and some[name]["weight"].metrics()["rel_mse"] >= 0


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("moe") / "model", architecture="qwen3_moe", intermediate=40)


RECIPES = {
    "plain": {},
    "corrections": {"macro_block": "dynamic", "fallback_alpha": 0.5},
    "whole tensors": {"format": "nvfp4"},
    "weights alone": {"activation": None},
    "activations alone": {"weight": None},
    "half of them": {"exclude": ["experts.down_proj"]},
    "switched off": None,
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "taken apart where they are not packed"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_rollout_has_the_actors_experts_bit_for_bit(tiny_checkpoint, name, fused):
    from transformers import AutoConfig, AutoModelForCausalLM
    from verl.workers.engine.fsdp.utils import unfuse_moe_params

    chosen = Settings.from_config({"enable": RECIPES[name] is not None, "recipe": RECIPES[name] or {}})
    actor = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    weights = actor.state_dict()
    if chosen.enable:
        convert(actor, chosen.recipe)
    layers = {layer.weight_name: layer for layer in converted_layers(actor).values() if layer.recipe.weight is not None}
    packed = {n: pack(w.weight.detach(), w.recipe.weight, torch.bfloat16, w.axis) for n, w in layers.items()}
    plain = {n: w for n, w in weights.items() if n not in packed}
    if not fused:
        plain = dict(unfuse_moe_params(plain.items(), "qwen3_moe"))
    rollout = RolloutModel(AutoConfig.from_pretrained(tiny_checkpoint), {1}, 0, chosen, None, torch.bfloat16)
    size = rollout.load(packed | plain, 0)
    assert size == sum(w.nbytes for w in packed.values()) + sum(2 * w.numel() for w in plain.values())
    ids = torch.randint(5, 40, (3, 12))
    with torch.no_grad():
        assert torch.equal(rollout.model(ids).logits, actor(ids).logits)
    for layer in rollout.packed_layers():
        assert layer.weight is None and "weights" in layer.path
        assert torch.equal(layer.weight_operand(torch.bfloat16), layers[layer.weight_name].weight_operand(torch.bfloat16))
    if name == "plain":
        experts = [n for n in packed if "experts" in n]
        assert len(experts) == 4 and not any("experts" in n for n, _ in rollout.model.named_parameters())
        few = {n: w for n, w in packed.items() if n != experts[0]}
        with pytest.raises(ValueError, match=r"missing \['model.layers.0.mlp.experts"):
            rollout.load(few | plain, 0)
        with pytest.raises(ValueError, match=r"holds \(4, 80, 64\), not \(4, 64, 40\)"):
            rollout.load(packed | plain | {experts[0]: packed[experts[1]]}, 0)


def test_a_rollout_without_weights_says_so(tiny_checkpoint):
    from transformers import AutoConfig

    chosen = Settings.from_config({"enable": True})
    rollout = RolloutModel(AutoConfig.from_pretrained(tiny_checkpoint), {1}, 0, chosen, None, torch.bfloat16)
    layer = next(layer for layer in rollout.packed_layers() if "experts" in layer.layer_name)
    assert layer.path == "no weights yet"
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj has no weights in torch\.bfloat16"):
        layer.weight_operand(torch.bfloat16)


@pytest.mark.parametrize("rollout", ["mxfp4_hf", "vllm"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_both_rollouts_are_let_through_where_vllm_loads_single_experts(architecture, rollout, tmp_path):
    from omegaconf import OmegaConf
    from transformers import GptOssConfig

    from mxfp4_rl.launch import LaunchError
    from mxfp4_rl.launch.inputs import check_quantisable

    if architecture == "gpt_oss":
        path = tmp_path / "model"
        GptOssConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, num_local_experts=4, vocab_size=64,
        ).save_pretrained(path)  # fmt: skip
    else:
        path = make_tiny_model(tmp_path / "model", architecture=architecture, intermediate=80)
    chosen = {"name": rollout, "tensor_model_parallel_size": 1}
    config = OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(path)}, "rollout": chosen}})
    everything = Settings.from_config({"enable": True})
    if architecture == "gpt_oss" and rollout == "vllm":
        with pytest.raises(LaunchError, match="vLLM loads the experts of gpt_oss only in fused tensors"):
            check_quantisable(config, everything)
        everything = Settings.from_config({"enable": True, "recipe": {"exclude": ["re:experts"]}})
        assert "experts" not in check_quantisable(config, everything)
        return
    assert "4 fused tensors of experts" in check_quantisable(config, everything)


def test_tensor_parallel_experts_are_cut_between_blocks(tmp_path):
    from omegaconf import OmegaConf

    from mxfp4_rl.launch import LaunchError
    from mxfp4_rl.launch.inputs import check_quantisable

    path = make_tiny_model(tmp_path / "model", architecture="qwen3_moe", intermediate=96)
    chosen = {"name": "vllm", "tensor_model_parallel_size": 2}
    config = OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(path)}, "rollout": chosen}})
    only_experts = {"exclude": ["re:self_attn"], "macro_block": None}
    with pytest.raises(LaunchError, match=r"experts\.down_proj has 96 inputs"):
        check_quantisable(config, Settings.from_config({"enable": True, "recipe": only_experts}))
