"""Rows that no FP8 container holds: multiplied from their unquantised sources, overwriting what the product left there.

Such rows are rare (a row, or a group of 128 elements, whose block scales spread over more than 15 exponents), but gradients
have a few in nearly every tensor. Programs look at the flags and end at once where there is none, so the host never waits.

Where there are some, every program lists them for itself, and then there are three kinds of tiles of y: wide rows of A times
the container of B, wide rows of B times the container of A, and wide rows of both. A tile is 16 or 32 wide rows and many of the
other side, whose container is half as large as its source and already quantised; only wide rows are quantised again. What the
containers left out of the other side's own wide rows is the third kind's, so every number of y is stored once. Where tiles are
fewer than programs they share a tile's contraction; the last to arrive adds up the partial sums, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mxfp4_kernels.container.triton import Side, Written
from mxfp4_kernels.device import INTERPRETED, constants, exp2_byte, load_tile, over_factor, two_passes
from mxfp4_kernels.launch import Launch, Part, empty
from mxfp4_kernels.matmul.decode import _counters

_PROGRAMS = 4 if INTERPRETED.value else 264  # two a multiprocessor of an H100
_FEW = tl.constexpr(16)  # so many wide rows make tiles of their own kind
_WHOLE = 1 << 30  # elements of a group: a row is one
_LEAST = 256  # elements of the contraction, the least that is worth a part of its own
_COUNTERS = tl.constexpr(256)  # of tiles that are shared, for each of the three kinds


@triton.jit
def x_hat(
    x_ptr, rows, count, columns, K, stride_row, stride_k,
    CARRY: tl.constexpr, SHIFT: tl.constexpr, MACRO: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The operand at some rows and columns, float32 (rows, columns)."""
    x = load_tile(x_ptr, rows, columns, count, K, stride_row, stride_k)
    R: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1]
    first, byte, _v, _b, factor = two_passes(tl.reshape(x, (R, BK // 32, 32)), CARRY, SHIFT, MACRO, LARGEST, False)
    operand = first * exp2_byte(byte)[:, :, None]
    if MACRO > 0:
        operand = over_factor(operand, factor)
    return tl.reshape(operand, (R, BK))


@triton.jit
def repair_rows(
    a_ptr, b_ptr, wide_ptr, bias_ptr, y_ptr, rows, columns, first, last, a_row, a_k, b_row, b_k, y_row, y_column, part, parts,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, MACRO_A: tl.constexpr,
    CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, MACRO_B: tl.constexpr, LARGEST: tl.constexpr,
    BIAS_ALONG_ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """y[r, :] = sum over k = first .. last - 1 of a_hat[r, k] b_hat[:, k], plus a bias, for the flagged rows of A.

    For grouped products: program `part` of `parts` computes every parts-th group of BN columns.
    """
    for r0 in range(0, rows, FLAGS):
        flags = tl.load(wide_ptr + r0 + tl.arange(0, FLAGS), mask=r0 + tl.arange(0, FLAGS) < rows, other=0)
        if tl.max(flags.to(tl.int32), axis=0) > 0:
            for r in range(r0, tl.minimum(r0 + FLAGS, rows)):
                if tl.load(wide_ptr + r) != 0:
                    for c0 in range(part * BN, columns, parts * BN):
                        column = c0 + tl.arange(0, BN)
                        total = tl.zeros((BN,), tl.float32)
                        for k0 in range(first, last, BK):
                            k = k0 + tl.arange(0, BK)
                            row = x_hat(
                                a_ptr, r + tl.arange(0, 1), rows, k, last, a_row, a_k, CARRY_A, SHIFT_A, MACRO_A, LARGEST
                            )
                            tile = x_hat(b_ptr, column, columns, k, last, b_row, b_k, CARRY_B, SHIFT_B, MACRO_B, LARGEST)
                            total += tl.sum(tile * row, axis=1)
                        if bias_ptr is not None:
                            if BIAS_ALONG_ROWS:
                                total += tl.load(bias_ptr + r).to(tl.float32)
                            else:
                                total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
                        at = (r + tl.zeros((BN,), tl.int64)) * y_row + column.to(tl.int64) * y_column
                        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _contained(payload_ptr, scale_ptr, rows, count, k0, LONG, PADDED, GROUP: tl.constexpr, BK: tl.constexpr):
    """What a container holds of the operand at some rows and the BK columns from k0, float32 (rows, BK)."""
    R: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = BK // GROUP if GROUP < BK else 1
    k = k0 + tl.arange(0, BK)
    at = rows[:, None].to(tl.int64) * LONG + k[None, :]
    payload = tl.load(payload_ptr + at, mask=(rows < count)[:, None] & (k < LONG)[None, :], other=0)
    if INTERPRETED:  # which does not read NaN, nor keep these numbers' sizes
        bits = payload.to(tl.int32)
        value = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), tl.where(bits > 127, -value, value))
    else:
        value = payload.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    group = k0 // GROUP + tl.arange(0, GROUPS)
    scale_at = group[None, :].to(tl.int64) * PADDED + rows[:, None]
    scale = tl.load(scale_ptr + scale_at, mask=(rows < count)[:, None] & (group * GROUP < LONG)[None, :], other=0.0)
    return tl.reshape(tl.reshape(value, (R, GROUPS, BK // GROUPS)) * scale[:, :, None], (R, BK))


@triton.jit
def _listed(wide_ptr, list_ptr, rows, FLAGS: tl.constexpr):
    """Store the numbers of the flagged rows in order, and return how many there are. All programs store the same."""
    count = rows * 0
    for r0 in range(0, rows, FLAGS):
        r = r0 + tl.arange(0, FLAGS)
        flag = tl.load(wide_ptr + r, mask=r < rows, other=0).to(tl.int32)
        found = tl.sum(flag, axis=0)
        if found > 0:
            tl.store(list_ptr + (count - 1 + tl.cumsum(flag, axis=0)), r, mask=flag != 0)
        count += found
    return count


@triton.jit
def _store(total, row, column, mask, bias_ptr, y_ptr, y_row, y_column, BIAS_ALONG_ROWS: tl.constexpr):
    """y at some rows and columns, `total` and the bias."""
    if bias_ptr is not None:
        if BIAS_ALONG_ROWS:
            total += tl.load(bias_ptr + row[:, None] + 0 * column[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            total += tl.load(bias_ptr + 0 * row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * y_row + column.to(tl.int64)[None, :] * y_column
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tiles(
    a_ptr, list_ptr, wide_rows, M, a_row, a_k, b_ptr, scale_ptr, other_ptr, N, b_row, b_k, K, LONG, PADDED,
    bias_ptr, y_ptr, y_row, y_column, partial_ptr, arrived_ptr, start,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, MACRO_A: tl.constexpr,
    CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, MACRO_B: tl.constexpr, LARGEST: tl.constexpr,
    GROUP: tl.constexpr, PAIRS: tl.constexpr, BIAS_ALONG_ROWS: tl.constexpr, PRECISE: tl.constexpr,
    BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ITEMS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """y of A's wide rows, and the first program of the next kind of tiles. `start` is this program's first item.

    Columns are B's rows: those of its container that are complete, whose flags are at other_ptr, or if PAIRS its own wide rows,
    `PADDED` of them listed at other_ptr and read from their source.
    """
    groups = tl.cdiv(wide_rows, BW)
    tiles = groups * tl.cdiv(PADDED if PAIRS else N, BN)
    steps = tl.cdiv(K, BK)
    splits = tl.maximum(tl.minimum(ITEMS // tiles, tl.cdiv(K, LEAST)), 1)
    ROWS: tl.constexpr = min(BW, 1024 // BN)  # whose partial sums are added up at once
    n, w = tl.arange(0, BN), tl.arange(0, BW)
    for item in range(start, tiles * splits, tl.num_programs(0)):
        tile, split = item // splits, item % splits
        rank = tile % groups * BW + w
        row_there = rank < wide_rows
        row = tl.load(list_ptr + rank, mask=row_there, other=M, cache_modifier=".cg")
        column = tile // groups * BN + n
        if PAIRS:
            there = column < PADDED
            column = tl.load(other_ptr + column, mask=there, other=N, cache_modifier=".cg")
        else:
            there = tl.load(other_ptr + column, mask=column < N, other=1) == 0
        if tl.max(there.to(tl.int32), axis=0) > 0:
            total = tl.zeros((BN, BW), tl.float32)
            for step in range(steps * split // splits, steps * (split + 1) // splits):
                k0 = step * BK
                k = k0 + tl.arange(0, BK)
                wide = x_hat(a_ptr, row, M, k, K, a_row, a_k, CARRY_A, SHIFT_A, MACRO_A, LARGEST)
                if PAIRS:
                    other = x_hat(b_ptr, column, N, k, K, b_row, b_k, CARRY_B, SHIFT_B, MACRO_B, LARGEST)
                else:
                    other = _contained(b_ptr, scale_ptr, column, N, k0, LONG, PADDED, GROUP, BK)
                if PRECISE:  # factors leave more bits than BF16 has
                    total = tl.dot(other, tl.trans(wide), total, input_precision="tf32x3")
                else:
                    total = tl.dot(other.to(tl.bfloat16), tl.trans(wide.to(tl.bfloat16)), total)
            if splits > 1:
                at = w[None, :] * BN + n[:, None]
                tl.store(partial_ptr + (item * (BN * BW) + at), total, mask=row_there[None, :] & there[:, None])
                tl.debug_barrier()  # all threads' sums are stored before the one that counts says so
                if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == splits - 1:
                    tl.store(arrived_ptr + tile, 0)
                    first = tile % groups * BW
                    for ours0 in range(first, tl.minimum(first + BW, wide_rows), ROWS):
                        ours = ours0 + tl.arange(0, ROWS)
                        our_row = tl.load(list_ptr + ours, mask=ours < wide_rows, other=M, cache_modifier=".cg")
                        mask = (our_row < M)[:, None] & there[None, :]
                        place = tile * splits * (BN * BW) + (ours - first)[:, None] * BN + n[None, :]
                        sums = tl.zeros((ROWS, BN), tl.float32)
                        for s0 in range(0, splits, 4):  # four loads are under way at once
                            for s in tl.static_range(4):
                                part = partial_ptr + (place + (s0 + s) * (BN * BW))
                                sums += tl.load(
                                    part, mask=mask & (s0 + s + 0 * place < splits), other=0.0, cache_modifier=".cg"
                                )
                        _store(sums, our_row, column, mask, bias_ptr, y_ptr, y_row, y_column, BIAS_ALONG_ROWS)
            else:
                all_there = row_there[:, None] & there[None, :]
                _store(tl.trans(total), row, column, all_there, bias_ptr, y_ptr, y_row, y_column, BIAS_ALONG_ROWS)
    programs = tl.num_programs(0)
    return (start + programs - tiles * splits % programs) % programs


@triton.jit
def _repair_kernel(
    a_ptr, b_ptr, payload_a_ptr, payload_b_ptr, scale_a_ptr, scale_b_ptr, wide_a_ptr, wide_b_ptr, any_a_ptr, any_b_ptr,
    bias_ptr, y_ptr, list_a_ptr, list_b_ptr, partial_ptr, arrived_ptr,
    M, N, K, a_row, a_k, b_row, b_k, y_row, y_column, LONG, PADDED_A, PADDED_B, REGION,
    CARRY_A: tl.constexpr, SHIFT_A: tl.constexpr, MACRO_A: tl.constexpr, GROUP_A: tl.constexpr,
    CARRY_B: tl.constexpr, SHIFT_B: tl.constexpr, MACRO_B: tl.constexpr, GROUP_B: tl.constexpr, LARGEST: tl.constexpr,
    PRECISE: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ITEMS: tl.constexpr,
    MANY_BW: tl.constexpr, MANY_BN: tl.constexpr, MANY_BK: tl.constexpr, MANY_ITEMS: tl.constexpr,
    PAIR_BN: tl.constexpr, LEAST: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    if (tl.load(any_a_ptr) | tl.load(any_b_ptr)) != 0:
        wide_a = _listed(wide_a_ptr, list_a_ptr, M, FLAGS)
        wide_b = _listed(wide_b_ptr, list_b_ptr, N, FLAGS)
        tl.debug_barrier()
        start = tl.program_id(0)
        if (wide_a > 0) & (wide_a <= _FEW):
            start = _tiles(
                a_ptr, list_a_ptr, wide_a, M, a_row, a_k, payload_b_ptr, scale_b_ptr, wide_b_ptr, N, b_row, b_k, K,
                LONG, PADDED_B, bias_ptr, y_ptr, y_row, y_column, partial_ptr, arrived_ptr, start,
                CARRY_A, SHIFT_A, MACRO_A, CARRY_B, SHIFT_B, MACRO_B, LARGEST,
                GROUP_B, False, False, PRECISE, BW, BN, BK, ITEMS, LEAST,
            )  # fmt: skip
        if wide_a > _FEW:
            start = _tiles(
                a_ptr, list_a_ptr, wide_a, M, a_row, a_k, payload_b_ptr, scale_b_ptr, wide_b_ptr, N, b_row, b_k, K,
                LONG, PADDED_B, bias_ptr, y_ptr, y_row, y_column, partial_ptr, arrived_ptr, start,
                CARRY_A, SHIFT_A, MACRO_A, CARRY_B, SHIFT_B, MACRO_B, LARGEST,
                GROUP_B, False, False, PRECISE, MANY_BW, MANY_BN, MANY_BK, MANY_ITEMS, LEAST,
            )  # fmt: skip
        if (wide_b > 0) & (wide_b <= _FEW):
            start = _tiles(
                b_ptr, list_b_ptr, wide_b, N, b_row, b_k, payload_a_ptr, scale_a_ptr, wide_a_ptr, M, a_row, a_k, K,
                LONG, PADDED_A, bias_ptr, y_ptr, y_column, y_row, partial_ptr + REGION, arrived_ptr + _COUNTERS, start,
                CARRY_B, SHIFT_B, MACRO_B, CARRY_A, SHIFT_A, MACRO_A, LARGEST,
                GROUP_A, False, True, PRECISE, BW, BN, BK, ITEMS, LEAST,
            )  # fmt: skip
        if wide_b > _FEW:
            start = _tiles(
                b_ptr, list_b_ptr, wide_b, N, b_row, b_k, payload_a_ptr, scale_a_ptr, wide_a_ptr, M, a_row, a_k, K,
                LONG, PADDED_A, bias_ptr, y_ptr, y_column, y_row, partial_ptr + REGION, arrived_ptr + _COUNTERS, start,
                CARRY_B, SHIFT_B, MACRO_B, CARRY_A, SHIFT_A, MACRO_A, LARGEST,
                GROUP_A, False, True, PRECISE, MANY_BW, MANY_BN, MANY_BK, MANY_ITEMS, LEAST,
            )  # fmt: skip
        if (wide_a > 0) & (wide_b > 0):
            _tiles(
                a_ptr, list_a_ptr, wide_a, M, a_row, a_k, b_ptr, None, list_b_ptr, N, b_row, b_k, K,
                LONG, wide_b, bias_ptr, y_ptr, y_row, y_column, partial_ptr + 2 * REGION, arrived_ptr + 2 * _COUNTERS, start,
                CARRY_A, SHIFT_A, MACRO_A, CARRY_B, SHIFT_B, MACRO_B, LARGEST,
                0, True, False, PRECISE, MANY_BW, PAIR_BN, MANY_BK, MANY_ITEMS, LEAST,
            )  # fmt: skip


class repair:
    """Overwrites the rows and columns of y (M, N) = A B^T + bias that the containers of A and B left out.

    Made once for sides, y and bias alike; it takes both matrices, their containers, y and the bias.
    """

    def __init__(self, a: Side, b: Side, y: torch.Tensor, bias: torch.Tensor | None = None):
        (M, N), K = y.shape, a.shape[1]
        how_a, how_b = constants(a.recipe), constants(b.recipe)
        macro = max(how_a["GROUP"], how_b["GROUP"])
        if macro:
            few = many = {"BW": 16, "BN": 32, "BK": 32 * max(macro, 2), "ITEMS": 512}
            pair, options = 32, {"num_warps": 4 if macro <= 4 else 8}
        else:
            few, many = {"BW": 16, "BN": 128, "BK": 64, "ITEMS": 512}, {"BW": 32, "BN": 128, "BK": 32, "ITEMS": 512}
            pair, options = 64, {"num_warps": 8, "maxnreg": 128}  # two programs a multiprocessor
        # Of partial sums: only tiles that are fewer than ITEMS have any, and no more parts than K has.
        parts = triton.cdiv(K, _LEAST)
        self.region = max(
            0 if parts == 1 else min(how["ITEMS"] * how["BW"] * how["BN"], parts * (M + how["BN"]) * (N + how["BN"]))
            for how in (few, many)
        )
        self.rows = triton.cdiv(M, 4) * 4, triton.cdiv(N, 4) * 4  # of lists: both start at a multiple of 16 bytes
        self.device = y.device
        sides = a, b
        whole = [_WHOLE if side.scales[0] == 1 else side.group for side in sides]
        # The tensors: both matrices, payloads, scales and buffers, y, lists, partial sums, counters, the bias.
        self.launch = Launch(
            _repair_kernel, (_PROGRAMS,),
            [
                Part(0), Part(1), Part(2, 0, torch.uint8), Part(3, 0, torch.uint8), Part(4), Part(5),
                *(Part(6 + i, side.flags, torch.uint8) for i, side in enumerate(sides)),
                *(Part(6 + i, side.flags + side.size[0], torch.uint8) for i, side in enumerate(sides)),
                Part(12) if bias is not None else None, Part(8),
                Part(9), Part(9, self.rows[0] * 4, torch.int32), Part(10), Part(11),
            ],
            (M, N, K, *a.strides, *b.strides, *y.stride(), a.size[1], a.size[0], b.size[0], self.region),
            CARRY_A=how_a["CARRY"], SHIFT_A=how_a["SHIFT"], MACRO_A=how_a["GROUP"], GROUP_A=whole[0],
            CARRY_B=how_b["CARRY"], SHIFT_B=how_b["SHIFT"], MACRO_B=how_b["GROUP"], GROUP_B=whole[1],
            LARGEST=how_a["LARGEST"], PRECISE=macro > 0 or INTERPRETED.value,
            **few, **{f"MANY_{name}": value for name, value in many.items()}, PAIR_BN=pair,
            LEAST=_LEAST, FLAGS=2048, num_stages=1, enable_fp_fusion=False, **options,
        )  # fmt: skip

    def __call__(
        self, a: torch.Tensor, b: torch.Tensor, in_a: Written, in_b: Written, y: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        lists = empty((sum(self.rows),), torch.int32, self.device)
        partial = empty((3 * self.region + 4,), torch.float32, self.device)
        captured = y.is_cuda and torch.cuda.is_current_stream_capturing()
        arrived = _counters(self.device, 3 * _COUNTERS.value, captured)
        self.launch(
            a, b, in_a.payload, in_b.payload, in_a.scale, in_b.scale, in_a.buffer, in_b.buffer, y, lists, partial, arrived,
            *(() if bias is None else (bias,)),
        )  # fmt: skip
