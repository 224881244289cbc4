"""The operator that vLLM's layers of experts call: few tokens by packed codes, many by dequantised weights, in a CUDA graph.

The second activation is not quantised here: a sum that rounds to a neighbour may move it by a step of E2M1. That it is the
trainer's, where sums are the same, tests/test_vllm_experts.py says.
"""

import pytest
import torch

from mxfp4_rl import QuantRecipe
from mxfp4_rl.nn.experts import quantize_experts
from mxfp4_rl.quant import fake_quantize
from mxfp4_rl.vllm_plugin.expert_product import recipe_texts
from mxfp4_rl.vllm_plugin.layout import NAMES
from tests.kernels.common import DEVICE, GPU

E, H, INNER, K = 4, 128, 64, 2
RECIPES = ["mxfp4", "mxfp4+mbs32", "mxfp4+mbs32+of"]


def _layer(words, tokens):
    g = torch.Generator().manual_seed(0)
    recipe = QuantRecipe.parse(words)
    weights = [torch.randn(shape, generator=g) / shape[2] ** 0.5 for shape in ((E, 2 * INNER, H), (E, H, INNER))]
    packed = [quantize_experts(w.bfloat16(), recipe).to(DEVICE) for w in weights]
    held = [[w.tensors()[name] for name in NAMES if name in w.tensors()] for w in packed]
    x = torch.randn(tokens, H, generator=g).bfloat16().to(DEVICE)
    ids = torch.randint(E - 1, (tokens, K), generator=g).int().to(DEVICE)  # the last expert has no tokens
    routing = torch.rand(tokens, K, generator=g).to(DEVICE)
    return packed, (x, ids, routing, *held, recipe_texts(recipe, QuantRecipe(), recipe, None), "silu")


def _expected(packed, x, ids, routing):
    gate_up, down = (w.dequantize(torch.bfloat16).double() for w in packed)
    x_hat = fake_quantize(x, QuantRecipe()).double()
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for j in range(K):
        wide = torch.einsum("th,tnh->tn", x_hat, gate_up[ids[:, j].long()]).bfloat16()
        gate, up = wide.chunk(2, dim=-1)
        inner = (torch.nn.functional.silu(gate) * up).double()
        out += routing[:, j : j + 1] * torch.einsum("tn,thn->th", inner, down[ids[:, j].long()])
    return out


@pytest.mark.parametrize("tokens", [1, 9, 160])
@pytest.mark.parametrize("words", RECIPES)
def test_the_operator_multiplies_the_operands_of_its_recipes(words, tokens):
    packed, arguments = _layer(words, tokens)
    y = torch.ops.mxfp4_rl.experts(*arguments)
    expected = _expected(packed, *arguments[:3])
    assert y.shape == (tokens, H) and y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() <= 2**-6 * expected.norm()


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("tokens", [4, 160])  # both ways
@pytest.mark.parametrize("words", RECIPES)
def test_a_cuda_graph_holds_the_operator_whatever_the_routing(words, tokens):
    _, arguments = _layer(words, tokens)
    x, ids, routing, *rest = arguments
    torch.ops.mxfp4_rl.experts(*arguments)  # kernels compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.mxfp4_rl.experts(*arguments)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        ids.copy_(torch.randint(E, ids.shape, device=ids.device) if seed else torch.zeros_like(ids))
        graph.replay()
        assert torch.equal(y, torch.ops.mxfp4_rl.experts(x, ids, routing, *rest))
