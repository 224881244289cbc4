"""The comparison of scale rules over draws: what a draw is, what a variant changes, and the arithmetic."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize, rel_mse
from mxfp4_rl.quant.nvfp4 import e4m3_value
from mxfp4_rl.tasks.tiny_model import make_tiny_model

FILE = Path(__file__).parents[1] / "recipes" / "scale_search" / "draws.py"


@pytest.fixture(scope="module")
def draws():
    spec = importlib.util.spec_from_file_location("draws", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["draws"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["draws"]


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 256, generator=generator).bfloat16() for n in (96, 32)]


@pytest.fixture
def made(draws, weights):
    """A variant's operand of both weights, float32, and its rule's scale of the tensor."""

    def make(text, **given):
        variant = draws.Variant.parse(text)
        rule = draws.packed(weights, variant.words, 1.4)
        return torch.cat(draws.operands(weights, variant, rule, **given)).float(), rule

    return make


@pytest.mark.parametrize("words", ["nvfp4", "nvfp4+four-over-six", "nvfp4+soar", "nvfp4+search"])
def test_a_draw_rounds_otherwise_with_about_the_same_error(draws, weights, made, words):
    whole = torch.cat(weights)
    plain = fake_quantize(whole, QuantRecipe.parse(words))
    same = draws.operands(weights, draws.Variant.parse(words), draws.packed(weights, words, 1.0))
    assert [t.shape for t in same] == [w.shape for w in weights] and all(t.dtype == torch.bfloat16 for t in same)
    other, _ = made(words)
    if words != "nvfp4+soar":  # which also fits the row that is cut off
        assert torch.equal(torch.cat(same), plain)
    error = (other.double() - whole.double()).square().sum() / whole.double().square().sum()
    assert not torch.equal(other, plain) and error.item() == pytest.approx(rel_mse(whole, QuantRecipe.parse(words)), rel=0.05)


@pytest.mark.parametrize("rule", ["nvfp4", "nvfp4+four-over-six", "nvfp4+soar", "nvfp4+search"])
def test_no_clip_holds_every_largest_element(weights, made, rule):
    x = torch.cat(weights).float().unflatten(-1, (-1, 16))
    amax = x.abs().amax(-1)
    (free, packed), (held, _) = made(rule), made(rule + ":no-clip")
    scale = e4m3_value(packed.scales[:-1]) * packed.tensor_scale
    clipped = scale * 6 < amax
    assert 0 < clipped.sum() < clipped.numel()
    # Without clipping, an element is off by at most half a step: 1 of the 6 units that the block's scale reaches to.
    values = held.unflatten(-1, (-1, 16))
    assert ((values - x).abs().amax(-1) <= amax * 1.15 / 4 * 1.01).all()
    if rule in ("nvfp4", "nvfp4+search"):  # the other two may find another of their scales the best
        same = (free.unflatten(-1, (-1, 16)) == values).all(-1)
        assert same[~clipped].all() and not same[clipped].any()


def test_the_choice_of_a_scale_goes_by_the_metric(weights, made):
    whole = torch.cat(weights).float()
    squares = torch.linspace(0, 1, 256) ** 4
    plain, _ = made("nvfp4+search")
    for text, weight in (("power=2", whole.square()), ("inputs", squares)):
        other, _ = made(f"nvfp4+search:{text}", squares=squares)
        assert (weight * (other - whole).square()).sum() < (weight * (plain - whole).square()).sum()
        assert (other - whole).square().sum() > (plain - whole).square().sum()
    assert torch.equal(made("nvfp4+search:power=0.0")[0], plain)


def test_errors_are_reflected_get_signs_or_leave_columns_out(draws, weights, made):
    whole = torch.cat(weights).float()
    error = made("nvfp4+soar")[0] - whole
    largest = draws.largest_of_blocks(whole)
    assert (largest.unflatten(-1, (-1, 16)).sum(-1) == 1).all()
    assert torch.equal(whole[largest].abs(), whole.abs().unflatten(-1, (-1, 16)).amax(-1).flatten())
    near = {"rtol": 0, "atol": 0.02}  # BF16
    torch.testing.assert_close(made("nvfp4+soar:reflected")[0] - whole, -error, **near)
    torch.testing.assert_close(made("nvfp4+soar:largest")[0] - whole, torch.where(largest, -error, error), **near)
    kept = made("nvfp4+soar:keep=2", squares=torch.arange(256).float())[0]
    assert torch.equal(kept[:, -2:], whole[:, -2:]) and torch.equal(kept[:, :-2], made("nvfp4+soar")[0][:, :-2])
    signs = [made("nvfp4+soar:signs", seed=seed)[0] - whole for seed in (1, 1, 2)]
    assert torch.equal(signs[0], signs[1]) and not torch.equal(signs[0], signs[2])
    torch.testing.assert_close(signs[0].abs(), error.abs(), **near)


def test_a_variant_that_does_not_exist_is_refused(draws):
    both = draws.Variant.parse("nvfp4+soar:no-clip:only=down_proj")
    assert both == draws.Variant("nvfp4+soar", no_clip=True, only="down_proj")
    for change in ("noclip", "power", "only="):
        with pytest.raises(ValueError, match=f"'{change}' is none of no-clip, inputs, .*, keep=, only="):
            draws.Variant.parse(f"nvfp4+soar:{change}")


def test_moments_give_the_outputs_errors(draws):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 32, generator=generator) + 1
    w, change = torch.randn(8, 32, generator=generator), torch.randn(8, 32, generator=generator) / 10
    found = draws.Moments(x.mean(0), x.T @ x / 50).errors(change, w)
    energy = (x @ w.T).square().sum().item()
    assert found["output"] == pytest.approx((x @ change.T).square().sum().item() / energy, rel=1e-4)
    assert found["mean"] == pytest.approx(50 * (x @ change.T).mean(0).square().sum().item() / energy, rel=1e-4)
    assert found["apart"] == pytest.approx((x.square() @ change.T.square()).sum().item() / energy, rel=1e-4)
    assert found["weight"] == pytest.approx((change.square().sum() / w.square().sum()).item(), rel=1e-4)
    assert draws.Moments(x.mean(0), x.T @ x).errors(-0.1 * w, w)["largest"] == pytest.approx(-0.1, rel=1e-4)


def test_noise_has_the_size_of_its_block(draws):
    weight = torch.cat([torch.full((64, 32), 1.0), torch.full((64, 32), 100.0)], dim=1).bfloat16()
    noise = (draws.noisy(weight, 0.05, torch.Generator().manual_seed(0)).float() - weight.float()).split(32, dim=1)
    assert [part.std().item() for part in noise] == pytest.approx([0.05, 5.0], rel=0.05)


def test_the_command_compares_variants_on_a_tiny_model(draws, tmp_path, monkeypatch, capsys):
    model = make_tiny_model(tmp_path / "tiny", hidden=64, intermediate=128)
    (tmp_path / "text.txt").write_text("What is 12 + 34? " * 20)
    rules = ["nvfp4", "nvfp4+soar", "nvfp4+soar:only=nowhere", "nvfp4+search:inputs"]
    arguments = "draws.py --text text.txt --calibration text.txt --draws 2 --errors --noise 0.05 --out out.json --rules"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*arguments.split(), *rules, "--model", str(model)])
    draws.main()
    record = json.loads((tmp_path / "out.json").read_text())
    assert list(record["losses"]) == rules and all(len(losses) == 2 for losses in record["losses"].values())
    assert record["losses"]["nvfp4+soar:only=nowhere"] == record["losses"]["nvfp4"] != record["losses"]["nvfp4+soar"]
    assert record["errors"]["nvfp4+soar"][0]["weight"] < record["errors"]["nvfp4"][0]["weight"]
    assert "nvfp4+search:inputs  errors weight 0.0" in capsys.readouterr().out


def test_timing_compares_every_weight_with_the_reference_and_the_reference_with_nothing(weights, monkeypatch):
    spec = importlib.util.spec_from_file_location("scale_search", FILE.with_name("run.py"))
    timing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timing)
    monkeypatch.setattr(timing, "seconds", lambda work, passes: 1.0)
    assert timing.measure(weights, "nvfp4", "reference", 1)["same_bits"] is None

    wrong_about = []

    def kernels(x, recipe, backend):
        """The reference, which where it stands for the kernels is wrong about some weights."""
        wrong = backend == "triton" and any(x is weight for weight in wrong_about)
        return quantize(x * 2 if wrong else x, recipe, backend="reference")

    monkeypatch.setattr("mxfp4_rl.quantize", kernels)
    assert timing.measure(weights, "nvfp4", "triton", 1)["same_bits"] is True
    wrong_about.append(weights[-1])
    assert timing.measure(weights, "nvfp4", "triton", 1)["same_bits"] is False


def test_errors_are_those_of_the_mean_over_draws(draws):
    assert draws.mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert draws.mean_and_error([1.0]) == (1.0, None)
