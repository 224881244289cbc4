"""Y = A_hat B_hat^T of two MXFP4 operands, macro blocks included, as one FP8 product with a float32 scale for every 128 of K.

Containers (`container/blocks.py`) hold the operands without losing a bit, so the sums are those of the dequantised operands up
to their own rounding: partial sums of 128 products are promoted to float32, scaled and added there. cuBLAS does it on Hopper
(`torch._scaled_mm`, both scales 1x128); a Triton kernel does it elsewhere and for macro blocks of 32 and 64.

Rows with a group whose scales spread over more than E4M3 holds are incomplete. A second kernel computes their products from the
unquantised operands, quantising them again, block by block, and overwrites them; it leaves at once where no row is flagged, so
nothing waits for the GPU's answer.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mxfp4_kernels.container.blocks import GROUP, BlockContainer, containers
from mxfp4_kernels.device import constants, exp2_byte, over_factor, two_passes
from mxfp4_kernels.matmul.operand import Operand
from mxfp4_rl.recipe import QuantRecipe


def operands(
    x: torch.Tensor,
    rows: QuantRecipe | None = None,
    columns: QuantRecipe | None = None,
    operand: torch.dtype | None = None,
) -> tuple[Operand | None, Operand | None, torch.Tensor | None]:
    """`containers` of x (M, K) and x^T (K, M) as operands of products, and x_hat; args, result and errors as there."""
    first, second, x_hat = containers(x, rows, columns, operand)
    return (
        Operand(x, rows, first) if first is not None else None,
        Operand(x.t(), columns, second) if second is not None else None,
        x_hat,
    )


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
        ValueError: K differs, or the backend cannot compute it.
    """
    (M, K), (N, other) = a.container.shape, b.container.shape
    if other != K:
        raise ValueError(f"A has {K} columns and B {other}: both are contracted")
    if not (M and N and K):
        y = torch.zeros(M, N, dtype=out_dtype, device=a.source.device)
        return y if bias is None else y + bias.to(out_dtype)
    y = _BACKENDS[backend or _best(a.container, b.container)](a.container, b.container, out_dtype, bias)[:M, :N]
    _repair(a, b, y, bias)
    return y


def _best(a: BlockContainer, b: BlockContainer) -> str:
    if not a.payload.is_cuda:
        return "reference"
    return "cublas" if a.group == b.group == GROUP and _has_block_scaling(a.payload.device) else "triton"


@functools.cache
def _has_block_scaling(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` takes 1x128 scales on both sides: Hopper, and a PyTorch built with CUDA 12.9 or later."""
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return torch.cuda.get_device_capability(device)[0] == 9 and cuda >= (12, 9)


def _cublas(a: BlockContainer, b: BlockContainer, out_dtype, bias) -> torch.Tensor:
    if not a.group == b.group == GROUP:
        raise ValueError(f"cuBLAS scales every {GROUP} elements, not every {a.group} and {b.group}: give backend='triton'")
    y = torch._scaled_mm(a.payload, b.payload.t(), scale_a=a.scale.t(), scale_b=b.scale, out_dtype=out_dtype)
    return y if bias is None else y[:, : bias.shape[0]].add_(bias)


def _reference(a: BlockContainer, b: BlockContainer, out_dtype, bias) -> torch.Tensor:
    y = a.dequantize() @ b.dequantize().t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


# ---- the product in Triton --------------------------------------------------------------------------------------------------


@triton.jit
def _product_kernel(
    a, b, scale_a_ptr, scale_b_ptr, bias_ptr, y_ptr, M, N, K, BIASED,
    GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
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
    if BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < BIASED, other=0.0).to(tl.float32)[None, :]
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
        a.scale, b.scale, bias, y, M, N, K, 0 if bias is None else bias.shape[0],
        GROUP_A=a.group, GROUP_B=b.group, BIAS=bias is not None, enable_fp_fusion=True, **tile,
    )  # fmt: skip
    return y


_BACKENDS = {"cublas": _cublas, "triton": _triton, "reference": _reference}


# ---- repairs ----------------------------------------------------------------------------------------------------------------


@triton.jit
def _x_hat(
    x_ptr, rows, count, columns, K, stride_row, stride_k, CARRY: tl.constexpr, SHIFT: tl.constexpr, MACRO: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """The operand at some rows and columns, float32 (rows, columns)."""
    mask = (rows < count)[:, None] & (columns < K)[None, :]
    at = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_k
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    R: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    first, byte, _v, _b, factor = two_passes(tl.reshape(x, (R, BK // 32, 32)), CARRY, SHIFT, MACRO, LARGEST, False)
    x_hat = first * exp2_byte(byte)[:, :, None]
    if MACRO > 0:
        x_hat = over_factor(x_hat, factor)
    return tl.reshape(x_hat, (R, BK))


@triton.jit
def _repair_rows(
    a_ptr, b_ptr, wide_ptr, bias_ptr, y_ptr, M, N, K, a_row, a_k, b_row, b_k, y_row, y_column, PADDED,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, MACRO_A: tl.constexpr,
    CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, MACRO_B: tl.constexpr, LARGEST: tl.constexpr,
    BIAS: tl.constexpr, BIAS_ALONG_ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the flagged rows of y (M, N) from the operands; nothing where the last flag says that there is none."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    if (tl.load(wide_ptr + PADDED) != 0) & (tl.program_id(0) * BN < N):
        for m in range(0, M):
            if tl.load(wide_ptr + m) != 0:
                total = tl.zeros((BN,), tl.float32)
                for k0 in range(0, K, BK):
                    k = k0 + tl.arange(0, BK)
                    row = _x_hat(a_ptr, m + tl.arange(0, 1), M, k, K, a_row, a_k, CARRY_A, SHIFT_A, MACRO_A, LARGEST)
                    tile = _x_hat(b_ptr, columns, N, k, K, b_row, b_k, CARRY_B, SHIFT_B, MACRO_B, LARGEST)
                    total += tl.sum(tile * row, axis=1)
                if BIAS:
                    if BIAS_ALONG_ROWS:
                        total += tl.load(bias_ptr + m).to(tl.float32)
                    else:
                        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
                at = (m + tl.zeros((BN,), tl.int64)) * y_row + columns.to(tl.int64) * y_column
                tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=columns < N)


@triton.jit
def _repair_kernel(
    a_ptr, b_ptr, wide_a_ptr, wide_b_ptr, bias_ptr, y_ptr, M, N, K, a_row, a_k, b_row, b_k, y_row, y_column, PADDED_M, PADDED_N,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, MACRO_A: tl.constexpr,
    CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, MACRO_B: tl.constexpr, LARGEST: tl.constexpr,
    BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    _repair_rows(
        a_ptr, b_ptr, wide_a_ptr, bias_ptr, y_ptr, M, N, K, a_row, a_k, b_row, b_k, y_row, y_column, PADDED_M,
        CARRY_A, SHIFT_A, MACRO_A, CARRY_B, SHIFT_B, MACRO_B, LARGEST, BIAS, False, BN, BK,
    )  # fmt: skip
    _repair_rows(
        b_ptr, a_ptr, wide_b_ptr, bias_ptr, y_ptr, N, M, K, b_row, b_k, a_row, a_k, y_column, y_row, PADDED_N,
        CARRY_B, SHIFT_B, MACRO_B, CARRY_A, SHIFT_A, MACRO_A, LARGEST, BIAS, True, BN, BK,
    )  # fmt: skip


def _repair(a: Operand, b: Operand, y: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Overwrite the rows and the columns of y whose operands' containers left a group out, if there are any."""
    if a.container.group == b.container.group == 32:
        return  # one block a group: every group fits
    (M, N), K = y.shape, a.source.shape[1]
    how_a, how_b = constants(a.recipe), constants(b.recipe)
    _repair_kernel[(triton.cdiv(max(M, N), 64),)](
        a.source, b.source, a.container.wide, b.container.wide, bias, y, M, N, K,
        *a.source.stride(), *b.source.stride(), *y.stride(), a.container.wide.shape[0] - 1, b.container.wide.shape[0] - 1,
        CARRY_A=how_a["CARRY"], SHIFT_A=how_a["SHIFT"], MACRO_A=how_a["GROUP"],
        CARRY_B=how_b["CARRY"], SHIFT_B=how_b["SHIFT"], MACRO_B=how_b["GROUP"], LARGEST=how_a["LARGEST"],
        BIAS=bias is not None, BN=64, BK=32 * max(2, how_a["GROUP"], how_b["GROUP"]), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
