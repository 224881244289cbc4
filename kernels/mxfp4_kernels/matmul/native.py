"""Y = A_hat B_hat^T on tensor cores that multiply MXFP4 themselves: GPUs of compute capability 10 and more.

Codes and scales go to the tensor core as they are stored (`tl.dot_scaled`); it accumulates in float32. All loads are TMA's,
which fills with zeros what lies outside, so no size has to be a multiple of anything. Scales are stored first in the order in
which the tensor core reads them, 128 rows of 4 blocks in 512 neighbouring bytes:

    row 32 i + j, block k  ->  byte 16 j + 4 i + k             (PTX ISA, "tcgen05.mma scale factor layout", 32x4x4)

The second pass of an outlier fallback is more contraction length, its weight alpha = 2^-n a shift of its scales:

    (A1 + alpha A2) B^T = [A1, A2'] [B, B]^T                   A2': codes of A2, scale bytes lower by n
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mxfp4_kernels.device import BLOCK, launches
from mxfp4_rl.quant.scales import NAN_BYTE
from mxfp4_rl.quant.tensor import MXFP4Tensor

CAPABILITY = 10  # the first with FP4 tensor cores


class Operand:
    """One side of a product: a quantised matrix, rows x contraction, with its scales in the tensor core's order.

    Attributes:
        codes: uint8 (passes, rows, K / 2), K padded to whole blocks.
        scales: uint8 (passes, ceil(rows / 128), ceil(K / 128), 2, 256).
        length: of the contraction, before padding.

    Raises:
        ValueError: not a matrix, blocks of other sizes than 32, macro blocks, a pre-scale, a rotation, or a fallback weight
            that is no power of two.
    """

    def __init__(self, q: MXFP4Tensor):
        if q.codes.ndim != 2 or q.block_size != BLOCK or q.macro is not None or q.pre_scale != 1 or q.hadamard:
            raise ValueError(
                "a native product takes matrices of plain MXFP4, blocks of 32, with or without an outlier fallback; this is "
                f"{tuple(q.shape)}, block_size={q.block_size}, macro blocks: {q.macro is not None}, pre_scale={q.pre_scale}, "
                f"hadamard={q.hadamard}: dequantise and multiply in BF16"
            )
        self.length = q.shape[q.axis]
        codes, scales = [q.codes], [q.scales]
        if q.residual is not None:
            mantissa, exponent = math.frexp(q.alpha)
            if mantissa != 0.5:
                raise ValueError(f"alpha={q.alpha} is no power of two: dequantise and multiply in BF16, or use alpha=0.5 or 1")
            byte = q.residual.scales
            shifted = (byte.int() + exponent - 1).clamp_(min=0)  # what that changes is below 2^-124
            codes.append(q.residual.codes)
            scales.append(torch.where(byte == NAN_BYTE, byte, shifted.to(torch.uint8)))
        stored = torch.stack(codes) if len(codes) > 1 else q.codes.contiguous().unsqueeze(0)
        self.codes = stored.clone() if stored.data_ptr() % 16 else stored  # TMA's alignment
        self.scales = core_order(torch.stack(scales))


def core_order(scales: torch.Tensor) -> torch.Tensor:
    """Scale bytes (passes, rows, blocks), padded with zeros -> (passes, ceil(rows / 128), ceil(blocks / 4), 2, 256)."""
    passes, rows, blocks = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -blocks % 4, 0, -rows % 128))
    tiles = padded.view(passes, -(-rows // 128), 4, 32, -(-blocks // 4), 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(passes, -(-rows // 128), -(-blocks // 4), 2, 256)


def product(a: Operand, b: Operand, out_dtype: torch.dtype = torch.bfloat16, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A_hat (M, K) times B_hat (N, K) transposed, plus a bias (N,): (M, N), bfloat16 or float32, rounded once.

    Raises:
        ValueError: no GPU of compute capability 10 or more, K differs, the bias has no N numbers, or another `out_dtype`.
    """
    device = a.codes.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability[0] < CAPABILITY:
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device}"
        raise ValueError(
            f"native MXFP4 products need a GPU of compute capability {CAPABILITY}.0 or more, and {here} has "
            f"{capability[0]}.{capability[1]}: use matmul.fp8, or dequantise and multiply in BF16"
        )
    return multiply(a, b, out_dtype, bias, **tiling(capability[0], b.codes.shape[1]))


def tiling(capability: int, N: int) -> dict[str, int]:
    """Tile and launch options. Capability 10 multiplies from 128 rows on, out of tensor memory; 12 has a third of its SRAM."""
    if capability == 10:
        return {"BM": 128, "BN": 256 if N > 128 else 128, "BK": 256, "num_warps": 8 if N > 128 else 4, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 128, "num_warps": 8, "num_stages": 3}


@launches
def multiply(a: Operand, b: Operand, out_dtype: torch.dtype, bias: torch.Tensor | None, **tile: int) -> torch.Tensor:
    """`product` on any GPU: Triton multiplies in BF16 where there is nothing native, which is slower and no less exact."""
    (_, M, width), (_, N, _), device = a.codes.shape, b.codes.shape, a.codes.device
    if a.length != b.length:
        raise ValueError(f"A has {a.length} columns and B {b.length}: both are contracted")
    if bias is not None:
        if bias.shape != (N,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {N} output columns")
        bias = bias.contiguous()
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"out_dtype={out_dtype} is not one of torch.bfloat16, torch.float32")
    if not (M and N and width):
        y = torch.zeros(M, N, dtype=out_dtype, device=device)
        return y if bias is None else y + bias.to(out_dtype)
    y = torch.empty(M, N, dtype=out_dtype, device=device)
    BM, BN, BK = tile["BM"], tile["BN"], tile["BK"]
    grid = (triton.cdiv(M, BM) * triton.cdiv(N, BN),)
    _product_kernel[grid](
        TensorDescriptor.from_tensor(a.codes, [1, BM, BK // 2]),
        TensorDescriptor.from_tensor(a.scales, [1, BM // 128, BK // 128, 2, 256]),
        TensorDescriptor.from_tensor(b.codes, [1, BN, BK // 2]),
        TensorDescriptor.from_tensor(b.scales, [1, BN // 128, BK // 128, 2, 256]),
        bias, y, M, N, width * 2,
        PASSES_A=a.codes.shape[0], PASSES_B=b.codes.shape[0], enable_fp_fusion=False, **tile,
    )  # fmt: skip
    return y


@triton.jit
def _block_scales(tile, ROWS: tl.constexpr, BK: tl.constexpr):
    """Scales of a tile as the tensor core wants them -> (rows, blocks)."""
    return tile.reshape(ROWS // 128, BK // 128, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, BK // 32)


@triton.jit
def _product_kernel(
    a_codes, a_scales, b_codes, b_scales, bias_ptr, y_ptr, M, N, K,
    PASSES_A: tl.constexpr, PASSES_B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Programs that run together take 8 tiles of rows by some of columns, whose operands fit the L2 cache.
    high = tl.cdiv(M, BM)
    group = tl.program_id(0) // (8 * tl.cdiv(N, BN))
    height = tl.minimum(high - group * 8, 8)
    within = tl.program_id(0) - group * 8 * tl.cdiv(N, BN)
    tile_m = group * 8 + within % height
    tile_n = within // height
    total = tl.zeros((BM, BN), tl.float32)
    steps = tl.cdiv(K, BK)
    for i in range(PASSES_A * PASSES_B * steps):
        pair = i // steps
        k = i - pair * steps
        pass_a = pair // PASSES_B
        pass_b = pair - pass_a * PASSES_B
        a = a_codes.load([pass_a, tile_m * BM, k * (BK // 2)]).reshape(BM, BK // 2)
        b = b_codes.load([pass_b, tile_n * BN, k * (BK // 2)]).reshape(BN, BK // 2)
        a_s = _block_scales(a_scales.load([pass_a, tile_m * (BM // 128), k * (BK // 128), 0, 0]), BM, BK)
        b_s = _block_scales(b_scales.load([pass_b, tile_n * (BN // 128), k * (BK // 128), 0, 0]), BN, BK)
        total = tl.dot_scaled(a, a_s, "e2m1", b.T, b_s, "e2m1", total)
    rows = tile_m * BM + tl.arange(0, BM)
    columns = tile_n * BN + tl.arange(0, BN)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
