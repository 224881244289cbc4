"""Experts by the grouped kernels: products of a layer, forward and backward, as the loop over experts computes them."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU  # isort: skip

from mxfp4_kernels.matmul import grouped

from mxfp4_rl import ModelRecipe, QuantRecipe
from mxfp4_rl.nn import MXFP4Experts, products
from mxfp4_rl.nn.experts import PROJECTIONS
from mxfp4_rl.nn.products import WeightPerExpert
from tests.test_experts import experts_of

HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter multiplies BF16's bits
BOUNDS = [0, 3, 3, 40, 41]
own_choice = products._grouped_kernels


@pytest.fixture
def use(monkeypatch):
    """Call it with whether the kernels run; interpreted, they do on a CPU."""
    if not GPU:
        monkeypatch.setattr(products, "_grouped_kernels", lambda a, b: grouped)
    return lambda kernels: kernels or monkeypatch.setattr(products, "_grouped_kernels", lambda a, b: None)


def close(ours, theirs, rtol=2**-7):
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours.cpu().float(), theirs.cpu().float(), rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("transposed", [False, True], ids=["outputs first", "inputs first"])
def test_products_are_those_of_the_loop(use, transposed):
    torch.manual_seed(0)
    x, g = torch.randn(48, 64, dtype=HALF, device=DEVICE), torch.randn(48, 32, dtype=HALF, device=DEVICE)
    w = torch.randn(4, *((64, 32) if transposed else (32, 64)), dtype=HALF, device=DEVICE)
    w = w.transpose(1, 2) if transposed else w
    results = []
    for kernels in (True, False):
        use(kernels)
        by_expert = WeightPerExpert(torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICE))
        results.append((by_expert.forward(x, w), by_expert.dgrad(g, w), by_expert.wgrad(g, x)))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)
    assert not results[0][0][41:].any() and not results[0][2][1].any()


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_experts_are_those_of_the_loop(use, family):
    """Forward and straight-through gradients; the second product's input is not quantised, since a last bit may flip codes."""
    results = []
    for kernels in (True, False):
        use(kernels)
        experts = experts_of(family, HALF, hidden=64, inner=48).to(DEVICE)
        first = ModelRecipe(weight=QuantRecipe(), activation=QuantRecipe())
        second = ModelRecipe(weight=QuantRecipe(), activation=None)
        MXFP4Experts.swap(experts, "experts", dict(zip(PROJECTIONS, (first, second), strict=True)))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20, 64, generator=generator).to(DEVICE, HALF).requires_grad_()
        index = torch.rand(20, 5, generator=generator).argsort(-1)[:, :2].clamp(max=3).to(DEVICE)  # the last gets no tokens
        weights = torch.rand(20, 2, generator=generator).to(DEVICE).requires_grad_()
        y = experts(x, index, weights)
        y.float().square().mean().backward()
        results.append([y.detach(), x.grad, weights.grad, *(p.grad for p in experts.parameters())])
        assert all(not p.grad[4].any() for p in experts.parameters())
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 2**-6)


def test_where_the_kernels_run():
    x, w = torch.zeros(4, 32, device=DEVICE, dtype=HALF), torch.zeros(2, 48, 32, device=DEVICE, dtype=HALF)
    assert own_choice(x, w) is (grouped if GPU else None)
    assert own_choice(x.float(), w.float()) is None and own_choice(x[:, :24], w[:, :, :24]) is None
