"""Products of a mixture of experts: tokens sorted by expert, offsets (E + 1,) on the device, which the host never reads.

    Y[t]  = W[e(t)] x[t]        `grouped_product`, also dX[t] = W[e(t)]^T g[t], with the weights transposed
    dW[e] = G_e^T X_e           `grouped_wgrad`, a contraction over the tokens of an expert

Operands are FP8 containers, which hold MXFP4 without losing a bit (one power of two a row, applied at the end), or plain
16-bit tensors; one kernel a product for both. A tile may read past its expert's rows into the next one's: their products are
not stored. Rows that no container holds are multiplied again from their sources (`grouped_repair.py`). Wgrads of many tokens in
BF16 are PyTorch's on Hopper, where its kernel is the faster one.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mxfp4_kernels.container.reference import MULTIPLE, Container, fits_rows
from mxfp4_kernels.device import BLOCK, launches
from mxfp4_kernels.matmul.grouped_operands import Experts, TokenContainer, Tokens
from mxfp4_kernels.matmul.grouped_repair import repair
from mxfp4_kernels.matmul.operand import Operand

PROMOTED = 128  # FP8 products that the tensor core sums in its own 14 bits before they are added in float32
# The tensor core waits while a program promotes its sums, so two share a multiprocessor. That leaves 128 registers to a thread,
# which its two accumulators alone would fill: four of them go to local memory and back in a step.
_PROMOTING = {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
_FLOATS = (torch.bfloat16, torch.float16)
_OUTPUTS = (*_FLOATS, torch.float32)


@triton.jit(do_not_specialize=["T", "LIMIT"])
def _schedule_kernel(
    offsets_ptr, tiles_ptr, total_ptr, T, E, LIMIT, BM: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):
    """The row tiles of all experts: (expert, first row) each, and how many. Expert E owns the rows behind the last one."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    starts = tl.load(offsets_ptr + every, mask=every < E, other=0)
    stops = tl.load(offsets_ptr + every + 1, mask=every < E, other=0)
    before = tl.sum(tl.where(every < expert, (stops - starts + BM - 1) // BM, 0), axis=0)
    first = tl.load(offsets_ptr + expert)
    last = tl.minimum(tl.load(offsets_ptr + expert + 1, mask=expert < E, other=T), T)
    count = tl.cdiv(tl.maximum(last - first, 0), BM)
    for i in range(0, count, CHUNK):
        own = i + tl.arange(0, CHUNK)
        mask = (own < count) & (before + own < LIMIT)
        tl.store(tiles_ptr + 2 * (before + own), expert + tl.zeros((CHUNK,), tl.int32), mask=mask)
        tl.store(tiles_ptr + 2 * (before + own) + 1, first + own * BM, mask=mask)
    if expert == E:
        tl.store(total_ptr, tl.minimum(before + count, LIMIT))


@triton.jit
def _dot(a, b, total, PROMOTE: tl.constexpr):
    """total + a b; FP8 products are summed PROMOTE at a time (0: however many) before they are promoted to float32."""
    if PROMOTE > 0:
        return tl.dot(a, b, total, max_num_imprecise_acc=min(PROMOTE, a.shape[1]))
    else:
        return tl.dot(a, b, total)


@triton.jit(do_not_specialize=["T"])
def _product_kernel(
    a, b, y_ptr, a_scale_ptr, b_scale_ptr, offsets_ptr, tiles_ptr, total_ptr, T, E, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FP8: tl.constexpr, PROMOTE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    SWAP: tl.constexpr = BM < 64  # few rows: the weights are the tensor core's 64 rows, the tokens its columns
    column_tiles = tl.cdiv(N, BN)
    row_tiles = tl.load(total_ptr)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        # Bands of GROUP row tiles, rows fastest: concurrent programs share their experts' weights and a band of tokens.
        band = tile // (GROUP * column_tiles)
        height = tl.minimum(row_tiles - band * GROUP, GROUP)
        within = tile - band * GROUP * column_tiles
        row_tile = band * GROUP + within % height
        column = within // height * BN
        expert = tl.load(tiles_ptr + 2 * row_tile)
        row = tl.load(tiles_ptr + 2 * row_tile + 1)
        last = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=T)
        depth = tl.where(expert < E, K, 0)
        total = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        for k in range(0, depth, BK):
            x = a.load([row, k])
            w = b.load([expert * K + k, column]).T if TRANSPOSED else b.load([expert * N + column, k])
            total = _dot(w, x.T, total, PROMOTE) if SWAP else _dot(x, w.T, total, PROMOTE)
        if SWAP:
            total = total.T
        rows = row + tl.arange(0, BM)
        columns = column + tl.arange(0, BN)
        in_rows = rows < tl.minimum(last, T)
        if FP8:
            a_scale = tl.load(a_scale_ptr + rows, mask=in_rows, other=0.0)
            b_scale = tl.load(b_scale_ptr + tl.minimum(expert, E - 1) * N + columns, mask=columns < N, other=0.0)
            total = total * a_scale[:, None] * b_scale[None, :]
        at = rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (columns < N)[None, :])


@triton.jit
def _wgrad_kernel(
    a, b, a_block, b_block, y_ptr, a_scale_ptr, b_scale_ptr, offsets_ptr, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, FP8: tl.constexpr, PROMOTE: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(K, BN)
    tiles = tl.cdiv(N, BM) * column_tiles
    expert = tl.program_id(0) // tiles
    within = tl.program_id(0) % tiles
    row = within // column_tiles * BM
    column = within % column_tiles * BN
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    begin = first // 32 * 32 if FP8 else first  # no other first token is allowed there
    whole = begin + tl.maximum(last - begin, 0) // BT * BT
    total = tl.zeros((BM, BN), tl.float32)
    for t in range(begin, whole, BT):
        if FP8:
            total = _dot(a.load([row, t]), b.load([column, t]).T, total, PROMOTE)
        else:
            total = _dot(a.load([t, row]).T, b.load([t, column]), total, PROMOTE)
    for t in range(whole, last, 32):
        if FP8:
            total = _dot(a_block.load([row, t]), b_block.load([column, t]).T, total, PROMOTE)
        else:  # the last block may hold the next expert's tokens
            keep = (t + tl.arange(0, 32) < last)[:, None]
            g = tl.where(keep, a_block.load([t, row]), 0.0)
            x = tl.where(keep, b_block.load([t, column]), 0.0)
            total = _dot(g.T, x, total, PROMOTE)
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    if FP8:
        a_scale = tl.load(a_scale_ptr + expert.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
        b_scale = tl.load(b_scale_ptr + expert.to(tl.int64) * K + columns, mask=columns < K, other=0.0)
        total = total * a_scale[:, None] * b_scale[None, :]
        total = tl.where((first | last) % 32 == 0, total, float("nan"))  # a block with tokens of two experts
    at = (expert.to(tl.int64) * N + rows[:, None]) * K + columns[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (columns < K)[None, :])


@launches
def grouped_product(
    a: Operand | torch.Tensor,
    b: Experts | torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    exact: bool = True,
) -> torch.Tensor:
    """Y[t] = W[e(t)] x[t], the product of every token with its expert's weight: (T, N).

    No autograd: the result has no gradient.

    Args:
        a: tokens sorted by expert, (T, K): an Operand of whole rows, or bfloat16 or float16.
        b: weights (E, N, K): Experts, or of A's dtype and any strides. For a dgrad A is G (T, N) and B the weights with
            their last two axes exchanged: `weights.transpose(1, 2)`, or Experts of it.
        offsets: int32 (E + 1,): expert e owns the tokens from offsets[e] to offsets[e + 1], from 0 on and in order. Rows
            behind the last expert's are zero in Y.
        exact: promote FP8 partial sums to float32 every 128 products; False leaves them to the tensor core.

    Raises:
        ValueError: operands of two kinds, of other dtypes or of shapes that do not multiply; rows of several scales; K or N
            no multiple of 16.
    """
    fp8 = _fp8(a, b)
    x, w = (a.source, b.source) if fp8 else (a, b)
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"A {tuple(x.shape)} and B {tuple(w.shape)} must be (T, K) and (E, N, K)")
    if fp8 and not isinstance(a.container, Container):
        raise ValueError("A is quantised along its tokens: give an Operand quantised along K")
    if fp8 and not a.container.scale.shape[0] == b.container.scale.shape[0] == 1:
        raise ValueError("a grouped product has a scale a row: make operands of whole rows")
    (T, K), (E, N, _) = x.shape, w.shape
    _check(x, w, offsets, E, out_dtype, N=N, K=K)
    if not (T and N and E and K):
        return x.new_zeros(T, N, dtype=out_dtype)
    y = x.new_empty(T, N, dtype=out_dtype)
    tile, launch, per_processor = product_tiling(T, E, fp8, exact)
    if fp8:
        x, w, transposed, scales = a.container.payload, b.container.payload, False, (a.container.scale, b.container.scale)
    else:
        (w, transposed), scales = _matrix_of(w), (None, None)
    if transposed:  # a step of the contraction must not reach into the next expert's weight
        tile["BK"] = min(tile["BK"], K & -K)
    BM, BN, BK = tile.values()
    limit = min(T, T // BM + E + 1)
    schedule = torch.empty(4 + 2 * limit, dtype=torch.int32, device=x.device)
    total, tiles = schedule, schedule[4:]  # apart, so that both are aligned
    every = {"EXPERTS": triton.next_power_of_2(E), "CHUNK": 128}
    _schedule_kernel[(E + 1,)](offsets, tiles, total, T, E, limit, BM=BM, **every)
    _product_kernel[(min(_processors(x.device) * per_processor, limit * triton.cdiv(N, BN)),)](
        _descriptor(x, BM, BK), _descriptor(w, *((BK, BN) if transposed else (BN, BK))), y, *scales, offsets, tiles, total,
        T, E, N, K, FP8=fp8, PROMOTE=PROMOTED if fp8 and exact else 0, TRANSPOSED=transposed, GROUP=8,
        enable_fp_fusion=True, **tile, **launch,
    )  # fmt: skip
    if fp8:
        repair(a, b, y, offsets, wgrad=False)
    return y


@launches
def grouped_wgrad(
    g: Tokens | torch.Tensor,
    x: Tokens | torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    exact: bool = True,
) -> torch.Tensor:
    """dW[e] = sum over the tokens t of expert e of g[t] x[t]^T: (E, N, K), zero for experts without tokens.

    No autograd: the result has no gradient.

    Args:
        g, x: tokens sorted by expert, (T, N) and (T, K): both Tokens, or both bfloat16 or float16.
        offsets: as in `grouped_product`. For Tokens every offset must be a multiple of 32 (`align_to_blocks`); the result
            of others is undefined.
        exact: as in `grouped_product`.

    Raises:
        ValueError: operands of two kinds, of other dtypes or of another number of tokens; N, K, or for Tokens T, is no
            multiple of 16.
    """
    fp8 = _fp8(g, x)
    a, b = (g.source, x.source) if fp8 else (g, x)
    if fp8 and not all(isinstance(side.container, TokenContainer) for side in (g, x)):
        raise ValueError("operands of a wgrad are quantised along tokens: give Tokens")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"G {tuple(a.shape)} and X {tuple(b.shape)} must be (T, N) and (T, K)")
    (T, N), K, E = a.shape, b.shape[1], max(offsets.numel() - 1, 0)
    _check(a, b, offsets, E, out_dtype, N=N, K=K, **({"T": T} if fp8 else {}))
    if not (T and N and K and E):
        return a.new_zeros(E, N, K, dtype=out_dtype)
    if not fp8 and _pytorch_is_faster(a, b, E, out_dtype):
        with torch.no_grad():
            return torch._grouped_mm(a.t(), b, offs=offsets[1:])
    y = a.new_empty(E, N, K, dtype=out_dtype)
    tile, launch = wgrad_tiling(fp8, exact)
    BM, BN, BT = tile.values()
    if fp8:
        a, b, scales = g.container.payload, x.container.payload, (g.container.scale, x.container.scale)
        blocks = [_descriptor(m, side, depth) for depth in (BT, BLOCK) for m, side in ((a, BM), (b, BN))]
    else:
        scales = None, None
        blocks = [_descriptor(m, depth, side) for depth in (BT, BLOCK) for m, side in ((a, BM), (b, BN))]
    _wgrad_kernel[(E * triton.cdiv(N, BM) * triton.cdiv(K, BN),)](
        *blocks, y, *scales, offsets, N, K, FP8=fp8, PROMOTE=PROMOTED if fp8 and exact else 0, enable_fp_fusion=True,
        **tile, **launch,
    )  # fmt: skip
    if fp8:
        repair(g, x, y, offsets, wgrad=True)
    return y


def product_tiling(T: int, E: int, fp8: bool, exact: bool) -> tuple[dict[str, int], dict[str, int], int]:
    """Tile, launch options and programs a multiprocessor, by tokens an expert."""
    tokens, depth = T / E, 128 if fp8 else 64
    if tokens <= 64:  # bound by the weights' bytes: many stages in flight
        rows, programs = (16, 3) if tokens <= 16 else (64, 2)
        return {"BM": rows, "BN": 128, "BK": depth}, {"num_warps": 4, "num_stages": 4}, programs
    if fp8 and exact:
        return {"BM": 128, "BN": 128, "BK": depth}, _PROMOTING, 2
    return {"BM": 128, "BN": 256, "BK": depth}, {"num_warps": 8, "num_stages": 3}, 1


def wgrad_tiling(fp8: bool, exact: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Tile and launch options. An expert's tokens are few steps, so a second program hides the first one's ends."""
    launch = _PROMOTING if fp8 and exact else {"num_warps": 8, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BT": 128 if fp8 else 64}, launch


def _pytorch_is_faster(g: torch.Tensor, x: torch.Tensor, experts: int, out_dtype: torch.dtype) -> bool:
    """Whether `torch._grouped_mm` computes this wgrad, and in less time: 0.8 of ours, measured from 64 tokens an expert on.

    Only on Hopper, where it writes zeros for experts without tokens; on Blackwell it does not (pytorch issue 172439).
    """
    return (
        g.is_cuda
        and g.dtype == out_dtype == torch.bfloat16
        and g.shape[0] >= 64 * experts
        and experts < 1024  # PyTorch's limit
        and _is_hopper(g.device)
        and _fetchable(g)
        and _fetchable(x)
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _fp8(a, b) -> bool:
    """Whether both sides are containers; raises where they are neither that nor 16-bit tensors of one dtype."""
    operands = [isinstance(side, Operand) for side in (a, b)]
    if operands[0] != operands[1]:
        raise ValueError("one side is an Operand and the other a tensor: quantise both, or dequantise both")
    if operands[0] and not (fits_rows(a.recipe) and fits_rows(b.recipe)):
        raise ValueError("a grouped product needs one scale a row: Operands of plain MXFP4 recipes")
    if not operands[0] and (a.dtype != b.dtype or a.dtype not in _FLOATS):
        raise ValueError(f"operands of {a.dtype} and {b.dtype}: both must be bfloat16, or float16")
    return operands[0]


def _check(a, b, offsets, experts: int, out_dtype: torch.dtype, **sizes: int) -> None:
    if out_dtype not in _OUTPUTS:
        raise ValueError(f"out_dtype={out_dtype} is not one of bfloat16, float16, float32")
    shape = (experts + 1,)
    right = offsets.dtype == torch.int32 and tuple(offsets.shape) == shape and offsets.device == a.device
    if not (right and offsets.is_contiguous()):
        have = f"{offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
        raise ValueError(f"offsets must be contiguous torch.int32 {shape} on {a.device}, not {have}")
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(f"{name}={size} must be a multiple of {MULTIPLE} for a grouped product")


def _matrix_of(b: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Weights (E, N, K) as a matrix (E * N, K), or (E * K, N) where that is how they lie: the matrix, and which."""
    transposed = b.stride(2) != 1 and b.stride(1) == 1
    b = b.transpose(1, 2) if transposed else b
    return b.reshape(-1, b.shape[2]), transposed


def _fetchable(x: torch.Tensor) -> bool:
    """Whether a matrix lies as the copy engine needs it: rows that do not overlap, each at a multiple of 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1] and not (x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16)


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of a matrix as the copy engine fetches them, zero outside of it; copied if it does not lie as that needs."""
    x = x if _fetchable(x) else x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(x, [rows, columns])


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
