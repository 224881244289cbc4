"""`mxfp4-rl ptq`: its weights are the quantiser's and the export's bits, its numbers those of a direct computation."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxfp4_rl import ModelRecipe, QuantRecipe, cli, convert, quantize
from mxfp4_rl.nn import convert_for_rollout, converted_layers
from mxfp4_rl.ptq.outputs import LayerOutputs, mean_and_worst
from mxfp4_rl.ptq.perplexity import difference, perplexity, token_losses, windows_of
from mxfp4_rl.ptq.rules import rules_of
from mxfp4_rl.ptq.soar_parts import soar_parts
from mxfp4_rl.ptq.weights import Weights
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from mxfp4_rl.verl_plugin.packing import pack

NVFP4 = ("nvfp4", "nvfp4+four-over-six", "nvfp4+soar", "nvfp4+search")
MXFP4 = ("mxfp4", "mxfp4+oas", "mxfp4+search")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny model whose weights are as a trained model's: heavier tails than a Gaussian's, and rows of different size."""
    folder = make_tiny_model(tmp_path_factory.mktemp("ptq") / "tiny", hidden=128, intermediate=256, seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            t = torch.randn(weight.shape, generator=generator)
            t /= (torch.randn(8, *weight.shape, generator=generator).square().mean(0)).sqrt()  # Student's t, 8 degrees
            size = torch.rand(weight.shape[0], 1, generator=generator).exp2() * 0.05
            weight.data.copy_(t * size)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ids_of(count, seed=0):
    return torch.randint(5, 90, (count,), generator=torch.Generator().manual_seed(seed))


# ---- rules -----------------------------------------------------------------------------------------------------------------


def test_names_of_rules_are_recipes():
    assert tuple(rules_of(["nvfp4"], None)[0]) == NVFP4
    assert tuple(rules_of(["mxfp4"], None)[0]) == MXFP4
    assert rules_of(["nvfp4"], ["4/6", "static4"])[0].keys() == {"nvfp4+four-over-six", "nvfp4+static4"}
    both, missing = rules_of(["nvfp4", "mxfp4"], ["static", "soar", "oas+mbs"])
    assert list(both) == ["nvfp4", "nvfp4+soar", "mxfp4", "mxfp4+oas+mbs"]
    assert both["mxfp4+oas+mbs"].recipe == QuantRecipe(scale_rule="oas", macro_block="static")
    assert [sentence.split(":")[0] for sentence in missing] == ["nvfp4 has no oas+mbs", "mxfp4 has no soar"]
    search = both | rules_of(["nvfp4"], ["scalesearch"])[0]
    assert list(search["nvfp4+search"].recipe.window) == [-2, -1, 0, 1, 2, 3, 4, 5, 6]


# ---- weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [*NVFP4, *MXFP4])
def test_as_training_the_model_holds_the_quantiser_s_bits(model, words):
    recipe = QuantRecipe.parse(words)
    weights = Weights(model)
    done = weights.quantise(recipe, "training")
    lost = energy = 0.0
    for name, weight in weights.originals.items():
        held = model.get_submodule(name).weight
        assert torch.equal(held, fake_quantize(weight, recipe)), name
        error = (held.double() - weight.double()).square().sum().item()
        assert done.errors[name] == pytest.approx(error / weight.double().square().sum().item(), rel=1e-6)
        lost, energy = lost + error, energy + weight.double().square().sum().item()
    assert done.rel_mse == pytest.approx(lost / energy, rel=1e-6) and done.elements == sum(
        w.numel() for w in weights.originals.values()
    )
    weights.restore()
    assert all(torch.equal(model.get_submodule(name).weight, w) for name, w in weights.originals.items())


@pytest.mark.parametrize("words", [*NVFP4, "mxfp4+search"])
def test_as_export_the_model_holds_what_the_export_stores(model, path, tmp_path, words, capsys):
    weights = Weights(model)
    weights.quantise(QuantRecipe.parse(words))
    format = f"{words.partition('+')[0]}-pack-quantized"
    assert cli.main(["export", str(path), "out", "--format", format, "--recipe", words]) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    from mxfp4_rl.quant import MXFP4Tensor, NVFP4Tensor

    assert len(weights.layers) == 14
    for name, weight in weights.originals.items():
        codes, scales = stored[f"{name}.weight_packed"], stored[f"{name}.weight_scale"].view(torch.uint8)
        common = {"shape": weight.shape, "axis": 1}
        if words.startswith("nvfp4"):
            g = (1 / stored[f"{name}.weight_global_scale"]).squeeze()
            packed = NVFP4Tensor(codes, scales, tensor_scale=g, block_size=16, **common)
        else:
            packed = MXFP4Tensor(codes, scales, block_size=32, **common)
        held = model.get_submodule(name).weight
        if words == "nvfp4+soar":  # keeps its own scale, whose reciprocal is rounded
            assert torch.allclose(held.float(), packed.dequantize(), rtol=2**-7)
        else:
            assert torch.equal(held, packed.dequantize(torch.bfloat16)), name


@pytest.mark.parametrize("like", ["export", "training"])
def test_rules_come_in_the_papers_order(model, like):
    weights = Weights(model)
    static, four_over_six, soar, search = (weights.quantise(QuantRecipe.parse(w), like).rel_mse for w in NVFP4)
    assert search < min(four_over_six, soar) and max(four_over_six, soar) < static
    assert search < 0.78 * static  # the paper: 27 % on a Gaussian
    rceil, oas, searched = (weights.quantise(QuantRecipe.parse(w), like).rel_mse for w in MXFP4)
    assert searched < oas < rceil
    assert weights.seconds_at_sync(QuantRecipe.parse("nvfp4")) > 0


@pytest.mark.parametrize("words", [*NVFP4, *MXFP4])
def test_every_rule_is_a_key_of_a_run_s_weights(model, path, words):
    """`mxfp4.recipe.weight.scale_rule`: what the weight sync packs is the trainer's operand, activations stay static."""
    recipe = QuantRecipe.parse(words)
    block = {"format": recipe.format, "weight": {"scale_rule": recipe.scale_rule}}
    run = ModelRecipe.from_dict(block)
    assert run.weight == recipe and run.activation == QuantRecipe.parse(recipe.format)
    convert(model, run)
    layer = converted_layers(model)["model.layers.0.self_attn.q_proj"]
    own = layer.weight_operand(torch.bfloat16).clone()
    packed = pack(layer.weight.detach(), run.weight, torch.bfloat16)
    layer.hold(packed, torch.bfloat16)
    assert torch.equal(layer.weight_operand(torch.bfloat16), own)
    assert torch.equal(packed.codes, quantize(layer.weight.detach(), recipe).codes)
    rollout = make_rollout_layer(path, run)
    rollout.hold(packed, torch.bfloat16)
    assert torch.equal(rollout.weight_operand(torch.bfloat16), own)


def make_rollout_layer(path, recipe):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    convert_for_rollout(model, recipe)
    return model.get_submodule("model.layers.0.self_attn.q_proj")


def test_dss_s_other_scale_wins_nowhere_and_its_neighbouring_codes_do(model):
    parts = soar_parts(Weights(model), rows=4)
    errors = parts["rel_mse"]
    static, cjso, neighbours, betas, search = errors.values()
    assert parts["other_beta_won"] == 0 and parts["blocks_and_rounds"] > 0
    assert betas == pytest.approx(neighbours, rel=1e-6)
    assert search < neighbours < cjso < static


# ---- layers' outputs -------------------------------------------------------------------------------------------------------


def test_output_errors_are_those_of_the_layers_inputs(model):
    ids = ids_of(40)
    weights = Weights(model)
    outputs = LayerOutputs(model, weights, ids, context=24)
    name = "model.layers.1.mlp.up_proj"
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0][0].float()))
    with torch.no_grad():
        for part in ids.split(24):
            model(input_ids=part[None])
    hook.remove()
    x = torch.cat(seen).double()
    assert set(outputs.errors().values()) == {0.0} and outputs.errors().keys() == weights.layers.keys()
    weights.quantise(QuantRecipe.parse("nvfp4"))
    was, now = weights.originals[name].double(), model.get_submodule(name).weight.detach().double()
    expected = (x @ (now - was).T).square().sum() / (x @ was.T).square().sum()
    errors = outputs.errors()
    assert errors[name] == pytest.approx(expected.item(), rel=1e-4)
    mean, worst, value = mean_and_worst(errors)
    assert mean == pytest.approx(sum(errors.values()) / 14) and errors[worst] == value == max(errors.values())


# ---- perplexity ------------------------------------------------------------------------------------------------------------


def test_one_window_is_the_loss_of_transformers(model):
    ids = ids_of(300)
    losses = token_losses(model, ids, windows_of(300, 512, 256))
    with torch.no_grad():
        loss = model(input_ids=ids[None], labels=ids[None]).loss.item()
    assert losses.shape == (299,) and losses.mean().item() == pytest.approx(loss, rel=1e-4)
    assert perplexity(losses) == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize(("count", "context", "stride"), [(300, 64, 32), (301, 64, 63), (100, 64, 1), (64, 64, 32)])
def test_overlapping_windows_score_every_token_once_as_transformers_does(model, count, context, stride):
    """The sliding window of transformers' documentation: labels of what was scored before are -100."""
    ids = ids_of(count)
    windows = windows_of(count, context, stride)
    assert sum(w.scored for w in windows) == count - 1 and windows[-1].stop == count
    assert all(w.stop - w.start <= context for w in windows)
    assert all(w.stop - w.scored - w.start >= context - stride for w in windows[1:])
    total, scored, before = 0.0, 0, 0
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        labels = ids[begin:end].clone()
        labels[: before - begin] = -100
        with torch.no_grad():
            loss = model(input_ids=ids[begin:end][None], labels=labels[None]).loss.item()
        now = int((labels[1:] != -100).sum())
        total, scored, before = total + loss * now, scored + now, end
        if end == count:
            break
    losses = token_losses(model, ids, windows)
    assert len(losses) == scored and losses.mean().item() == pytest.approx(total / scored, rel=1e-4)


def test_windows_that_do_not_overlap_and_windows_that_cannot_be():
    windows = windows_of(129, 64, 64)
    assert [(w.start, w.stop, w.scored) for w in windows] == [(0, 64, 63), (64, 128, 63)]  # the last token stands alone
    for tokens, context, stride in ((1, 64, 32), (10, 64, 65), (10, 1, 1), (10, 64, 0)):
        with pytest.raises(ValueError, match="stride"):
            windows_of(tokens, context, stride)


def test_a_difference_is_between_tokens_and_its_error_between_stretches():
    base = torch.rand(640, generator=torch.Generator().manual_seed(0)) * 5
    assert difference(base + 0.25, base) == (pytest.approx(0.25, abs=1e-6), pytest.approx(0, abs=1e-6))
    noisy = base + torch.arange(10).repeat_interleave(64) / 10
    mean, error = difference(noisy, base)
    assert mean == pytest.approx(0.45, abs=1e-5)
    assert error == pytest.approx((torch.arange(10) / 10).std().item() / math.sqrt(10), rel=1e-4)
    assert difference(base[:100], base[:100]) == (0.0, None)


# ---- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9, encoding="utf-8")
    (tmp_path / "other.txt").write_text("Pack my box with five dozen liquor jugs. " * 4, encoding="utf-8")


def ptq(path, *more):
    return cli.main(["ptq", str(path), "--context", "64", *more])


def test_the_whole_table(path, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MXFP4_RL_CACHE", str(tmp_path / "cache"))
    more = "--format nvfp4 mxfp4 --scales static soar scalesearch --text text.txt --text-tokens 200 --calibration other.txt"
    task = "--task arithmetic --limit 4 --max-new-tokens 3 --soar-parts 1 --out out"
    assert ptq(path, *more.split(), *task.split()) == 0
    record = json.loads((tmp_path / "out" / "ptq.json").read_text())
    rows = {row["recipe"]: row for row in record["results"]}
    assert list(rows) == ["BF16", "nvfp4", "nvfp4+soar", "nvfp4+search", "mxfp4", "mxfp4+search"]
    assert record["left_out"] and "mxfp4 has no soar" in record["left_out"][0]
    assert record["text"]["tokens"] == 200 and record["text"]["scored"] == 199 and record["text"]["stride"] == 32

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ids = torch.tensor(tokenizer((tmp_path / "text.txt").read_text())["input_ids"][:200])
    bf16 = rows["BF16"]["perplexity"]["value"]
    for name, row in rows.items():
        if name != "BF16":
            Weights(model).quantise(QuantRecipe.parse(name))
        assert row["perplexity"]["value"] == pytest.approx(
            perplexity(token_losses(model, ids, windows_of(200, 64, 32))), rel=1e-6
        )
        assert row["perplexity"]["loss"] == pytest.approx(math.log(row["perplexity"]["value"] / bf16), abs=1e-5)
        base = rows["BF16" if name == "BF16" else name.partition("+")[0]]["perplexity"]
        assert row["perplexity"]["vs_first"] == pytest.approx(row["perplexity"]["loss"] - base["loss"], abs=1e-5)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        assert row["accuracy"]["questions"] == 4
        if name != "BF16":
            assert len(row["weights"]["layers"]) == len(row["outputs"]["layers"]) == 14
            assert row["weights"]["seconds"] > 0 and row["weights"]["seconds_at_sync"] > 0
    shown = capsys.readouterr().out
    assert (tmp_path / "out" / "ptq.md").read_text() in shown
    assert "| nvfp4+search | 4.5 |" in shown and "CJSO alone" in shown and "mxfp4-rl export" in shown


def test_it_hands_over_to_the_export(path, tmp_path, capsys):
    assert ptq(path, "--format", "nvfp4", "--scales", "scalesearch", "--export", "served") == 0
    shown = capsys.readouterr().out
    assert "perplexity" not in shown.partition("\n\n")[0] and "--format nvfp4-pack-quantized --recipe nvfp4+search" in shown
    stored = load_file(tmp_path / "served" / "model.safetensors")
    assert sum(name.endswith("weight_packed") for name in stored) == 14
    assert ptq(path, "--format", "nvfp4", "--scales", "static", "--like", "training", "--export", "exact") == 0
    name, recipe = "model.layers.1.mlp.down_proj.weight", QuantRecipe.parse("nvfp4")
    source = load_file(path / "model.safetensors")[name]
    assert torch.equal(load_file(tmp_path / "exact" / "model.safetensors")[name], fake_quantize(source, recipe))


def importance_of(path, text, context=64):
    """Mean squares of every layer's inputs, in float64, each layer by itself."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    found: dict[str, list] = {}
    layers = Weights(model).layers
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda m, a, name=name: found.setdefault(name, []).append(a[0][0].double()))
    with torch.no_grad():
        for part in torch.tensor(tokenizer(text)["input_ids"]).split(context):
            model(input_ids=part.unsqueeze(0))
    return {name: torch.cat(own).square().mean(0) for name, own in found.items()}


@pytest.mark.parametrize(("format", "recipe"), [("nvfp4", "nvfp4+search"), ("mxfp4", "mxfp4+search")])
def test_errors_weighed_with_the_inputs_from_measurement_to_export(path, texts, tmp_path, capsys, format, recipe):
    assert ptq(path, "--format", format, "--calibration", "other.txt", "--out", "all") == 0
    rows = {row["recipe"]: row for row in json.loads((tmp_path / "all" / "ptq.json").read_text())["results"]}
    plain, weighed = rows[recipe], rows[f"{recipe}+inputs"]
    assert weighed["weights"]["rel_mse"] > plain["weights"]["rel_mse"], "not the least error of the weights any more"
    assert weighed["outputs"]["mean"] < plain["outputs"]["mean"], "but of what they are multiplied by"
    assert weighed["weights"]["seconds_at_sync"] is None
    file = tmp_path / "all" / "importance.safetensors"
    stored, expected = load_file(file), importance_of(path, (tmp_path / "other.txt").read_text())
    assert stored.keys() == expected.keys() and len(stored) == 14
    assert all(torch.allclose(stored[name].double(), own, rtol=1e-5) for name, own in expected.items())

    arguments = ["--format", f"{format}-pack-quantized", "--recipe", recipe, "--importance", str(file), "--verify"]
    assert cli.main(["export", str(path), "weighed", *arguments]) == 0
    assert "errors weighed with" in capsys.readouterr().out
    measured = ["--format", format, "--scales", "scalesearch+inputs", "--calibration", "other.txt"]
    assert ptq(path, *measured, "--export", "handed") == 0
    assert f"--recipe {recipe} --importance runs/ptq/tiny/importance.safetensors" in capsys.readouterr().out
    assert cli.main(["export", str(path), "plain", *arguments[:4]]) == 0
    own, handed, other = (load_file(tmp_path / f / "model.safetensors") for f in ("weighed", "handed", "plain"))
    same = {name: torch.equal(t.view(torch.uint8), handed[name].view(torch.uint8)) for name, t in own.items()}
    assert all(same.values()) and not all(torch.equal(own[name], other[name]) for name in own if name.endswith("_packed"))

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    weights = Weights(model)
    weights.quantise(QuantRecipe.parse(recipe), "training", stored)
    name = "model.layers.1.mlp.down_proj"
    direct = quantize(weights.originals[name], QuantRecipe.parse(recipe), importance=stored[name])
    assert torch.equal(model.get_submodule(name).weight, direct.dequantize(torch.bfloat16))


def test_an_importance_of_something_else_is_refused(path, tmp_path, capsys):
    def refused(tensors, recipe="nvfp4+search"):
        save_file(tensors, tmp_path / "own.safetensors")
        arguments = ["--format", "bf16", "--recipe", recipe, "--importance", "own.safetensors"]
        assert cli.main(["export", str(path), "out", *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    good = {name: torch.ones(layer.in_features) for name, layer in Weights(model).layers.items()}
    name = "model.layers.1.mlp.down_proj"
    assert f"no inputs of {name}" in refused({k: v for k, v in good.items() if k != name})
    assert f"has 7 inputs of {name}, which has 256" in refused(good | {name: torch.ones(7)})
    assert f"{name} is no float32 row" in refused(good | {name: -torch.ones(256)})
    assert "its scale rule, static, does not choose" in refused(good, "nvfp4")
    (tmp_path / "own.safetensors").write_text("no tensors")
    arguments = ["--format", "bf16", "--recipe", "nvfp4+search", "--importance"]
    assert cli.main(["export", str(path), "out", *arguments, "own.safetensors"]) == 2
    assert "own.safetensors cannot be read" in capsys.readouterr().err
    assert cli.main(["export", str(path), "out", *arguments, "absent.safetensors"]) == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--format nvfp4 --scales scalesearch+inputs", "give --calibration FILE too"),
        ("--format nvfp4 --scales static+inputs --calibration text.txt", "its scale rule, static, does not choose"),
        ("--format nvfp4 --scales oas", "nvfp4 has no oas: oas rounds powers of two"),
        ("--format mxfp4 --scales soar", "MXFP4 has no scale of the tensor"),
        ("--format mxfp4 --scales static 4over6", "powers of two do not hold"),
        ("--format nvfp4 --scales fastest", "'fastest' in 'nvfp4+fastest' is none of"),
        ("--format nvfp4 --scales 4over6 4/6", "names nvfp4+four-over-six twice"),
        ("--format mxfp4 --scales static+sr", "leave sr out"),
        ("--format nvfp4 --text absent.txt", "--text absent.txt cannot be read"),
        ("--format nvfp4 --text empty.txt", "is empty"),
        ("--format nvfp4 --text text.txt --stride 65", "--stride 65 skips tokens"),
        ("--format nvfp4 --text text.txt --context 1024", "reads 512 tokens at most"),
        ("--format nvfp4 --stride 16", "--stride is of --text"),
        ("--format nvfp4 --limit 3", "--limit is of a task"),
        ("--format nvfp4 --task none", "--task none"),
        ("--format nvfp4 --text-tokens 1 --text text.txt", "give 2 or more"),
        ("--format mxfp4 --soar-parts 4", "--soar-parts is of NVFP4"),
        ("--format nvfp4 --export out", "is of one rule"),
        ("--format nvfp4 --scales static --export text.txt", "exists"),
        ("--format nvfp4 --out text.txt", "is a file"),
        ("--format nvfp4 --unknown", "--unknown"),
    ],
)
def test_mistakes_are_one_sentence(path, texts, tmp_path, more, words, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    assert ptq(path, *more.split()) == 2
    said = capsys.readouterr().err
    assert words in said and said[said.index("mxfp4-rl: ") :].count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_models_that_it_cannot_measure(tmp_path, capsys):
    experts = make_tiny_model(tmp_path / "moe", architecture="qwen3_moe")
    assert ptq(experts, "--format", "nvfp4") == 2 and "holds experts in a fused tensor" in capsys.readouterr().err
    odd = make_tiny_model(tmp_path / "odd", intermediate=40)
    assert ptq(odd, "--format", "nvfp4") == 2 and "no multiple of 16" in capsys.readouterr().err
    assert ptq(odd, "--format", "nvfp4", "--scales", "static", "--like", "training") == 0
    model = AutoModelForCausalLM.from_pretrained(odd)
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0, 0] = float("nan")
    model.save_pretrained(odd)
    assert ptq(odd, "--format", "nvfp4") == 2 and "holds NaN or infinity" in capsys.readouterr().err
