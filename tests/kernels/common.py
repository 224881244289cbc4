"""What the kernel tests share: where they run, awkward data, bitwise comparison.

They run on a GPU, or on a CPU under Triton's interpreter, which has to be chosen before Triton is first imported: there they
need a process of their own, `TRITON_INTERPRET=1 pytest tests/kernels` (`make test` does). The interpreter's BF16 has two
defects, which the GPU does not share: it reads subnormal numbers wrongly and truncates where it should round. So a CPU compares
BF16 data without subnormals, and BF16 results only where they are exact.
"""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from tests.test_quant import awkward  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
OUT = torch.bfloat16 if GPU else torch.float32  # of products: the interpreter's BF16 truncates
NAMES = ["mxfp4", "mxfp4+c7.25", "mxfp4+mbs32", "mxfp4+of0.3", "mxfp4+floor+mbs256+of1"]


def data(shape, dtype, seed=0):
    """Awkward numbers, a broken block, a row of zeros and one whose scales spread too far for E4M3."""
    rows = shape[0]
    flat = awkward(rows=max(rows, 32), length=torch.Size(shape[1:]).numel(), seed=seed)[-rows:].clone()
    flat[0] = 0
    if rows > 2 and flat.shape[1] > 40:
        flat[1, 35] = float("nan")
        flat[2] = torch.exp2(torch.linspace(-20, 20, flat.shape[1]))
    x = flat.view(shape).to(dtype)
    return torch.where(x.abs() < 2.0**-100, torch.zeros_like(x), x) if not GPU and dtype == torch.bfloat16 else x


def assert_same(ours, theirs, broken=None):
    """Equal bits, but for what a NaN looks like and for the codes of broken blocks."""
    ours = ours.cpu()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if ours.dtype.is_floating_point:
        assert torch.equal(ours.isnan(), theirs.isnan())
        broken = theirs.isnan() if broken is None else broken
        ours, theirs = (
            t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]) for t in (ours, theirs)
        )
    keep = ~broken if broken is not None else slice(None)
    assert torch.equal(ours[keep], theirs[keep])
