"""Decode attention over a packed KV cache, in Triton: codes and scales go from memory to registers, and nothing else does.

One program takes one sequence, one head of keys and values with all queries that share it (padded to 16 rows, so that a tensor
core can multiply), and one part of the packed tokens; one more takes sinks and open block. Each leaves a running maximum, a sum
and weighted values in float32, and a second kernel puts the parts together (Flash-Decoding).

Neither operand is ever interleaved. A byte holds two channels of a key: q . k is the sum of a product over even channels, with
low nibbles, and one over odd channels, with high ones. A byte holds two tokens of a value: even and odd tokens get a product
each, so a tile's logits are computed as two halves, of even and of odd tokens.

E2M1 code s|ee|m shifted to the top of a float32's exponent is its value times 2^-126, and E4M3 likewise times 2^-120,
subnormal numbers included. Code times scales is exact in BF16 (see `mxfp4_rl.kv_cache.blocks`), as which it is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_kernels.device import exp2_byte


@triton.jit
def _e2m1(nibble):
    """Codes in the low four bits of int32 -> float32 values."""
    bits = ((nibble & 7) << 22) | ((nibble & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def _scales(bytes_, E8M0: tl.constexpr):
    """Bytes of scales, int32 -> float32. E4M3's NaN does not come: its block's exponent is NaN."""
    if E8M0:
        return exp2_byte(bytes_)
    else:
        return (bytes_ << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _values(codes, scales, TYPE: tl.constexpr):
    """Packed codes int32 (A, W), with scales float32 (A, n) for W / n bytes each: low and high nibbles' values (A, W)."""
    A: tl.constexpr = codes.shape[0]
    W: tl.constexpr = codes.shape[1]
    N: tl.constexpr = scales.shape[1]
    blocks = tl.reshape(codes, (A, N, W // N))
    low = tl.reshape(_e2m1(blocks) * scales[:, :, None], (A, W))
    high = tl.reshape(_e2m1(blocks >> 4) * scales[:, :, None], (A, W))
    return low.to(TYPE), high.to(TYPE)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dense(acc, largest, total, q, k_ptr, v_ptr, count, scale, D: tl.constexpr, TT: tl.constexpr, TYPE: tl.constexpr):
    """Attend to `count` tokens (tokens, D) as they are."""
    c = tl.arange(0, D)
    for t0 in range(0, count, TT):
        t = t0 + tl.arange(0, TT)
        there = t < count
        at = t[:, None] * D + c[None, :]
        k = tl.load(k_ptr + at, mask=there[:, None], other=0.0).to(TYPE)
        logits = tl.where(there[None, :], _product(q, tl.trans(k)) * scale, float("-inf"))
        above = tl.maximum(largest, tl.max(logits, 1))
        weights, shrink = tl.exp2(logits - above[:, None]), tl.exp2(largest - above)
        v = tl.load(v_ptr + at, mask=there[:, None], other=0.0).to(TYPE)
        acc = acc * shrink[:, None] + _product(weights.to(TYPE), v)
        total = total * shrink + tl.sum(weights, 1)
        largest = above
    return acc, largest, total


@triton.jit
def _keys(k_ptr, ks_ptr, exponent, t, there, D: tl.constexpr, SIZE: tl.constexpr, E8M0: tl.constexpr, TYPE: tl.constexpr):
    """Keys of tokens t, even and odd channels: (tokens, D / 2) each. `exponent`: float32 (tokens,), or None."""
    c, s = tl.arange(0, D // 2), tl.arange(0, D // SIZE)
    codes = tl.load(k_ptr + (t[:, None] * (D // 2) + c[None, :]), mask=there[:, None], other=0).to(tl.int32)
    scales = tl.load(ks_ptr + (t[:, None] * (D // SIZE) + s[None, :]), mask=there[:, None], other=0).to(tl.int32)
    scales = _scales(scales, E8M0)
    if exponent is not None:
        scales = scales * exponent[:, None]
    return _values(codes, scales, TYPE)


@triton.jit
def partial_kernel(
    q_ptr, k_ptr, ks_ptr, ke_ptr, v_ptr, vs_ptr, ve_ptr, sink_k_ptr, sink_v_ptr, open_k_ptr, open_v_ptr,
    lengths_ptr, packed_ptr, acc_ptr, stat_ptr, scale, H, N, S,
    G: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, B: tl.constexpr, TT: tl.constexpr, SIZE: tl.constexpr,
    E8M0: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of the packed tokens of head `program_id(0)`; the last part is sinks and open block.

    Args:
        q_ptr: (R, H * G, D). k_ptr, ks_ptr, ke_ptr: codes, scales, exponents (None for E8M0) of R x H x N blocks; v likewise.
        lengths_ptr, packed_ptr: int32 (R,).
        acc_ptr: float32 (R * H, parts, G, D). stat_ptr: float32 (R * H, parts, 2, G): largest logit, sum of weights.
        scale: times log2(e). TT: tokens of a tile; a multiple of B, or B of it. SIZE: elements that share a scale.
    """
    head, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = head // H
    length, count = tl.load(lengths_ptr + row), tl.load(packed_ptr + row) * B
    g = tl.arange(0, BM)
    q_ptr += head * (G * D) + g[:, None] * D
    acc = tl.zeros((BM, D), tl.float32)
    largest = tl.full((BM,), -1e30, tl.float32)  # not -inf: the difference of two of them would be NaN
    total = tl.zeros((BM,), tl.float32)
    c = tl.arange(0, D)
    if part == parts - 1:
        q = tl.load(q_ptr + c[None, :], mask=(g < G)[:, None], other=0.0).to(TYPE)
        sinks = tl.minimum(length, S)
        sink_k_ptr += head * S * D
        sink_v_ptr += head * S * D
        acc, largest, total = _dense(acc, largest, total, q, sink_k_ptr, sink_v_ptr, sinks, scale, D, 16, TYPE)
        open_k_ptr += head * (B * D)
        open_v_ptr += head * (B * D)
        rest = length - sinks - count
        acc, largest, total = _dense(acc, largest, total, q, open_k_ptr, open_v_ptr, rest, scale, D, 16, TYPE)
    else:
        half = tl.arange(0, D // 2) * 2
        q_even = tl.load(q_ptr + half[None, :], mask=(g < G)[:, None], other=0.0).to(TYPE)
        q_odd = tl.load(q_ptr + (half + 1)[None, :], mask=(g < G)[:, None], other=0.0).to(TYPE)
        first = head * N  # of this head's blocks
        k_ptr += first * (B * D // 2)
        ks_ptr += first * (B * D // SIZE)
        v_ptr += first * (B * D // 2)
        vs_ptr += first * (B * D // SIZE)
        tiles = tl.cdiv(tl.cdiv(count, TT), parts - 1)
        pair, s = tl.arange(0, TT // 2), tl.arange(0, TT // SIZE)
        for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(count, TT))):
            t0 = tile * TT
            even = t0 + 2 * pair
            there = even < count  # and so are odd tokens: count is even
            k_exponent = None
            if not E8M0:
                k_exponent = exp2_byte(tl.load(ke_ptr + first + even // B, mask=there, other=0).to(tl.int32))
            low, high = _keys(k_ptr, ks_ptr, k_exponent, even, there, D, SIZE, E8M0, TYPE)
            of_even = (_product(q_even, tl.trans(low)) + _product(q_odd, tl.trans(high))) * scale
            low, high = _keys(k_ptr, ks_ptr, k_exponent, even + 1, there, D, SIZE, E8M0, TYPE)
            of_odd = (_product(q_even, tl.trans(low)) + _product(q_odd, tl.trans(high))) * scale
            of_even = tl.where(there[None, :], of_even, float("-inf"))
            of_odd = tl.where(there[None, :], of_odd, float("-inf"))

            above = tl.maximum(largest, tl.max(tl.maximum(of_even, of_odd), 1))
            shrink = tl.exp2(largest - above)
            of_even, of_odd = tl.exp2(of_even - above[:, None]), tl.exp2(of_odd - above[:, None])
            total = total * shrink + tl.sum(of_even + of_odd, 1)
            largest = above

            # Bytes of a channel: a block of B / 2 of them lies D * B / 2 after the one before.
            at = (even // B) * (D * B // 2) + (even % B) // 2
            codes = tl.load(v_ptr + (c[:, None] * (B // 2) + at[None, :]), mask=there[None, :], other=0).to(tl.int32)
            t = t0 + s * SIZE
            of_scale = (t // B) * (D * B // SIZE) + (t % B) // SIZE
            scales = tl.load(vs_ptr + (c[:, None] * (B // SIZE) + of_scale[None, :]), mask=(t < count)[None, :], other=0)
            scales = _scales(scales.to(tl.int32), E8M0)
            if not E8M0:
                exponent = tl.load(ve_ptr + first + t // B, mask=t < count, other=0).to(tl.int32)
                scales = scales * exp2_byte(exponent)[None, :]
            low, high = _values(codes, scales, TYPE)
            acc = acc * shrink[:, None] + _product(of_even.to(TYPE), tl.trans(low))
            acc += _product(of_odd.to(TYPE), tl.trans(high))
    place = head * parts + part
    tl.store(acc_ptr + place * (G * D) + g[:, None] * D + c[None, :], acc, mask=(g < G)[:, None])
    tl.store(stat_ptr + place * (2 * G) + g, largest, mask=g < G)
    tl.store(stat_ptr + place * (2 * G) + G + g, total, mask=g < G)


@triton.jit
def combine_kernel(acc_ptr, stat_ptr, out_ptr, parts, G: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """All parts of query head `program_id(0)`: out (R * Hq, D). PARTS: a power of two of at least `parts`."""
    query = tl.program_id(0).to(tl.int64)
    head, g = query // G, query % G
    p, c = tl.arange(0, PARTS), tl.arange(0, D)
    there = p < parts
    stat = stat_ptr + (head * parts + p) * (2 * G) + g
    largest = tl.load(stat, mask=there, other=-1e30)
    weight = tl.exp2(largest - tl.max(largest, 0))
    total = tl.sum(weight * tl.load(stat + G, mask=there, other=0.0), 0)
    acc = tl.load(acc_ptr + ((head * parts + p) * G + g)[:, None] * D + c[None, :], mask=there[:, None], other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out_ptr + query * D + c, out.to(out_ptr.dtype.element_ty))
