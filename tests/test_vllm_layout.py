"""How packed weights are stored and shipped to vLLM; no vLLM is needed here."""

import pytest
import torch

from mxfp4_rl import ModelRecipe, QuantRecipe, quantize
from mxfp4_rl.quant import quantize as quantize_any
from mxfp4_rl.vllm_plugin import quantization_config
from mxfp4_rl.vllm_plugin.layout import check_cut, checksum, fields, named_tensors, packs, weight_of, why_not_packed
from mxfp4_rl.vllm_plugin.shipment import Shipment

PACKED = ("mxfp4", "mxfp4+mbs", "mxfp4+of", "mxfp4+mbs32+of1", "mxfp4+oas+of+top5%", "mxfp4+search+tile")
DEQUANTISED = ("mxfp4+hadamard32", "mxfp4+prescale", "mxfp4+b16", "nvfp4")


def weight(rows=24, columns=200):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("words", PACKED)
def test_a_layer_that_holds_what_was_shipped_holds_the_weight(words):
    recipe, w = QuantRecipe.parse(words), weight(32, 192)
    packed = quantize_any(w, recipe)
    layer = torch.nn.Module()
    stored = fields(recipe, w.shape[1])
    for name, (columns, dtype) in stored.items():
        layer.register_parameter(name, torch.nn.Parameter(torch.empty(32, columns, dtype=dtype), requires_grad=False))
    shipped = dict(named_tensors("a.b.weight", packed))
    assert shipped.keys() == {f"a.b.{name}" for name in stored}
    for name, tensor in shipped.items():
        getattr(layer, name.removeprefix("a.b.")).data.copy_(tensor)
    assert torch.equal(weight_of(layer, recipe, 192).dequantize(), packed.dequantize())
    assert checksum((f"a.b.{n}", p.data) for n, p in layer.named_parameters()) == checksum(shipped.items())


def test_plain_and_macro_block_weights_take_less_than_three_tenths_of_bf16_with_a_fallback_less_than_056():
    for words, most in (("mxfp4", 0.30), ("mxfp4+mbs", 0.30), ("mxfp4+of", 0.56), ("mxfp4+mbs+of", 0.56)):
        stored = fields(QuantRecipe.parse(words), 2048).values()
        assert sum(columns * dtype.itemsize for columns, dtype in stored) <= most * 2048 * 2


@pytest.mark.parametrize("words", PACKED + DEQUANTISED)
def test_both_ends_agree_on_what_travels_packed(words):
    recipe = QuantRecipe.parse(words)
    assert packs(quantize_any(weight(32, 192), recipe)) == (why_not_packed(recipe) is None)


def test_a_shipment_names_casts_and_counts():
    plain, rotated, norm = QuantRecipe(), QuantRecipe.parse("mxfp4+hadamard32"), torch.ones(8)
    shipment = Shipment(torch.bfloat16)
    pairs = [("x.weight", quantize(weight(), plain)), ("norm.weight", norm), ("y.weight", quantize(weight(), rotated))]
    shipped = dict(shipment.tensors([*pairs, ("ids", torch.arange(3))]))
    assert shipped.keys() == {"x.weight_packed", "x.weight_scale", "norm.weight", "y.weight", "ids"}
    assert shipped["norm.weight"].dtype == torch.bfloat16 and shipped["ids"].dtype == torch.int64
    assert torch.equal(shipped["y.weight"], pairs[2][1].dequantize(torch.bfloat16))
    packed = 24 * (7 * 16 + 7)
    assert shipment.sizes == {"bytes": packed + 16 + 24 * 200 * 2 + 24, "packed_bytes": packed, "packed_elements": 4800}
    assert int(shipment.checksum) == int(shipped["x.weight_packed"].sum()) + int(shipped["x.weight_scale"].sum())


def recipe_of(weight, activation):
    return ModelRecipe(weight=QuantRecipe.parse(weight), activation=activation and QuantRecipe.parse(activation))


@pytest.mark.parametrize(
    ("weight", "activation", "K", "parts", "expected"),
    [
        ("mxfp4", None, 96, 2, "blocks of 32"),
        ("mxfp4+mbs", None, 576, 2, "blocks of 128"),
        ("mxfp4+mbs", None, 768, 4, "tensor_model_parallel_size=2"),
        ("mxfp4", None, 100, 3, "tensor_model_parallel_size=1"),
        ("mxfp4+mbs256", None, 1152, 2, "smaller macro_size"),
        ("mxfp4", "mxfp4+mbs", 384, 2, "blocks of 128"),
        ("nvfp4", "mxfp4+hadamard64", 192, 2, "blocks of 64"),
        ("mxfp4", "nvfp4", 384, 2, "whole tensor"),
        ("mxfp4", "mxfp4+of+top5%", 384, 2, "whole tensor"),
    ],
)
def test_a_cut_inside_a_block_is_refused_with_the_fix(weight, activation, K, parts, expected):
    with pytest.raises(ValueError, match=r"layers\.0\.down_proj") as error:
        check_cut(recipe_of(weight, activation), K, parts, "layers.0.down_proj")
    assert expected in str(error.value)


def test_cuts_between_blocks_and_whole_rows_are_fine():
    check_cut(recipe_of("mxfp4", "nvfp4"), 100, 1, "odd but whole")
    check_cut(recipe_of("mxfp4+mbs", "mxfp4+mbs+of"), 11008, 2, "Qwen2.5-3B's down_proj")
    check_cut(recipe_of("nvfp4", None), 100, 2, "shipped dequantised")


def test_the_quantisation_config_brings_the_recipe_back():
    recipe = ModelRecipe(activation=None, overrides={"down_proj": {"macro_size": 64}}, exclude=["re:layers.0"])
    config = quantization_config(recipe)
    assert config["quant_method"] == "mxfp4_rl"
    assert ModelRecipe.from_dict(config["recipe"]) == recipe
