"""The scripts that compare what vLLM holds: their models and comparisons are what they say, and a difference is an error."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mxfp4_rl.export.serving import marlin_has_a_tiling, notes
from mxfp4_rl.tasks.tiny_model import make_tiny_model

FOLDER = Path(__file__).parents[1] / "recipes" / "serve_export"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        import compare
        import models
    finally:
        sys.path.remove(str(FOLDER))
    return models, compare.compare


def script(name, file):
    """The module of a script, whose neighbours it imports."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


@pytest.fixture(scope="module")
def run():
    return script("serve_export", FOLDER / "run.py")


@pytest.fixture(scope="module")
def experts_rollout():
    return script("experts_rollout", FOLDER.parent / "experts_rollout" / "run.py")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_widened_model_computes_what_it_did(tmp_path, scripts, tied):
    models, _ = scripts
    source = make_tiny_model(tmp_path / "own", hidden=64, heads=4, architecture="llama", tie_word_embeddings=tied)
    wide = models.widen(source, tmp_path / "wide", 256)  # four times as many: norms are scaled by 1/2, exactly
    ids = torch.arange(6, 26).view(2, 10)
    with torch.no_grad():
        ours, theirs = load(wide), load(source)
        assert ours.config.hidden_size == 256 and ours.config.head_dim == 16
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_marlin_s_tilings_are_those_of_its_source():
    assert not marlin_has_a_tiling(576, 960) and not marlin_has_a_tiling(576, 576)
    assert marlin_has_a_tiling(576, 3072) and marlin_has_a_tiling(1536, 576)
    for inputs, outputs in ((1152, 960), (576, 1152), (1152, 3072), (1536, 1152)):  # SmolLM2 at twice its width
        assert marlin_has_a_tiling(inputs, outputs)


def test_what_vllm_would_refuse_is_noted_by_products():
    shapes = {f"layers.{i}.self_attn.{n}_proj": (o, 576) for i in (0, 1) for n, o in (("q", 576), ("k", 192), ("v", 192))}
    shapes["layers.0.mlp.gate_proj"] = shapes["layers.0.mlp.up_proj"] = (1536, 576)
    (note,) = notes(shapes, {"lm_head"})
    assert note.count("576 inputs") == 1 and "q_proj + k_proj + v_proj with 576 inputs, 960 outputs" in note
    left = {"layers.0.mlp.gate_proj"}
    (mixed,) = notes({n: s for n, s in shapes.items() if "mlp.up" in n}, left)
    assert "layers.0.mlp.up_proj but not layers.0.mlp.gate_proj" in mixed
    assert notes({"layers.0.mlp.down_proj": (576, 1536)}, left) == []


def test_comparison_counts_equal_replies_and_what_the_first_flip_costs(scripts):
    _, compare = scripts
    reference = {"replies": [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "margins": [[9, 9, 9], [9, 0.25, 9], [9, 9, 0.5]]}
    reference["forced"] = [[-1.0, -2.0, -3.0]] * 3
    ours = {
        "replies": [[1, 2, 3], [4, 0, 0], [7, 8, 0]],
        "forced": [[-1.0, -2.0, -3.0], [-1.0, -2.5, -3.0], [-1.0, -2.0, -3.25]],
    }
    found = compare(ours, reference)
    assert found["replies"] == 3 and found["equal"] == pytest.approx(1 / 3)
    assert found["first_divergence"] == 1 and found["median_divergence"] == 1.5 and found["largest_margin"] == 0.5
    assert found["max_difference"] == 0.5 and found["mean_difference"] == pytest.approx(0.75 / 9)
    same = compare(reference, reference)
    assert same["equal"] == 1 and same["first_divergence"] is None and same["max_difference"] == 0


class Held(torch.nn.Module):
    """A layer as vLLM has it: its product is that of its method."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.quant_method = SimpleNamespace(apply=lambda module, x: x @ module.weight.T)


def test_only_linear_layers_with_the_very_operands_are_as_exported(tmp_path, run):
    weights = {"layers.0.o_proj.weight": torch.randn(4, 8).bfloat16(), "layers.0.mlp.experts.gate_up_proj": torch.ones(2, 8, 4)}
    save_file(weights, tmp_path / "model.safetensors")
    held = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": torch.nn.ModuleDict()})})
    held["layers"]["0"]["router"] = torch.nn.Linear(8, 2)
    row = {"operands": run.operands(held, tmp_path)}
    assert run._operands_text(row) == "operands: nothing was compared; the experts of 1 layers were NOT compared"
    assert not run._as_exported(row)
    held["layers"]["0"]["o_proj"] = Held(weights["layers.0.o_proj.weight"].clone())
    row = {"operands": run.operands(held, tmp_path)}
    assert "0 of 32 values in 1 linear layers differ" in run._operands_text(row) and "NOT compared" in run._operands_text(row)
    assert run._as_exported(row)
    held["layers"]["0"]["o_proj"].weight.data[0, 0] += 1
    row = {"operands": run.operands(held, tmp_path)}
    assert "1 of 32 values" in run._operands_text(row) and not run._as_exported(row)
    for failed in (None, {"operands": "Traceback"}):
        assert not run._as_exported(failed)
    assert "could not be read\nTraceback" in run._operands_text({"operands": "Traceback"})


def test_the_reference_holds_the_packed_export_s_own_values(tmp_path, run, monkeypatch):
    pytest.importorskip("compressed_tensors", minversion="0.16")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from mxfp4_rl.export.formats import FORMATS

    source = make_tiny_model(tmp_path / "own", hidden=64, intermediate=64, architecture="llama")
    monkeypatch.setattr(run, "_make", lambda model, root: source)
    case = run.Case("tiny", "nvfp4+four-over-six", "nvfp4-pack-quantized")
    run.export(case, tmp_path)
    packed, plain = (load_file(case.folder(tmp_path, f) / "model.safetensors") for f in (case.format, "bf16"))
    arguments = QuantizationArgs(**FORMATS[case.format].arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    decompress = BaseCompressor.get_value_from_registry(case.format).decompress
    names = [name.removesuffix("_packed") for name in packed if name.endswith("_packed")]
    for name in names:
        stored = {
            own: packed[f"{name.removesuffix('weight')}{own}"]
            for own in ("weight_packed", "weight_scale", "weight_global_scale")
        }
        assert torch.equal(decompress(stored, scheme)["weight"].bfloat16(), plain[name]), name
    assert len(names) == 14


def test_a_run_that_takes_too_long_is_ended_and_what_it_said_is_kept(tmp_path):
    step_cost = script("step_cost", FOLDER.parent / "step_cost" / "run.py")
    log = tmp_path / "log.txt"
    said = "import os; print(os.environ['VLLM_USE_DEEP_GEMM'], flush=True); "
    assert step_cost.run_for([sys.executable, "-c", said + "raise SystemExit(3)"], 60, log) == 3
    assert log.read_text() == "0\n"
    ends = "import signal, sys, time; signal.signal(15, lambda *_: (print('ended', flush=True), sys.exit())); "
    with pytest.raises(subprocess.TimeoutExpired):
        step_cost.run_for([sys.executable, "-c", ends + "print('on', flush=True); time.sleep(600)"], 5, log)
    assert log.read_text() == "on\nended\n"


@pytest.mark.parametrize("wrong", ["checksum_equal", "experts_equal"])
def test_experts_that_differ_are_an_error_of_their_variant(experts_rollout, monkeypatch, wrong):
    from mxfp4_rl.vllm_plugin import offline

    found = {"checksum_equal": True, "experts_equal": True, wrong: False}
    monkeypatch.setattr(offline, "model_of", lambda llm: None)
    monkeypatch.setattr(offline, "load", lambda llm, model: SimpleNamespace(sizes={}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(experts_rollout, "trainer_model", lambda folder: torch.nn.Module())
    monkeypatch.setattr(experts_rollout, "checksums", lambda *_: {"checksum_equal": found["checksum_equal"]})
    monkeypatch.setattr(experts_rollout, "experts_equal", lambda *_: {"experts_equal": found["experts_equal"]})
    monkeypatch.setattr(experts_rollout, "k3_of", lambda *_: {})
    monkeypatch.setattr("mxfp4_rl.nn.convert", lambda *_: None)
    row = {"errors": []}
    recipe = experts_rollout.recipe_of("w4a4 mxfp4")
    experts_rollout.agree(None, recipe, SimpleNamespace(folder=""), lambda _, work: row.update(work()), row)
    assert row["errors"] == [f"{wrong} is false"]


def test_replies_do_not_end_and_their_log_probabilities_are_the_model_s(tmp_path, run):
    folder = make_tiny_model(tmp_path / "own", architecture="llama")
    asked = [[10, 11, 12], [13, 14, 15, 16, 17, 18]]
    found = run.transformers_answers(folder, asked, 20)
    assert [len(reply) for reply in found["replies"]] == [20, 20]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for prompt, reply, forced, margins in zip(asked, *(found[k] for k in ("replies", "forced", "margins")), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        own = logits[torch.arange(20), torch.tensor(reply)]
        torch.testing.assert_close(own, torch.tensor(forced), atol=0.05, rtol=0)
        assert min(margins) >= 0 and (logits.max(-1).values - own).max() < 0.1  # greedy, up to BF16's ties
