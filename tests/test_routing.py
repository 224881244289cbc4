"""The chosen experts of trainer and rollout, compared on the same tokens; a mixture in the ladder; its experts drift apart."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mxfp4_rl import ModelRecipe, QuantRecipe, convert
from mxfp4_rl.monitor import experts as table
from mxfp4_rl.monitor import routing
from mxfp4_rl.nn import MXFP4Experts, experts
from mxfp4_rl.tasks.tiny_model import make_tiny_model
from recipes.ladder import grpo, rungs
from recipes.ladder.options import Options
from recipes.upcycle.upcycle import main, upcycle
from tests.test_ladder import logged, prepared, task  # noqa: F401  (a fixture)

SEQUENCES = [[7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18, 19], [20, 21]]
HEADS = [3, 2, 1]


def mixture(tmp_path, dtype=torch.float32, **options):
    dense = AutoModelForCausalLM.from_pretrained(
        make_tiny_model(tmp_path / "dense", architecture="llama", intermediate=256), dtype=dtype
    )
    return upcycle(dense, slices=2, **options).eval()


def test_each_token_once_in_the_sequences_order(tmp_path):
    moe = mixture(tmp_path, expert_noise=0.5, router_std=1.0)
    found = routing.choices_of(moe, SEQUENCES, 0)
    assert found.shape == (4 + 7 + 1, moe.config.num_hidden_layers, 2)
    one_by_one = [routing.choices_of(moe, [s], 0) for s in SEQUENCES]
    assert torch.equal(found.sort(-1)[0], torch.cat(one_by_one).sort(-1)[0])
    cached = routing.choices_of(moe, SEQUENCES, 0, HEADS)  # left padding and a KV cache: in float32 the same choices
    assert routing.agreement(found, cached) == {"router_agreement": 1.0, "router_overlap": 1.0}
    assert not any(m._forward_pre_hooks for m in moe.modules())


def test_quantised_and_not_choose_almost_the_same(tmp_path):
    moe = mixture(tmp_path, expert_noise=0.5, router_std=1.0)
    before = routing.choices_of(moe, SEQUENCES, 0)
    recipe = QuantRecipe.parse("mxfp4")
    convert(moe, ModelRecipe(weight=recipe, activation=recipe))
    found = routing.agreement(before, routing.choices_of(moe, SEQUENCES, 0))
    assert 0 < found["router_agreement"] <= found["router_overlap"] <= 1


def test_the_numbers():
    ours = torch.tensor([[[0, 1]], [[2, 3]], [[0, 3]], [[1, 2]]])
    theirs = torch.tensor([[[1, 0]], [[2, 0]], [[1, 2]], [[1, 2]]])  # equal in another order, half, none, equal
    assert routing.agreement(ours, theirs) == {"router_agreement": 0.5, "router_overlap": 0.625}
    with pytest.raises(ValueError, match="do not compare"):
        routing.agreement(ours, theirs[:2])


def test_a_dense_model_routes_nothing(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "dense"))
    assert routing.agreement(*[routing.choices_of(model, SEQUENCES, 0)] * 2) == {}


def test_the_ladder_upcycles_compares_routers_and_keeps_operands(tmp_path, task, monkeypatch):  # noqa: F811
    dense = make_tiny_model(tmp_path / "dense", architecture="llama", intermediate=256)
    made = []
    original = experts.operand_of_experts
    monkeypatch.setattr(experts, "operand_of_experts", lambda *a: made.append(1) or original(*a))
    options = {
        "model": str(dense), "upcycle": {"slices": 2, "expert_noise": 0.05}, "steps": 2, "measure_every": 1, "warmup_steps": 1,
        "warmup_batch": 4,
    }  # fmt: skip
    aqn = rungs.RUNGS["w4a4+aqn"].config()
    loop = grpo.Run(prepared(tmp_path / "run", task, aqn, **options))
    assert sum(isinstance(m, MXFP4Experts) for m in loop.model.modules()) == loop.model.config.num_hidden_layers
    made.clear()
    loop.rollout(1)  # many decoded tokens, with noise on the norms, and the comparison
    assert len(made) == 2 * loop.model.config.num_hidden_layers
    loop.rollout(1)
    assert len(made) == 2 * loop.model.config.num_hidden_layers
    assert loop.go() == 0
    steps = logged(tmp_path / "run")
    for step in (1, 2):
        assert 0 < steps[step]["mxfp4/router_agreement"] <= steps[step]["mxfp4/router_overlap"] <= 1
        assert 0 < steps[step]["ladder/router_agreement_bf16"] <= 1
        assert steps[step]["mxfp4_experts/imbalance_max"] >= 1
    assert table.read_table(tmp_path / "run").step == 2
    assert len(list((tmp_path / "mixtures").glob("[!.]*/config.json"))) == 1
    plain = grpo.Run(prepared(tmp_path / "plain", task, rungs.RUNGS["bf16"].config(), **{**options, "steps": 1}))
    assert plain.go() == 0 and "ladder/router_agreement_bf16" not in logged(tmp_path / "plain")[1]
    assert logged(tmp_path / "plain")[1]["mxfp4/router_agreement"] > 0.5


def test_the_preset_and_its_rungs():
    assert [r.name for r in rungs.chosen(["moe"])] == ["bf16", "w4a4", "w4a4+mbs", "w4a4+of", "w4a4+mbs+of1"]
    preset, dense = Options.from_dict(rungs.PRESETS["moe"]), Options.from_dict(rungs.PRESETS["gpu"])
    differ = {k for k, v in vars(preset).items() if v != getattr(dense, k)}
    assert differ == {"upcycle"} and json.dumps(preset.upcycle)


def distance(moe, slices=2):
    """Of the copies of a slice, over their size, the least of all layers."""
    weights = [layer.mlp.experts.gate_up_proj.detach().float() for layer in moe.model.layers]
    return min(((w[:slices] - w[slices:]).norm() / w[:slices].norm()).item() for w in weights)


def test_noise_and_training_pull_copies_apart(tmp_path):
    assert distance(mixture(tmp_path)) == 0
    assert distance(mixture(tmp_path, expert_noise=0.05)) == pytest.approx(0.05 * 2**0.5, rel=0.02)
    moe = mixture(tmp_path, router_std=1.0)  # so that copies get other tokens
    recipe = QuantRecipe.parse("mxfp4+mbs+of")
    convert(moe, ModelRecipe(weight=recipe, activation=recipe))
    optimiser = torch.optim.AdamW(moe.parameters(), lr=1e-3, weight_decay=0)
    ids = torch.randint(6, 100, (4, 24), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        moe(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert distance(moe) > 1e-3
    assert all(not torch.equal(*layer.mlp.gate.weight[:2]) for layer in moe.model.layers)  # slices of a copy, too


def test_a_mixture_with_an_expert_that_nobody_chooses_trains(tmp_path):
    moe = mixture(tmp_path, expert_noise=0.05)
    for layer in moe.model.layers:  # experts 2 and 3 get nothing
        layer.mlp.gate.register_forward_hook(lambda module, args, out: (out[0], out[1], out[2].clamp(max=1)))
    recipe = QuantRecipe.parse("mxfp4+mbs+of")
    convert(moe, ModelRecipe(weight=recipe, activation=recipe))
    optimiser = torch.optim.AdamW(moe.parameters(), lr=1e-3, weight_decay=0)
    before = [layer.mlp.experts.gate_up_proj.detach()[2:].clone() for layer in moe.model.layers]
    ids = torch.randint(6, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        loss = moe(input_ids=ids, labels=ids).loss
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())
        optimiser.step()
        optimiser.zero_grad()
    for layer, untouched in zip(moe.model.layers, before, strict=True):
        assert torch.equal(layer.mlp.experts.gate_up_proj.detach()[2:], untouched)


def test_the_command_takes_noise(tmp_path, capsys):
    dense = make_tiny_model(tmp_path / "dense", architecture="llama", intermediate=256)
    main([str(dense), str(tmp_path / "moe"), "--slices", "2", "--expert-noise", "0.1"])
    assert "4 experts a layer, 2 for a token" in capsys.readouterr().out
    assert distance(AutoModelForCausalLM.from_pretrained(tmp_path / "moe")) > 0.1
    assert AutoConfig.from_pretrained(tmp_path / "moe").num_local_experts == 4
