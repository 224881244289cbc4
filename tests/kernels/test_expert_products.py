"""Experts by the grouped kernels: products of a layer, forward and backward, as the loop over experts computes them."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.common import DEVICE, GPU  # isort: skip

from mxfp4_kernels.matmul import grouped

from mxfp4_rl import ModelRecipe, QuantRecipe
from mxfp4_rl.nn import MXFP4Experts, expert_fp8, fp8, products
from mxfp4_rl.nn.experts import PROJECTIONS, quantize_experts
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


PLAIN = QuantRecipe()
FP8_RECIPES = {
    "ste": ModelRecipe(weight=PLAIN, activation=PLAIN),
    "bf16": ModelRecipe(weight=PLAIN, activation=PLAIN, dgrad="bf16", wgrad="bf16"),
    "mx": ModelRecipe(weight=PLAIN, activation=PLAIN, grad=PLAIN, dgrad="mx", wgrad="mx"),
    "half": ModelRecipe(weight=PLAIN, activation=PLAIN, grad=PLAIN, dgrad="mx", wgrad="ste"),
    "gradient in BF16": ModelRecipe(
        weight=PLAIN, activation=PLAIN, grad=QuantRecipe.parse("mxfp4+of1"), dgrad="mx", wgrad="mx"
    ),
}
WIDE = torch.bfloat16 if GPU else torch.float32  # what a container is made of, in the interpreter


@pytest.fixture
def fp8_anywhere(monkeypatch):
    monkeypatch.setattr(fp8, "runs_on", lambda device, dtype: True)


def in_fp8(recipe, product="fp8"):
    return dataclasses.replace(recipe, product=product)


def projection_step(family, recipe, x, g, bounds):
    torch.manual_seed(0)
    experts = experts_of(family, WIDE, hidden=64, inner=48).to(DEVICE)
    with torch.no_grad():
        experts.gate_up_proj[0, 0, 0] = 2.0**-60  # beside ordinary numbers: no container holds its row whole
        experts.gate_up_proj[0, -1, -1] = 2.0**60
    MXFP4Experts.swap(experts, "experts", dict.fromkeys(PROJECTIONS, recipe))
    projection, x = experts.projections["gate_up_proj"], x.clone().requires_grad_()
    by_expert = WeightPerExpert(torch.tensor(bounds, dtype=torch.int32, device=DEVICE))
    y = projection(x, lambda: by_expert.quantized_rows(x, recipe.activation), by_expert)
    y.backward(g)
    return y.detach(), x.grad, projection.weight.grad


@pytest.mark.parametrize("name", FP8_RECIPES)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("product", ["fp8", "fp8_fast"])
def test_fp8_products_are_those_of_the_dequantised_operands(fp8_anywhere, family, name, product):
    """Forward, dgrad and wgrad, with an expert without tokens, and rows that no container holds."""
    torch.manual_seed(1)
    x, g = torch.randn(41, 64, dtype=WIDE, device=DEVICE), torch.randn(41, 96, dtype=WIDE, device=DEVICE)
    x[5, 0], x[5, 63] = 2.0**-60, 2.0**40
    recipe, bounds = FP8_RECIPES[name], [0, 3, 3, 40, 41, 41]
    ours = projection_step(family, in_fp8(recipe, product), x, g, bounds)
    theirs = projection_step(family, recipe, x, g, bounds)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.isfinite().all()
        for own, expected in zip(a.double(), b.double(), strict=True):  # a token, or an expert: sizes differ by 2^60
            assert (own - expected).norm() <= (2**-6 if GPU else 1e-5) * expected.norm()
    assert not ours[2][1].any()


def test_the_fp8_products_run_and_weights_are_contained_once_a_step(fp8_anywhere, monkeypatch):
    calls = []
    for name in ("grouped_product", "grouped_wgrad"):
        own = getattr(grouped, name)
        kept = lambda a, b, *rest, own=own, name=name: calls.append((name, type(a).__name__)) or own(a, b, *rest)  # noqa: E731
        monkeypatch.setattr(grouped, name, kept)
    made, own_weights = [], expert_fp8.weights_of
    monkeypatch.setattr(expert_fp8, "weights_of", lambda *a: made.append(1) or own_weights(*a))
    experts = experts_of("Qwen3Moe", WIDE, hidden=64, inner=48).to(DEVICE)
    MXFP4Experts.swap(experts, "experts", dict.fromkeys(PROJECTIONS, in_fp8(FP8_RECIPES["mx"])))
    x = torch.randn(20, 64, device=DEVICE, dtype=WIDE, requires_grad=True)
    index = torch.rand(20, 5).argsort(-1)[:, :2].clamp(max=3).to(DEVICE)
    for _ in range(2):
        experts(x, index, torch.rand(20, 2, device=DEVICE)).float().square().sum().backward()
    assert len(made) == 2  # a projection each
    kinds = [name for name, kind in calls if kind in ("FP8Operand", "Tokens")]
    assert kinds.count("grouped_product") == 2 * 4 and kinds.count("grouped_wgrad") == 2 * 2
    assert not experts.down_proj.grad[4].any() and experts.down_proj.grad.isfinite().all()
    with torch.no_grad():
        before, _ = experts(x, index, torch.ones(20, 2, device=DEVICE)), experts.down_proj.mul_(2.0)
        after = experts(x, index, torch.ones(20, 2, device=DEVICE))
    assert len(made) == 3  # the changed one's anew
    torch.testing.assert_close(after, 2 * before)
    assert experts(x[:0], index[:0], torch.ones(0, 2, device=DEVICE)).shape == (0, 64)


def test_checkpointing_and_autograds_graph_are_as_without(fp8_anywhere):
    experts = experts_of("Qwen3Moe", WIDE, hidden=64, inner=48).to(DEVICE)
    MXFP4Experts.swap(experts, "experts", dict.fromkeys(PROJECTIONS, in_fp8(FP8_RECIPES["half"])))
    x = torch.randn(20, 64, device=DEVICE, dtype=WIDE)
    index, weights = torch.rand(20, 5).argsort(-1)[:, :2].to(DEVICE), torch.rand(20, 2, device=DEVICE)
    grads = []
    for call in (experts, lambda *a: checkpoint(experts, *a, use_reentrant=False)):
        experts.zero_grad()
        own = x.clone().requires_grad_()
        call(own, index, weights).float().square().sum().backward()
        grads.append((own.grad, experts.gate_up_proj.grad.clone()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_which_recipes_and_shapes_have_an_fp8_product():
    shape = torch.Size([4, 96, 64])
    assert expert_fp8.multiplies(in_fp8(FP8_RECIPES["ste"]), shape)
    assert not expert_fp8.multiplies(FP8_RECIPES["ste"], shape)
    assert not expert_fp8.multiplies(in_fp8(FP8_RECIPES["ste"]), torch.Size([4, 96, 72]))
    for words in ("mxfp4+mbs", "mxfp4+of1", "nvfp4"):
        other = QuantRecipe.parse(words)
        assert not expert_fp8.multiplies(in_fp8(ModelRecipe(weight=other, activation=other)), shape)


def test_a_rollouts_weights_are_multiplied_as_they_came(fp8_anywhere):
    recipe, source = in_fp8(FP8_RECIPES["ste"]), experts_of("Qwen3Moe", WIDE, hidden=64, inner=48).to(DEVICE)
    packed = [quantize_experts(getattr(source, own).detach(), recipe.weight) for own in PROJECTIONS]
    MXFP4Experts.swap(source, "experts", dict.fromkeys(PROJECTIONS, recipe), packed=True)
    for own, codes in zip(PROJECTIONS, packed, strict=True):
        source.projections[own].hold(codes, WIDE)
    with torch.no_grad():
        y = source(
            torch.randn(6, 64, device=DEVICE, dtype=WIDE), torch.zeros(6, 1).long().to(DEVICE), torch.ones(6, 1).to(DEVICE)
        )
    assert y.isfinite().all() and {p.recipe.product for p in source.projections.values()} == {"bf16"}
