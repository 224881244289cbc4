"""A mixture of experts on its way to vLLM and its products there, without vLLM: against the trainer's experts."""

import copy
import itertools

import pytest
import torch

from mxfp4_rl import ModelRecipe, QuantRecipe, RecipeError
from mxfp4_rl.nn import MXFP4Experts
from mxfp4_rl.nn.experts import LAYERS_OF, PROJECTIONS, quantize_experts
from mxfp4_rl.quant import StackedTensor, quantize
from mxfp4_rl.vllm_plugin.expert_names import taken_apart, transformers_name
from mxfp4_rl.vllm_plugin.expert_product import recipe_texts, weights_of
from mxfp4_rl.vllm_plugin.layout import NAMES, checksum, fields, is_packed, named_tensors, why_not_packed
from mxfp4_rl.vllm_plugin.shipment import Shipment
from tests.test_experts import experts_of, routed

E, H, INNER = 5, 72, 40
PACKED = ("mxfp4", "mxfp4+mbs", "mxfp4+mbs+of", "mxfp4+of+top5%")
DEQUANTISED = ("mxfp4+hadamard64", "nvfp4+search")


def quantised(words, own="gate_up_proj"):
    g = torch.Generator().manual_seed(0)
    shape = (E, 2 * INNER, H) if own == "gate_up_proj" else (E, H, INNER)
    return quantize_experts(torch.randn(shape, generator=g).bfloat16(), QuantRecipe.parse(words))


def held(weight, recipe):
    """What a vLLM layer holds of a projection's weights."""
    if recipe is None or recipe.weight is None:
        return [weight.bfloat16()]
    packed = quantize_experts(weight.bfloat16(), recipe.weight)
    if why_not_packed(recipe.weight):
        return [packed.dequantize(torch.bfloat16)]
    stored = [name for name in NAMES if NAMES[name] in fields(recipe.weight, weight.shape[2])]
    parts = packed.parts if isinstance(packed, StackedTensor) else None
    return [torch.stack([part.tensors()[name] for part in parts]) if parts else packed.tensors()[name] for name in stored]


def by_operator(experts, recipes, x, index, weights):
    def packed(recipe):
        return recipe.weight if recipe and recipe.weight and not why_not_packed(recipe.weight) else None

    tensors = [held(getattr(experts, own).detach(), recipe) for own, recipe in recipes.items()]
    texts = recipe_texts(*(own for r in recipes.values() for own in (packed(r), r and r.activation)))
    return torch.ops.mxfp4_rl.experts(x, index, weights, *tensors, texts, "silu")


@pytest.mark.parametrize("words", PACKED)
def test_an_experts_codes_are_rows_of_the_fused_tensors(words):
    for own in PROJECTIONS:
        fused = quantised(words, own)
        shipped = dict(taken_apart(f"l.mlp.experts.{own}", fused, "qwen3_moe"))
        assert len(shipped) == E * len(LAYERS_OF[own])
        for e, whole in enumerate(fused.dequantize()):
            parts = [shipped[f"l.mlp.experts.{e}.{part}.weight"] for part in LAYERS_OF[own]]
            assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole)


def test_a_shipment_of_experts_has_the_names_of_checkpoints_and_sums_what_is_held():
    fused, plain = quantised("mxfp4+mbs+of"), torch.randn(E, H, INNER)
    shipment = Shipment(torch.bfloat16, "qwen3_moe")
    shipped = dict(shipment.tensors([("a.mlp.experts.gate_up_proj", fused), ("a.mlp.experts.down_proj", plain)]))
    stem = "a.mlp.experts.3.gate_proj."
    assert {name for name in shipped if name.startswith(stem)} == {stem + name for name in NAMES.values()}
    assert torch.equal(shipped["a.mlp.experts.2.down_proj.weight"], plain[2].bfloat16())
    assert shipment.sizes["packed_elements"] == E * 2 * INNER * H
    fields_held = [("w13_" + NAMES[own], tensor) for own, tensor in fused.tensors().items()]
    assert all(is_packed(name) for name, _ in fields_held)
    assert int(shipment.checksum) == int(checksum(fields_held)) == int(checksum(named_tensors("weight", fused)))


@pytest.mark.parametrize("words", PACKED)  # the last has a tensor of its own for every expert
def test_a_fused_weight_is_summed_before_it_is_taken_apart(words, monkeypatch):
    summed = []

    def recorded(pairs):
        pairs = list(pairs)
        summed.extend(pairs)
        return checksum(pairs)

    monkeypatch.setattr("mxfp4_rl.vllm_plugin.shipment.checksum", recorded)
    pairs = [(f"a.mlp.experts.{own}", quantised(words, own)) for own in PROJECTIONS]
    shipment = Shipment(torch.bfloat16, "qwen3_moe")
    shipped = list(shipment.tensors([*pairs, ("a.mlp.gate.weight", quantize(torch.ones(3, H), QuantRecipe.parse("mxfp4")))]))
    assert int(shipment.checksum) == int(checksum(shipped))  # as if every expert's every tensor were summed
    assert len(summed) == sum(len(weight.tensors()) for _, weight in pairs) + 2
    assert sum(t.nbytes for _, t in summed) == shipment.sizes["packed_bytes"]


def test_families_have_names_of_their_own():
    layer = "model.layers.0.mlp."
    pairs = [(layer + "experts.down_proj", quantised("mxfp4", "down_proj")), (layer + "gate.weight", torch.ones(2))]
    mixtral = dict(Shipment(torch.bfloat16, "mixtral").tensors(pairs))
    assert "model.layers.0.block_sparse_moe.experts.4.w2.weight_packed" in mixtral
    assert "model.layers.0.block_sparse_moe.gate.weight" in mixtral
    assert transformers_name("model.layers.0.block_sparse_moe.experts") == "model.layers.0.mlp.experts"
    with pytest.raises(RecipeError, match="only in fused tensors"):
        list(Shipment(torch.bfloat16, "gpt_oss").tensors(pairs))
    plain = [(layer + "experts.down_proj", torch.ones(2, 3, 4))]
    assert dict(Shipment(torch.bfloat16, "gpt_oss").tensors(plain)).keys() == {layer + "experts.down_proj"}


CASES = [*itertools.product([*PACKED, *DEQUANTISED], [None, "mxfp4", "mxfp4+mbs+of"]), (None, "mxfp4")]


@pytest.mark.parametrize(("words", "activation"), CASES)
def test_the_operator_computes_what_the_trainers_experts_do(words, activation):
    recipe = ModelRecipe(weight=words and QuantRecipe.parse(words), activation=activation and QuantRecipe.parse(activation))
    recipes = dict.fromkeys(PROJECTIONS, recipe)
    experts = experts_of("Qwen3Moe", torch.bfloat16)
    x, index, weights = (t.detach() for t in routed(23, torch.bfloat16))
    index = index.clamp(max=3)  # the last expert has no tokens
    trainer = copy.deepcopy(experts)
    MXFP4Experts.swap(trainer, "experts", recipes)
    for own in PROJECTIONS:
        operand = trainer.projections[own].weight_operand(torch.bfloat16)
        stored = held(getattr(experts, own).detach(), recipe)
        if len(stored) > 1:
            stored = [weights_of(stored, recipe.weight, operand.shape[2]).dequantize(torch.bfloat16)]
        assert torch.equal(stored[0], operand)
    expected = trainer(x, index, weights)
    y = by_operator(experts, recipes, x, index, weights)
    assert y.dtype == x.dtype and torch.equal(y, expected.detach())


def test_a_projection_may_be_left_alone_and_there_may_be_no_tokens():
    experts = experts_of("Qwen3Moe", torch.bfloat16)
    recipes = {"gate_up_proj": ModelRecipe(), "down_proj": None}
    x, index, weights = (t.detach() for t in routed(7, torch.bfloat16))
    trainer = copy.deepcopy(experts)
    MXFP4Experts.swap(trainer, "experts", {"gate_up_proj": ModelRecipe()})
    assert torch.equal(by_operator(experts, recipes, x, index.int(), weights), trainer(x, index, weights).detach())
    assert by_operator(experts, recipes, x[:0], index[:0], weights[:0]).shape == (0, H)


def test_the_operator_can_be_traced_without_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, ids, weights = torch.empty(7, 64).bfloat16(), torch.empty(7, 2).int(), torch.empty(7, 2)
        held = [torch.empty(4, 128, 32).byte(), torch.empty(4, 128, 2).byte()]
        y = torch.ops.mxfp4_rl.experts(x, ids, weights, held, held, [""] * 4, "silu")
    assert y.shape == x.shape and y.dtype == x.dtype
