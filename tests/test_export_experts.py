"""Exports of mixtures of experts: every expert's bits are those of training, under the names that others look for."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from mxfp4_rl import ModelRecipe, QuantRecipe, convert, quantize
from mxfp4_rl.analysis.checkpoint import open_checkpoint
from mxfp4_rl.analysis.weights import linear_weights
from mxfp4_rl.cli import main
from mxfp4_rl.nn import converted_layers
from mxfp4_rl.settings import RECIPE_FILE

MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
FAMILIES = ("Qwen3Moe", "Mixtral", "Olmoe", "GptOss")
EXPERTS, INNER, LAYERS = 3, 96, 2
IDS = torch.arange(5, 29).view(2, 12)


def save_tiny(family, folder, inner=INNER):
    """A random model in BF16, as transformers writes it."""
    sizes = dict(vocab_size=48, hidden_size=64, intermediate_size=inner, moe_intermediate_size=inner, num_hidden_layers=LAYERS)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=EXPERTS, num_local_experts=EXPERTS)
    tokens = dict(num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes, **heads, **tokens))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate" in name or "router" in name:
                parameter.normal_(std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family) for family in FAMILIES}


def export(model, out, format, recipe, *more):
    return main(["export", str(model), str(out), "--format", format, "--recipe", recipe, *more])


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load(folder, dtype=torch.bfloat16, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()


def trained(folder, words, dtype=torch.bfloat16):
    """The model as training multiplies its weights, activations left alone."""
    model = load(folder, dtype)
    convert(model, ModelRecipe(weight=QuantRecipe.parse(words), activation=None))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same_operands(served, converted):
    """Every parameter of `served` is what `converted` multiplies by."""
    layers = {layer.weight_name: layer for layer in converted_layers(converted).values()}
    source = dict(converted.named_parameters())
    with torch.no_grad():
        for name, parameter in served.named_parameters():
            expected = layers[name].weight_operand(torch.bfloat16) if name in layers else source[name]
            assert torch.equal(parameter, expected), name
    return len(layers)


@pytest.mark.parametrize("words", ["mxfp4+mbs-dynamic+of", "mxfp4+oas+of+top5%", "mxfp4+tile", "nvfp4+search"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_what_training_multiplies_by(saved, tmp_path, family, words):
    """Recipes that look at whole tensors see an expert's gate and up as one, as in training."""
    assert export(saved[family], tmp_path / "out", "bf16", words, "--verify") == 0
    assert stored(saved[family]).keys() == stored(tmp_path / "out").keys()
    assert same_operands(load(tmp_path / "out"), trained(saved[family], words)) == LAYERS * (4 + 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_computes_what_the_converted_model_does(saved, tmp_path, family):
    assert export(saved[family], tmp_path / "out", "bf16", "mxfp4") == 0
    ours, theirs = (logits(m) for m in (trained(saved[family], "mxfp4", torch.float32), load(tmp_path / "out", torch.float32)))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, logits(load(saved[family], torch.float32)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "Olmoe"])
def test_mxfp4_holds_a_linear_layer_an_expert(saved, tmp_path, capsys, family):
    assert export(saved[family], tmp_path / "out", MXFP4, "mxfp4", "--verify") == 0
    source, written = stored(saved[family]), stored(tmp_path / "out")
    names = [n for n in source if re.search(r"(_proj|\.w[123])\.weight$", n)]
    assert len([n for n in names if ".experts." in n]) == LAYERS * EXPERTS * 3
    for name in names:
        q = quantize(source.pop(name), QuantRecipe())
        assert torch.equal(written.pop(f"{name}_packed"), q.codes) and torch.equal(written.pop(f"{name}_scale"), q.scales)
    assert source.keys() == written.keys() and all(torch.equal(written[n], source[n]) for n in source)
    block = "block_sparse_moe" if family == "Mixtral" else "mlp"
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.{layer}.{block}.gate" for layer in range(LAYERS))]
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(("format", "recipe"), [(MXFP4, "mxfp4+oas"), (NVFP4, "nvfp4+four-over-six"), (NVFP4, "nvfp4+soar")])
def test_compressed_tensors_reads_every_expert_as_ours(saved, tmp_path, capsys, format, recipe):
    pytest.importorskip("compressed_tensors", minversion="0.16")
    assert export(saved["Qwen3Moe"], tmp_path / "out", format, recipe, "--verify") == 0
    count = LAYERS * (4 + EXPERTS * 3)
    said = capsys.readouterr().out
    assert f"compressed-tensors reads {count} weights" in said
    assert recipe == "nvfp4+soar" or "all values equal" in said


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "Olmoe"])
def test_a_model_of_what_compressed_tensors_reads_computes_the_same(saved, tmp_path, family):
    """Read by its decompressor: transformers does not load packed experts (5.10 leaves them random, with a warning)."""
    pytest.importorskip("compressed_tensors", minversion="0.16")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert export(saved[family], tmp_path / "out", MXFP4, "mxfp4") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scheme = QuantizationConfig(**config.pop("quantization_config")).config_groups["group_0"]
    compressor, written = BaseCompressor.get_value_from_registry(MXFP4), stored(tmp_path / "out")
    for name in [n for n in written if n.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        own = {f"weight_{part}": written.pop(f"{stem}_{part}") for part in ("packed", "scale")}
        written[stem] = compressor.decompress(own, scheme)["weight"].to(torch.bfloat16)
    (tmp_path / "read").mkdir()
    save_file(written, tmp_path / "read" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "read" / "config.json").write_text(json.dumps(config))
    served = load(tmp_path / "read")
    assert same_operands(served, trained(saved[family], "mxfp4")) == LAYERS * (4 + 2)
    assert export(saved[family], tmp_path / "plain", "bf16", "mxfp4") == 0
    assert torch.equal(logits(served), logits(load(tmp_path / "plain")))


def test_nvfp4_experts_have_a_scale_each_which_gate_and_up_share(saved, tmp_path):
    for family, (gate, up) in {"Qwen3Moe": ("gate_proj", "up_proj"), "Mixtral": ("w1", "w3")}.items():
        assert export(saved[family], tmp_path / family, NVFP4, "nvfp4+search", "--verify") == 0
        written = stored(tmp_path / family)
        gates = [n for n in written if ".experts." in n and n.endswith(f".{gate}.weight_global_scale")]
        assert len(gates) == LAYERS * EXPERTS
        for name in gates:
            assert torch.equal(written[name], written[name.replace(f".{gate}.", f".{up}.")])


@pytest.mark.parametrize(("format", "recipe"), [(MXFP4, "mxfp4+tile"), (NVFP4, "nvfp4+search"), ("bf16", "nvfp4+search")])
def test_fused_tensors_in_the_file_give_the_same(saved, tmp_path, format, recipe):
    (tmp_path / "fused").mkdir()
    fused = {name: tensor.contiguous() for name, tensor in load(saved["Qwen3Moe"]).state_dict().items()}
    assert sum("experts.gate_up_proj" in name for name in fused) == LAYERS
    save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fused" / "config.json").write_text((saved["Qwen3Moe"] / "config.json").read_text())
    assert export(tmp_path / "fused", tmp_path / "out", format, recipe, "--verify", "--shard-size", "30KB") == 0
    assert export(saved["Qwen3Moe"], tmp_path / "expected", format, recipe) == 0
    if format == "bf16":
        written, expected = (load(tmp_path / own).state_dict() for own in ("out", "expected"))
    else:
        written, expected = stored(tmp_path / "out"), stored(tmp_path / "expected")
        configs = [json.loads((tmp_path / own / "config.json").read_text()) for own in ("out", "expected")]
        assert configs[0] == configs[1]
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n].view(torch.uint8), expected[n].view(torch.uint8)) for n in expected)


@pytest.mark.parametrize("fused", [False, True])
def test_recipes_speak_of_experts_as_training_does(saved, tmp_path, fused):
    source = saved["Qwen3Moe"]
    (tmp_path / "model").mkdir()
    tensors = {n: t.contiguous() for n, t in load(source).state_dict().items()} if fused else stored(source)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text((source / "config.json").read_text())
    own = {"re:layers.1.*gate_up_proj": {"scale_rule": "floor"}}
    recipe = ModelRecipe(weight=QuantRecipe(), exclude=("experts.down_proj",), overrides=own)
    (tmp_path / "model" / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", MXFP4, "--verify"]) == 0
    plain, written = stored(source), stored(tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    for layer, rule in enumerate(["rceil", "floor"]):
        for expert in range(EXPERTS):
            stem = f"model.layers.{layer}.mlp.experts.{expert}"
            up, down = f"{stem}.up_proj.weight", f"{stem}.down_proj.weight"
            assert torch.equal(written[f"{up}_scale"], quantize(plain[up], QuantRecipe(scale_rule=rule)).scales)
            assert torch.equal(written[down], plain[down]) and f"{stem}.down_proj" in ignored


@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+oas", "mxfp4+tile"])
def test_gpt_oss_as_transformers_dequantises_it(saved, tmp_path, capsys, words):
    out = tmp_path / "out"
    assert export(saved["GptOss"], out, "gpt-oss", words, "--verify", "--shard-size", "40KB") == 0
    assert f"transformers reads {LAYERS * 2} weights, all values equal" in capsys.readouterr().out
    source, written = stored(saved["GptOss"]), stored(out)
    for layer in range(LAYERS):
        for own, rows, inputs in (("gate_up_proj", 2 * INNER, 64), ("down_proj", 64, INNER)):
            name = f"model.layers.{layer}.mlp.experts.{own}"
            blocks, scales = written.pop(f"{name}_blocks"), written.pop(f"{name}_scales")
            assert (blocks.shape, scales.shape) == ((EXPERTS, rows, inputs // 32, 16), (EXPERTS, rows, inputs // 32))
            assert blocks.dtype == scales.dtype == torch.uint8
            weight = source.pop(name)
            for expert in range(EXPERTS):
                q = quantize(weight[expert].t().contiguous(), QuantRecipe.parse(words))
                assert torch.equal(blocks[expert].flatten(1), q.codes) and torch.equal(scales[expert], q.scales)
    assert source.keys() == written.keys()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"

    converted = trained(saved["GptOss"], words)
    served = load(out, quantization_config=Mxfp4Config(dequantize=True))
    assert same_operands(served, converted) == LAYERS * (4 + 2)
    assert export(saved["GptOss"], tmp_path / "plain", "bf16", words) == 0
    assert torch.equal(logits(served), logits(load(tmp_path / "plain")))


@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+oas"])
def test_a_gpt_oss_in_mxfp4_is_read_as_transformers_dequantises_it(saved, tmp_path, capsys, words):
    """As the models on the hub are: experts in blocks and scales. Exported as BF16, and again as gpt-oss, nothing is lost."""
    packed = tmp_path / "packed"
    assert export(saved["GptOss"], packed, "gpt-oss", words, "--shard-size", "40KB") == 0
    theirs = load(packed, quantization_config=Mxfp4Config(dequantize=True)).state_dict()
    with open_checkpoint(str(packed)) as checkpoint:
        assert "quantization_config" not in checkpoint.config and f"{LAYERS * 2} tensors of experts" in checkpoint.note
        found = {info.name: checkpoint.read(info) for info in checkpoint.tensors}
        assert {info.name: info.shape for info in checkpoint.tensors} == {name: tuple(t.shape) for name, t in found.items()}
        axes = {weight.kind: weight.axis for weight in linear_weights(checkpoint)[0] if "experts" in weight.name}
    assert found.keys() == theirs.keys() and axes == {"experts.gate_up_proj": -2, "experts.down_proj": -2}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.items())
    with open_checkpoint(str(packed), as_stored=True) as checkpoint:
        assert {info.name for info in checkpoint.tensors} == stored(packed).keys()
    capsys.readouterr()
    for format in ("bf16", "gpt-oss"):
        assert export(packed, tmp_path / format, format, "mxfp4", "--verify") == 0
        assert "stored in MXFP4" in capsys.readouterr().out
    plain = stored(tmp_path / "bf16")
    experts = [name for name in plain if "experts" in name and name.endswith("proj")]
    assert len(experts) == 2 * LAYERS and all(torch.equal(plain[name], found[name]) for name in experts)
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    again = load(tmp_path / "gpt-oss", quantization_config=Mxfp4Config(dequantize=True)).state_dict()
    assert all(torch.equal(again[name], found[name]) for name in experts)


def test_gpt_oss_keeps_linear_layers_of_any_recipe_in_bf16(saved, tmp_path):
    (tmp_path / "model").mkdir()
    save_file(stored(saved["GptOss"]), tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text((saved["GptOss"] / "config.json").read_text())
    own = {"o_proj": {"macro_block": "dynamic", "fallback_alpha": 0.5}}
    recipe = ModelRecipe(weight=QuantRecipe(), exclude=("q_proj",), overrides=own)
    (tmp_path / "model" / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "gpt-oss", "--verify"]) == 0
    source, written = stored(tmp_path / "model"), stored(tmp_path / "out")
    q, o = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qo")
    folded = quantize(source[o], QuantRecipe.parse("mxfp4+mbs-dynamic+of"))
    assert torch.equal(written[o], folded.dequantize(torch.bfloat16)) and torch.equal(written[q], source[q])


@pytest.mark.parametrize(
    ("family", "format", "recipe", "message"),
    [
        (
            "GptOss",
            "gpt-oss",
            "mxfp4+mbs+of",
            "gpt-oss has no place for macro-block factors (MBS) and the fallback's second pass",
        ),
        ("GptOss", "gpt-oss", "nvfp4", "gpt-oss stores mxfp4 in blocks of 32"),
        ("GptOss", MXFP4, "mxfp4", "no Linear layers for the fused experts"),
        ("Qwen3Moe", "gpt-oss", "mxfp4", "models of type gpt_oss, not qwen3_moe"),
        ("Mixtral", MXFP4, "mxfp4+mbs", "no place for macro-block factors"),
    ],
)
def test_what_a_format_cannot_say_is_refused(saved, tmp_path, capsys, family, format, recipe, message):
    assert export(saved[family], tmp_path / "out", format, recipe) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_gpt_oss_needs_every_expert_in_whole_blocks(saved, tmp_path, capsys):
    odd = save_tiny("GptOss", tmp_path / "odd", inner=40)
    assert export(odd, tmp_path / "out", "gpt-oss", "mxfp4") == 2
    assert "down_proj has 40 inputs, no multiple of 32" in capsys.readouterr().err
    recipe = ModelRecipe(weight=QuantRecipe(), exclude=("re:layers.1.*experts",))
    (odd / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    assert main(["export", str(odd), str(tmp_path / "out"), "--format", "gpt-oss"]) == 2
    assert not (tmp_path / "out").exists()
    (saved["GptOss"] / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    assert main(["export", str(saved["GptOss"]), str(tmp_path / "out"), "--format", "gpt-oss"]) == 2
    assert "stores all experts in MXFP4" in capsys.readouterr().err
    (saved["GptOss"] / RECIPE_FILE).unlink()


@pytest.mark.parametrize(("suffix", "message"), [("$", "has lost its experts"), (None, "has no fused experts")])
def test_a_model_without_its_experts_is_refused(saved, tmp_path, capsys, suffix, message):
    """transformers 5.10 dequantises gpt-oss' MXFP4 and then saves all layers' experts as `gate_up_proj$` and `down_proj$`."""
    kept = {n: t for n, t in stored(saved["GptOss"]).items() if not n.endswith(("gate_up_proj", "down_proj"))}
    if suffix:
        kept |= {f"{own}{suffix}": torch.zeros(EXPERTS, 64, 2 * INNER) for own in ("gate_up_proj", "down_proj")}
    (tmp_path / "model").mkdir()
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text((saved["GptOss"] / "config.json").read_text())
    assert export(tmp_path / "model", tmp_path / "out", "gpt-oss", "mxfp4") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_verify_tells_which_block_differs(saved, tmp_path, capsys, monkeypatch):
    from mxfp4_rl.export import verify

    name = "model.layers.1.mlp.experts.down_proj_scales"
    real = verify.verify_export

    def damaged(checkpoint, plan, out, dtype, advance):
        tensors = load_file(out / "model.safetensors")
        tensors[name][2, 5, 1] += 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return real(checkpoint, plan, out, dtype, advance)

    monkeypatch.setattr(verify, "verify_export", damaged)
    assert export(saved["GptOss"], tmp_path / "out", "gpt-oss", "mxfp4", "--verify") == 1
    assert f"{name} differs" in capsys.readouterr().err
