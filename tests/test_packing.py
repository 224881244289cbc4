"""Weights that FSDP2 has cut, packed where they lie: two processes over gloo."""

import itertools
import os
import socket

import pytest
import torch

from mxfp4_rl import QuantRecipe
from mxfp4_rl.quant import quantize
from mxfp4_rl.verl_plugin.packing import looks_at_other_rows, pack

WORDS = ("mxfp4", "mxfp4+mbs-dynamic+of", "mxfp4+oas+of+top5%", "mxfp4+tile", "nvfp4+search")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(rank: int, world: int, port: int, rows: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    layer = torch.nn.Linear(200, rows, bias=False)
    whole = layer.weight.detach().clone()
    fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    for words in WORDS:
        recipe = QuantRecipe.parse(words)
        packed, expected = pack(layer.weight, recipe, torch.bfloat16), quantize(whole.bfloat16(), recipe)
        assert packed.shape == expected.shape
        assert packed.tensors().keys() == expected.tensors().keys()
        for name, tensor in expected.tensors().items():
            assert torch.equal(packed.tensors()[name], tensor), f"{words}: {name}"
    experts = torch.nn.Module()  # cut between experts; contracted along either of the other axes
    experts.weight = torch.nn.Parameter(torch.randn(rows, 40, 72, generator=torch.Generator().manual_seed(0)))
    whole_experts = experts.weight.detach().clone()
    fully_shard(experts, mesh=init_device_mesh("cpu", (world,)))
    for words, axis in itertools.product(WORDS, (-1, -2)):
        recipe = QuantRecipe.parse(words)
        packed = pack(experts.weight, recipe, torch.bfloat16, axis).dequantize()
        for own, matrix in zip(packed, whole_experts.bfloat16(), strict=True):
            assert torch.equal(own, quantize(matrix, recipe, axis).dequantize()), f"{words} along {axis}"
    replicas = torch.nn.Linear(200, rows, bias=False)  # every rank holds all rows, as over the nodes of HSDP
    replicas.weight.data.copy_(whole)
    fully_shard(replicas, mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")))
    assert torch.equal(
        pack(replicas.weight, QuantRecipe(), torch.bfloat16).codes, quantize(whole.bfloat16(), QuantRecipe()).codes
    )
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows", [64, 33, 1], ids=["even", "uneven", "an empty part"])
def test_parts_packed_apart_are_the_whole_weight_packed(rows):
    torch.multiprocessing.spawn(_worker, (2, _free_port(), rows), nprocs=2)


def test_only_recipes_that_look_at_other_rows_need_the_whole_weight():
    assert [looks_at_other_rows(QuantRecipe.parse(words)) for words in WORDS] == [False, False, True, True, True]
