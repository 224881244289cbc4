"""Grouped products against loops over experts in float64, of the dequantised operands."""

import pytest
import torch

from tests.kernels.common import DEVICE, GPU, OUT, assert_same  # isort: skip

from mxfp4_kernels.container.reference import container, fits_rows
from mxfp4_kernels.matmul import fp8, grouped
from mxfp4_kernels.matmul import grouped_reference as reference
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
    """The reference's containers of whole rows, the kernel's bit for bit: interpreted, those take longer than the products."""
    kernel = fp8.containers

    def containers(x, rows=None, columns=None, operand_dtype=None, whole_rows=False):
        if whole_rows and fits_rows(rows) and x.numel():
            return container(quantize(x, rows), None), None, None
        return kernel(x, rows, columns, operand_dtype, whole_rows)

    if not GPU:
        monkeypatch.setattr(fp8, "containers", containers)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(HALF).to(DEVICE)


def rows_of(x, recipe=RECIPE):
    """Tokens quantised along K."""
    return fp8.operands(x, rows=recipe, whole_rows=True)[0]


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
        y = grouped_product(rows_of(x), Experts(w, OTHER), offsets, OUT, exact)
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
    """Wide tokens and wide weight rows, in experts of their own and together: all that a wide row meets where one side is
    plain is the block that does not fit."""
    spread = torch.exp2(torch.linspace(-20, 0, 256)).to(DEVICE)
    x, w, offsets = random(75, 256).float(), random(4, 48, 256).float(), offsets_of([30, 0, 40, 5])
    x[[0, 3, 74]] *= spread
    w[[2, 2, 3], [0, 47, 5]] *= spread
    x, w, plain_x, plain_w = x.to(HALF), w.to(HALF), random(75, 256), random(4, 48, 256)
    plain_x[:, 32:], plain_w[:, :, 32:] = 0, 0
    assert rows_of(x).container.wide.sum() == 3 and Experts(w, OTHER).container.wide.sum() == 3
    for tokens, weights in ((x, w), (x, plain_w), (plain_x, w)):
        check_product(tokens, weights, offsets)
    check_product(random(75, 48), w.transpose(1, 2), offsets)


SHARED = {  # counts of tokens, and rows of the buffer
    "experts of whole tiles": ([128, 256, 0], 384),
    "four experts in a tile": ([32, 32, 32, 32, 64, 0, 32, 96], 352),
    "experts that begin and end within tiles": ([96, 0, 160, 32], 288),
    "rows behind the last expert": ([0, 32, 64], 320),
    "no tokens": ([0, 0], 160),
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("name", SHARED)
def test_tokens_are_the_containers_of_each_expert(name, dtype):
    """To the bit: every block has its own expert's scale, whose others are far from it."""
    counts, rows = SHARED[name]
    offsets, x = offsets_of(counts), random(rows, 144).float()
    for block, first in enumerate(range(0, rows, 32)):
        x[first : first + 32, :120] *= 2.0 ** (-4 * (block % 5))  # of five blocks one does not fit
    x[:64, 3], x[:32, 7], x[:, 131], x[5, 5] = 0, 2.0**-12, x[:, 131] * 2.0**-118, float("nan")
    x[31, 7], x[rows - 1, 143], x[rows - 40, 143] = 1, float("inf"), float("nan")
    x = x.to(dtype)
    ours = Tokens(x, RECIPE, offsets).container
    wide = 0
    for e, (first, last) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist())):
        if first < last:
            own = container(quantize(x[first:last].cpu(), RECIPE, 0), None)
            assert_same(ours.payload[:, first:last], own.payload)
            assert_same(ours.scale[e], own.scale[0])
            assert_same(ours.wide[e], own.wide)
            wide += own.wide.sum()
        else:
            assert not ours.wide[e].any() and ours.scale[e].isfinite().all()
    assert ours.any_wide.tolist() == [int(wide > 0)] and (wide or max(counts) < 160)
    assert ours.shape == (144, rows) == ours.payload.shape


@pytest.mark.parametrize("view", ["transposed", "cut"])
def test_tokens_of_any_strides(view):
    offsets, x = offsets_of([64, 32, 32]), random(160, 48)
    strided = x.t().contiguous().t() if view == "transposed" else torch.cat((x, x), 1)[:, :48]
    assert not strided.is_contiguous()
    ours, theirs = (Tokens(t, OTHER, offsets).container for t in (strided, x))
    assert torch.equal(ours.payload.view(torch.uint8)[:, :128], theirs.payload.view(torch.uint8)[:, :128])
    assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("side", ["G", "X", "both"])
def test_wide_features_of_a_wgrad(side):
    """Scales may spread from one expert to the next, but not within one. What meets the wide features of one side alone is the
    block that does not fit."""
    wide, plain, offsets = random(256, 48).float(), random(256, 80), offsets_of([96, 0, 32, 128])
    wide[128:, 7] *= torch.exp2(torch.linspace(-20, 0, 128)).to(DEVICE)
    wide[:96, 40] *= torch.exp2(torch.linspace(-26, 4, 96)).to(DEVICE)
    wide[96:128] *= 2.0**-9
    wide = wide.to(HALF)
    plain[32:96], plain[160:] = 0, 0
    assert Tokens(wide, RECIPE, offsets).container.wide.nonzero().tolist() == [[0, 40], [3, 7]]
    assert not Tokens(plain, OTHER, offsets).container.any_wide
    y = check_wgrad(*{"G": (wide, plain), "X": (plain, wide), "both": (wide, wide)}[side], offsets)
    assert (y[1] == 0).all()


@pytest.mark.skipif(not GPU, reason="PyTorch's grouped product of a GPU")
@pytest.mark.parametrize("shape", [(144, 272), (64, 272)], ids=str)  # it has two kernels, the second for small matrices
@pytest.mark.parametrize("counts", [[130, 0, 301, 0], [0, 0, 500, 3], [700], [0, 0]], ids=str)
def test_bf16_wgrads_that_pytorch_computes(counts, shape, monkeypatch):
    """Empty experts are zero whatever the memory held, tokens of the next expert and behind the last are not read."""
    calls, kernel = [], torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", lambda *args, **kwargs: calls.append(args) or kernel(*args, **kwargs))
    offsets, tokens = offsets_of(counts), max(sum(counts), 64 * len(counts)) + 5
    g, x = random(tokens, shape[0]), random(tokens, shape[1])
    g[sum(counts) :], x[sum(counts) :] = float("nan"), float("nan")
    filler = torch.full((len(counts), *shape), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    del filler  # the next allocation of its size gets its memory
    y = check_wgrad(g.requires_grad_(), x, offsets, quantised=False)
    assert bool(calls) == (torch.cuda.get_device_capability()[0] == 9)
    assert not y.requires_grad and all((y[e] == 0).all() for e, count in enumerate(counts) if not count)


def test_what_pytorch_s_wgrad_is_for(monkeypatch):
    """BF16 in and out, 64 tokens an expert, rows at multiples of 16 bytes; everything else is our kernel's."""

    class Cuda(torch.Tensor):
        is_cuda = True

    def chosen(*shape, cut=slice(None), dtype=torch.bfloat16, experts=2, out_dtype=torch.bfloat16, hopper=True):
        monkeypatch.setattr(grouped, "_is_hopper", lambda device: hopper)
        x = torch.empty(shape, dtype=dtype)[:, cut].as_subclass(Cuda)
        return grouped._pytorch_is_faster(x, x, experts, out_dtype)

    assert chosen(128, 48) and chosen(130, 56, cut=slice(48)) and chosen(128, 56, cut=slice(8, 56))
    assert not chosen(128, 48, hopper=False) and not chosen(128, 48, experts=3)
    assert not chosen(128, 48, out_dtype=torch.float32) and not chosen(128, 48, dtype=torch.float16)
    for width, cut in ((56, slice(4, 52)), (52, slice(48)), (96, slice(0, 96, 2))):
        assert not chosen(128, width, cut=cut)


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_token_stays_a_broken_token(quantised, broken):
    """In its own row of a product, and in its own expert and feature of a wgrad: nothing else changes by a bit."""
    clean, w, g, offsets = random(96, 64), random(3, 48, 64), random(96, 48), offsets_of([32, 32, 32])
    x = clean.clone()
    x[31, 40], x[64, 3] = broken, broken

    def product(x):
        return grouped_product(*((rows_of(x), Experts(w, RECIPE)) if quantised else (x, w)), offsets, OUT)

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
    for sides in ((rows_of(x), Experts(w, RECIPE)), (x, w)):
        y = grouped_product(*sides, offsets_of([20, 37]), OUT)
        assert (y[57:] == 0).all() and y.isfinite().all() and (y[:57] != 0).any(1).all()


def test_blocks_with_tokens_of_two_experts_are_not_silent():
    g, x, offsets = random(96, 32), random(96, 48), offsets_of([32, 20, 44])
    y = grouped_wgrad(Tokens(g, RECIPE, offsets), Tokens(x, RECIPE, offsets), offsets, OUT)
    assert y[0].isfinite().all() and y[1:].isnan().all()


def test_what_cannot_be_multiplied_is_refused():
    x, w, g, offsets = random(64, 64), random(2, 48, 64), random(64, 48), offsets_of([30, 34])
    a, b = rows_of(x), Experts(w, RECIPE)
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
    long, mbs = random(64, 256), QuantRecipe.parse("mxfp4+mbs")
    with pytest.raises(ValueError, match="a grouped product has a scale a row: make operands of whole rows"):
        grouped_product(fp8.operands(long, rows=RECIPE)[0], Experts(random(2, 48, 256), RECIPE), offsets)
    with pytest.raises(ValueError, match="a grouped product needs one scale a row: Operands of plain MXFP4 recipes"):
        grouped_product(fp8.operands(x, rows=mbs)[0], b, offsets)
    with pytest.raises(ValueError, match="quantised along tokens: give Tokens"):
        grouped_wgrad(tokens, a, offsets)
    with pytest.raises(ValueError, match=r"not \(64, 48\) of mxfp4 rceil \+ OF 0.5"):
        Tokens(g, QuantRecipe(fallback_alpha=0.5), offsets)
    with pytest.raises(ValueError, match="no FP8 container holds mxfp4 rceil"):
        Experts(w, mbs)
