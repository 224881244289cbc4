"""Launches without Triton's preparation: the arguments that Triton would hand on, and everything odd left to Triton."""

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.common import DEVICE, GPU  # isort: skip

from mxfp4_kernels import launch
from mxfp4_kernels.launch import Launch, Part, Prepared
from mxfp4_kernels.matmul import fp8

from mxfp4_rl import QuantRecipe


class Kernel:
    """A stand-in for a compiled Triton kernel: notes what it is launched with, by whom."""

    arg_names = ("a_ptr", "b_ptr", "none_ptr", "n", "SIZE", "LAST")

    def __init__(self):
        self.pre_run_hooks, self.seen = [], []

    def __getitem__(self, grid):
        def through_triton(*args, **constants):
            self.seen.append(("triton", grid, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args], constants))
            return SimpleNamespace(run=self.run, function="function", packed_metadata="metadata")

        return through_triton

    def run(self, *args):
        self.seen.append(("direct", *args))


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "direct", True)
    return Kernel()


def launched(kernel, start=16):
    parts = [Part(0), Part(1, start, torch.uint8), None]
    return Launch(kernel, (3, 2), parts, (7,), LAST=5, SIZE=4, num_warps=8)


def test_the_second_launch_hands_on_what_triton_would(kernel):
    a, b = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    one = launched(kernel)
    one(a, b)
    assert kernel.seen == [
        ("triton", (3, 2), [a.data_ptr(), b.data_ptr() + 16, None, 7], {"LAST": 5, "SIZE": 4, "num_warps": 8})
    ]
    a, b = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    one(a, b)
    head = ("direct", 3, 2, 1, "stream", "function", "metadata", None, None, None)
    assert kernel.seen[1][:12] == (*head, a.data_ptr(), b.data_ptr() + 16)
    assert kernel.seen[1][13:] == (7, 4, 5)  # in the order of the kernel's parameters; what stands for None is never read


@pytest.mark.parametrize("odd", ["address", "later address", "start", "hook", "watched", "switched off", "another device"])
def test_what_is_out_of_the_ordinary_goes_through_triton(kernel, monkeypatch, odd):
    a, b = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    one = launched(kernel, 4 if odd == "start" else 16)
    one(a[1:] if odd == "address" else a, b)
    if odd == "hook":
        kernel.pre_run_hooks.append(print)
    if odd == "watched":
        monkeypatch.setattr(
            launch, "_runtime", SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[print]), launch_exit_hook=None)
        )
    if odd == "switched off":
        monkeypatch.setattr(launch, "direct", False)
    if odd == "another device":
        one._device = 1
    one(a[1:] if odd == "later address" else a, b)
    assert [who for who, *_ in kernel.seen] == ["triton", "triton"]
    if odd == "address":  # has told nothing about launches with others
        one(a, b)
        assert [who for who, *_ in kernel.seen[2:]] == ["direct"]


def test_a_thousand_things_are_prepared_at_most():
    prepared = Prepared()
    for i in range(3000):
        assert prepared.keep(i, str(i)) == prepared[i] == str(i)
    assert len(prepared) <= 1024


@pytest.mark.parametrize("direct", [True, False])
def test_new_memory_is_like_pytorch_s(monkeypatch, direct):
    monkeypatch.setattr(launch, "direct", direct)
    device = torch.empty(0, device=DEVICE).device
    for count in (0, 1, 1000, 1 << 20):
        filled = launch.zeros(count, device)
        assert filled.shape == (count,) and filled.dtype == torch.int32 and filled.device == device and not filled.any()
        filled.fill_(1)
    for size in ((3, 5), (16, 0), (0, 16), (7,)):
        ours, theirs = launch.empty(size, torch.bfloat16, device), torch.empty(size, dtype=torch.bfloat16, device=device)
        assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (theirs.shape, theirs.stride(), theirs.dtype, device)
        assert not ours.requires_grad


def bits(t):
    return t.contiguous().view(torch.uint8).cpu()


@pytest.mark.skipif(not GPU, reason="the interpreter launches every kernel itself")
@pytest.mark.parametrize("layout", ["plain", "misaligned", "apart", "transposed"])
@pytest.mark.parametrize("whole_rows", [True, False])
def test_results_do_not_depend_on_who_launches(monkeypatch, layout, whole_rows):
    recipe, dtype = QuantRecipe(), torch.bfloat16
    results = []
    for direct in (False, True, True):
        monkeypatch.setattr(launch, "direct", direct)
        torch.manual_seed(0)
        for shape in ((48, 64), (33, 96), (48, 64)):
            x = torch.randn(shape).mul_(torch.exp2(torch.linspace(-30, 0, shape[1]))).to(DEVICE, dtype)
            if layout == "misaligned":
                x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
            elif layout == "apart":
                x = x.repeat_interleave(2, 1)[:, ::2]
            elif layout == "transposed":
                x = x.t().contiguous().t()
            a, a_t, x_hat = fp8.operands(x, recipe, recipe, dtype, whole_rows)
            made = [t for one in (a, a_t) for t in (one.container.payload, one.container.scale, one.container.wide)]
            results.append([bits(t) for t in (*made, x_hat, fp8.product(a, a, dtype), fp8.product(a_t, a_t, dtype))])
    for ordinary, first, again in zip(results[:3], results[3:6], results[6:], strict=True):
        assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(ordinary, first, again, strict=True))


def test_an_operand_s_tensors_may_come_back_in_another_layout():
    x = torch.randn(32, 64, device=DEVICE).t().contiguous().t()
    operand, operand_t, _ = fp8.operands(x, QuantRecipe(), QuantRecipe(), None, True)
    for one in (operand, operand_t):
        matrix, *others = one.tensors()
        back = one.template().with_tensors([matrix.contiguous(), *others])
        assert back.source.stride() == one.source.stride() and torch.equal(back.source, one.source)
        assert torch.equal(fp8.product(back, back, backend="reference"), fp8.product(one, one, backend="reference"))
