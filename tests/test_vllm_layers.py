"""The layers that vLLM builds with our quantisation method: loaded, cut over tensor-parallel workers, multiplied.

vLLM's own loaders run, on CPUs over gloo; the kernels run in Triton's interpreter. Skipped where vLLM is not installed.
"""

import os

import pytest
import torch

from mxfp4_rl import ModelRecipe, QuantRecipe, quantize
from mxfp4_rl.nn import convert, converted_layers
from mxfp4_rl.nn.experts import quantize_experts
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.recipe import RecipeError
from mxfp4_rl.vllm_plugin import quantization_config
from mxfp4_rl.vllm_plugin.layout import checksum, named_tensors
from mxfp4_rl.vllm_plugin.shipment import Shipment
from tests.test_experts import tiny
from tests.test_packing import _free_port

pytest.importorskip("vllm")

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HIDDEN, HEAD, HEADS, KV_HEADS, INNER = 256, 64, 4, 2, 512


def _config(recipe):
    from mxfp4_rl.vllm_plugin.quantization import MXFP4Config

    config = MXFP4Config.from_config(quantization_config(recipe))
    config.packed_modules_mapping = FUSED
    return config


def _weights():
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (HEADS * HEAD, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN),
              "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}  # fmt: skip
    return {name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}


def _in_worker(rank, world, port, words):
    # The last one is what vLLM's workers on CPUs set before they meet.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), VLLM_DIST_IDENT=str(port))
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    recipe = ModelRecipe(weight=QuantRecipe.parse(words), activation=QuantRecipe())
    packed = {name: quantize(w, recipe.weight) for name, w in _weights().items()}
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world, rank, "env://", rank, "gloo")
        initialize_model_parallel(world)
        config, layer = _config(recipe), "model.layers.0."
        shared = {"bias": False, "quant_config": config, "params_dtype": torch.bfloat16}
        qkv = QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix=layer + "self_attn.qkv_proj", **shared)
        gate_up = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], prefix=layer + "mlp.gate_up_proj", **shared)
        down = RowParallelLinear(INNER, HIDDEN, prefix=layer + "mlp.down_proj", **shared)
        shipped = 0
        for module, parts in ((qkv, {"q": "q", "k": "k", "v": "v"}), (gate_up, {"gate": 0, "up": 1}), (down, {"down": None})):
            for part, shard in parts.items():
                for name, tensor in named_tensors("weight", packed[part]):
                    parameter = getattr(module, name)
                    parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
                    shipped += checksum([("x." + name, tensor)])
        held = sum(checksum(("x." + n, p.data) for n, p in m.named_parameters()) for m in (qkv, gate_up, down))
        torch.distributed.all_reduce(held)
        assert int(held) == int(shipped)

        def part(name):
            return packed[name].dequantize().chunk(world)[rank]

        expected = {
            qkv: torch.cat([part(name) for name in "qkv"]),
            gate_up: torch.cat([part("gate"), part("up")]),
            down: packed["down"].dequantize().chunk(world, dim=1)[rank],
        }
        for module, w in expected.items():
            assert torch.equal(module.quant_method.weight(module).dequantize(), w)
            x = torch.randn(3, w.shape[1]).bfloat16()
            y, x_hat = module.quant_method.apply(module, x), fake_quantize(x, recipe.activation).double()
            size = x_hat.abs() @ w.double().abs().t()
            assert ((y.double() - x_hat @ w.double().t()).abs() <= 2**-8 * size).all()
        if world > 1:
            with pytest.raises(ValueError, match="cut its blocks"):
                RowParallelLinear(96, HIDDEN, prefix=layer + "mlp.down_proj", **shared)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+mbs+of"])
def test_layers_hold_and_multiply_their_part_of_what_was_shipped(words, world, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the workers import the kernels
    torch.multiprocessing.spawn(_in_worker, (world, _free_port(), words), nprocs=world)


def test_layers_that_are_fused_must_agree():
    agreeing = _config(ModelRecipe(overrides={"re:[qkv]_proj": {"macro_block": "static"}}))
    assert agreeing._recipe_of("model.layers.0.self_attn.qkv_proj").weight.macro_block == "static"
    with pytest.raises(RecipeError, match="matches all of them or none"):
        _config(ModelRecipe(overrides={"q_proj": {"macro_block": "static"}}))._recipe_of("model.layers.0.self_attn.qkv_proj")
    with pytest.raises(RecipeError, match="matches all of them or none"):
        _config(ModelRecipe(exclude=["up_proj"]))._recipe_of("model.layers.0.mlp.gate_up_proj")


def test_what_the_trainer_leaves_alone_the_rollout_leaves_alone():
    config = _config(ModelRecipe(exclude=["re:layers.1"]))
    for name in ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.self_attn.qkv_proj"):
        assert config._recipe_of(name) is None
    assert config._recipe_of("model.layers.0.mlp.down_proj") == ModelRecipe()


EXPERTS, TOP = 4, 2


def _expert_model(config, inner=INNER):
    """What vLLM's models do with their experts: a FusedMoE layer, and names replaced on the way to its loader."""
    from vllm.model_executor.layers.fused_moe import FusedMoE

    layer = FusedMoE(
        num_experts=EXPERTS, top_k=TOP, hidden_size=HIDDEN, intermediate_size=inner, params_dtype=torch.bfloat16,
        renormalize=True, quant_config=config, prefix="model.layers.0.mlp.experts",
    )  # fmt: skip
    mapping = FusedMoE.make_expert_params_mapping(layer, "gate_proj", "down_proj", "up_proj", EXPERTS)
    parameters = {f"model.layers.0.mlp.experts.{name}": p for name, p in layer.named_parameters()}

    def load_weights(pairs):
        for name, tensor in pairs:
            into, own, expert, shard = next(m for m in mapping if m[1] in name)
            name = name.replace(own, into)
            parameter = parameters[name]
            assert parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=expert, return_success=True)

    return layer, load_weights


def _experts_in_worker(rank, world, port, words):
    # The last one is what vLLM's workers on CPUs set before they meet.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), VLLM_DIST_IDENT=str(port))
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    recipe = ModelRecipe(weight=QuantRecipe.parse(words), activation=QuantRecipe())
    g = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN), "down_proj": (EXPERTS, HIDDEN, INNER)}
    weights = {own: (torch.randn(shape, generator=g) / 16).bfloat16() for own, shape in shapes.items()}
    packed = {own: quantize_experts(w, recipe.weight) for own, w in weights.items()}
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world, rank, "env://", rank, "gloo")
        initialize_model_parallel(world)
        layer, load_weights = _expert_model(_config(recipe))
        for first in (True, False):  # shipped again, in place
            if first:
                shipped = {own: quantize_experts(torch.randn(w.shape).bfloat16(), recipe.weight) for own, w in weights.items()}
            else:
                shipped = packed
                for name, parameter in layer.named_parameters():
                    if name.startswith(("w13_weight", "w2_weight")):  # as verl does before every sync
                        parameter.weight_loader = layer.weight_loader
            shipment = Shipment(torch.bfloat16, "qwen3_moe")
            load_weights(shipment.tensors((f"model.layers.0.mlp.experts.{own}", w) for own, w in shipped.items()))
        held = checksum((n, p.data) for n, p in layer.named_parameters())
        torch.distributed.all_reduce(held)
        assert int(held) == int(shipment.checksum)

        expected = {}
        for own, w in packed.items():
            parts = w.dequantize(torch.bfloat16)
            halves = [half.chunk(world, dim=1)[rank] for half in parts.chunk(2, dim=1)]
            expected[own] = torch.cat(halves, dim=1) if own == "gate_up_proj" else parts.chunk(world, dim=2)[rank]
            stored = layer.quant_method.weight(layer, own)
            assert torch.equal(stored.dequantize(torch.bfloat16), expected[own])

        x, ids = torch.randn(9, HIDDEN, generator=g).bfloat16(), torch.randint(EXPERTS - 1, (9, TOP), generator=g).int()
        routing = torch.rand(9, TOP, generator=g)
        y = layer.quant_method.apply(layer, x, routing, ids, None, None).double()
        x_hat, exact = fake_quantize(x, recipe.activation).double(), torch.zeros(9, HIDDEN).double()
        for t, j in ((t, j) for t in range(9) for j in range(TOP)):
            wide = x_hat[t] @ expected["gate_up_proj"][ids[t, j]].double().t()
            gate, up = wide.bfloat16().chunk(2)
            inner = fake_quantize((torch.nn.functional.silu(gate) * up)[None], recipe.activation).double()[0]
            exact[t] += routing[t, j] * (inner @ expected["down_proj"][ids[t, j]].double().t())
        # A sum that rounds to a neighbour before the gate may move the second activation by a step of E2M1.
        assert y.shape == (9, HIDDEN) and (y - exact).norm() <= 0.15 * exact.norm()
        assert layer.quant_method.maybe_make_prepare_finalize() is None
        layer.maybe_init_modular_kernel()  # which vLLM calls; nothing replaces our method
        assert type(layer.quant_method).__name__ == "MXFP4ExpertsMethod"
        if world > 1:
            with set_current_vllm_config(VllmConfig()), pytest.raises(ValueError, match="cut its blocks"):
                _expert_model(_config(ModelRecipe(weight=QuantRecipe.parse("mxfp4+mbs"))), inner=192)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("words", ["mxfp4", "mxfp4+mbs+of"])
def test_a_layer_of_experts_holds_and_multiplies_its_part_of_what_was_shipped(words, world, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.multiprocessing.spawn(_experts_in_worker, (world, _free_port(), words), nprocs=world)


def _kinds_in_worker(rank, world, port):
    # The last one is what vLLM's workers on CPUs set before they meet.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), VLLM_DIST_IDENT=str(port))
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    def built(recipe):
        with set_current_vllm_config(VllmConfig()):
            config = _config(recipe)
            return _expert_model(config)[0], config

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(world, rank, "env://", rank, "gloo")
        initialize_model_parallel(world)
    layer, config = built(ModelRecipe(overrides={"down_proj": {"hadamard": 64}}, exclude=["re:self_attn"]))
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"w13_weight_packed", "w13_weight_scale", "w2_weight"}
    assert "dequantised: down_proj" in config.describe()
    layer, config = built(ModelRecipe(exclude=["re:experts"]))
    assert isinstance(layer.quant_method, UnquantizedFusedMoEMethod) and "not quantised" in config.describe()
    with pytest.raises(RecipeError, match="all tokens of an expert"):
        built(ModelRecipe(activation=QuantRecipe.parse("nvfp4")))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_what_a_layer_of_experts_holds_and_refuses():
    torch.multiprocessing.spawn(_kinds_in_worker, (1, _free_port()), nprocs=1)


def _loaders_in_worker(rank, port):
    # The last one is what vLLM's workers on CPUs set before they meet.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), VLLM_DIST_IDENT=str(port))
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe import FusedMoE
    from vllm.model_executor.models.mixtral import MixtralModel
    from vllm.model_executor.models.olmoe import OlmoeModel
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeModel
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, rank, "env://", rank, "gloo")
        initialize_model_parallel(1)
    recipe = ModelRecipe(weight=QuantRecipe.parse("mxfp4+mbs32+of"))
    for family, model, block in (
        ("Qwen2Moe", Qwen2MoeModel, "mlp"),
        ("Qwen3Moe", Qwen3MoeModel, "mlp"),
        ("Mixtral", MixtralModel, "block_sparse_moe"),
        ("Olmoe", OlmoeModel, "mlp"),
    ):
        trained = tiny(family, hidden_size=64, intermediate_size=64, moe_intermediate_size=64).bfloat16()
        convert(trained, recipe)
        layers = {n.removeprefix("model."): p for n, p in converted_layers(trained).items() if "experts" in n}
        config, held = _config(recipe), torch.nn.Module()
        with set_current_vllm_config(VllmConfig()):  # of the model only its experts, under its own names
            held.layers = torch.nn.ModuleList()
            for i in range(2):
                experts = FusedMoE(
                    num_experts=4, top_k=2, hidden_size=64, intermediate_size=64, params_dtype=torch.bfloat16,
                    renormalize=True, quant_config=config, prefix=f"model.layers.{i}.{block}.experts",
                )  # fmt: skip
                held.layers.append(torch.nn.ModuleDict({block: torch.nn.ModuleDict({"experts": experts})}))
        held.config, held.quant_config = trained.config, config
        held.num_redundant_experts, held.start_layer, held.end_layer = 0, 0, 2
        held.get_expert_mapping = lambda model=model, held=held: model.get_expert_mapping(held)
        shipment = Shipment(torch.bfloat16, trained.config.model_type)
        exported = ((name, quantize_experts(p.weight, p.recipe.weight)) for name, p in layers.items())
        model.load_weights(held, shipment.tensors(exported))
        for name, projection in layers.items():
            stem, _, own = name.rpartition(".")
            experts = held.get_submodule(stem.replace(".mlp.", f".{block}."))
            held_weight = experts.quant_method.weight(experts, own).dequantize(torch.bfloat16)
            assert torch.equal(held_weight, projection.weight_operand(torch.bfloat16))
        assert int(checksum((n, p.data) for n, p in held.named_parameters())) == int(shipment.checksum)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_vllms_models_load_what_a_shipment_of_their_family_yields():
    torch.multiprocessing.spawn(_loaders_in_worker, (_free_port(),), nprocs=1)
