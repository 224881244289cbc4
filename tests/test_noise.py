"""The noise is a pure function of seed, step and name, follows its schedule, and only norms get it."""

import pytest
import torch
from torch import nn

from mxfp4_rl import RecipeError
from mxfp4_rl.noise import AQNSchedule, noise_targets
from tests.test_nn import llama


def test_schedule_is_the_published_one():
    schedule = AQNSchedule(sigma_start=0.01, sigma_end=0.001, stages=10, total_steps=100)
    stages = [schedule.sigma(step) for step in range(0, 100, 10)]
    expected = [0, 0.01, 0.0075, 0.00562, 0.00422, 0.00316, 0.00237, 0.00178, 0.00133, 0.001]
    assert stages == pytest.approx(expected, abs=6e-6)
    assert schedule.sigma(9) == 0 and schedule.sigma(10) == 0.01 and schedule.sigma(500) == pytest.approx(0.001)
    assert AQNSchedule(stages=2, total_steps=4).sigma(3) == 0.01


def test_noise_repeats_exactly_and_never_touches_the_clean_weight():
    schedule = AQNSchedule(total_steps=10, seed=3)
    weight = torch.ones(4096)
    first = schedule.noisy("model.norm.weight", weight, 5)
    assert torch.equal(first, schedule.noisy("model.norm.weight", weight, 5))
    assert torch.equal(weight, torch.ones(4096))
    assert (first - 1).std().item() == pytest.approx(schedule.sigma(5), rel=0.05)
    for other in (
        schedule.noisy("model.norm2.weight", weight, 5),
        schedule.noisy("model.norm.weight", weight, 6),
        AQNSchedule(total_steps=10, seed=4).noisy("model.norm.weight", weight, 5),
    ):
        assert abs(torch.corrcoef(torch.stack((first - 1, other - 1)))[0, 1].item()) < 0.1
    quiet = schedule.noisy("model.norm.weight", weight, 0)
    assert torch.equal(quiet, weight) and quiet.data_ptr() != weight.data_ptr()
    assert schedule.noisy("w", weight.bfloat16(), 5).dtype == torch.bfloat16


def test_targets_are_the_norms():
    assert noise_targets(llama()) == [
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in range(2) for n in ("input", "post_attention")),
        "model.norm.weight",
    ]
    with pytest.raises(RecipeError, match="no RMSNorm"):
        noise_targets(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_the_norm_that_feeds_a_router_stays_clean():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
        )
    )
    targets = noise_targets(model)
    assert "model.layers.0.input_layernorm.weight" in targets
    assert not any("post_attention_layernorm" in name for name in targets)


@pytest.mark.parametrize("norm", ["ffn_norm", "post_attention_layernorm"])
def test_experts_behind_an_unknown_norm_are_refused(norm):
    layer = nn.ModuleDict({norm: nn.RMSNorm(4), "gate": nn.Linear(4, 2)})
    if norm == "post_attention_layernorm":  # of the attention's output, in the families that have both
        layer["pre_mlp_layernorm"] = nn.RMSNorm(4)
    with pytest.raises(RecipeError, match="which norms feed the routers of ModuleDict is not known"):
        noise_targets(layer)


def test_norms_without_a_weight_of_their_own_are_no_targets():
    class RMSNorm(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    model = torch.nn.ModuleDict({"plain": RMSNorm(torch.ones(4)), "own": RMSNorm(torch.nn.Parameter(torch.ones(4)))})
    assert noise_targets(model) == ["own.weight"]
