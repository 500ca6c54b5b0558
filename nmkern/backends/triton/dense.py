"""The dense kernels: x made ready, x times generated weights, and the stage that finishes split sums.

    prepared[step, m, i] = x[m, k], for the k that place i of the step holds
    prepared[step, part, m, i] = part of (x[m, k] * in_gain[c, k] / row_scale[m])
    partial[s, m, n] = row_scale[m] * sum over the k of split s: prepared value * code[n, k]
    y[m, n] = (factor * sum over s: partial[s, m, n]) * out_gain[c, n] + bias[c, n]

A program computes a tile of y's transpose, W tile [BO, BR] times x tile [BR, BM], so that weights are the
A operand of the tensor cores: computed in the very registers that multiply them, never in shared memory.
What makes Triton do so is where indices go:

- Rows of the tile that one thread holds (bit 3, and the bits above the warps') are rows of one patch, or
  fields of one word (transposed); neighbouring reduction indices are the two halves of a word. So a
  thread uses every bit of what it hashes. x is prepared in that order, in memory that a step reads 16 bytes
  at a time, ahead of its use; a few rows that need no preparation are gathered instead. The tile of y is put
  back in order in registers, where a thread holds neighbours.
- The tile starts from the result of a small tensor-core product (``_anchor``), whose layout the whole
  hash then takes: without, Triton hashes in another layout and moves every weight through shared memory
  (15 instead of 3.6 instructions a weight on sm_90).
- The first is NVIDIA's order. On AMD (MFMA) a lane holds one row of 16 and four neighbouring reduction
  indices, which are fields of one word (transposed: rows of a patch); what it holds of the other side are
  tiles of 16 rows, above the warps'. In NVIDIA's order it would hash each word for a field or four alone (at
  16 rows on gfx942, instructions a weight: uniform 8.4 instead of 4.9, rademacher 12.5 instead of 3.9).

Tensor cores truncate when they add up (Fasi et al. 2021, doi:10.7717/peerj-cs.330): of a sum of T products
of tiles they take 0.7 T / 2 * 2^-24 in the mean, 2e-5 of two parts at K = 8192, where float32 may be off by
2e-6. So each tile's products of float32 are summed alone, and their sums rounded to nearest.

The invariant: what is summed in which order depends on shapes and on the split, not on BM, BO, PIECES or
warps, nor on whether x was prepared; and no float is added atomically.
"""

import triton
import triton.language as tl

from nmkern.backends.triton.stream import (
    AMD,
    code_scale,
    columns_per_word,
    decode,
    decode_rows,
    word_of_row,
    words,
)

# Whether tiles are in the order of AMD's matrix cores.
MFMA = AMD


@triton.jit
def _anchor(BO: tl.constexpr, BR: tl.constexpr, DTYPE: tl.constexpr):
    """Zeros (uint32) in the layout of a tensor-core result, though Triton's optimiser cannot know them."""
    a, b = tl.full([BO, 16], 1.0, DTYPE), tl.full([16, BR], 1.0, DTYPE)
    # One after the other: only of chained products does every warp own whole rows on Ampere, as in the loop;
    # on AMD a chain is a product whose A is another's result.
    if AMD:
        a = tl.dot(a, tl.full([16, 16], 1.0, DTYPE)).to(DTYPE)
        one = tl.dot(a, b)
    else:
        one = tl.dot(a, b, tl.dot(a, b))
    # LLVM folds this away, with all that depends on the value;
    # Triton's own passes, which choose layouts, do not.
    return (one.to(tl.uint32, bitcast=True) & 1) >> 1


@triton.jit
def _secret(words, nothing):
    """The words of a patch, shifted by a zero of which LLVM does not know, on AMD.

    It would otherwise multiply once for each field that a product of the last round holds: uniform at 16
    rows takes 7.8 instructions a weight, and 4.9 so (5.8 with an empty line of assembly, which costs copies).
    """
    w0, w1, w2, w3 = words
    if AMD:
        w0, w1, w2, w3 = w0 >> nothing, w1 >> nothing, w2 >> nothing, w3 >> nothing
    return w0, w1, w2, w3


@triton.jit
def _held(j, WARPS: tl.constexpr, COUNT: tl.constexpr):
    """Split tile rows j into (which of the COUNT that one thread holds together, the others in order)."""
    BELOW: tl.constexpr = 16 * WARPS
    if MFMA:  # rows 0-15 are lanes, then come the warps
        held = (j // BELOW) % COUNT
        other = j % BELOW + BELOW * (j // (BELOW * COUNT))
    else:  # rows 0-7 are lanes, 8 is held, then come the warps
        held = (j >> 3) % 2 + 2 * ((j // BELOW) % (COUNT // 2))
        other = j % 8 + 8 * ((j >> 4) % WARPS) + 8 * WARPS * (j // (BELOW * (COUNT // 2)))
    return held, other


@triton.jit
def _in_order(acc, WARPS: tl.constexpr, COUNT: tl.constexpr):
    """A tile [BO, BP] as [BP, BO], row COUNT * other + held where ``_held`` splits it into these."""
    BO: tl.constexpr = acc.shape[0]
    BP: tl.constexpr = acc.shape[1]
    if MFMA:
        acc = tl.reshape(acc, [BO // (16 * WARPS * COUNT), COUNT, 16 * WARPS, BP])
        acc = tl.permute(acc, (3, 0, 2, 1))
    else:
        acc = tl.reshape(acc, [BO // (8 * WARPS * COUNT), COUNT // 2, WARPS, 2, 8, BP])
        acc = tl.permute(acc, (5, 0, 2, 4, 1, 3))
    return tl.reshape(acc, [BP, BO])


@triton.jit
def _reduced(i, TAG: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Place i of a step of the reduction: which of its words (transposed: patches), and field (row) of it."""
    WIDTH: tl.constexpr = columns_per_word(TAG)
    HALF: tl.constexpr = WIDTH // 2
    if MFMA:
        if TRANSPOSED:
            unit, inner = i // 4, i % 4
        else:
            unit, inner = (i >> 2) % 4 + 4 * (i // (4 * WIDTH)), (i >> 1) % 2 + 2 * ((i >> 4) % (HALF // 2))
            inner += (i % 2) * HALF
    elif TRANSPOSED:
        unit, inner = (i >> 1) % 4 + 4 * (i >> 4), i % 2 + 2 * ((i >> 3) % 2)
    else:
        unit, inner = (i >> 1) % 4 + 4 * (i // (4 * WIDTH)), (i % 2) * HALF + (i >> 3) % HALF
    return unit, inner


@triton.jit
def context_rows(context, m, M, contexts):
    """Which of several rows, ``contexts``, of a bank serves rows m of the batch: int64, never outside."""
    if context is None:  # a row for each
        c = m
    else:
        c = tl.load(context + m, mask=m < M, other=0)
        # Python cannot look at values on a GPU. With TRITON_DEBUG=1 this raises; otherwise a context out
        # of range is read as the nearest one, never out of bounds.
        tl.device_assert((c >= 0) & (c < contexts), "context: out of range of the bank")
        c = tl.minimum(tl.maximum(c, 0), contexts - 1)
    return c


@triton.jit
def widen(value):
    """A bfloat16, float16 or float32 value in float32, exactly."""
    if value.dtype == tl.bfloat16:  # by its bits, which Triton's interpreter converts wrongly
        value = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """A float32 rounded to nearest even in DTYPE."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def _store_modulated(
    total, y, out_gain, bias, context, factor, m, n, valid, M, N,
    out_contexts, bias_contexts, stride_ot, stride_of, stride_bt, stride_bf,
    OUT_BANK: tl.constexpr, BIAS_BANK: tl.constexpr,
):  # fmt: skip
    """y[m, n] = total * factor * out_gain + bias, each rounded on its own (no kernel may fuse them)."""
    total *= factor
    in_row = (n >= 0) & (n < N)
    if out_gain is not None:
        if OUT_BANK:
            c = context_rows(context, m, M, out_contexts)
            total *= tl.load(out_gain + c * stride_ot + n * stride_of, mask=valid, other=0.0)
        else:  # one value for all rows of the batch
            total *= tl.load(out_gain + n * stride_of, mask=in_row, other=0.0)
    if bias is not None:
        if BIAS_BANK:
            c = context_rows(context, m, M, bias_contexts)
            total += tl.load(bias + c * stride_bt + n * stride_bf, mask=valid, other=0.0)
        else:
            total += tl.load(bias + n * stride_bf, mask=in_row, other=0.0)
    tl.store(y + m * N + n, narrow(total, y.dtype.element_ty), mask=valid)


@triton.jit
def _places(tile, r_skip, TAG: tl.constexpr, TRANSPOSED: tl.constexpr, BR: tl.constexpr, TILES: tl.constexpr):
    """Of the steps from ``tile`` on: which k each place holds, and the place itself, [TILES * BR] each."""
    i = tl.arange(0, TILES * BR)
    PER_UNIT: tl.constexpr = 4 if TRANSPOSED else columns_per_word(TAG)
    unit, inner = _reduced(i % BR, TAG, TRANSPOSED)
    tile = tl.cast(tile, tl.int64) + i // BR
    return tile * BR + (PER_UNIT * unit + inner) - r_skip, tile, i % BR


@triton.jit(do_not_specialize=["M", "r_skip", "tiles"])
def prepare_kernel(
    x,  # [M, K]
    out,  # [tiles, M, BR] in DTYPE
    M,
    K,
    r_skip,
    tiles,
    stride_xm,
    stride_xr,
    TAG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
):
    """x as ``product_kernel`` reads it: in the order of its steps."""
    m = (tl.program_id(0) // tiles).to(tl.int64) * BM + tl.arange(0, BM)
    k, tile, i = _places(tl.program_id(0) % tiles, r_skip, TAG, TRANSPOSED, BR, 1)
    in_batch = (m < M)[:, None]
    valid = ((k >= 0) & (k < K))[None, :] & in_batch
    value = tl.load(x + (m * stride_xm)[:, None] + (k * stride_xr)[None, :], mask=valid, other=0.0)
    tl.store(out + (tile[None, :] * M + m[:, None]) * BR + i[None, :], narrow(widen(value), DTYPE), in_batch)


@triton.jit
def _gained(
    x, in_gain, m, row, k, M, K, stride_xm, stride_xr, stride_if, IN_BANK: tl.constexpr
):  # fmt: skip
    """x[m, k] * in_gain[row, k] in float32, zero outside; ``row``: the offsets of a bank's rows."""
    inside = (k >= 0) & (k < K)
    valid = inside[None, :] & (m < M)[:, None]
    value = widen(tl.load(x + (m * stride_xm)[:, None] + (k * stride_xr)[None, :], mask=valid, other=0.0))
    if IN_BANK:
        value *= tl.load(in_gain + row[:, None] + (k * stride_if)[None, :], mask=valid, other=0.0)
    elif in_gain is not None:
        value *= tl.load(in_gain + k * stride_if, mask=inside, other=0.0)[None, :]
    return value


@triton.jit(do_not_specialize=["M", "r_skip", "tiles"])
def prepare_rows_kernel(
    x,  # [M, K]
    in_gain,  # [contexts, K] float32 or None
    context,  # [M] int64 or None
    out,  # [tiles, PARTS, M, BR] in DTYPE
    row_scale,  # [M] float32
    M,
    K,
    r_skip,
    tiles,
    contexts,
    stride_xm,
    stride_xr,
    stride_it,
    stride_if,
    IN_BANK: tl.constexpr,  # whether in_gain has several rows; else one serves the whole batch
    TAG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,  # that are read at a time
):
    """x * in_gain as ``product_kernel`` reads it, in parts of float16, of rows times a power of two.

    A row's largest is scaled to [2^14, 2^15). One part is off by at most 2^-11 of a value, two are by 2^-23,
    or by 2^-39 of the row's largest; csrc/cuda/pack.cu, which does the same, says why.
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row = m
    if IN_BANK:
        row = context_rows(context, m, M, contexts) * stride_it
    magnitudes = tl.zeros([BM, TILES * BR], tl.float32)
    for first in range(0, tiles, TILES):
        k, tile, i = _places(first, r_skip, TAG, TRANSPOSED, BR, TILES)
        value = _gained(x, in_gain, m, row, k, M, K, stride_xm, stride_xr, stride_if, IN_BANK)
        magnitudes = tl.maximum(magnitudes, tl.abs(value))  # where one is not finite, no result is
    most = tl.max(magnitudes, axis=1)
    # 2^(14 - e) for a largest of exponent e, biased; both it and its inverse are normal numbers.
    exponent = tl.minimum(2 * 127 + 14 - (most.to(tl.int32, bitcast=True) >> 23), 253)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(row_scale + m, ((2 * 127 - exponent) << 23).to(tl.float32, bitcast=True), mask=m < M)
    part = tl.cast(M, tl.int64) * BR
    for first in range(0, tiles, TILES):
        k, tile, i = _places(first, r_skip, TAG, TRANSPOSED, BR, TILES)
        value = _gained(x, in_gain, m, row, k, M, K, stride_xm, stride_xr, stride_if, IN_BANK)
        value *= scale[:, None]
        to = out + (tile[None, :] * PARTS * M + m[:, None]) * BR + i[None, :]
        valid = (tile < tiles)[None, :] & (m < M)[:, None]
        high = value.to(DTYPE)
        if PARTS == 2:
            # The smaller first, as they are added up. What is not finite has none: it would be a NaN.
            rest = value - high.to(tl.float32)
            tl.store(to, tl.where(rest == rest, rest, 0.0).to(DTYPE), mask=valid)
            to += part
        tl.store(to, high, mask=valid)


# Not o_skip: where it is 0, and N a multiple of 16, results are stored 8 or 16 bytes at a time.
_SCALARS = ["M", "k0", "k1", "o_first", "r_first", "r_skip", "chunk", "tiles", "m_blocks", "o_blocks"]


@triton.jit(do_not_specialize=_SCALARS)
def product_kernel(
    x,  # [M, K], K the length of the reduction; or what a kernel above made of it
    out_gain,  # [1, N] float32 or None: of all rows
    bias,  # [1, N] float32 or None
    y,  # [M, N] in the dtype of x; PARTIAL: [splits, M, N] float32, unscaled sums
    table,  # NORMAL_TABLE in DTYPE
    row_scale,  # [M] float32, or None
    factor,
    M,
    N,
    K,
    k0,  # the halves of the seed, and below the first counters, are uint32 passed as int32
    k1,
    o_first,  # first patch (transposed: word) of the outputs, and how many of its outputs lie before them
    o_skip,
    r_first,  # the same of the reduction
    r_skip,
    chunk,  # tiles of the reduction that a split takes
    tiles,  # of the reduction
    m_blocks,
    o_blocks,
    stride_xm,
    stride_xr,
    stride_of,
    stride_bf,
    TAG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTIAL: tl.constexpr,
    PARTS: tl.constexpr,  # of each value, prepared; 0: x is read as it is
    CHAINS: tl.constexpr,  # whether each tile of the reduction is summed alone, as float32 has to be
    DTYPE: tl.constexpr,  # of the operands of tl.dot
    FIELDS: tl.constexpr,  # transposed: the fields of a word that a program computes
    BO: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    PIECES: tl.constexpr,  # that the rows of x are multiplied in, 1 or 2
    WARPS: tl.constexpr,
):
    WIDTH: tl.constexpr = columns_per_word(TAG)
    BP: tl.constexpr = BM // PIECES
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    o_first = o_first.to(tl.uint32, bitcast=True)
    r_first = r_first.to(tl.uint32, bitcast=True)
    pid = tl.program_id(0)
    m_block = pid % m_blocks
    o_block = pid // m_blocks % o_blocks
    split = pid // m_blocks // o_blocks

    # Where the tile's rows and columns lie: patch (or word) and place in it.
    j, i = tl.arange(0, BO), tl.arange(0, BR)
    PER_UNIT: tl.constexpr = 4 if TRANSPOSED else WIDTH
    GROUPS: tl.constexpr = WIDTH // FIELDS if TRANSPOSED else 1
    HELD: tl.constexpr = FIELDS if TRANSPOSED else 4
    group, block = o_block % GROUPS, o_block // GROUPS
    held, other = _held(j, WARPS, HELD)
    held += group * FIELDS if TRANSPOSED else 0
    outer = ((other.to(tl.uint32) + block.to(tl.uint32) * (BO // HELD)) + o_first)[:, None]
    unit, inner = _reduced(i, TAG, TRANSPOSED)

    m = m_block.to(tl.int64) * BM + tl.arange(0, BP)
    if PARTS > 0:
        x += i[:, None] + (m * BR)[None, :]
        part = tl.cast(M, tl.int64) * BR
        # Pointers advance: half an instruction a weight less.
        x += split.to(tl.int64) * chunk * (PARTS * part)
    else:
        x += (m * stride_xm)[None, :]
        offset = PER_UNIT * unit + inner - r_skip
    zero = _anchor(BO, BR, DTYPE)
    nothing = tl.cast(tiles, tl.uint32) >> 31
    acc = tl.zeros([BO, BP], tl.float32)
    acc1 = acc
    for tile in range(split * chunk, tl.minimum((split + 1) * chunk, tiles)):
        counter = (tl.cast(tile, tl.uint32) * (BR // PER_UNIT) + unit.to(tl.uint32) + r_first)[None, :] + zero
        if TRANSPOSED:
            w0, w1, w2, w3 = _secret(words(outer, counter, k0, k1, TAG), nothing)
            f = held.to(tl.uint32)[:, None]
            w = decode_rows(w0, w1, w2, w3, inner[None, :], f, table, TAG, DTYPE)
        else:
            w0, w1, w2, w3 = _secret(words(counter, outer, k0, k1, TAG), nothing)
            w = word_of_row(w0, w1, w2, w3, held[:, None])
            w = decode(w, inner.to(tl.uint32)[None, :], table, TAG, DTYPE)
        if PARTS > 0:
            place = x
            x += PARTS * part
            chain = tl.zeros([BO, BP], tl.float32) if CHAINS else acc
            chain1 = tl.zeros([BO, BP], tl.float32) if CHAINS else acc1
            for _ in tl.static_range(PARTS):
                value = tl.load(place, mask=(m < M)[None, :], other=0.0)
                chain = tl.dot(w, value, chain)
                if PIECES == 2:
                    value = tl.load(place + BP * BR, mask=(m + BP < M)[None, :], other=0.0)
                    chain1 = tl.dot(w, value, chain1)
                place += part
            acc = acc + chain if CHAINS else chain
            acc1 = acc1 + chain1 if CHAINS else chain1
        else:
            k = tl.cast(tile, tl.int64) * BR + offset
            valid = ((k >= 0) & (k < K))[:, None] & (m < M)[None, :]
            value = tl.load(x + (k * stride_xr)[:, None], mask=valid, other=0.0)
            if value.dtype != DTYPE:  # in the interpreter
                value = widen(value)
            acc = tl.dot(w, value, acc)

    for piece in tl.static_range(PIECES):
        # In the order of y, so that a warp writes neighbours.
        o = tl.arange(0, BO)
        n = block.to(tl.int64) * (BO // HELD)
        if TRANSPOSED:
            n = (WIDTH * (n + o // FIELDS) + o % FIELDS + group * FIELDS - o_skip)[None, :]
        else:
            n = (4 * n + o - o_skip)[None, :]
        rows = (m + piece * BP)[:, None]
        valid = (n >= 0) & (n < N) & (rows < M)
        total = _in_order(acc if piece == 0 else acc1, WARPS, HELD) * code_scale(TAG, DTYPE)
        if row_scale is not None:
            total *= tl.load(row_scale + rows, mask=rows < M, other=0.0)
        if PARTIAL:
            tl.store(y + (split.to(tl.int64) * M + rows) * N + n, total, mask=valid)
        else:
            _store_modulated(
                total, y, out_gain, bias, None, factor, rows, n, valid, M, N,
                1, 1, 0, stride_of, 0, stride_bf, False, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "splits", "slices", "col_blocks"])
def finish_kernel(
    partial,  # [splits, M, N] float32
    y,  # [M, N] or None
    out_gain,
    bias,
    other,  # [M, N], with sums or products
    sums,  # [contexts, slices, N] float32 or None
    products,  # [M, N] float32 or None
    context,
    order,  # [M] int64: the rows in the order of their contexts; None: one context
    starts,  # [contexts + 1] int64: where those of each context start
    factor,
    M,
    N,
    splits,
    slices,  # of a context's rows, each summed by a program
    col_blocks,
    out_contexts,
    bias_contexts,
    stride_om,
    stride_on,
    stride_ot,
    stride_of,
    stride_bt,
    stride_bf,
    OUT_BANK: tl.constexpr,
    BIAS_BANK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y of a split product, and other[m, n] * z[m, n]: products, or their sums over the rows of a context.

    A program owns BN columns of BM rows or, with sums, of a slice of a context's rows, which it adds up in
    order: no atomics, the same bits every time.
    """
    pid = tl.program_id(0)
    n = (pid % col_blocks).to(tl.int64) * BN + tl.arange(0, BN)
    segment = (pid // col_blocks).to(tl.int64)
    in_row = n < N
    if sums is None:
        begin = segment * BM
        end = tl.minimum(begin + BM, M)
    else:
        begin = segment * 0
        end = begin + M
        if starts is not None:
            begin = tl.load(starts + segment // slices)
            end = tl.load(starts + segment // slices + 1)
        rows = tl.cdiv(tl.cdiv(end - begin, slices), BM) * BM
        begin += segment % slices * rows
        end = tl.minimum(begin + rows, end)
    total = tl.zeros([BN], tl.float32)
    for first in range(begin, end, BM):
        m = tl.cast(first, tl.int64) + tl.arange(0, BM)
        inside = m < end
        if order is not None:
            m = tl.load(order + m, mask=inside, other=0)
        valid = inside[:, None] & in_row[None, :]
        place = m[:, None] * N + n[None, :]
        z = tl.load(partial + place, mask=valid, other=0.0)
        for split in range(1, splits):
            z += tl.load(partial + tl.cast(split, tl.int64) * M * N + place, mask=valid, other=0.0)
        if y is not None:
            _store_modulated(
                z, y, out_gain, bias, context, factor, m[:, None], n[None, :], valid, M, N,
                out_contexts, bias_contexts, stride_ot, stride_of, stride_bt, stride_bf, OUT_BANK, BIAS_BANK,
            )  # fmt: skip
        if other is not None:
            there = m[:, None] * stride_om + n[None, :] * stride_on
            product = widen(tl.load(other + there, mask=valid, other=0.0)) * (z * factor)
            if products is not None:
                tl.store(products + place, product, mask=valid)
            else:
                total += tl.sum(product, axis=0)
    if sums is not None:
        tl.store(sums + segment * N + n, total, mask=in_row)
