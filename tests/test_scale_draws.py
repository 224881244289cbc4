"""The comparison of scale rules over draws: what a draw is, and its arithmetic."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mxfp4_rl import QuantRecipe
from mxfp4_rl.quant import fake_quantize, rel_mse

FILE = Path(__file__).parents[1] / "recipes" / "scale_search" / "draws.py"


@pytest.fixture(scope="module")
def draws():
    spec = importlib.util.spec_from_file_location("draws", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", ["nvfp4", "nvfp4+four-over-six", "nvfp4+soar", "nvfp4+search"])
def test_a_draw_rounds_otherwise_with_about_the_same_error(draws, words):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 256, generator=generator).bfloat16() for n in (96, 32)]
    whole = torch.cat(weights)
    plain = fake_quantize(whole, QuantRecipe.parse(words))
    same = draws.quantised(weights, words, 1.0)
    assert [t.shape for t in same] == [w.shape for w in weights] and all(t.dtype == torch.bfloat16 for t in same)
    other = torch.cat(draws.quantised(weights, words, 1.4))
    if words != "nvfp4+soar":  # which also fits the row that is cut off
        assert torch.equal(torch.cat(same), plain)
    error = (other.double() - whole.double()).square().sum() / whole.double().square().sum()
    assert not torch.equal(other, plain) and error.item() == pytest.approx(rel_mse(whole, QuantRecipe.parse(words)), rel=0.05)


def test_errors_are_those_of_the_mean_over_draws(draws):
    assert draws.mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert draws.mean_and_error([1.0]) == (1.0, None)
