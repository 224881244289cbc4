"""Y = X W_hat^T for few rows of X and packed MXFP4 weights: the product of decoding, bound by the bytes of W.

The weight is the tensor core's first operand (y^T = W x^T), so M is padded to 8 only, and a thread decodes what it loaded: 16
bytes, one block, one scale. The order of a contraction is free, so the codes stay where the load put them. With t the thread of
four that share a row, q the word of its 16 bytes, w the byte of the word:

    position (q, t, w) of the contraction  <->  byte 16 t + 4 q + w of the 64 bytes (128 elements) of a row

is the order of a matrix fragment for the thread that loaded them (wgmma wants pairs of bytes further apart), and X is read in
that order. Low nibbles meet the even columns of X, high nibbles the odd ones. So W goes from memory to the tensor core without
a table and without leaving its thread.

A code's magnitude bits, put where a bfloat16 has its last exponent bits and first mantissa bit, are its E2M1 value * 2^-126,
0.5 and 0 included (they are subnormal). Multiplied by 2^126, then by the scale: exact, for every scale.

Warps share the contraction (ALONG_K: mma, X in registers too, for the smallest M) or the rows (wgmma, X^T in shared memory).
Programs may share the contraction too; the last one to arrive adds their partial sums in a fixed order, so that results do not
depend on the schedule.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Four code bytes b0..b3 and their scales -> the low nibbles' values, then the high nibbles', as pairs of bfloat16. Adding -0.0
# changes no product, not even its sign where it is zero; `mul.bf16x2` would need capability 9.0.
_DECODE = tl.constexpr(
    """{
    .reg .b32 w, a, s, z;
    prmt.b32 w, $4, 0, 0x3120;
    shl.b32 a, w, 6;  shl.b32 s, w, 12; and.b32 a, a, 0x01C001C0; lop3.b32 $0, s, 0x80008000, a, 0xEA;
    shr.b32 a, w, 2;  shl.b32 s, w, 4;  and.b32 a, a, 0x01C001C0; lop3.b32 $1, s, 0x80008000, a, 0xEA;
    shl.b32 a, w, 2;  shl.b32 s, w, 8;  and.b32 a, a, 0x01C001C0; lop3.b32 $2, s, 0x80008000, a, 0xEA;
    shr.b32 a, w, 6;                    and.b32 a, a, 0x01C001C0; lop3.b32 $3, w, 0x80008000, a, 0xEA;
    mov.b32 a, 0x7E807E80; mov.b32 z, 0x80008000;
    fma.rn.bf16x2 $0, $0, a, z;  fma.rn.bf16x2 $1, $1, a, z;  fma.rn.bf16x2 $2, $2, a, z;  fma.rn.bf16x2 $3, $3, a, z;
    fma.rn.bf16x2 $0, $0, $5, z; fma.rn.bf16x2 $1, $1, $6, z; fma.rn.bf16x2 $2, $2, $5, z; fma.rn.bf16x2 $3, $3, $6, z;
    }"""
)


@triton.jit
def _scale_bits(byte):
    """E8M0 bytes, int32 -> the scale's bfloat16 bits: byte 0 is 2^-127, which is subnormal, and 255 is NaN."""
    return (byte << 7) | tl.where((byte == 0) | (byte == 255), 0x40, 0)


@triton.jit
def _nibble_value(code):
    """4-bit codes, int32 -> float32."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def _values(codes, bits, factor, MACRO: tl.constexpr, ASM: tl.constexpr):
    """Codes, uint8 (..., 16), and per block the scale's bits and the macro factor -> even and odd values (..., 16)."""
    if ASM and not MACRO:
        scale = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        pair, scale = tl.broadcast(codes, tl.expand_dims(scale, 4))
        even, odd = tl.inline_asm_elementwise(
            _DECODE, "=&r,=&r,=&r,=&r,r,r,r", [pair, scale], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        scale = (bits << 16).to(tl.float32, bitcast=True)
        if MACRO:
            scale = tl.div_rn(scale, factor)
        scale = tl.expand_dims(scale, 4)
        even, odd = _nibble_value(codes.to(tl.int32) & 15) * scale, _nibble_value(codes.to(tl.int32) >> 4) * scale
        if ASM:
            even, odd = even.to(tl.bfloat16), odd.to(tl.bfloat16)
    return even, odd


@triton.jit
def _fragments(v, ALONG_K: tl.constexpr):
    """(t 4, g 8, W, R, 16) -> the dot's first operand, (W, 8 R, 64) or (8 W R, 64)."""
    W: tl.constexpr = v.shape[2]
    R: tl.constexpr = v.shape[3]
    if ALONG_K:
        v = tl.permute(tl.reshape(v, (4, 8, W, R, 4, 4)), (2, 3, 1, 4, 0, 5))
        return tl.reshape(v, (W, R * 8, 64))
    else:
        v = tl.permute(tl.reshape(v, (4, 8, W, R // 2, 2, 4, 2, 2)), (3, 2, 4, 1, 5, 6, 0, 7))
        return tl.reshape(v, (W * R * 8, 64))


@triton.jit
def _x_fragments(x_ptr, chunk, M, K, stride_x, BM: tl.constexpr, ALONG_K: tl.constexpr, ASM: tl.constexpr):
    """Even and odd columns of X in the order of the fragments, (W, 64, BM) or (64, BM); chunk (1, 1, W or 1, 1)."""
    W: tl.constexpr = chunk.shape[2]
    m = tl.arange(0, 8)[None, :, None, None] + 8 * tl.arange(0, BM // 8)[None, None, None, :]
    column = chunk * 128 + tl.arange(0, 4)[:, None, None, None] * 32 + 0 * m
    at = (x_ptr + m.to(tl.int64) * stride_x + column // 2)[:, :, :, :, None] + tl.arange(0, 4)[None, None, None, None, :]
    there, column = (m < M)[:, :, :, :, None], column[:, :, :, :, None] + tl.zeros((1, 1, 1, 1, 4), tl.int32)
    w0 = tl.load(at, mask=there & (column < K), other=0)
    w1 = tl.load(at + 4, mask=there & (column + 8 < K), other=0)
    w2 = tl.load(at + 8, mask=there & (column + 16 < K), other=0)
    w3 = tl.load(at + 12, mask=there & (column + 24 < K), other=0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (t, m % 8, W, m // 8, w, q // 2, q % 2)
    if ALONG_K:
        words = tl.reshape(tl.permute(words, (2, 5, 6, 0, 4, 3, 1)), (W, 64, BM))
    else:
        words = tl.permute(tl.reshape(words, (4, 8, BM // 8, 2, 2, 2, 2)), (5, 6, 3, 0, 4, 2, 1))
        words = tl.reshape(words, (64, BM))
    if ASM:
        even, odd = words.to(tl.int16), (words >> 16).to(tl.int16)
        return even.to(tl.bfloat16, bitcast=True), odd.to(tl.bfloat16, bitcast=True)
    else:
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _add_pass(
    acc, xe, xo, codes_ptr, scales_ptr, macro_ptr, row, chunk, K, NB, NW,
    MACRO: tl.constexpr, ALONG_K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc + one pass's values times X; row (1, 8, W, R), chunk (1, 1, W, 1)."""
    t = tl.arange(0, 4)[:, None, None, None]
    block = chunk * 4 + t + 0 * row
    row = row.to(tl.int64) + 0 * block
    there = block < NB
    at = (codes_ptr + row * (NB * 16) + block * 16)[:, :, :, :, None] + tl.arange(0, 16)[None, None, None, None, :]
    codes = tl.load(at, mask=tl.broadcast_to(there[:, :, :, :, None], at.shape), other=0)
    # Four threads read one word of four scales and take theirs.
    word = tl.load(scales_ptr + row * NW + block // 4, mask=there, other=0)
    factor = 1.0
    if MACRO > 0:
        factor = tl.load(macro_ptr + row * tl.cdiv(K, MACRO) + block // (MACRO // 32), mask=there, other=1.0)
    even, odd = _values(codes, _scale_bits((word >> (t * 8)) & 255), factor, MACRO > 0, ASM)
    acc = tl.dot(_fragments(even, ALONG_K), xe, acc, input_precision="ieee")
    return tl.dot(_fragments(odd, ALONG_K), xo, acc, input_precision="ieee")


@triton.jit
def dot_kernel(
    x_ptr, codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr,
    M, N, K, NB, NW, stride_x, alpha, steps,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, ALONG_K: tl.constexpr, SPLIT: tl.constexpr,
    MACRO: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BN // 8 if ALONG_K else BN // (8 * W)
    WHOLE: tl.constexpr = MACRO > 0 and MACRO % 128 == 0  # a chunk has one factor, which its sum can take
    INNER: tl.constexpr = 0 if WHOLE else MACRO
    g = tl.arange(0, 8)[None, :, None, None]
    w = tl.arange(0, W)[None, None, :, None]
    r = tl.arange(0, R)[None, None, None, :]
    row = g + 8 * r + 0 * w if ALONG_K else g + 8 * (r % 2) + 16 * (w + W * (r // 2))
    row = tl.minimum(tl.program_id(0) * BN + row, N - 1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((W, BN, BM) if ALONG_K else (BN, BM), tl.float32)
    rest = tl.zeros_like(acc)
    for i in tl.range(0, steps, num_stages=STAGES):
        step = tl.program_id(1) * steps + i
        chunk = step * W + w if ALONG_K else step + 0 * w
        own = step * W + tl.arange(0, W) if ALONG_K else step + tl.arange(0, 1)
        xe, xo = _x_fragments(x_ptr, own[None, None, :, None], M, K, stride_x, BM, ALONG_K, ASM)
        part = tl.zeros_like(acc) if WHOLE else acc
        part = _add_pass(part, xe, xo, codes_ptr, scales_ptr, macro_ptr, row, chunk, K, NB, NW, INNER, ALONG_K, ASM)
        if RESIDUAL:
            rest = tl.zeros_like(acc) if WHOLE else rest
            rest = _add_pass(rest, xe, xo, codes2_ptr, scales2_ptr, macro_ptr, row, chunk, K, NB, NW, INNER, ALONG_K, ASM)
        if WHOLE:
            if RESIDUAL:
                part += alpha * rest
            place = tl.minimum(own, tl.cdiv(K, 128) - 1) // (MACRO // 128)
            at = macro_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * tl.cdiv(K, MACRO) + place[:, None]
            factor = tl.load(at) if ALONG_K else tl.reshape(tl.load(at), (BN,))
            acc += part / tl.expand_dims(factor, -1)
        else:
            acc = part
    if RESIDUAL and not WHOLE:
        acc += alpha * rest
    y = tl.trans(tl.sum(acc, axis=0) if ALONG_K else acc)
    _finish(y, n, bias_ptr, y_ptr, partial_ptr, arrived_ptr, M, N, BM, SPLIT)


@triton.jit
def _finish(y, n, bias_ptr, y_ptr, partial_ptr, arrived_ptr, M, N, BM: tl.constexpr, SPLIT: tl.constexpr):
    """Store y (BM, BN), or with others' partial sums if this program is the last of SPLIT to arrive."""
    m = tl.arange(0, BM)[:, None]
    mask = (m < M) & (n < N)[None, :]
    at = m.to(tl.int64) * N + n[None, :]
    last = True
    if SPLIT > 1:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * M * N + at, y, mask=mask)
        tl.debug_barrier()  # all threads' sums are stored before the one that counts says so
        last = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            tl.debug_barrier()
            y = tl.zeros_like(y)
            for s in tl.static_range(SPLIT):
                y += tl.load(partial_ptr + tl.full((), s, tl.int64) * M * N + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tl.program_id(0), 0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
