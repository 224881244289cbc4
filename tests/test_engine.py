"""verl's own FSDP2 engine with our layers, on one and on two processes: what is shipped is what is multiplied, as bits."""

import os
import pickle
import socket

import pytest
import torch
import torch.multiprocessing as mp

RECIPE = {
    "macro_block": "static",
    "fallback_alpha": 0.5,
    "overrides": {"down_proj": {"macro_block": "dynamic"}},  # of an MLP, or of experts
    "exclude": ["re:layers\\.1\\.self_attn\\.o_proj"],
}


def _build_engine(path, enable=True):
    import verl  # noqa: F401  (loads the plugin, and with it the CPU platform)
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.base import EngineRegistry

    import mxfp4_rl.verl_plugin.register  # noqa: F401
    from mxfp4_rl.verl_plugin.config import MXFP4EngineConfig

    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=str(path),
            use_remove_padding=False,
            enable_gradient_checkpointing=True,
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=MXFP4EngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            model_dtype="fp32",
            mixed_precision={"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            mxfp4={"enable": enable, "recipe": RECIPE, "monitor": {"max_rows": None}},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def _forward(engine):
    tokens = torch.arange(24).view(2, 12) % 60 + 5
    return engine.module(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


def _train_step(engine):
    _forward(engine).float().logsumexp(-1).mean().backward()
    engine.optimizer_step()
    engine.optimizer_zero_grad()


def _shipped_equals_multiplied(engine):
    """How many weights were shipped packed, after checking each against the operand its layer makes by itself."""
    from mxfp4_rl.nn import converted_layers, release_operands
    from mxfp4_rl.quant import MXFP4Tensor

    pairs, _ = engine.get_per_tensor_param()
    packed = {name.removesuffix(".weight"): t for name, t in pairs if isinstance(t, MXFP4Tensor)}
    layers = converted_layers(engine.module)
    assert packed.keys() == layers.keys()
    held = {name: layer.weight_operand(torch.bfloat16).clone() for name, layer in layers.items()}
    logits = _forward(engine)
    release_operands(engine.module)  # now every layer quantises the weight that FSDP gathers for it
    assert torch.equal(_forward(engine), logits)
    for name, layer in layers.items():
        own = layer._held["operand"].view(torch.int16)
        assert torch.equal(own, held[name].view(torch.int16)), name
        assert torch.equal(own, packed[name].dequantize(torch.bfloat16).view(torch.int16)), name
    return held


def _worker(rank, world, port, path, out):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    engine = _build_engine(path)
    before = _shipped_equals_multiplied(engine)
    _train_step(engine)
    after = _shipped_equals_multiplied(engine)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before), "an operand stayed as it was before the optimiser step"

    engine.start_measuring()
    _train_step(engine)
    errors = engine.collect_errors()
    gathered = [None] * world
    torch.distributed.all_gather_object(gathered, errors)

    engine.save_checkpoint(os.path.join(out, f"checkpoint-{world}"), global_step=2)
    saved = {n: t.clone() for n, t in _shipped_equals_multiplied(engine).items()}
    _train_step(engine)
    _forward(engine)
    engine.load_checkpoint(os.path.join(out, f"checkpoint-{world}"), del_local_after_load=False)
    for name, operand in _shipped_equals_multiplied(engine).items():
        assert torch.equal(operand, saved[name]), f"{name} is stale after loading a checkpoint"
    if rank == 0:
        with open(os.path.join(out, f"errors-{world}.pkl"), "wb") as file:
            pickle.dump((gathered, len(before)), file)
    torch.distributed.destroy_process_group()


def _run(world, path, out):
    """What `_worker` left: the errors of every rank, and the number of quantised layers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_worker, args=(world, port, path, str(out)), nprocs=world)
    with open(out / f"errors-{world}.pkl", "rb") as file:
        return pickle.load(file)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from mxfp4_rl.tasks.tiny_model import make_tiny_model

    out = tmp_path_factory.mktemp("engine")
    path = make_tiny_model(out / "model", seed=0, tie_word_embeddings=True)
    return {world: _run(world, path, out) for world in (1, 2)}


def test_rollout_operands_equal_the_actors_bit_for_bit(results):
    for _errors, layers in results.values():
        assert layers == 13  # 14 less the excluded one; the equalities are asserted in the workers


def test_errors_pooled_over_ranks_are_those_of_the_whole_model(results):
    from mxfp4_rl.monitor.components import error_metrics, pool

    metrics = {world: error_metrics(pool(errors)) for world, (errors, _) in results.items()}
    assert metrics[1]["mxfp4/rel_mse"] > 0 and metrics[1]["mxfp4/activation/rel_mse"] > 0
    assert sum(k.startswith("mxfp4_layers/") for k in metrics[1]) == 13 * 5
    assert metrics[1].keys() == metrics[2].keys()
    for name in ("scale_bias", "deadzone", "grid_noise", "fallback", "rel_mse", "deadzone_fraction"):
        # the optimiser's steps differ in the last bits between one and two ranks, the initial weights do not
        assert metrics[2][f"mxfp4/{name}"] == pytest.approx(metrics[1][f"mxfp4/{name}"], rel=2e-2)


def test_experts_cut_between_ranks_are_shipped_as_they_are_multiplied(tmp_path):
    from mxfp4_rl.monitor.components import error_metrics, pool
    from mxfp4_rl.tasks.tiny_model import make_tiny_model

    path = make_tiny_model(tmp_path / "model", seed=0, architecture="qwen3_moe", intermediate=72)
    errors, layers = _run(3, path, tmp_path)  # of four experts two, two and none
    assert layers == 2 * (4 + 2) - 1
    pooled = pool(errors)
    for layer in range(2):
        sums = pooled[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        assert sums["tokens"].sum() == 3 * 24 * 2  # ranks, tokens, experts a token: none twice for the checkpointed forward
        assert (sums["experts/weight"][:, 0] > 0).all()  # every expert's, whichever rank holds it
        assert ((sums["experts/activation"][:, 0] > 0) == (sums["tokens"] > 0)).all()
        assert sums["weight"].elements == (sums["tokens"] > 0).sum() * 144 * 64
    metrics = error_metrics(pooled)
    assert metrics["mxfp4_layers/model.layers.0.mlp.experts.down_proj/tokens_mean"] == 36


def test_switched_off_the_engine_is_verls():
    from mxfp4_rl.settings import Settings
    from mxfp4_rl.verl_plugin.config import MXFP4EngineConfig

    assert not Settings.from_config(MXFP4EngineConfig(strategy="fsdp2").mxfp4).enable
