"""Y = A_hat B_hat^T of two MXFP4 operands as one FP8 product, exact operands in every case.

Containers (`container/reference.py`) hold the operands without losing a bit, so the sums are those of the dequantised operands
up to their own rounding. Rows that share a scale make a row-wise product, `torch._scaled_mm`; partial sums are promoted to
float32, or, `fast`, left to the tensor core's own accumulator, as FP8 libraries do by default. Groups of 128 with a scale
each, which macro blocks need, are promoted, scaled and added in float32: by cuBLAS on Hopper, else, and for macro blocks of 32
and 64, by a Triton kernel.

Rows with blocks that do not fit a container are incomplete; `repair.py` computes their products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mxfp4_kernels.container.reference import GROUP, MULTIPLE, Container
from mxfp4_kernels.container.triton import Written, containers
from mxfp4_kernels.device import BLOCK, launches
from mxfp4_kernels.launch import Prepared
from mxfp4_kernels.matmul.operand import Operand
from mxfp4_kernels.matmul.repair import repair
from mxfp4_rl.recipe import QuantRecipe


class FP8Operand(Operand):
    """A matrix quantised along K by `operands`.

    Attributes:
        matrix: what the container was made from, or its transpose if `transposed`.
    """

    def __init__(self, matrix: torch.Tensor, recipe: QuantRecipe, container: Written, transposed: bool):
        self.matrix, self.recipe, self.container, self.transposed = matrix, recipe, container, transposed

    @property
    def source(self) -> torch.Tensor:
        return self.matrix.t() if self.transposed else self.matrix

    def tensors(self) -> tuple[torch.Tensor, ...]:
        container = self.container
        return self.matrix, container.payload, container.scale, container.buffer

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> FP8Operand:
        matrix, payload, scale, buffer = tensors
        side = self.container.side
        strides = side.strides[::-1] if self.transposed else side.strides
        if matrix.stride() != strides:  # it was away, in a CPU's memory or so, and came back as another one
            matrix = torch.empty_strided(matrix.shape, strides, dtype=matrix.dtype, device=matrix.device).copy_(matrix)
        return FP8Operand(matrix, self.recipe, Written(payload, scale, buffer, side), self.transposed)

    def template(self) -> FP8Operand:
        return FP8Operand(None, self.recipe, Written(None, None, None, self.container.side), self.transposed)


def operands(
    x: torch.Tensor,
    rows: QuantRecipe | None = None,
    columns: QuantRecipe | None = None,
    operand_dtype: torch.dtype | None = None,
    whole_rows: bool = False,
) -> tuple[FP8Operand | None, FP8Operand | None, torch.Tensor | None]:
    """`containers` of x (M, K) and x^T (K, M) as operands of products, and x_hat; args, result and errors as there."""
    first, second, x_hat = containers(x, rows, columns, operand_dtype, whole_rows)
    return first and FP8Operand(x, rows, first, False), second and FP8Operand(x, columns, second, True), x_hat


def product(
    a: FP8Operand,
    b: FP8Operand,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """A_hat (M, K) times B_hat (N, K) transposed, plus bias (N,) if given: (M, N).

    Args:
        backend: "row-wise" | "cublas" (a scale every 128) | "triton" | "reference" (float32 product of the dequantised
            containers) | None: the fastest that can; the reference on a CPU. Repairs are the same kernel in all of them.
            "row-wise" and "cublas" only have bfloat16 outputs on a GPU, rounded before a bias is added, unless the product is
            row-wise and the bias bfloat16.
        fast: let a row-wise product leave its sums to the tensor core's own accumulator, of 14 bits or so; others ignore it.

    Raises:
        ValueError: K differs, the bias has no N numbers, or the backend does not exist or cannot compute it.
    """
    if bias is not None:
        bias = bias.detach().contiguous()
    sides = a.container.side, b.container.side
    key = (id(sides[0]), id(sides[1]), out_dtype, bias is not None and (bias.shape, bias.dtype), backend, fast)
    known = _products.get(key) or _products.keep(key, (_Product(a, b, out_dtype, bias, backend, fast), sides))
    return known[0](a, b, bias)


class _Product:
    """`product` for operands that were made by the same two jobs; args and errors as there."""

    def __init__(self, a, b, out_dtype, bias, backend, fast):
        (M, K), (N, other) = a.container.shape, b.container.shape
        if other != K:
            raise ValueError(f"A has {K} columns and B {other}: both are contracted")
        if a.container.payload.shape[1] != b.container.payload.shape[1]:
            raise ValueError("one side has a scale a row and the other a scale every 128 elements: make both alike")
        if backend is not None and backend not in _BACKENDS:
            raise ValueError(f"backend={backend!r} is not one of {', '.join(map(repr, _BACKENDS))}, None")
        if bias is not None and bias.shape != (N,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {N} output columns")
        self.shape, self.out_dtype, self.fast = (M, N), out_dtype, fast
        self.empty = not (M and N and K)
        self.compute = _BACKENDS[backend or _best(a.container, b.container, out_dtype)]
        if self.compute is row_wise and a.container.payload.is_cuda and not self.empty:
            _check_row_wise(a.container, b.container)
            _check_bfloat16(out_dtype)
            self.compute = _scaled
        # One block a group: every group fits.
        self.whole = a.container.group == b.container.group == BLOCK
        self.repair = None

    def __call__(self, a, b, bias):
        if self.empty:
            y = torch.zeros(self.shape, dtype=self.out_dtype, device=a.matrix.device)
            return y if bias is None else y + bias.to(self.out_dtype)
        y = self.compute(a.container, b.container, self.out_dtype, bias, self.fast)
        if y.shape != self.shape:  # without the padding, and not a view: autograd lets nobody change a Function's in place
            y = y.new_empty(0).set_(y.untyped_storage(), 0, self.shape, y.stride())
        if not self.whole:
            if self.repair is None:
                self.repair = repair(a.container.side, b.container.side, y, bias)
            self.repair(a.matrix, b.matrix, a.container, b.container, y, bias)
        return y


_products = Prepared()


def _best(a: Container, b: Container, out_dtype: torch.dtype) -> str:
    if not a.payload.is_cuda:
        return "reference"
    if out_dtype != torch.bfloat16:
        return "triton"
    if _share_scales(a, b):
        return "row-wise"
    return "cublas" if a.group == b.group == GROUP and _has_block_scaling(a.payload.device) else "triton"


def _share_scales(a: Container, b: Container) -> bool:
    return a.scale.shape[0] == b.scale.shape[0] == 1


@functools.cache
def _has_block_scaling(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes 1x128 scales on both sides: Hopper, PyTorch 2.9, CUDA 12.9."""
    pytorch, cuda = (tuple(map(int, v.split(".")[:2])) for v in (torch.__version__, torch.version.cuda or "0.0"))
    return torch.cuda.get_device_capability(device)[0] == 9 and pytorch >= (2, 9) and cuda >= (12, 9)


def row_wise(a, b, out_dtype: torch.dtype, bias: torch.Tensor | None = None, fast: bool = False) -> torch.Tensor:
    """P_a P_b^T, each row and column times its scale, plus bias: (M, N).

    a, b have `payload` float8_e4m3fn (rows, K), `scale` float32 (1, rows) and `dequantize()`. In float32 on a CPU.

    Raises:
        ValueError: K differs, K or N is no multiple of 16, a row has several scales, or on a GPU another output than bfloat16.
    """
    _check_row_wise(a, b)
    (M, K), N = a.payload.shape, b.payload.shape[0]
    if not (M and N and K):
        return torch.zeros(M, N, dtype=out_dtype, device=a.payload.device)
    if not a.payload.is_cuda:
        return _reference(a, b, out_dtype, bias)
    _check_bfloat16(out_dtype)
    return _scaled(a, b, out_dtype, bias, fast)


def _check_row_wise(a, b) -> None:
    K, (N, other) = a.payload.shape[1], b.payload.shape
    if other != K:
        raise ValueError(f"A has {K} columns and B {other}: both are contracted")
    if not _share_scales(a, b):
        raise ValueError("a row-wise product has a scale a row: make containers of whole rows")
    if K % MULTIPLE or N % MULTIPLE:
        raise ValueError(f"K={K} and N={N} must be multiples of {MULTIPLE} for an FP8 product: multiply in BF16")


def _scaled(a, b, out_dtype: torch.dtype, bias: torch.Tensor | None, fast: bool) -> torch.Tensor:
    """`row_wise` on a GPU, unchecked."""
    if bias is None:
        return torch._scaled_mm(a.payload, b.payload.t(), a.scale.t(), b.scale, None, None, out_dtype, fast)
    N = b.payload.shape[0]
    own = bias.dtype == torch.bfloat16  # the product's own bias has to be
    pad = torch.nn.functional.pad(bias, (0, N - bias.shape[0])) if own else None
    y = torch._scaled_mm(a.payload, b.payload.t(), a.scale.t(), b.scale, pad, None, out_dtype, fast)
    if not own:
        y[:, : bias.shape[0]].add_(bias)
    return y


def _check_bfloat16(out_dtype: torch.dtype) -> None:
    if out_dtype != torch.bfloat16:
        raise ValueError(f"PyTorch's scaled FP8 products give bfloat16, not {out_dtype}: give backend='triton'")


def _cublas(a: Container, b: Container, out_dtype, bias, fast) -> torch.Tensor:
    if not a.group == b.group == GROUP:
        raise ValueError(f"cuBLAS scales every {GROUP} elements, not every {a.group} and {b.group}: give backend='triton'")
    _check_bfloat16(out_dtype)
    y = torch._scaled_mm(a.payload, b.payload.t(), scale_a=a.scale.t(), scale_b=b.scale, out_dtype=out_dtype)
    if bias is not None:
        y[:, : b.shape[0]].add_(bias)
    return y


def _reference(a, b, out_dtype, bias, fast=False) -> torch.Tensor:
    y = a.dequantize() @ b.dequantize().t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


# ---- the product in Triton --------------------------------------------------------------------------------------------------


@triton.jit
def _product_kernel(
    a, b, scale_a_ptr, scale_b_ptr, bias_ptr, y_ptr, M, N, K, N_OUT,
    GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    # Tiles in columns of ACROSS rows of tiles: neighbours in time read the same part of A and B.
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    column = tl.program_id(0) // (ACROSS * tiles_n)
    height = tl.minimum(tiles_m - column * ACROSS, ACROSS)
    within = tl.program_id(0) % (ACROSS * tiles_n)
    m0, n0 = (column * ACROSS + within % height) * BM, within // height * BN
    rows, columns = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        part = tl.dot(a.load([m0, k0]), b.load([n0, k0]).T)
        scale_a = tl.load(scale_a_ptr + k0 // GROUP_A * M + rows, mask=rows < M, other=0.0)
        scale_b = tl.load(scale_b_ptr + k0 // GROUP_B * N + columns, mask=columns < N, other=0.0)
        total += part * (scale_a[:, None] * scale_b[None, :])
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < N_OUT, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


_WHOLE = 1 << 30  # elements of a row: there is one scale


@launches
def _triton(a: Container, b: Container, out_dtype, bias, fast=False, **tile: int) -> torch.Tensor:
    (M, K), N = a.payload.shape, b.payload.shape[0]
    y = torch.empty(M, N, dtype=out_dtype, device=a.payload.device)
    groups = [_WHOLE if c.scale.shape[0] == 1 else c.group for c in (a, b)]
    # Small tiles, so that several programs share a multiprocessor: one scales while another multiplies.
    tile = {"BM": 64, "BN": 128, "ACROSS": 8, "num_warps": 4, "num_stages": 4, **tile, "BK": min(*groups, GROUP)}
    _product_kernel[triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]),](
        TensorDescriptor.from_tensor(a.payload, [tile["BM"], tile["BK"]]),
        TensorDescriptor.from_tensor(b.payload, [tile["BN"], tile["BK"]]),
        a.scale, b.scale, bias, y, M, N, K, b.shape[0],
        GROUP_A=groups[0], GROUP_B=groups[1], enable_fp_fusion=True, **tile,
    )  # fmt: skip
    return y


_BACKENDS = {"row-wise": row_wise, "cublas": _cublas, "triton": _triton, "reference": _reference}
