"""Our parts of verl's vLLM rollout, with stand-ins for what is vLLM's and Ray's own. Skipped where vLLM is not installed."""

import asyncio
import types

import pytest
import torch

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.settings import Settings

pytest.importorskip("vllm")

from mxfp4_rl.verl_plugin import vllm_rollout
from mxfp4_rl.verl_plugin.vllm_rollout import MXFP4ServerAdapter, MXFP4vLLMServer, MXFP4WorkerExtension
from mxfp4_rl.vllm_plugin.shipment import Shipment

AQN = {"enable": True, "sigma_start": 0.01, "sigma_end": 0.001, "stages": 2}


class RMSNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)


def worker():
    extension = object.__new__(MXFP4WorkerExtension)
    model = torch.nn.ModuleDict({"norm": RMSNorm()})
    model.layer = torch.nn.Module()
    for name, tensor in (
        quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), QuantRecipe()).tensors().items()
    ):
        stored = {"codes": "weight_packed", "scales": "weight_scale"}[name]
        model.layer.register_parameter(stored, torch.nn.Parameter(tensor, requires_grad=False))
    config = types.SimpleNamespace(quant_config=types.SimpleNamespace(describe=lambda: "1 layers: packed"))
    extension.model_runner = types.SimpleNamespace(model=model, vllm_config=config)
    return extension


class Engine:
    """One worker behind vLLM's asynchronous interface."""

    def __init__(self):
        self.worker, self.resets = worker(), 0

    async def collective_rpc(self, method, args=()):
        return [getattr(self.worker, method)(*args)]

    async def reset_prefix_cache(self):
        self.resets += 1


def server(enable=True, **settings):
    own = object.__new__(MXFP4vLLMServer)
    own.settings = Settings.from_config({"enable": enable, "aqn": AQN, **settings})
    own._schedule = vars(own.settings.aqn.schedule(10))
    own._noise_on, own._last_sync, own._said = True, {}, False
    own.engine, own.node_rank, own.replica_rank, own.global_steps = Engine(), 0, 0, None
    own.model_config = types.SimpleNamespace(hf_config=types.SimpleNamespace(num_key_value_heads=1))
    own.config = types.SimpleNamespace(tensor_model_parallel_size=1, data_parallel_size=1, quantization=None)
    return own


def test_noise_is_put_on_the_clean_norms_of_the_last_sync_and_never_adds_up():
    own = server()
    norm = own.engine.worker.model_runner.model["norm"].weight
    asyncio.run(own.set_global_steps(8))  # the second half of the run: noise
    noisy = norm.clone()
    assert not torch.equal(noisy, torch.ones(8))
    assert asyncio.run(own.set_noise(False)) == 0.0 and torch.equal(norm, torch.ones(8))
    assert asyncio.run(own.set_noise(True)) == 0.01 and torch.equal(norm, noisy)
    asyncio.run(own.set_global_steps(8))
    assert torch.equal(norm, noisy)
    assert own.engine.resets == 4  # what was computed with other norms is forgotten


def test_only_a_sync_of_weights_brings_new_clean_norms(monkeypatch):
    monkeypatch.setattr(vllm_rollout.vLLMColocateWorkerExtension, "update_weights_from_ipc", lambda self, *args: None)
    own = server()
    extension = own.engine.worker
    norm = extension.model_runner.model["norm"].weight
    asyncio.run(own.set_global_steps(8))
    extension.update_weights_from_ipc({"r": 8}, True)  # adapters alone: the norms in the model are still the noisy ones
    asyncio.run(own.set_noise(False))
    assert torch.equal(norm, torch.ones(8))
    norm.data.fill_(2)
    extension.update_weights_from_ipc()
    asyncio.run(own.set_noise(True))
    asyncio.run(own.set_noise(False))
    assert torch.equal(norm, torch.full((8,), 2.0))


def shipped(scale=1.0):
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * scale
    shipment = Shipment(torch.bfloat16)
    list(shipment.tensors([("layer.weight", quantize(w, QuantRecipe()))]))
    return {**shipment.sizes, "seconds": 0.5, "checksum": int(shipment.checksum)}


def test_a_sync_ends_with_the_weights_compared_and_the_paths_told(capsys):
    own = server()
    asyncio.run(own.end_sync(shipped()))
    assert asyncio.run(own.last_sync())["bytes"] == 4 * (32 + 2)
    assert "1 layers: packed" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="does not hold the weights"):
        asyncio.run(own.end_sync(shipped(scale=4.0)))


def test_adapters_alone_are_not_compared():
    own = server()
    asyncio.run(own.end_sync({"bytes": 8, "packed_bytes": 0, "packed_elements": 0, "seconds": 0.1, "checksum": 0}))


def test_two_quantisations_of_the_rollout_are_refused():
    own = server()
    method, overrides = own._apply_quantization()
    assert method == "mxfp4_rl" and overrides["quantization_config"]["quant_method"] == "mxfp4_rl"
    own.config.quantization = "fp8"
    with pytest.raises(ValueError, match="give one of them"):
        own._apply_quantization()


def test_the_adapter_ships_packed_tensors_and_tells_the_server(monkeypatch):
    sent, told = {}, []

    async def send(self, weights, global_steps=None, wire_format="named_tensors", **kwargs):
        sent.update(weights)

    async def end_sync(sync):
        told.append(sync)

    monkeypatch.setattr(vllm_rollout.ServerAdapter, "update_weights", send)
    adapter = object.__new__(MXFP4ServerAdapter)
    adapter.config = types.SimpleNamespace(custom={"mxfp4": {"enable": True}}, dtype="bfloat16")
    adapter._has_server = True
    adapter.server_handle = types.SimpleNamespace(end_sync=types.SimpleNamespace(remote=end_sync))
    weights = [("layer.weight", quantize(torch.randn(4, 64), QuantRecipe())), ("norm.weight", torch.ones(8))]
    asyncio.run(adapter.update_weights(iter(weights), global_steps=3))
    assert sent.keys() == {"layer.weight_packed", "layer.weight_scale", "norm.weight"}
    assert sent["norm.weight"].dtype == torch.bfloat16
    assert told[0]["bytes"] == 4 * (32 + 2) + 16 and told[0]["seconds"] > 0
    with pytest.raises(ValueError, match="backend=naive"):
        asyncio.run(adapter.update_weights(iter(weights), wire_format="delta_flush"))
    adapter.config.custom = {}
    asyncio.run(adapter.update_weights(iter([("plain", torch.ones(1))])))
    assert "plain" in sent and len(told) == 1
