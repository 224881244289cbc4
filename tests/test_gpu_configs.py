"""The configurations for GPUs, and what a vLLM rollout is refused for, without a GPU."""

import importlib.metadata

import pytest
import torch

from mxfp4_rl import vllm_plugin
from mxfp4_rl.launch import LaunchError, support
from mxfp4_rl.launch.compose import compose_config
from mxfp4_rl.launch.preflight import check_batches
from mxfp4_rl.launch.support import check_supported
from mxfp4_rl.settings import Settings

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture(autouse=True)
def a_gpu_host(monkeypatch):
    own = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.22.0" if name == "vllm" else own(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(support, "has_flash_attention", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")


def check(name="one_gpu", *overrides):
    config = compose_config(name, overrides)
    check_supported(config, Settings.from_config(config.mxfp4))
    return config


@pytest.mark.parametrize("name", ["one_gpu", "two_gpus", "eight_gpus"])
def test_configurations_fit_together(name):
    assert check_batches(check(name)) == []


def test_lora_adapters_and_plain_bf16_are_fine():
    check("one_gpu", "actor_rollout_ref.model.lora_rank=16")
    check("one_gpu", "mxfp4.enable=false", f"{ROLLOUT}.quantization=fp8")
    check("one_gpu", "mxfp4.enable=false", f"{ROLLOUT}.load_format=safetensors")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (f"{ROLLOUT}.quantization=fp8", "two quantisations"),
        (f"{ROLLOUT}.load_format=safetensors", "load_format=dummy"),
        (f"{ROLLOUT}.layered_summon=true", "layered_summon=false"),
        (f"++{ROLLOUT}.disaggregation.enabled=true", "disaggregation"),
        (f"++{ROLLOUT}.qat.enable=true", "qat"),
        (f"{ROLLOUT}.quantization_config_file=x.json", "set it to null"),
        (f"{ROLLOUT}.dtype=float16", "use bfloat16"),
        (f"{ROLLOUT}.checkpoint_engine.backend=nccl", "use naive"),
        ("trainer.device=cpu", "CPU"),
        ("mxfp4.kv_cache={block: 32}", "missing is an attention backend"),
        ("actor_rollout_ref.model={lora_rank: 8, lora: {merge: true}}", "merge=false"),
    ],
)
def test_what_a_packed_rollout_cannot_do_is_refused(override, expected):
    with pytest.raises(LaunchError) as error:
        check("one_gpu", override)
    assert expected in str(error.value)


def test_vllm_must_be_there_and_of_a_version_that_the_plugin_fits(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.31.1")
    with pytest.raises(LaunchError, match=r"vLLM 0\.31\.1 is outside .*pip install 'vllm>=0\.22,<0\.25'"):
        check()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(LaunchError, match=r"vLLM is not installed: pip install"):
        check()


def test_vllm_is_the_build_for_the_runs_device(monkeypatch):
    with pytest.raises(LaunchError, match=r"needs a GPU .* or vLLM's build for CPUs.*installed: 0\.22\.0"):
        check("quickstart_vllm")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.22.0+cpu")
    monkeypatch.setattr(vllm_plugin, "lacks", lambda: [])
    with pytest.raises(LaunchError, match=r"vLLM 0\.22\.0\+cpu is its build for CPUs, but trainer\.device=cuda"):
        check()
    with pytest.raises(LaunchError, match="enable_sleep_mode"):
        check("quickstart_vllm", "actor_rollout_ref.rollout.enable_sleep_mode=true")
    check("quickstart_vllm")


def test_what_vllm_imports_for_any_quantised_model_must_be_there(monkeypatch):
    asked = ["torch==2.11.0", "humming-kernels[cu13]==0.1.2; python_version >= '3'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    with pytest.raises(LaunchError, match=r"vLLM 0\.22\.0 lacks .*pip install 'humming-kernels\[cu13\]==0\.1\.2'"):
        check()
    monkeypatch.setattr(vllm_plugin, "_ALWAYS_IMPORTED", {"humming-kernels": "json"})  # a module that is there
    check()


@pytest.mark.parametrize("marker", ["sys_platform == 'elsewhere'", "extra == 'humming'"])
def test_what_vllm_does_not_ask_for_here_may_be_missing(monkeypatch, marker):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [f"humming-kernels==0.1.2; {marker}"])
    assert vllm_plugin.lacks() == []
    check()


def test_the_gpu_must_run_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(LaunchError, match=r"a GPU has compute capability 7\.5"):
        check()


def test_flash_attention_must_be_there_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(support, "has_flash_attention", lambda: False)
    with pytest.raises(LaunchError, match="flash-attn, which is not installed"):
        check("eight_gpus")
    check("one_gpu")
