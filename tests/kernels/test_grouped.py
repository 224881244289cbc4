"""Grouped products against loops over experts in float64, of the dequantised operands."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, OUT, assert_same  # isort: skip

from mxfp4_kernels.container.reference import container
from mxfp4_kernels.matmul import fp8, grouped_operands
from mxfp4_kernels.matmul import grouped_reference as reference
from mxfp4_kernels.matmul.fp8 import Operand
from mxfp4_kernels.matmul.grouped import grouped_product, grouped_wgrad
from mxfp4_kernels.matmul.grouped_operands import Experts, Tokens, align_to_blocks

from mxfp4_rl import QuantRecipe, quantize
from mxfp4_rl.quant import fake_quantize

HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter multiplies BF16's bits
RECIPE, OTHER = QuantRecipe(), QuantRecipe.parse("mxfp4+oas")
COUNTS = {
    "ragged": [3, 0, 70, 1, 33],
    "empty at both ends": [0, 0, 40, 0],
    "one expert has all": [0, 150, 0],
    "decoding": [1, 0, 2, 0, 0, 1, 0, 4],
    "no tokens": [0, 0],
}


@pytest.fixture(autouse=True)
def quick_containers(monkeypatch):
    """The reference's containers, the kernel's bit for bit, and larger tiles: interpreted, they take longer than products."""
    kernel = fp8.container
    if not GPU:
        monkeypatch.setattr(fp8, "container", lambda x, r: container(quantize(x, r)) if x.numel() else kernel(x, r))
        monkeypatch.setattr(grouped_operands, "TILE", {"R": 256, "BT": 64})


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(HALF).to(DEVICE)


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)


def assert_close(ours, exact, size, sums=2**-11):
    """Within the output's rounding and that of the sums: the tensor core's 14 bits for FP8, float32 for the rest."""
    ours, exact, size = (t.cpu().double() for t in (ours, exact, size))
    assert ours.shape == exact.shape
    rounding = 2**-8 if torch.bfloat16 == OUT else 2**-22
    assert ((ours - exact).abs() <= rounding * exact.abs() + sums * size).all()


def hat(x, recipe=RECIPE, axis=-1):
    return fake_quantize(x.cpu().float(), recipe, axis)


def check_product(x, w, offsets, quantised=True, exact=True):
    """Y, compared with the reference."""
    if quantised:
        y = grouped_product(Operand(x, RECIPE), Experts(w, OTHER), offsets, OUT, exact)
        x, w = hat(x), hat(w, OTHER)
    else:
        y = grouped_product(x, w, offsets, OUT)
        x, w = x.cpu(), w.cpu()
    offsets = offsets.cpu()
    size = reference.product(x.abs(), w.abs(), offsets)
    sums = 2**-17 if not quantised else 2**-11 if exact else 2**-8
    assert_close(y, reference.product(x, w, offsets), size, sums)
    return y


def check_wgrad(g, x, offsets, quantised=True):
    if quantised:
        y = grouped_wgrad(Tokens(g, RECIPE, offsets), Tokens(x, OTHER, offsets), offsets, OUT)
        g, x = hat(g, RECIPE, 0), hat(x, OTHER, 0)
    else:
        y = grouped_wgrad(g, x, offsets, OUT)
        g, x = g.cpu(), x.cpu()
    offsets = offsets.cpu()
    size = reference.wgrad(g.abs(), x.abs(), offsets)
    assert_close(y, reference.wgrad(g, x, offsets), size, 2**-11 if quantised else 2**-17)
    return y


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("name", COUNTS)
def test_products_of_ragged_and_empty_experts(name, quantised):
    counts = COUNTS[name]
    check_product(random(sum(counts), 96), random(len(counts), 48, 96), offsets_of(counts), quantised)


@pytest.mark.parametrize("counts", [[130, 20], [40, 50], [5, 9]], ids=str)  # tiles of 128, 64 and 16 tokens
@pytest.mark.parametrize("exact", [True, False])
def test_products_with_tails_in_every_tile(counts, exact):
    check_product(random(sum(counts), 576), random(2, 144, 576), offsets_of(counts), exact=exact)


@pytest.mark.parametrize("counts", [[130, 20], [40, 50], [5, 9]], ids=str)
def test_dgrad_of_both_kinds(counts):
    """dX = G W: BF16 reads W as it lies, two MXFP4 operands are W quantised along N."""
    g, w = random(sum(counts), 176), random(2, 176, 144)
    for quantised in (True, False):
        check_product(g, w.transpose(1, 2), offsets_of(counts), quantised)


@pytest.mark.parametrize("quantised", [True, False])
def test_views_of_tokens_and_weights(quantised):
    x, w = random(90, 256)[:, 32:128], random(6, 96, 160)
    check_product(x[1:], w[::2, :, :96], offsets_of([50, 0, 39]), quantised)
    check_product(x, w.permute(0, 2, 1)[:2], offsets_of([80, 10]), quantised)


@pytest.mark.parametrize("name", COUNTS)
def test_wgrads_of_16_bit_operands(name):
    counts = COUNTS[name]
    y = check_wgrad(random(sum(counts), 144), random(sum(counts), 272), offsets_of(counts), quantised=False)
    assert all((y[e] == 0).all() for e, count in enumerate(counts) if not count)


@pytest.mark.parametrize("name", COUNTS)
def test_wgrads_of_containers_in_buffers_of_whole_blocks(name):
    """Tokens quantised along their expert's tokens alone: each expert's own rows, quantised apart, give the same operand."""
    counts = COUNTS[name]
    offsets, tokens = offsets_of(counts), sum(counts)
    aligned, where, size = align_to_blocks(offsets, tokens)
    assert aligned.dtype == torch.int32 and (aligned % 32 == 0).all() and size % 32 == 0 and aligned[-1] <= size
    g, x = random(tokens, 144), random(tokens, 272)
    padded = [m.new_zeros(size, m.shape[1]).index_copy_(0, where, m) for m in (g, x)]
    y = check_wgrad(*padded, aligned)
    for e, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        if first < last:
            own, other = hat(g[first:last], RECIPE, 0).double(), hat(x[first:last], OTHER, 0).double()
            assert_close(y[e], own.t() @ other, own.abs().t() @ other.abs())


def test_wgrads_of_many_steps():
    check_wgrad(random(448, 48), random(448, 32), offsets_of([416, 32]))
    check_wgrad(random(448, 48), random(448, 32), offsets_of([401, 47]), quantised=False)


def test_rows_that_no_container_holds_are_multiplied_all_the_same():
    """Wide tokens and wide weight rows, in experts of their own and together."""
    spread = torch.exp2(torch.linspace(-20, 0, 256)).to(DEVICE)
    x, w = random(75, 256).float(), random(4, 48, 256).float()
    x[[0, 3, 74]] *= spread
    w[[2, 2, 3], [0, 47, 5]] *= spread
    x, w, offsets = x.to(HALF), w.to(HALF), offsets_of([30, 0, 40, 5])
    assert Operand(x, RECIPE).container.wide.sum() == 3 and Experts(w, OTHER).container.wide.sum() == 3
    y = check_product(x, w, offsets)
    assert (y[[0, 3, 74]] != 0).all() and (y[30:70, [0, 47]] != 0).all() and (y[70:, 5] != 0).all()
    check_product(random(75, 48), w.transpose(1, 2), offsets)


def test_tokens_are_the_containers_of_each_expert():
    counts = [96, 0, 160, 32]
    offsets, x = offsets_of(counts), random(320, 144).float()
    x[:64, 3], x[40, 5], x[96:160, 7], x[96:128] = 0, float("nan"), 2.0**-20, x[96:128] * 2.0**-9
    x[200, 7] = 1
    ours = Tokens(x, RECIPE, offsets).container
    for e, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        if first < last:
            own = container(quantize(x[first:last].cpu(), RECIPE, 0))
            assert_same(ours.payload[:, first:last], own.payload)
            assert_same(ours.scale[e], own.scale)
            assert_same(ours.wide[e], own.wide)
    assert ours.wide.sum() == 1 and ours.wide[2, 7]


def test_wide_features_of_a_wgrad():
    """Scales may spread from one expert to the next, but not within one."""
    spread = torch.exp2(torch.linspace(-20, 0, 128)).to(DEVICE)
    g, x = random(256, 48).float(), random(256, 80).float()
    g[128:, 7] *= spread
    g[:96] *= 2.0**-9
    x[128:, 0] *= spread
    x[:96, 79] *= torch.exp2(torch.linspace(-30, 0, 96)).to(DEVICE)
    g, x, offsets = g.to(HALF), x.to(HALF), offsets_of([96, 0, 32, 128])
    assert Tokens(g, RECIPE, offsets).container.wide.nonzero().tolist() == [[3, 7]]
    assert Tokens(x, OTHER, offsets).container.wide.nonzero().tolist() == [[0, 79], [3, 0]]
    y = check_wgrad(g, x, offsets)
    assert (y[3, 7] != 0).all() and (y[3, :, 0] != 0).all() and (y[0, :, 79] != 0).all() and (y[1] == 0).all()


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_token_stays_a_broken_token(quantised, broken):
    """In its own row of a product, and in its own expert and feature of a wgrad: nothing else changes by a bit."""
    clean, w, g, offsets = random(96, 64), random(3, 48, 64), random(96, 48), offsets_of([32, 32, 32])
    x = clean.clone()
    x[31, 40], x[64, 3] = broken, broken

    def product(x):
        return grouped_product(*((Operand(x, RECIPE), Experts(w, RECIPE)) if quantised else (x, w)), offsets, OUT)

    def wgrad(x, offsets=offsets):
        sides = (Tokens(g, RECIPE, offsets), Tokens(x, RECIPE, offsets)) if quantised else (g, x)
        return grouped_wgrad(*sides, offsets, OUT)

    def wrong(y, before):
        if GPU or not quantised:  # the interpreter reads E4M3's NaN as 480
            assert torch.equal(~y.isfinite(), y != before)
        return (y != before).nonzero()

    rows = wrong(product(x), product(clean))
    assert rows[:, 0].unique().tolist() == [31, 64] and len(rows) == 2 * 48
    features = wrong(wgrad(x), wgrad(clean))[:, [0, 2]]
    assert features.unique(dim=0).tolist() == [[0, 40], [2, 3]]
    if not quantised:  # an expert that ends between two blocks does not see its neighbour's
        ragged = offsets_of([31, 33, 32])
        assert wrong(wgrad(x, ragged), wgrad(clean, ragged))[:, 0].unique().tolist() == [1, 2]


@pytest.mark.parametrize("transposed", [True, False])
def test_a_broken_expert_stays_a_broken_expert(transposed):
    """Steps of the contraction, 64 wide, and tiles of columns end with the expert's weight."""
    x, w = random(60, 176), random(3, 48, 176)
    w[1] = float("nan")
    w = w.transpose(1, 2).contiguous().transpose(1, 2) if transposed else w
    y = grouped_product(x, w, offsets_of([20, 20, 20]), OUT)
    assert y[20:40].isnan().all() and y[:20].isfinite().all() and y[40:].isfinite().all()


def test_rows_behind_the_last_expert_are_zero():
    x, w = random(90, 64), random(2, 48, 64)
    x[60:] = float("nan")
    for sides in ((Operand(x, RECIPE), Experts(w, RECIPE)), (x, w)):
        y = grouped_product(*sides, offsets_of([20, 37]), OUT)
        assert (y[57:] == 0).all() and y.isfinite().all() and (y[:57] != 0).any(1).all()


def test_blocks_with_tokens_of_two_experts_are_not_silent():
    g, x, offsets = random(96, 32), random(96, 48), offsets_of([32, 20, 44])
    y = grouped_wgrad(Tokens(g, RECIPE, offsets), Tokens(x, RECIPE, offsets), offsets, OUT)
    assert y[0].isfinite().all() and y[1:].isnan().all()


def test_what_cannot_be_multiplied_is_refused():
    x, w, g, offsets = random(64, 64), random(2, 48, 64), random(64, 48), offsets_of([30, 34])
    a, b = Operand(x, RECIPE), Experts(w, RECIPE)
    with pytest.raises(ValueError, match="quantise both, or dequantise both"):
        grouped_product(a, w, offsets)
    with pytest.raises(ValueError, match=r"A \(64, 48\) and B \(2, 48, 64\) must be \(T, K\) and \(E, N, K\)"):
        grouped_product(g, w, offsets)
    with pytest.raises(ValueError, match=r"must be \(T, K\) and \(E, N, K\)"):
        grouped_product(a, a, offsets)
    with pytest.raises(ValueError, match="both must be bfloat16, or float16"):
        grouped_product(x.float(), w.float(), offsets)
    with pytest.raises(ValueError, match="N=47 must be a multiple of 16"):
        grouped_product(x, w[:, :47], offsets)
    with pytest.raises(ValueError, match=r"offsets must be contiguous torch.int32 \(3,\) on .*, not torch.int64 \(3,\)"):
        grouped_product(a, b, offsets.long())
    with pytest.raises(ValueError, match=r"not torch.int32 \(2,\)"):
        grouped_product(a, b, offsets[1:])
    with pytest.raises(ValueError, match=r"out_dtype=torch\.int8"):
        grouped_product(a, b, offsets, torch.int8)
    with pytest.raises(ValueError, match=r"the weights of experts are \(E, N, K\), not \(64, 64\)"):
        Experts(x, RECIPE)
    with pytest.raises(ValueError, match=r"G \(64, 48\) and X \(63, 64\) must be \(T, N\) and \(T, K\)"):
        grouped_wgrad(g, x[1:], offsets)
    tokens = Tokens(g[:40], RECIPE, offsets)
    with pytest.raises(ValueError, match="T=40 must be a multiple of 16"):
        grouped_wgrad(tokens, tokens, offsets)
    with pytest.raises(ValueError, match="A is quantised along its tokens"):
        grouped_product(tokens, Experts(w.transpose(1, 2), RECIPE), offsets)
    with pytest.raises(ValueError, match="quantised along tokens: give Tokens"):
        grouped_wgrad(tokens, a, offsets)
    with pytest.raises(ValueError, match=r"not \(64, 48\) of mxfp4 rceil \+ OF 0.5"):
        Tokens(g, QuantRecipe(fallback_alpha=0.5), offsets)
    with pytest.raises(ValueError, match="plain MXFP4 recipe"):
        Experts(w, QuantRecipe(fallback_alpha=0.5))
