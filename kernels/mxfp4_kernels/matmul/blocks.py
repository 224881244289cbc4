"""Y = A_hat B_hat^T of two MXFP4 operands, macro blocks included, as one FP8 product with a float32 scale for every 128 of K.

Containers (`container/blocks.py`) hold the operands without losing a bit, so the sums are those of the dequantised operands up
to their own rounding: partial sums of 128 products are promoted to float32, scaled and added there. cuBLAS does it on Hopper
(`torch._scaled_mm`, both scales 1x128); a Triton kernel does it elsewhere and for macro blocks of 32 and 64.

Rows with a group whose scales spread over more than E4M3 holds are incomplete; `repair.py` computes their products.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mxfp4_kernels.container.blocks import GROUP, BlockContainer, containers
from mxfp4_kernels.device import BLOCK, launches
from mxfp4_kernels.matmul.operand import Operand
from mxfp4_kernels.matmul.repair import repair
from mxfp4_rl.recipe import QuantRecipe


def operands(
    x: torch.Tensor,
    rows: QuantRecipe | None = None,
    columns: QuantRecipe | None = None,
    operand_dtype: torch.dtype | None = None,
) -> tuple[Operand | None, Operand | None, torch.Tensor | None]:
    """`containers` of x (M, K) and x^T (K, M) as operands of products, and x_hat; args, result and errors as there."""
    first, second, x_hat = containers(x, rows, columns, operand_dtype)
    return (
        Operand(x, rows, first) if first is not None else None,
        Operand(x.t(), columns, second) if second is not None else None,
        x_hat,
    )


@launches
def product(
    a: Operand,
    b: Operand,
    out_dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """A_hat (M, K) times B_hat (N, K) transposed, plus bias (N,) if given: (M, N).

    Args:
        backend: "cublas" | "triton" | "reference" (float32 product of the dequantised containers) | None: cuBLAS where it can,
            else Triton; the reference on a CPU. Repairs are the same kernel in all three.

    Raises:
        ValueError: K differs, the bias has no N numbers, or the backend does not exist or cannot compute it.
    """
    (M, K), (N, other) = a.container.shape, b.container.shape
    if other != K:
        raise ValueError(f"A has {K} columns and B {other}: both are contracted")
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(map(repr, _BACKENDS))}, None")
    if bias is not None:
        if bias.shape != (N,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {N} output columns")
        bias = bias.contiguous()
    if not (M and N and K):
        y = torch.zeros(M, N, dtype=out_dtype, device=a.source.device)
        return y if bias is None else y + bias.to(out_dtype)
    padded = _BACKENDS[backend or _best(a.container, b.container)](a.container, b.container, out_dtype, bias)
    # Without the padding, and not a view: autograd lets nobody change in place a view that a Function returns.
    y = padded.new_empty(0).set_(padded.untyped_storage(), 0, (M, N), padded.stride())
    if not a.container.group == b.container.group == BLOCK:  # one block a group: every group fits
        repair(a, b, y, bias)
    return y


def _best(a: BlockContainer, b: BlockContainer) -> str:
    if not a.payload.is_cuda:
        return "reference"
    return "cublas" if a.group == b.group == GROUP and _has_block_scaling(a.payload.device) else "triton"


@functools.cache
def _has_block_scaling(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes 1x128 scales on both sides: Hopper, PyTorch 2.9, CUDA 12.9."""
    pytorch, cuda = (tuple(map(int, v.split(".")[:2])) for v in (torch.__version__, torch.version.cuda or "0.0"))
    return torch.cuda.get_device_capability(device)[0] == 9 and pytorch >= (2, 9) and cuda >= (12, 9)


def _cublas(a: BlockContainer, b: BlockContainer, out_dtype, bias) -> torch.Tensor:
    if not a.group == b.group == GROUP:
        raise ValueError(f"cuBLAS scales every {GROUP} elements, not every {a.group} and {b.group}: give backend='triton'")
    y = torch._scaled_mm(a.payload, b.payload.t(), scale_a=a.scale.t(), scale_b=b.scale, out_dtype=out_dtype)
    return y if bias is None else y[:, : b.shape[0]].add_(bias)


def _reference(a: BlockContainer, b: BlockContainer, out_dtype, bias) -> torch.Tensor:
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


def _triton(a: BlockContainer, b: BlockContainer, out_dtype, bias, **tile: int) -> torch.Tensor:
    (M, K), N = a.payload.shape, b.payload.shape[0]
    y = torch.empty(M, N, dtype=out_dtype, device=a.payload.device)
    # Small tiles, so that several programs share a multiprocessor: one scales while another multiplies.
    tile = {"BM": 64, "BN": 128, "ACROSS": 8, "num_warps": 4, "num_stages": 4, **tile, "BK": min(a.group, b.group)}
    _product_kernel[triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"]),](
        TensorDescriptor.from_tensor(a.payload, [tile["BM"], tile["BK"]]),
        TensorDescriptor.from_tensor(b.payload, [tile["BN"], tile["BK"]]),
        a.scale, b.scale, bias, y, M, N, K, b.shape[0],
        GROUP_A=a.group, GROUP_B=b.group, enable_fp_fusion=True, **tile,
    )  # fmt: skip
    return y


_BACKENDS = {"cublas": _cublas, "triton": _triton, "reference": _reference}
