"""Our parts of verl's vLLM rollout, with stand-ins for what is vLLM's and Ray's own. Skipped where vLLM is not installed."""

import asyncio
import types

import pytest
import torch

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.settings import Settings

pytest.importorskip("vllm")

from vllm.v1.core.sched.scheduler import Scheduler

from mxfp4_rl.verl_plugin import vllm_adapter, vllm_worker
from mxfp4_rl.verl_plugin.vllm_adapter import MXFP4ServerAdapter
from mxfp4_rl.verl_plugin.vllm_server import MXFP4vLLMServer
from mxfp4_rl.verl_plugin.vllm_worker import MXFP4WorkerExtension, layer_names, under_adapters
from mxfp4_rl.vllm_plugin.shipment import Shipment

NOTHING_PACKED = {"bytes": 8, "packed_bytes": 0, "packed_elements": 0, "seconds": 0.1, "checksum": 0}
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
    config = types.SimpleNamespace(
        quant_config=types.SimpleNamespace(describe=lambda: "1 layers: packed"),
        parallel_config=types.SimpleNamespace(tensor_parallel_size=1),
    )
    extension.model_runner = types.SimpleNamespace(model=model, vllm_config=config)
    return extension


class Engine:
    """One worker behind vLLM's asynchronous interface, with the reset of vLLM's own scheduler."""

    def __init__(self):
        self.worker, self.resets, self.busy, self.connector = worker(), 0, False, None
        self.vllm_config = types.SimpleNamespace(kv_transfer_config=None)

    async def collective_rpc(self, method, args=()):
        return [getattr(self.worker, method)(*args)]

    async def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.resets += 1
        scheduler = object.__new__(Scheduler)
        scheduler.kv_cache_manager = types.SimpleNamespace(reset_prefix_cache=lambda: not self.busy)
        scheduler.connector, scheduler.log_stats = self.connector, False
        return scheduler.reset_prefix_cache(reset_running_requests, reset_connector)


def server(enable=True, **settings):
    own = object.__new__(MXFP4vLLMServer)
    own.settings = Settings.from_config({"enable": enable, "aqn": AQN, **settings})
    own._schedule = vars(own.settings.aqn.schedule(10))
    own._noise_on, own._last_sync, own._said = True, {}, False
    own.engine, own.node_rank, own.replica_rank, own.global_steps = Engine(), 0, 0, None
    own.config = types.SimpleNamespace(quantization=None)
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


def test_noise_does_not_change_under_running_requests():
    own = server()
    own.engine.busy = True
    with pytest.raises(RuntimeError, match="prefix cache is in use"):
        asyncio.run(own.set_noise(False))


def test_noise_clears_an_external_store_of_keys_and_values_too():
    own, cleared = server(), []
    own.engine.vllm_config.kv_transfer_config = object()
    own.engine.connector = types.SimpleNamespace(reset_cache=lambda: cleared.append(True))
    asyncio.run(own.set_global_steps(8))
    assert cleared == [True]
    own.engine.connector.reset_cache = lambda: False
    with pytest.raises(RuntimeError, match="prefix cache is in use"):
        asyncio.run(own.set_noise(False))


def test_only_a_sync_of_weights_brings_new_clean_norms(monkeypatch):
    monkeypatch.setattr(vllm_worker.vLLMColocateWorkerExtension, "update_weights_from_ipc", lambda self, *args: None)
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
    return {**shipment.sizes, "seconds": 0.5, "checksum": int(shipment.checksum), "adapters": False}


def test_a_sync_ends_with_the_weights_compared_and_the_paths_told(capsys):
    own = server()
    asyncio.run(own.end_sync(shipped()))
    assert asyncio.run(own.last_sync())["bytes"] == 4 * (32 + 2)
    assert "1 layers: packed" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="does not hold the weights"):
        asyncio.run(own.end_sync(shipped(scale=4.0)))


def test_weights_that_several_workers_hold_are_not_compared_and_the_run_says_so(capsys):
    own = server()
    own.engine.worker.model_runner.vllm_config.parallel_config.tensor_parallel_size = 2
    asyncio.run(own.end_sync(shipped(scale=4.0)))
    assert "not compared" in capsys.readouterr().out


def test_what_does_not_fit_is_received_to_the_end_and_then_told(monkeypatch):
    received = []

    def receive(self, peft_config, base_sync_done, use_shm):
        for bucket in ([("a", None)], [("b", None)]):
            self._update_weights(bucket, peft_config, base_sync_done)
            received.append(bucket)

    def load(self, weights, peft_config, base_sync_done):
        raise KeyError(weights[0][0])

    monkeypatch.setattr(vllm_worker.vLLMColocateWorkerExtension, "update_weights_from_ipc", receive)
    monkeypatch.setattr(vllm_worker.vLLMColocateWorkerExtension, "_update_weights", load)
    with pytest.raises(RuntimeError, match=r"cannot load the trainer's weights .KeyError: 'a'"):
        worker().update_weights_from_ipc()
    assert len(received) == 2


def test_packed_names_where_adapters_are_wrapped_around_layers():
    model = torch.nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for stem in ("a.qkv_proj.base_layer", "a.o_proj.base_layer", "b.down_proj"):
        owner = model
        for part in stem.split("."):
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        owner.weight_packed = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    known = layer_names(model)
    for shipped_name, held in (
        ("a.q_proj.base_layer.weight_packed", "a.q_proj.base_layer.weight_packed"),
        ("a.o_proj.base_layer.weight_scale", "a.o_proj.base_layer.weight_scale"),
        ("b.down_proj.base_layer.weight_packed", "b.down_proj.weight_packed"),
    ):
        assert under_adapters(model, shipped_name, known) == held


def test_weights_that_travel_dequantised_are_not_compared_and_the_run_says_so_once(capsys):
    own = server()
    for _ in range(2):
        asyncio.run(own.end_sync(NOTHING_PACKED | {"adapters": False}))
    told = capsys.readouterr().out
    assert told.count("not compared: weights travel dequantised") == told.count("1 layers: packed") == 1
    own = server()
    own.replica_rank = 1
    asyncio.run(own.end_sync(NOTHING_PACKED | {"adapters": False}))
    assert capsys.readouterr().out == ""


def test_adapters_alone_are_not_compared(capsys):
    own = server()
    asyncio.run(own.end_sync(NOTHING_PACKED | {"adapters": True}))
    assert capsys.readouterr().out == "" and asyncio.run(own.last_sync())["bytes"] == 8


def test_vllm_tells_graphs_of_two_recipes_apart(monkeypatch):
    monkeypatch.setattr(MXFP4vLLMServer.__bases__[0], "_preprocess_engine_kwargs", lambda self, kwargs: None)
    keys = []
    for recipe in ({}, {"exclude": ["o_proj"]}, {"overrides": {"down_proj": {"fallback_alpha": 1.0}}}):
        kwargs = {"additional_config": '{"mine": 1}'}
        server(recipe=recipe)._preprocess_engine_kwargs(kwargs)
        assert kwargs["additional_config"]["mine"] == 1
        keys.append(str(kwargs))
    assert len(set(keys)) == 3


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

    monkeypatch.setattr(vllm_adapter.ServerAdapter, "update_weights", send)
    adapter = object.__new__(MXFP4ServerAdapter)
    adapter.config = types.SimpleNamespace(custom={"mxfp4": {"enable": True}}, dtype="bfloat16")
    adapter.model_config = types.SimpleNamespace(hf_config=types.SimpleNamespace(model_type="qwen2"))
    adapter._has_server = True
    adapter.server_handle = types.SimpleNamespace(end_sync=types.SimpleNamespace(remote=end_sync))
    weights = [("layer.weight", quantize(torch.randn(4, 64), QuantRecipe())), ("norm.weight", torch.ones(8))]
    asyncio.run(adapter.update_weights(iter(weights), global_steps=3))
    assert sent.keys() == {"layer.weight_packed", "layer.weight_scale", "norm.weight"}
    assert sent["norm.weight"].dtype == torch.bfloat16
    assert told[0]["bytes"] == 4 * (32 + 2) + 16 and told[0]["seconds"] > 0
    for base_sync_done in (False, True):  # a sync of what the adapters are on, and one of adapters alone
        asyncio.run(adapter.update_weights(iter(weights), peft_config={"r": 8}, base_sync_done=base_sync_done))
    asyncio.run(adapter.update_weights(iter(weights), peft_config=None, base_sync_done=True))  # a model without adapters
    assert [sync["adapters"] for sync in told] == [False, False, True, False]
    with pytest.raises(ValueError, match="backend=naive"):
        asyncio.run(adapter.update_weights(iter(weights), wire_format="delta_flush"))
    adapter.config.custom = {}
    asyncio.run(adapter.update_weights(iter([("plain", torch.ones(1))])))
    assert "plain" in sent and len(told) == 4
