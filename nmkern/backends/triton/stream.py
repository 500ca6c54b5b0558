"""The weight stream, version 1, as Triton device functions: what every Triton kernel draws weights with.

    words(c0, c1) -> four words of Philox4x32-7 at counter (c0, c1, 0, TAG); word r is of row 4 * c1 + r
    field(word, f) -> the bits of column (columns per word) * c0 + f
    decode(field) -> the code, in the dtype that a kernel multiplies in and a unit of that (code_scale)

``nmkern.stream`` is the law, this is its one definition in Triton; tests/vectors.txt ties them together.
The invariant: every integer here is a uint32, with no implicit promotion, so that the compiler and
Triton's interpreter agree on every bit.

Importing this module imports Triton: kernels are imported at their first call, never with nmkern.
"""

import torch
import triton
import triton.language as tl

from nmkern import stream

RADEMACHER = tl.constexpr(stream.RADEMACHER.tag)
UNIFORM = tl.constexpr(stream.UNIFORM.tag)
NORMAL = tl.constexpr(stream.NORMAL.tag)
SPARSE = tl.constexpr(stream.SPARSE_TAG)

# Whether kernels are compiled for NVIDIA GPUs: neither interpreted, nor for AMD.
PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
AMD = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is not None)

_ROUNDS = tl.constexpr(stream.ROUNDS)
_M0 = tl.constexpr(stream.MULTIPLIERS[0])
_M1 = tl.constexpr(stream.MULTIPLIERS[1])
_W0 = tl.constexpr(stream.WEYL_KEYS[0])
_W1 = tl.constexpr(stream.WEYL_KEYS[1])


@triton.constexpr_function
def bits_per_code(tag):
    """Bits that a code of a dense family takes."""
    return {0x101: 1, 0x102: 4, 0x103: 8}[tag]


@triton.constexpr_function
def columns_per_word(tag):
    """Columns that a word of a dense family holds."""
    return 32 // bits_per_code(tag)


@triton.jit
def multiply_words(a, factor: tl.constexpr):
    """High and low word of a product of two words.

    Of a high word and a low word LLVM makes two multiplications, and takes a product of 64 bits apart again:
    uniform at 16 rows 4.25 and 3.92 instructions a weight, and 2.84 with one (sm_90). On AMD, where integer
    multiplications take four times as long as others, 206 of 863 instructions for 32 weights were, and 42 of
    477 are.
    """
    if PTX:
        product = tl.inline_asm_elementwise(
            "mul.wide.u32 $0, $1, $2;", "=l,r,r", [a, factor], tl.uint64, is_pure=True, pack=1
        )
    else:
        product = a.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-7: the four words at a counter; all arguments uint32, tensors or scalars."""
    for _ in tl.static_range(_ROUNDS):
        hi0, lo0 = multiply_words(c0, _M0)
        hi1, lo1 = multiply_words(c2, _M1)
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3


@triton.jit
def words(c0, c1, k0, k1, TAG: tl.constexpr):
    """The four words of the patches at word columns c0 and patch rows c1 (uint32, broadcastable)."""
    # Not zeros of the full shape: what does not vary along an axis is hashed once along it.
    zero = tl.zeros_like(c0)
    return philox4x32(c0, c1, zero, zero + TAG, k0, k1)


@triton.jit
def word_of_row(w0, w1, w2, w3, r):
    """Word r of a patch. A select, which costs nothing where r is known when the kernel is compiled."""
    return tl.where(r < 2, tl.where(r == 0, w0, w1), tl.where(r == 2, w2, w3))


@triton.jit
def field(word, f, TAG: tl.constexpr):
    """Field f (uint32) of a word: the bits of column ``columns_per_word(TAG) * c0 + f``."""
    BITS: tl.constexpr = bits_per_code(TAG)
    return (word >> (f * BITS)) & ((1 << BITS) - 1)


@triton.jit
def pair_of_fields(word, f, TAG: tl.constexpr, MANTISSA: tl.constexpr):
    """Two 16-bit floats in a word, of fields f and f + P/2 of ``word``, f < P/2, or what will become them.

    Fields half a word apart fall into the two halves of a register together, so that one instruction each
    serves both. rademacher: a shift, and an and-xor that sets the sign of 1.0. uniform: an and, and a shift
    for two pairs; alone, the lowest eight bits of such a float (MANTISSA bits: 7 in bfloat16, 10 in float16)
    are an integer in units of the smallest subnormal number, which ``_level`` turns into a code. It takes 0.4
    (sm_90) and 0.7 (sm_80) instructions a weight less than 2^MANTISSA + 2u and a subtraction, in bfloat16 at
    16 rows.
    """
    if TAG == RADEMACHER:
        ONE: tl.constexpr = 0x3F803F80 if MANTISSA == 7 else 0x3C003C00
        pair = ((word << (15 - f)) & 0x80008000) ^ (0x80008000 | ONE)
    else:
        tl.static_assert(TAG == UNIFORM)
        lowest = tl.where(f < 2, word, word >> 8)
        pair = lowest & tl.where(f % 2 == 0, 0x000F000F, 0x00F000F0)
    return pair


# The least that keeps the factors of ``widened_level`` within float32.
WIDENED_SCALE = tl.constexpr(2.0**23)


@triton.constexpr_function
def widened(tag, dtype):
    """Whether codes are made in float32 and their upper halves taken: AMD emulates bfloat16 arithmetic."""
    return AMD.value and tag == 0x102 and dtype == tl.bfloat16


@triton.constexpr_function
def code_scale(tag, dtype):
    """What sums of weights decoded in ``dtype`` are multiplied by: a power of two."""
    if tag != 0x102 or dtype == tl.float32:
        return 1.0
    if widened(tag, dtype):
        return WIDENED_SCALE.value
    return 2.0**7 if dtype == tl.bfloat16 else 2.0**10


@triton.constexpr_function
def level_factor(upper, dtype):
    """What ``_level`` multiplies uniform's lower and upper fields of a byte by."""
    return (2.0**127 if dtype == tl.bfloat16 else 2.0**15) / (16 if upper else 1)


@triton.jit
def _level(field, f, TAG: tl.constexpr, DTYPE: tl.constexpr):
    """The code of uniform's field f, which is in the bits of ``field`` as ``pair_of_fields`` leaves it.

    Without a rounding: u or 16 u smallest subnormals, times a power of two, less 15 over the scale.
    """
    LOWER: tl.constexpr = level_factor(False, DTYPE)
    UPPER: tl.constexpr = level_factor(True, DTYPE)
    OFFSET: tl.constexpr = 15 / code_scale(TAG, DTYPE)
    factor, field = tl.broadcast(tl.where(f % 2 == 0, LOWER, UPPER).to(DTYPE), field)
    return tl.fma(field, factor, tl.full(field.shape, -OFFSET, DTYPE))


@triton.jit
def widened_level(word, f):
    """The code of uniform's field f over WIDENED_SCALE, in float32, as ``_level`` makes it: where the field
    stands, alone, it is a subnormal number, up to bit 23; the factors are 2^127 to 2^107.

    Arithmetic in bfloat16 took 6.5 instructions a weight and lane more (gfx942).
    """
    OFFSET: tl.constexpr = 15 / WIDENED_SCALE
    place = tl.where(f < 6, 4 * f, 4 * f - 8)
    level = (tl.where(f < 6, word, word >> 8) & (15 << place)).to(tl.float32, bitcast=True)
    factor, level = tl.broadcast(((254 - place) << 23).to(tl.float32, bitcast=True), level)
    return tl.fma(level, factor, tl.full(level.shape, -OFFSET, tl.float32))


@triton.jit
def _opaque(bits):
    """The same bits, of which LLVM knows nothing. (On AMD: ``dense._secret``.)

    It would otherwise carry the extraction of each field back into the hash: at 16 rows uniform takes 2.84
    instructions a weight, and 3.52 without, rademacher 2.10 and 3.26 (sm_90).
    """
    if PTX:
        bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], tl.uint32, is_pure=True, pack=1)
    return bits


@triton.jit
def _look_up(table, index, DTYPE: tl.constexpr):
    """table[index] for a table that lies in DTYPE."""
    if PTX and DTYPE != tl.float32:  # which only the interpreter multiplies
        # To Triton a load decides the layout around it: every index, then every weight, would go through
        # shared memory (9.2 instead of 7.8 instructions a weight, sm_90). To it this is arithmetic.
        base = table.to(tl.uint64, bitcast=True)
        bits = tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.u32 a, $2, 2, $1; ld.global.nc.b16 $0, [a]; }",
            "=h,l,r", [base, index], tl.uint16, is_pure=True, pack=1,
        )  # fmt: skip
        code = bits.to(DTYPE, bitcast=True)
    else:
        code = tl.load(table + index)
    return code


@triton.jit
def _half_of_pair(word, f, half, TAG: tl.constexpr, DTYPE: tl.constexpr, OPAQUE: tl.constexpr):
    """The code, scaled, in half 0 or 1 of the pair that a word's fields f and f + P/2 are."""
    MANTISSA: tl.constexpr = 7 if DTYPE == tl.bfloat16 else 10
    pair = pair_of_fields(word, f, TAG, MANTISSA)
    if OPAQUE:
        pair = _opaque(pair)
    code = (pair >> (16 * half)).to(tl.uint16).to(DTYPE, bitcast=True)
    if TAG == UNIFORM:
        code = _level(code, f, TAG, DTYPE)
    return code


@triton.jit
def decode(word, f, table, TAG: tl.constexpr, DTYPE: tl.constexpr):
    """The code of field f (uint32) of a word in DTYPE (bfloat16, float16 or float32), over ``code_scale``.

    ``table`` points to NORMAL_TABLE in DTYPE; other families do not read it.
    """
    if TAG == NORMAL:
        code = _look_up(table, field(_opaque(word), f, TAG), DTYPE)
    elif DTYPE == tl.float32:
        if TAG == RADEMACHER:
            code = (((word << (31 - f)) & 0x80000000) ^ 0xBF800000).to(tl.float32, bitcast=True)
        else:  # 2^23 and twice the field; float32's last place is 1 there
            doubled = (field(_opaque(word), f, TAG) << 1) | 0x4B000000
            code = doubled.to(tl.float32, bitcast=True) - (2.0**23 + 15)
    elif widened(TAG, DTYPE):
        upper = widened_level(word, f).to(tl.uint32, bitcast=True) >> 16
        code = upper.to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        HALF: tl.constexpr = columns_per_word(TAG) // 2
        code = _half_of_pair(word, f % HALF, f // HALF, TAG, DTYPE, True)
    return code


@triton.jit
def decode_rows(w0, w1, w2, w3, r, f, table, TAG: tl.constexpr, DTYPE: tl.constexpr):
    """As ``decode`` of word r, for a thread that holds rows 2 q and 2 q + 1 side by side.

    The halves of their words that hold field f are put together once, for 16 / bits fields, and then
    decoded in pairs as if they were one word.
    """
    if TAG == NORMAL or DTYPE == tl.float32 or widened(TAG, DTYPE):
        code = decode(word_of_row(w0, w1, w2, w3, r), f, table, TAG, DTYPE)
    else:
        HALF: tl.constexpr = columns_per_word(TAG) // 2
        even = tl.where(r < 2, w0, w2)
        odd = tl.where(r < 2, w1, w3)
        low = (even & 0xFFFF) | (odd << 16)
        high = (even >> 16) | (odd & 0xFFFF0000)
        # At 16 rows uniform takes 3.45 instructions a weight so, and 3.81 with opaque pairs; rademacher 4.14
        # and 3.08.
        OPAQUE: tl.constexpr = TAG == RADEMACHER
        code = _half_of_pair(tl.where(f < HALF, low, high), f % HALF, r % 2, TAG, DTYPE, OPAQUE)
    return code
