"""What the vLLM rollout refuses of a mixture of experts, told before anything starts; vLLM is not needed for it."""

import sys

import pytest
from omegaconf import OmegaConf

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.launch.inputs import check_quantisable
from mxfp4_rl.settings import Settings
from tests.test_experts import tiny

BARE = {"exclude": ["re:experts"]}


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # its import fails


def check(folder, family="Qwen3Moe", recipe=None, rollout=None, model=None, **sizes):
    tiny(family, **sizes).config.save_pretrained(folder)
    chosen = {"name": "vllm", "tensor_model_parallel_size": 1, "expert_parallel_size": 1, **(rollout or {})}
    config = {"actor_rollout_ref": {"model": {"path": str(folder), **(model or {})}, "rollout": chosen}}
    return check_quantisable(OmegaConf.create(config), Settings.from_config({"enable": True, "recipe": recipe or {}}))


SIXTEENS = {"intermediate_size": 48, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rollout": {"expert_parallel_size": 2}}, "rollout.expert_parallel_size=2"),
        ({"recipe": {"activation": {"format": "nvfp4"}}}, "activations in nvfp4"),
        ({"recipe": {"activation": {"tile": True}}}, "tile"),
        ({"model": {"lora_rank": 8}}, "model.lora_rank=8"),
        ({"model": {"lora": {"rank": 4}}}, "model.lora_rank=4"),
        ({"model": {"lora_adapter_path": "adapters"}}, "model.lora_adapter_path=adapters"),
        ({"moe_intermediate_size": 40}, "widths 64 and 40"),
        ({"hidden_size": 72}, "widths 72 and 48"),
        ({"rollout": {"tensor_model_parallel_size": 2}}, "tensor_model_parallel_size=2: .* 64 and 24 are no multiples of 16"),
    ],
)
def test_what_vllms_layers_of_experts_cannot_do_is_refused_early(given, expected, tmp_path):
    with pytest.raises(LaunchError, match=expected) as told:
        check(tmp_path, **{**SIXTEENS, **given})
    assert "mxfp4.recipe.exclude=['re:experts']" in str(told.value)
    if "tensor" not in expected:  # a cut that the other layers' blocks would not stand either
        alone = {**(given.get("recipe") or {}), **BARE}
        assert "experts" not in check(tmp_path, **{**SIXTEENS, **given, "recipe": alone})
        assert "experts" in check(tmp_path, **{**SIXTEENS, **given, "rollout": {"name": "mxfp4_hf"}})


@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe", "Mixtral", "Olmoe"])
def test_families_whose_loaders_were_run_are_let_through(family, tmp_path):
    assert "4 experts" in check(tmp_path, family, **SIXTEENS)


@pytest.mark.parametrize("family", ["Phimoe", "MiniMax", "MiniMaxM2", "Lfm2Moe"])
def test_families_whose_names_nobody_tried_are_refused(family, tmp_path):
    sizes = {**SIXTEENS, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2} if family == "Lfm2Moe" else SIXTEENS
    with pytest.raises(LaunchError, match="tried in vLLM for qwen2_moe, qwen3_moe, olmoe, mixtral;") as told:
        check(tmp_path, family, **sizes)
    assert "rollout.name=mxfp4_hf" in str(told.value) and "\n" not in str(told.value)
    assert "experts" in check(tmp_path, family, rollout={"name": "mxfp4_hf"}, **sizes)
    assert "experts" not in check(tmp_path, family, recipe=BARE, **sizes)
