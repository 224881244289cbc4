"""Y = X W_hat^T for few rows of X and packed MXFP4 weights: the product of decoding, bound by the bytes of W.

The weight is the tensor core's first operand (y^T = W x^T), so M is padded to 8 only, and a thread decodes what it loaded: 16
bytes, one block, one scale. The order of a contraction is free, so the codes stay where the load put them, and X is read in
their order. With t the thread of four that share a row, q the word of its 16 bytes, i + 2 j the byte of the word, p the half of
the byte (low nibbles are even columns), the place (t, q, i, j, p) of a chunk of 128 columns is

    column 32 t + 8 q + 2 (i + 2 j) + p,

and the axes are sorted into the order in which the tensor core's fragments lie in their threads. So W goes from memory to the
tensor core without a table and without leaving its thread.

A code's magnitude bits, put where a bfloat16 has its last exponent bits and first mantissa bit, are its E2M1 value * 2^-126,
0.5 and 0 included (they are subnormal). A nibble at bit 0 of a half word, times 2^6 + 2^12 and masked, is there, its sign too.
One multiplication, by the scale * 2^126, gives the value exactly. Scales above 2 have no such bfloat16; a program that met one
starts again and multiplies twice.

Warps share the contraction (ALONG_K: mma, X in registers too, for the smallest M) or the rows (wgmma, X^T in shared memory).
With QUARTERS they share either, and both operands are in registers (mma) however large M is: of a chunk's codes, which come a
step ahead, one word a thread is multiplied at a time, with the 32 columns of X that belong to it, straight from memory. Nothing
waits for a barrier, so a warp loads, unpacks and multiplies at once. X is read by every warp and comes from L1 mostly; a thread
takes its word q ^ (t / 2) q-th, so that the four places of a row lie in different banks.

Programs may share the contraction too; the last one to arrive adds their partial sums in a fixed order, so that results do not
depend on the schedule. Neighbouring programs differ in their part of the contraction, so that those that meet on a
multiprocessor, a multiple of 132 programs apart, mostly read the same X.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4_kernels.device import LAST_AXIS_FIRST

# Four code bytes -> the values of (p, i) = (0, 0), (0, 1), (1, 0), (1, 1), each a pair of bfloat16 (j = 0, 1). Adding -0.0
# changes no product, not even its sign where it is zero; `mul.bf16x2` would need capability 9.0.
_BITS = """{
    .reg .b32 u, first, z;
    shr.u32 u, $4, 6;
    and.b32 $0, $4, 0x000F000F; mul.lo.u32 $0, $0, 0x1040; and.b32 $0, $0, 0x81C081C0;
    and.b32 $1, u,  0x003C003C; mul.lo.u32 $1, $1, 0x0410; and.b32 $1, $1, 0x81C081C0;
    and.b32 $2, $4, 0x00F000F0; mul.lo.u32 $2, $2, 0x0104; and.b32 $2, $2, 0x81C081C0;
    and.b32 $3, u,  0x01C001C0; lop3.b32 $3, $4, 0x80008000, $3, 0xEA;
    mov.b32 z, 0x80008000;
"""
_TIMES = " ".join(f"fma.rn.bf16x2 ${n}, ${n}, FACTOR, z;" for n in range(4))
_NARROW = tl.constexpr(_BITS + _TIMES.replace("FACTOR", "$5") + "}")
_TWICE = "mov.b32 first, 0x7E807E80;" + _TIMES.replace("FACTOR", "first")  # 2^126
_WIDE = tl.constexpr(_BITS + _TWICE + _TIMES.replace("FACTOR", "$5") + "}")

# The same in the order of the columns: of each of the bytes 0 to 3 a pair (p = 0, 1). Three more instructions for four bytes,
# but words of X are the tensor core's operand as they are.
_BYTES = """{
    .reg .b32 lo, hi, first, z;
    and.b32 lo, $4, 0x0F0F0F0F; shr.u32 hi, $4, 4; and.b32 hi, hi, 0x0F0F0F0F; mov.b32 z, 0x80008000;
""" + " ".join(
    f"prmt.b32 ${n}, lo, hi, 0x{s}; mul.lo.u32 ${n}, ${n}, 0x1040; and.b32 ${n}, ${n}, 0x81C081C0;"
    for n, s in enumerate(("C480", "D591", "E6A2", "F7B3"))
)
_NARROW_BYTES = tl.constexpr(_BYTES + _TIMES.replace("FACTOR", "$5") + "}")
_WIDE_BYTES = tl.constexpr(_BYTES + _TWICE + _TIMES.replace("FACTOR", "$5") + "}")


@triton.jit
def _scale_bits(byte):
    """E8M0 bytes, int32 -> the scale's bfloat16 bits: byte 0 is 2^-127, which is subnormal, and 255 is NaN."""
    return (byte << 7) | tl.where((byte == 0) | (byte == 255), 0x40, 0)


@triton.jit
def _nibble(words, n: tl.constexpr, scale):
    """The value of nibble n of each word, float32."""
    code = words >> (4 * n)
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale  # 2^126


@triton.jit
def _pairs(words):
    """Words of two 16-bit numbers -> these numbers, along a new last axis."""
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _values(words, scale, factor, MACRO: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr):
    """Words of codes (t, g, W, R, q), and per block the scale byte and the macro factor -> values (t, g, W, R, q, i, p, j)."""
    if ASM and MACRO == 0:
        pair = _scale_bits(scale) * 0x00010001 if WIDE else scale * 0x00800080 + 0x3F003F00
        words, pair = tl.broadcast(words, tl.expand_dims(pair, 4))
        e0, e1, o0, o1 = tl.inline_asm_elementwise(
            _WIDE if WIDE else _NARROW, "=&r,=&r,=&r,=&r,r,r", [words, pair],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return _pairs(tl.join(tl.join(e0, e1), tl.join(o0, o1)))
    else:
        scale = (_scale_bits(scale) << 16).to(tl.float32, bitcast=True)
        if MACRO > 0:
            scale = tl.div_rn(scale, factor)
        words, scale = tl.broadcast(words, tl.expand_dims(scale, 4))
        low = tl.join(
            tl.join(_nibble(words, 0, scale), _nibble(words, 2, scale)),
            tl.join(_nibble(words, 1, scale), _nibble(words, 3, scale)),
        )
        high = tl.join(
            tl.join(_nibble(words, 4, scale), _nibble(words, 6, scale)),
            tl.join(_nibble(words, 5, scale), _nibble(words, 7, scale)),
        )
        values = tl.join(low, high)
        return values.to(tl.bfloat16) if ASM else values


@triton.jit
def _fragments(v, ALONG_K: tl.constexpr):
    """Values (t 4, g 8, W, R, q 4, i 2, p 2, j 2) -> the dot's first operand, (W, 8 R, 128) or (8 W R, 128)."""
    W: tl.constexpr = v.shape[2]
    R: tl.constexpr = v.shape[3]
    if ALONG_K:
        v = tl.permute(tl.reshape(v, (4, 8, W, R, 2, 2, 2, 2, 2)), (2, 3, 1, 7, 4, 0, 5, 6, 8))
        return tl.reshape(v, (W, R * 8, 128))
    else:
        v = tl.permute(tl.reshape(v, (4, 8, W, R // 2, 2, 4, 2, 2, 2)), (3, 2, 4, 1, 7, 5, 6, 0, 8))
        return tl.reshape(v, (W * R * 8, 128))


@triton.jit
def _x_fragments(words, ALONG_K: tl.constexpr, ASM: tl.constexpr):
    """Words of X (t, m % 8, W, (m / 8, q), 4) or (t, m % 8, q, m / 8, 4) -> the second operand, (W, 128, BM) or (128, BM)."""
    W: tl.constexpr = words.shape[2]
    H: tl.constexpr = words.shape[3]
    if ASM:
        x = _pairs(words)
    else:
        x = tl.join((words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True))
    if ALONG_K:
        x = tl.permute(tl.reshape(x, (4, 8, W, H // 4, 2, 2, 2, 2, 2)), (2, 8, 4, 0, 5, 7, 6, 3, 1))
        return tl.reshape(x, (W, 128, H * 2))
    else:
        x = tl.permute(tl.reshape(x, (4, 8, 4, H, 2, 2, 2)), (6, 2, 5, 0, 4, 3, 1))
        return tl.reshape(x, (128, H * 8))


@triton.jit
def _sorted(v):
    """(t, g, W, R, ...) <-> the order of axes in which a load gives neighbours along t and g to neighbouring threads."""
    if LAST_AXIS_FIRST:
        v = tl.permute(v, (3, 2, 1, 0, 4) if len(v.shape) == 5 else (3, 2, 1, 0))
    return v


@triton.jit
def _load_words(at, there, EVEN: tl.constexpr):
    """The 16 bytes at each address, sorted, as four words (t, g, W, R, 4); zeros where they are not there."""
    at = at[:, :, :, :, None] + tl.arange(0, 4)[None, None, None, None, :]
    words = tl.load(at) if EVEN else tl.load(at, mask=tl.broadcast_to(there[:, :, :, :, None], at.shape), other=0)
    return _sorted(words)


@triton.jit
def _load_pass(codes_ptr, scales_ptr, macro_ptr, at, row, block, K, NB, MACRO: tl.constexpr, EVEN: tl.constexpr):
    """A step's codes, as words, scale bytes and macro factors; `at`, row and block, those of the blocks, are sorted."""
    words = _load_words(codes_ptr + at * 4, block < NB, EVEN)
    scale = _sorted(tl.load(scales_ptr + at) if EVEN else tl.load(scales_ptr + at, mask=block < NB, other=0)).to(tl.int32)
    factor = 1.0
    if MACRO > 0:
        block = tl.minimum(block, NB - 1)  # where a chunk ends early, all have its factor
        factor = _sorted(tl.load(macro_ptr + row.to(tl.int64) * tl.cdiv(K, MACRO) + block // (MACRO // 32)))
    return words, scale, factor


@triton.jit
def _sums(
    x_ptr, codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, M, N, K, NB, stride_x, alpha, zero,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, ALONG_K: tl.constexpr,
    MACRO: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """This program's part of y^T, (W, BN, BM) or (BN, BM), and the largest scale byte of its part of W."""
    R: tl.constexpr = BN // 8 if ALONG_K else BN // (8 * W)
    CHUNKS: tl.constexpr = W if ALONG_K else 1  # of a step
    WHOLE: tl.constexpr = MACRO > 0 and MACRO % 128 == 0  # a chunk has one factor, which its sum can take
    INNER: tl.constexpr = 0 if WHOLE else MACRO
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    w = tl.arange(0, W)[None, None, :, None]
    r = tl.arange(0, R)[None, None, None, :]
    steps = tl.cdiv(NB, 4 * CHUNKS)
    first = steps * tl.program_id(0) // tl.num_programs(0)
    last = steps * (tl.program_id(0) + 1) // tl.num_programs(0)
    chunk = first * CHUNKS + (w if ALONG_K else 0)

    n0 = tl.program_id(1) * BN
    row = g + 8 * r + 0 * w if ALONG_K else g + 8 * (r % 2) + 16 * (w + W * (r // 2))
    row = tl.minimum(row + zero, N - 1 - n0)
    block = _sorted(chunk * 4 + t + 0 * row)
    row = _sorted(row + 0 * t)
    at = tl.max_contiguous(row * NB + block, (1, 1, 1, 1))  # a thread loads its own scale, not four to hand on
    start = n0.to(tl.int64) * NB  # `at` counts from here and has 32 bits
    codes_ptr, scales_ptr = codes_ptr + start * 4, scales_ptr + start
    if RESIDUAL:
        codes2_ptr, scales2_ptr = codes2_ptr + start * 4, scales2_ptr + start
    if INNER:
        macro_ptr += n0.to(tl.int64) * tl.cdiv(K, INNER)

    h = tl.arange(0, BM // 2 if ALONG_K else BM // 8)[None, None, None, :]
    q = h % 4 if ALONG_K else tl.arange(0, 4)[None, None, :, None]
    m = tl.minimum(g + 8 * (h // 4 if ALONG_K else h) + zero, M - 1)
    column = chunk * 128 + t * 32 + q * 8 + 0 * m
    x_at = _sorted((m.to(tl.int64) if ALONG_K else m) * stride_x * 4 + column // 2)
    if ALONG_K:  # one address a thread; with shared rows it has several, which take less room as offsets
        x_at = x_ptr + x_at
    column = _sorted(column)

    acc = tl.zeros((W, BN, BM) if ALONG_K else (BN, BM), tl.float32)
    rest = tl.zeros_like(acc)
    largest = tl.zeros((4, 8, W, R), tl.int32)
    for step in tl.range(first, last, num_stages=1):
        words, scale, factor = _load_pass(codes_ptr, scales_ptr, macro_ptr, at, row, block, K, NB, INNER, EVEN)
        x = _x_fragments(_load_words(x_at if ALONG_K else x_ptr + x_at, column < K, EVEN), ALONG_K, ASM)
        values = _fragments(_values(words, scale, factor, INNER, WIDE, ASM), ALONG_K)
        largest = tl.maximum(largest, scale)
        part = tl.dot(values, x, tl.zeros_like(acc) if WHOLE else acc, input_precision="ieee")
        if RESIDUAL:
            words, scale, factor = _load_pass(codes2_ptr, scales2_ptr, macro_ptr, at, row, block, K, NB, INNER, EVEN)
            values = _fragments(_values(words, scale, factor, INNER, WIDE, ASM), ALONG_K)
            largest = tl.maximum(largest, scale)
            rest = tl.dot(values, x, tl.zeros_like(acc) if WHOLE else rest, input_precision="ieee")
        if WHOLE:
            if RESIDUAL:
                part += alpha * rest
            n = tl.minimum(n0 + tl.arange(0, BN), N - 1).to(tl.int64)
            place = tl.minimum(step * CHUNKS + tl.arange(0, CHUNKS), tl.cdiv(K, 128) - 1) // (MACRO // 128)
            factor = tl.load(macro_ptr + n[None, :] * tl.cdiv(K, MACRO) + place[:, None])
            acc += part / tl.expand_dims(factor if ALONG_K else tl.reshape(factor, (BN,)), -1)
        else:
            acc = part
        at += 4 * CHUNKS
        block += 4 * CHUNKS
        column += 128 * CHUNKS
        if ALONG_K:
            x_at += 64 * CHUNKS
        else:
            x_ptr += 64
    if RESIDUAL and not WHOLE:
        acc += alpha * rest
    return acc, tl.max(largest)


@triton.jit
def _word_values(words, scale, factor, MACRO: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr):
    """A word of each block (t, g, W, R) -> the dot's first operand, (W, 8 R, 32), columns in order."""
    W: tl.constexpr = words.shape[2]
    R: tl.constexpr = words.shape[3]
    if ASM and MACRO == 0:
        pair = _scale_bits(scale) * 0x00010001 if WIDE else scale * 0x00800080 + 0x3F003F00
        b0, b1, b2, b3 = tl.inline_asm_elementwise(
            _WIDE_BYTES if WIDE else _NARROW_BYTES, "=&r,=&r,=&r,=&r,r,r", [words, pair],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        v = _pairs(tl.join(tl.join(b0, b2), tl.join(b1, b3)))
    else:
        v = _values(tl.expand_dims(words, 4), scale, factor, MACRO, WIDE, ASM)
        v = tl.permute(v, (0, 1, 2, 3, 4, 7, 5, 6))
    return tl.reshape(tl.permute(tl.reshape(v, (4, 8, W, R, 2, 2, 2)), (2, 3, 1, 5, 0, 4, 6)), (W, R * 8, 32))


@triton.jit
def _by_row(acc, factor):
    """Rows of acc (W, 8 R, BM) times factors (t, g, W, R), which are the same for all t. Nothing leaves its thread."""
    W: tl.constexpr = acc.shape[0]
    R: tl.constexpr = factor.shape[3]
    BM: tl.constexpr = acc.shape[2]
    f = tl.permute(factor, (2, 3, 1, 0))
    f = tl.expand_dims(tl.expand_dims(f, 3), 5)
    return tl.reshape(tl.reshape(acc, (W, R, 8, BM // 8, 4, 2)) * f, (W, R * 8, BM))


@triton.jit
def _quarter_sums(
    acc, x_ptr, codes_ptr, scales_ptr, macro_ptr, M, N, K, NB, stride_x, zero,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, ALONG_K: tl.constexpr,
    MACRO: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """acc, (W, 8 R, BM), plus this program's part of y^T, and the largest scale byte of its part of W."""
    R: tl.constexpr = acc.shape[1] // 8
    CHUNKS: tl.constexpr = W if ALONG_K else 1  # of a step
    WHOLE: tl.constexpr = MACRO > 0 and MACRO % 128 == 0  # a chunk has one factor, which its sum can take
    INNER: tl.constexpr = 0 if WHOLE else MACRO
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    w = tl.arange(0, W)[None, None, :, None]
    r = tl.arange(0, R)[None, None, None, :]
    h = tl.arange(0, BM // 8)[None, None, None, :]
    steps = tl.cdiv(NB, 4 * CHUNKS)
    first = steps * tl.program_id(0) // tl.num_programs(0)
    last = steps * (tl.program_id(0) + 1) // tl.num_programs(0)
    chunk = first * CHUNKS + (w if ALONG_K else 0)

    n0 = tl.program_id(1) * BN
    row = tl.minimum(g + 8 * (r + (0 * w if ALONG_K else R * w)) + zero, N - 1 - n0)
    block = _sorted(chunk * 4 + t + 0 * row)
    row = _sorted(row + 0 * t)
    at = tl.max_contiguous(row * NB + block, (1, 1, 1, 1))  # a thread loads its own scale, not four to hand on
    start = n0.to(tl.int64) * NB  # `at` counts from here and has 32 bits
    codes_ptr, scales_ptr = codes_ptr + start * 4, scales_ptr + start
    if MACRO > 0:
        macro_ptr += n0.to(tl.int64) * tl.cdiv(K, MACRO)

    far = t // 2  # a thread's word in quarter q is number q ^ far
    m = tl.minimum(g + 8 * h + zero, M - 1)
    column = chunk * 128 + t * 32 + 0 * (m + w)
    x_at = _sorted(m * stride_x * 4 + 0 * column)  # 32 bits; where in the row, 64: one multiplication adds them

    largest = tl.zeros((4, 8, W, R), tl.int32)
    below = tl.full((4, 8, W, R), 1.0, tl.float32)
    words, scale, factor = _load_pass(codes_ptr, scales_ptr, macro_ptr, at, row, block, K, NB, MACRO, EVEN)
    for step in tl.range(first, last, num_stages=1):
        more = (step + 1 < last).to(tl.int32) * CHUNKS  # codes are loaded a step ahead; the last step loads its own again
        at += 4 * more
        block += 4 * more
        next_words, next_scale, next_factor = _load_pass(codes_ptr, scales_ptr, macro_ptr, at, row, block, K, NB, MACRO, EVEN)
        largest = tl.maximum(largest, scale)
        if WHOLE:
            acc = _by_row(acc, factor * below)
            below = 1.0 / factor
        even, odd = tl.split(tl.reshape(words, (4, 8, W, R, 2, 2)))
        for q in tl.static_range(4):
            low, high = tl.split(even if q % 2 == 0 else odd)
            other_low, other_high = tl.split(odd if q % 2 == 0 else even)
            word = tl.where(far == 0, low if q < 2 else high, other_low if q < 2 else other_high)
            shift = 8 * (q + far if q % 2 == 0 else q - far)
            x_now = x_ptr + _sorted((column + shift).to(tl.int64) // 2) + x_at
            x = _load_words(x_now, _sorted(column + shift) < K, EVEN)
            x = _x_quarter(x, ASM)
            values = _word_values(word, scale, factor, INNER, WIDE, ASM)
            acc = tl.dot(values, x, acc, input_precision="ieee")
        words, scale, factor = next_words, next_scale, next_factor
        column += 128 * CHUNKS
    if WHOLE:
        acc = _by_row(acc, below)
    return acc, tl.max(largest)


@triton.jit
def _x_quarter(words, ASM: tl.constexpr):
    """Words of X (t, m % 8, W, m / 8, 4) -> the second operand, (W, 32, BM), columns in order."""
    W: tl.constexpr = words.shape[2]
    H: tl.constexpr = words.shape[3]
    if ASM:
        x = _pairs(words)
    else:
        x = tl.join((words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True))
    return tl.reshape(tl.permute(tl.reshape(x, (4, 8, W, H, 2, 2, 2)), (2, 5, 0, 4, 6, 3, 1)), (W, 32, H * 8))


@triton.jit
def _in_quarters(
    x_ptr, codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, M, N, K, NB, stride_x, alpha, zero,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, ALONG_K: tl.constexpr,
    MACRO: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """What `_sums` gives. The residual is summed first, then times alpha the others' start: one sum has room in registers."""
    acc = tl.zeros((W, BN if ALONG_K else BN // W, BM), tl.float32)
    largest = 0
    if RESIDUAL:
        acc, largest = _quarter_sums(
            acc, x_ptr, codes2_ptr, scales2_ptr, macro_ptr, M, N, K, NB, stride_x, zero,
            BM, BN, W, ALONG_K, MACRO, EVEN, WIDE, ASM,
        )  # fmt: skip
        acc *= alpha
    acc, first_largest = _quarter_sums(
        acc, x_ptr, codes_ptr, scales_ptr, macro_ptr, M, N, K, NB, stride_x, zero,
        BM, BN, W, ALONG_K, MACRO, EVEN, WIDE, ASM,
    )  # fmt: skip
    return (acc if ALONG_K else tl.reshape(acc, (BN, BM))), tl.maximum(first_largest, largest)


@triton.jit
def _over_warps(acc):
    """(W, BN, BM) -> the sum over W: by halves, with one exchange through shared memory. (`tl.sum` has bank conflicts.)"""
    W: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    BM: tl.constexpr = acc.shape[2]
    acc = tl.permute(acc, (1, 2, 0))
    for _ in tl.static_range((W > 1) + (W > 2) + (W > 4) + (W > 8)):
        a, b = tl.split(tl.reshape(acc, (BN, BM, acc.shape[2] // 2, 2)))
        acc = a + b
    return tl.reshape(acc, (BN, BM))


@triton.jit(do_not_specialize=["M", "NB", "stride_x"])  # what follows for alignment, the kernel says itself
def dot_kernel(
    x_ptr, codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr,
    M, N, K, NB, stride_x, alpha,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, ALONG_K: tl.constexpr, SHARED: tl.constexpr,
    MACRO: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, QUARTERS: tl.constexpr,
):  # fmt: skip
    sums: tl.constexpr = _in_quarters if QUARTERS else _sums
    acc, largest = sums(
        x_ptr, codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, M, N, K, NB, stride_x, alpha, 0,
        BM, BN, W, ALONG_K, MACRO, RESIDUAL, EVEN, False, ASM,
    )  # fmt: skip
    if ASM and (MACRO == 0 or MACRO % 128 == 0):
        again = largest > 128  # the scale byte of 2
        if again:  # a zero that the compiler does not know makes it compute the addresses anew, not keep them in registers
            acc, largest = sums(
                x_ptr, codes_ptr, scales_ptr, codes2_ptr, scales2_ptr, macro_ptr, M, N, K, NB, stride_x, alpha, largest >> 8,
                BM, BN, W, ALONG_K, MACRO, RESIDUAL, EVEN, True, ASM,
            )  # fmt: skip
    y = tl.trans(_over_warps(acc) if ALONG_K else acc)
    _finish(y, bias_ptr, y_ptr, partial_ptr, arrived_ptr, M, N, W, SHARED)


@triton.jit
def _finish(y, bias_ptr, y_ptr, partial_ptr, arrived_ptr, M, N, W: tl.constexpr, SHARED: tl.constexpr):
    """Store y (BM, BN), or with others' partial sums if this program is the last of those that share it to arrive."""
    BM: tl.constexpr = y.shape[0]
    BN: tl.constexpr = y.shape[1]
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    if SHARED:
        tile, splits = tl.program_id(1), tl.num_programs(0)
        size = tl.num_programs(1).to(tl.int64) * (BM * BN)  # of the partial sums of one part of the contraction
        partial_ptr += tile.to(tl.int64) * (BM * BN)
        tl.store(partial_ptr + tl.program_id(0) * size + (m * BN + n), y, mask=m < M)
        tl.debug_barrier()  # all threads' sums are stored before the one that counts says so
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived_ptr + tile, 0)
            ROWS: tl.constexpr = min(BM, max(1, 512 * W // BN))  # 16 numbers a thread
            for m0 in range(0, M, ROWS):
                row = m0 + tl.arange(0, ROWS)[:, None]
                there = (row < M) & (n < BN)
                total = tl.zeros((ROWS, BN), tl.float32)
                for first in range(0, splits, 4):  # four loads are under way at once
                    for k in tl.static_range(4):
                        at = partial_ptr + (first + k) * size + (row * BN + n)
                        total += tl.load(at, mask=there & (first + k + 0 * n < splits), other=0.0, cache_modifier=".cg")
                _store(total, row, bias_ptr, y_ptr, M, N)
    else:
        _store(y, m, bias_ptr, y_ptr, M, N)


@triton.jit
def _store(y, m, bias_ptr, y_ptr, M, N):
    """Rows m of this program's columns of Y."""
    BN: tl.constexpr = y.shape[1]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64) * N + n, y.to(y_ptr.dtype.element_ty), mask=(m < M) & (n < N))
