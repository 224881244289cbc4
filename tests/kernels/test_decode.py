"""Decode products against float64 products of the dequantised operands."""

import itertools

import pytest
import torch

from tests.kernels.common import DEVICE, GPU  # isort: skip

from mxfp4_kernels.matmul import decode
from mxfp4_kernels.matmul.decode import MOST_ROWS, Plan, decode_product, forget_graphs, plan

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize

ALONG_K, ALONG_N = Plan(32, 4, True, 1), Plan(64, 4, False, 1)
QUARTERS = [Plan(32, 4, True, 1, True), Plan(64, 4, False, 2, True)]


def operands(M, N, K, name="mxfp4", seed=0):
    g = torch.Generator().manual_seed(seed + M + N + K)
    x = torch.randn(M, K, generator=g).bfloat16()
    w = torch.randn(N, K, generator=g) * torch.exp2(torch.randint(-8, 8, (N, 1), generator=g))
    return x, quantize(w, QuantRecipe.parse(name))


def close(y, x, w, bias=None, operand=0.0):
    """|y - exact| within K float32 roundings, the operand's rounding, and the output's."""
    w_hat = w.dequantize(torch.float32).double()
    exact, size = x.double() @ w_hat.t(), x.double().abs() @ w_hat.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # Tensor cores truncate what they add: an ulp a sum, of at most K / 8 + 64.
    bound = ((x.shape[1] / 8 + 64) * 2.0**-23 + operand) * size
    bound = bound + (2.0**-8 * exact.abs() if y.dtype == torch.bfloat16 else 0)
    assert y.shape == exact.shape and ((y.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("how", [ALONG_K, ALONG_N, *QUARTERS, Plan(16, 16, True, 3), Plan(128, 8, False, 6)], ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 896), (3, 40, 576), (16, 33, 32), (17, 130, 300), (40, 70, 640)], ids=str)
def test_products_are_those_of_the_dequantised_weight(shape, how):
    x, w = operands(*shape)
    bias = torch.randn(shape[1])
    close(decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32, how=how), x, w)
    close(decode_product(x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), torch.float32, how=how), x, w, bias)
    if GPU:
        close(decode_product(x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), how=how), x, w, bias)


@pytest.mark.parametrize("how", [ALONG_K, ALONG_N, *QUARTERS], ids=str)
@pytest.mark.parametrize("largest", [128, 255])
def test_every_code_at_every_scale(how, largest):
    """One code a row of W, at one scale; the rows of X pick single columns, so every sum is one exact product.

    Up to 2 (byte 128) one multiplication gives a value, above two.
    """
    scales = [s for s in (0, 1, 2, 60, 126, 127, 128, 129, 130, 180, 249, 250, 255) if s <= largest]
    pairs = list(itertools.product(range(16), scales))
    w = quantize(torch.zeros(len(pairs), 160), QuantRecipe())
    for n, (code, scale) in enumerate(pairs):
        column = 32 + n % 32
        w.codes[n, column // 2] = code << (4 * (column % 2))
        w.scales[n, 1] = scale
    x = torch.zeros(32, 160, dtype=torch.bfloat16)
    x[:, 32:64] = torch.eye(32)
    y = decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32, how=how).cpu()
    picked, expected = y[torch.arange(len(pairs)) % 32, torch.arange(len(pairs))], w.dequantize()
    expected = expected[torch.arange(len(pairs)), 32 + torch.arange(len(pairs)) % 32]
    broken = torch.tensor([scale == 255 for _code, scale in pairs])
    assert torch.equal(picked[~broken], expected[~broken])
    assert y[:, broken].isnan().all() and (y[:, ~broken].count_nonzero(0) == (expected[~broken] != 0)).all()


@pytest.mark.parametrize("how", [ALONG_K._replace(SPLIT=2), ALONG_N, *QUARTERS], ids=str)
@pytest.mark.parametrize("name", ["mxfp4+mbs", "mxfp4+mbs32", "mxfp4+mbs96-dynamic", "mxfp4+of0.5", "mxfp4+mbs256+of0.3"])
def test_macro_blocks_and_fallback(name, how):
    x, w = operands(5, 40, 576, name)
    operand = 0.0 if w.macro is None or w.macro_size % 128 == 0 else 2.0**-8
    close(decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32, how=how), x, w, operand=operand)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp4+mbs+of0.5"])
def test_quantised_activations(name):
    x, w = operands(7, 64, 256)
    recipe = QuantRecipe.parse(name)
    y = decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32, activation=recipe)
    x_hat = fake_quantize(x.to(DEVICE), recipe).cpu()
    close(y, x_hat, w)


def test_views_nan_and_empty():
    x, w = operands(6, 48, 200)
    y = decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32)
    bias = torch.randn(96, device=DEVICE, requires_grad=True)[::2]
    biased = decode_product(x.to(DEVICE), w.to(DEVICE), bias, torch.float32)
    assert torch.equal(biased, y + bias.detach()) and not biased.requires_grad
    wide = torch.randn(12, 400).bfloat16().to(DEVICE)
    for view in (wide[::2, ::2], wide[1:7, 3:203], wide[:6, 8:208]):
        view.copy_(x)
        assert torch.equal(decode_product(view, w.to(DEVICE), None, torch.float32), y)
    transposed = x.t().contiguous().t().to(DEVICE)
    assert torch.equal(decode_product(transposed, w.to(DEVICE), None, torch.float32), y)
    x[2, 150], x[4, 3] = float("nan"), float("inf")
    broken = decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32)
    assert not broken[2].isfinite().any() and not broken[4].isfinite().any()
    keep = [0, 1, 3, 5]
    assert torch.equal(broken[keep], y[keep])
    bias = torch.ones(48, device=DEVICE)
    assert decode_product(x[:0].to(DEVICE), w.to(DEVICE), bias).shape == (0, 48)
    nothing = quantize(torch.zeros(48, 0)).to(DEVICE)
    assert torch.equal(decode_product(x[:, :0].to(DEVICE), nothing, bias, torch.float32), bias.expand(6, 48))
    assert decode_product(x.to(DEVICE), quantize(torch.zeros(0, 200)).to(DEVICE)).shape == (6, 0)


def test_sums_are_the_same_every_time_and_counters_stay_zero():
    x, w = operands(4, 80, 1024)
    how = ALONG_K._replace(SPLIT=2)
    first = decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32, how=how)
    for _ in range(2):
        assert torch.equal(decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32, how=how), first)
    assert not any(zeros.any() for pools in decode._POOLS.values() for zeros, _start in pools)


def test_counters_are_aligned_and_nobody_else_s(monkeypatch):
    monkeypatch.setattr(decode, "_POOLS", {})
    device = torch.zeros(0, device=DEVICE).device
    before = decode._counters(device, 2, captured=True)
    dealt = [decode._counters(device, count, captured=False) for count in (1, 5, 4, 3)]
    graphs = [decode._counters(device, count, captured=True) for count in (3, 6)]
    assert all(counters.data_ptr() % 16 == 0 for counters in (before, *dealt, *graphs))
    for a, b in [*itertools.pairwise(dealt), *itertools.pairwise(graphs)]:
        assert a.data_ptr() + 4 * a.numel() <= b.data_ptr()
    assert len({counters.untyped_storage().data_ptr() for counters in (before, dealt[0], graphs[0])}) == 3


def test_calls_take_turns_and_graphs_do_not(monkeypatch):
    monkeypatch.setattr(decode, "_POOLS", {})
    device = torch.zeros(0, device=DEVICE).device
    most = 1 << 20
    calls = [decode._counters(device, most, captured=False) for _ in range(2)]
    assert calls[0].data_ptr() == calls[1].data_ptr()
    graphs = [decode._counters(device, most, captured=True) for _ in range(2)]
    assert graphs[0].data_ptr() != graphs[1].data_ptr() and not graphs[1].any()
    forget_graphs()
    assert decode._counters(device, most, captured=True).data_ptr() == graphs[0].data_ptr()


@pytest.mark.skipif(not GPU, reason="captures a CUDA graph")
def test_a_graph_has_counters_of_its_own():
    x, w = (operand.to(DEVICE) for operand in operands(4, 80, 1024))
    how = ALONG_K._replace(SPLIT=2)
    expected = decode_product(x, w, None, torch.float32, how=how)
    ((calls, graphs),) = decode._POOLS.values()
    before = calls[1], graphs[1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_product(x, w, None, torch.float32, how=how)
    assert calls[1] == before[0] and graphs[1] > before[1]
    for _ in range(2):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected) and not graphs[0].any()


@pytest.mark.parametrize("M", [1, 9, 40])
def test_planned_products(M):
    x, w = operands(M, 64, 160)
    close(decode_product(x.to(DEVICE), w.to(DEVICE), None, torch.float32), x, w)
    assert plan(M, 64, 160).ALONG_K is (M <= 32)


def test_products_that_cannot_be_are_refused():
    x, w = operands(2, 32, 64)
    with pytest.raises(ValueError, match="x has 64 columns and the weight 96"):
        decode_product(x, quantize(torch.zeros(32, 96)))
    with pytest.raises(ValueError, match="65 rows; a decode product takes at most 64"):
        decode_product(torch.zeros(MOST_ROWS + 1, 64, dtype=torch.bfloat16), w)
    with pytest.raises(ValueError, match=r"bfloat16 matrix, not torch\.float32"):
        decode_product(x.float(), w)
    with pytest.raises(ValueError, match="along its last axis"):
        decode_product(x, quantize(torch.zeros(64, 32), axis=0))
    with pytest.raises(ValueError, match="rotated or pre-scaled"):
        decode_product(x, quantize(torch.zeros(32, 64), QuantRecipe(hadamard=64)))
    with pytest.raises(ValueError, match=r"bias must be of shape \(32,\)"):
        decode_product(x, w, torch.zeros(31))
    with pytest.raises(ValueError, match=r"out_dtype=torch\.float16"):
        decode_product(x, w, None, torch.float16)
