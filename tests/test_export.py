"""`mxfp4-rl export`: what is written is what the recipe gives, whole or not at all, and others read the same values."""

import errno
import json
import math

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.cli import main
from mxfp4_rl.export import plan, write
from mxfp4_rl.settings import RECIPE_FILE
from mxfp4_rl.tasks.tiny_model import make_tiny_model

MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", intermediate=192, seed=0)


def export(model, out, format, recipe, *more):
    return main(["export", str(model), str(out), "--format", format, "--recipe", recipe, *more])


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_command_line_names_every_format():
    from mxfp4_rl.export import FORMAT_NAMES
    from mxfp4_rl.export.formats import FORMATS

    assert tuple(FORMATS) == FORMAT_NAMES


def linear_names(tensors):
    return [n for n in tensors if n.endswith("proj.weight")]


def test_mxfp4_holds_codes_and_scales_of_every_projection_and_the_rest_as_it_was(model, tmp_path, capsys):
    assert export(model, tmp_path / "out", MXFP4, "mxfp4", "--verify") == 0
    source, written = stored(model), stored(tmp_path / "out")
    names = linear_names(source)
    assert len(names) == 14
    for name in names:
        q = quantize(source.pop(name).bfloat16(), QuantRecipe())
        stem = name.removesuffix("weight")
        assert torch.equal(written.pop(f"{stem}weight_packed"), q.codes)
        assert torch.equal(written.pop(f"{stem}weight_scale"), q.scales)
    assert source.keys() == written.keys()
    assert all(torch.equal(written[n], source[n].bfloat16()) for n in source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == MXFP4 and config["quantization_config"]["ignore"] == ["lm_head"]
    said = capsys.readouterr().out
    assert "14 weights with 4.25 bits a value" in said and "bit for bit" in said


def test_bf16_folds_the_corrections_in(model, tmp_path):
    assert export(model, tmp_path / "out", "bf16", "mxfp4+mbs+of", "--verify") == 0
    source, written = stored(model), stored(tmp_path / "out")
    recipe = QuantRecipe.parse("mxfp4+mbs+of")
    for name in linear_names(source):
        assert torch.equal(written[name], quantize(source[name].bfloat16(), recipe).dequantize(torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_nvfp4_layers_that_are_served_together_share_a_power_of_two(model, tmp_path):
    assert export(model, tmp_path / "out", NVFP4, "nvfp4+four-over-six", "--verify") == 0
    written = stored(tmp_path / "out")
    g = {n.removesuffix(".weight_global_scale"): t.item() for n, t in written.items() if n.endswith("global_scale")}
    assert len(g) == 14 and all(math.frexp(v)[0] == 0.5 for v in g.values())
    for layer in (0, 1):
        stem = f"model.layers.{layer}"
        assert (
            len({g[f"{stem}.self_attn.{p}_proj"] for p in "qkv"})
            == len({g[f"{stem}.mlp.{p}_proj"] for p in ("gate", "up")})
            == 1
        )
    source, name = stored(model), "model.layers.0.self_attn.o_proj"
    weight = source[f"{name}.weight"].bfloat16()
    codes, scale = written[f"{name}.weight_packed"], written[f"{name}.weight_scale"].float()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
    values = grid[nibbles & 7] * torch.where(nibbles > 7, -1, 1) * (scale / g[name]).repeat_interleave(16, 1)
    error = (values - weight).square().mean() / weight.float().square().mean()
    own = (
        quantize(weight, QuantRecipe.parse("nvfp4+four-over-six")).dequantize() - weight
    ).square().mean() / weight.float().square().mean()
    assert error < 1.1 * own  # a power of two costs next to nothing


@pytest.mark.parametrize(
    ("format", "recipe"), [(MXFP4, "mxfp4"), (NVFP4, "nvfp4"), (NVFP4, "nvfp4+soar"), ("bf16", "mxfp4+mbs+of")]
)
def test_transformers_loads_it_and_computes_what_the_dequantised_model_does(model, tmp_path, format, recipe):
    if format != "bf16":
        pytest.importorskip("compressed_tensors")
    assert export(model, tmp_path / "out", format, recipe) == 0
    assert export(model, tmp_path / "plain", "bf16", recipe) == 0
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("1 + 2 = ?", return_tensors="pt").input_ids
    with torch.no_grad():
        theirs, ours = served(ids).logits, plain(ids).logits
    if format == NVFP4:  # "bf16" keeps each tensor's own g
        assert torch.nn.functional.cosine_similarity(theirs.flatten().float(), ours.flatten().float(), dim=0) > 0.99
    else:
        assert torch.equal(theirs, ours)


def test_shards_are_small_and_the_index_names_them(model, tmp_path):
    assert export(model, tmp_path / "out", MXFP4, "mxfp4", "--shard-size", "20KB", "--verify") == 0
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert {n for n, f in index.items() if f == file} == set(shard.keys())
        sizes = [t.nbytes for t in load_file(tmp_path / "out" / file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
        assert (tmp_path / "out" / file).stat().st_mode & 0o444


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_cut_off_export_looks_like_no_model_and_the_next_one_clears_it_away(model, tmp_path, monkeypatch, capsys, error):
    real, calls = write.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            raise error
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(write, "save_file", full)
    assert export(model, tmp_path / "out", MXFP4, "mxfp4", "--shard-size", "20KB") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (part,) = tmp_path.iterdir()
    assert not (part / "config.json").exists() and not list(part.glob("*.safetensors"))
    monkeypatch.undo()
    assert export(model, tmp_path / "out", MXFP4, "mxfp4", "--verify") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_gpu_without_room_is_an_error_that_names_the_way_out(model, tmp_path, monkeypatch, capsys):
    def no_room(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def only_when_verifying(*arguments):
        return real(*arguments) if not (tmp_path / "out").exists() else no_room()

    real = plan.quantise_group
    monkeypatch.setattr(plan, "quantise_group", no_room)
    assert export(model, tmp_path / "out", MXFP4, "mxfp4") == 2
    assert "--device cpu" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(plan, "quantise_group", only_when_verifying)
    assert export(model, tmp_path / "out", MXFP4, "mxfp4", "--verify") == 2
    assert "written but not verified" in capsys.readouterr().err and (tmp_path / "out" / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(model, tmp_path, capsys):
    assert export(model, tmp_path / "out", MXFP4, "mxfp4", "--device", "cuda") == 2
    assert "this machine has 0 GPUs" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "drop", "add"])
def test_verify_tells_what_differs(model, tmp_path, capsys, monkeypatch, damage):
    from mxfp4_rl.export import command, verify

    name = "model.layers.1.mlp.up_proj.weight_packed"

    def damaged(checkpoint, plan, out, dtype, advance):
        file = out / "model.safetensors"
        tensors = load_file(file)
        if damage == "flip":
            tensors[name][3, 5] ^= 1
        elif damage == "drop":
            del tensors[name]
        else:
            tensors["extra"] = torch.zeros(1)
        save_file(tensors, file, metadata={"format": "pt"})
        return real(checkpoint, plan, out, dtype, advance)

    real = verify.verify_export
    monkeypatch.setattr(verify, "verify_export", damaged)
    assert command is not None and export(model, tmp_path / "out", MXFP4, "mxfp4", "--verify") == 1
    expected = {"flip": f"{name} differs", "drop": f"lacks {name}", "add": "1 tensors that are not of this model, e.g. extra"}
    assert expected[damage] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--format", MXFP4, "--recipe", "mxfp4+mbs+of"],
            "no place for macro-block factors (MBS) and the fallback's second pass",
        ),
        (["--format", MXFP4, "--recipe", "nvfp4"], "stores mxfp4 in blocks of 32"),
        (["--format", NVFP4, "--recipe", "mxfp4"], "stores nvfp4 in blocks of 16"),
        (["--format", MXFP4], "no recipe stored with it"),
        (["--format", MXFP4, "--recipe", "mxfp5"], "mxfp5"),
        (["--format", MXFP4, "--recipe", "mxfp4", "--shard-size", "big"], "--shard-size big is no size"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(model, tmp_path, capsys, arguments, message):
    assert main(["export", str(model), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(model, tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert export(model, tmp_path / "mine", MXFP4, "mxfp4") == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "kept"


def checkpoint_with(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_no_format_stores_are_refused(tmp_path, capsys):
    odd = checkpoint_with(tmp_path / "odd", {"model.layers.0.mlp.up_proj.weight": torch.randn(8, 40)}, {"model_type": "llama"})
    assert export(odd, tmp_path / "out", MXFP4, "mxfp4") == 2
    assert "40 inputs, no multiple of 32" in capsys.readouterr().err
    assert export(odd, tmp_path / "out", "bf16", "mxfp4") == 0
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 64, 128),  # inputs first
        "model.layers.0.mlp.experts.down_proj": torch.randn(2, 64, 64),
    }
    fused = checkpoint_with(tmp_path / "fused", experts, {"model_type": "llama4_text", "hidden_size": 64})
    assert export(fused, tmp_path / "fused_out", MXFP4, "mxfp4") == 2
    assert "no Linear layers for the fused experts" in capsys.readouterr().err
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    done = checkpoint_with(tmp_path / "done", {"model.layers.0.mlp.up_proj.weight": torch.randn(8, 64)}, config)
    assert export(done, tmp_path / "done_out", MXFP4, "mxfp4") == 2
    assert "quantised already" in capsys.readouterr().err


def test_the_recipe_of_a_run_is_found_with_its_overrides_and_excluded_layers(model, tmp_path, capsys):
    from mxfp4_rl import ModelRecipe

    step = tmp_path / "global_step_3" / "actor"
    step.mkdir(parents=True)
    (step / "huggingface").symlink_to(model)
    recipe = ModelRecipe(weight=QuantRecipe(), exclude=("o_proj",), overrides={"down_proj": {"scale_rule": "floor"}})
    (tmp_path / "global_step_3" / RECIPE_FILE).write_text(json.dumps(recipe.to_dict()))
    assert main(["export", str(tmp_path / "global_step_3"), str(tmp_path / "out"), "--format", MXFP4, "--verify"]) == 0
    assert "left      2 Linear layers unquantised" in capsys.readouterr().out
    source, written = stored(model), stored(tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    name = "model.layers.0.mlp.down_proj.weight"
    floor = quantize(source[name].bfloat16(), QuantRecipe(scale_rule="floor"))
    assert torch.equal(written[f"{name}_scale"], floor.scales) and "model.layers.0.self_attn.o_proj.weight" in written
