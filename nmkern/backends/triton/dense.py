"""The dense kernels: x times generated weights, and the stage that finishes split sums.

    partial[s, m, n] = sum over the k of split s: (x[m, k] * in_gain[c, k]) * code[n, k]
    y[m, n] = (factor * sum over s: partial[s, m, n]) * out_gain[c, n] + bias[c, n]

A program computes a tile of y's transpose, W tile [BO, BR] times x tile [BR, BM], so that weights are the
A operand of the tensor cores: computed in the very registers that multiply them, never in shared memory.
What makes Triton do so is where indices go:

- Rows of the tile that one thread holds (bit 3, and the bits above the warps') are rows of one patch, or
  fields of one word (transposed); neighbouring reduction indices are the two halves of a word. So a
  thread uses every bit of what it hashes. x is read, and y written, in the same permuted order.
- The tile starts from the result of a small tensor-core product (``_anchor``), whose layout the whole
  hash then takes: without, Triton hashes in another layout and moves every weight through shared memory
  (15 instead of 3.6 instructions a weight on sm_90).

The invariant: what is summed in which order depends on shapes and on the split, not on BM, BO or warps;
and no float is added atomically.
"""

import triton
import triton.language as tl

from nmkern.backends.triton.stream import columns_per_word, decode, decode_rows, word_of_row, words


@triton.jit
def _anchor(BO: tl.constexpr, BR: tl.constexpr, DTYPE: tl.constexpr):
    """Zeros (uint32) in the layout of a tensor-core result, though Triton's optimiser cannot know them."""
    one = tl.dot(tl.full([BO, 16], 1.0, DTYPE), tl.full([16, BR], 1.0, DTYPE), input_precision="tf32")
    # LLVM folds this away, with all that depends on the value;
    # Triton's own passes, which choose layouts, do not.
    return (one.to(tl.uint32, bitcast=True) & 1) >> 1


@triton.jit
def _held(j, WARPS: tl.constexpr, COUNT: tl.constexpr):
    """Split tile rows j into (which of the COUNT that one thread holds together, the others in order)."""
    BELOW: tl.constexpr = 16 * WARPS  # rows 0-7 are lanes, 8 is held, then come the warps
    held = (j >> 3) % 2 + 2 * ((j // BELOW) % (COUNT // 2))
    other = j % 8 + 8 * ((j >> 4) % WARPS) + 8 * WARPS * (j // (BELOW * (COUNT // 2)))
    return held, other


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
def _truncate(value):
    """The eight leading bits of a float32, a value that bfloat16 holds."""
    return (value.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _to_part(value, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        value = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value


@triton.jit
def dot(w, value, acc, SPLIT_X: tl.constexpr, DTYPE: tl.constexpr):
    """acc + w @ value. A float32 is split in three truncated parts, which sum to it exactly."""
    if SPLIT_X:
        high = _truncate(value)
        # An infinity has no rest; the difference would be a NaN.
        rest = tl.where(tl.abs(value) == float("inf"), 0.0, value - high)
        middle = _truncate(rest)
        acc = tl.dot(w, _to_part(rest - middle, DTYPE), acc)
        acc = tl.dot(w, _to_part(middle, DTYPE), acc)
        acc = tl.dot(w, _to_part(high, DTYPE), acc)
    else:
        acc = tl.dot(w, value, acc, input_precision="tf32")
    return acc


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


_SCALARS = ["M", "k0", "k1", "o_first", "o_skip", "r_first", "r_skip", "chunk", "m_blocks", "o_blocks"]


@triton.jit(do_not_specialize=_SCALARS)
def product_kernel(
    x,  # [M, K], K the length of the reduction
    in_gain,  # [in_contexts, K] float32 or None
    out_gain,  # [out_contexts, N] float32 or None
    bias,  # [bias_contexts, N] float32 or None
    context,  # [M] int64 or None
    y,  # [M, N] in the dtype of x; PARTIAL: [splits, M, N] float32, unscaled sums
    table,  # NORMAL_TABLE in DTYPE
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
    m_blocks,
    o_blocks,
    in_contexts,
    out_contexts,
    bias_contexts,
    stride_xm,
    stride_xr,
    stride_it,
    stride_if,
    stride_ot,
    stride_of,
    stride_bt,
    stride_bf,
    IN_BANK: tl.constexpr,  # whether in_gain has several rows; else one serves the whole batch
    OUT_BANK: tl.constexpr,
    BIAS_BANK: tl.constexpr,
    TAG: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTIAL: tl.constexpr,
    SPLIT_X: tl.constexpr,  # in three parts of DTYPE
    DTYPE: tl.constexpr,  # of the operands of tl.dot
    FIELDS: tl.constexpr,  # transposed: the fields of a word that a program computes
    BO: tl.constexpr,
    BR: tl.constexpr,
    BM: tl.constexpr,
    WARPS: tl.constexpr,
):
    WIDTH: tl.constexpr = columns_per_word(TAG)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    o_first = o_first.to(tl.uint32, bitcast=True)
    r_first = r_first.to(tl.uint32, bitcast=True)
    pid = tl.program_id(0)
    m_block = pid % m_blocks
    o_block = pid // m_blocks % o_blocks
    split = pid // m_blocks // o_blocks

    # Where the tile's rows and columns lie: patch (or word) and place in it, then the index in the view.
    j, i = tl.arange(0, BO), tl.arange(0, BR)
    PER_TILE: tl.constexpr = BR // (4 if TRANSPOSED else WIDTH)  # patches, or words
    if TRANSPOSED:
        GROUPS: tl.constexpr = WIDTH // FIELDS
        f, word = _held(j, WARPS, FIELDS)
        f += o_block % GROUPS * FIELDS
        word += (o_block // GROUPS).to(tl.int64) * (BO // FIELDS)
        n = WIDTH * word + f - o_skip
        c0 = (word.to(tl.uint32) + o_first)[:, None]
        f = f.to(tl.uint32)[:, None]
        r = i % 2 + 2 * ((i >> 3) % 2)
        unit = (i >> 1) % 4 + 4 * (i >> 4)
        offset = r - r_skip
        r = r[None, :]
    else:
        r, patch = _held(j, WARPS, 4)
        patch += o_block.to(tl.int64) * (BO // 4)
        n = 4 * patch + r - o_skip
        c1 = (patch.to(tl.uint32) + o_first)[:, None]
        r = r[:, None]
        HALF: tl.constexpr = WIDTH // 2
        f = (i % 2) * HALF + (i >> 3) % HALF
        unit = (i >> 1) % 4 + 4 * (i // (4 * WIDTH))
        offset = f - r_skip
        f = f.to(tl.uint32)[None, :]

    m = m_block.to(tl.int64) * BM + tl.arange(0, BM)
    in_batch = (m < M)[None, :]
    x += (m * stride_xm)[None, :]
    if IN_BANK:
        in_gain += (context_rows(context, m, M, in_contexts) * stride_it)[None, :]
    zero = _anchor(BO, BR, DTYPE)
    acc = tl.zeros([BO, BM], tl.float32)
    for tile in range(split * chunk, (split + 1) * chunk):
        units = tl.cast(tile, tl.int64) * PER_TILE + unit
        k = (4 if TRANSPOSED else WIDTH) * units + offset
        valid = ((k >= 0) & (k < K))[:, None] & in_batch
        value = tl.load(x + (k * stride_xr)[:, None], mask=valid, other=0.0)
        if IN_BANK:
            value = widen(value) * tl.load(in_gain + (k * stride_if)[:, None], mask=valid, other=0.0)
        elif in_gain is not None:
            gain = tl.load(in_gain + k * stride_if, mask=(k >= 0) & (k < K), other=0.0)
            value = widen(value) * gain[:, None]
        elif value.dtype != DTYPE:
            value = widen(value)
        counter = (units.to(tl.uint32) + r_first)[None, :] + zero
        if TRANSPOSED:
            w0, w1, w2, w3 = words(c0, counter, k0, k1, TAG)
            w = decode_rows(w0, w1, w2, w3, r, f, table, TAG, DTYPE)
        else:
            w0, w1, w2, w3 = words(counter, c1, k0, k1, TAG)
            w = decode(word_of_row(w0, w1, w2, w3, r), f, table, TAG, DTYPE)
        acc = dot(w, value, acc, SPLIT_X, DTYPE)

    m, n = m[None, :], n[:, None]
    valid = (n >= 0) & (n < N) & in_batch
    if PARTIAL:
        tl.store(y + (split.to(tl.int64) * M + m) * N + n, acc, mask=valid)
    else:
        _store_modulated(
            acc, y, out_gain, bias, context, factor, m, n, valid, M, N,
            out_contexts, bias_contexts, stride_ot, stride_of, stride_bt, stride_bf, OUT_BANK, BIAS_BANK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "splits", "row_tiles"])
def finish_kernel(
    partial,  # [splits, M, N] float32
    y,  # [M, N] or None
    out_gain,
    bias,
    other,  # [M, N], with gain_grad
    gain_grad,  # [contexts, N] float32 or None: is added to
    context,
    factor,
    M,
    N,
    splits,
    row_tiles,  # row tiles that a program takes, one after the other
    contexts,
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
    BANK: tl.constexpr,  # gain_grad: "one" row, a row "each" for the rows of the batch, or by "context"
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y of a split product, and gain_grad[c, n] += sum over the rows m of c: other[m, n] * z[m, n].

    A program owns its columns of gain_grad and takes the rows in order: no atomics, the same bits every time.
    """
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    in_row = n < N
    total = tl.zeros([BN], tl.float32)
    for tile in range(row_tiles):
        m = (tl.program_id(1).to(tl.int64) * row_tiles + tile) * BM + tl.arange(0, BM)
        valid = (m < M)[:, None] & in_row[None, :]
        place = m[:, None] * N + n[None, :]
        z = tl.load(partial + place, mask=valid, other=0.0)
        for split in range(1, splits):
            z += tl.load(partial + tl.cast(split, tl.int64) * M * N + place, mask=valid, other=0.0)
        if y is not None:
            _store_modulated(
                z, y, out_gain, bias, context, factor, m[:, None], n[None, :], valid, M, N,
                out_contexts, bias_contexts, stride_ot, stride_of, stride_bt, stride_bf, OUT_BANK, BIAS_BANK,
            )  # fmt: skip
        if gain_grad is not None:
            there = m[:, None] * stride_om + n[None, :] * stride_on
            product = widen(tl.load(other + there, mask=valid, other=0.0)) * (z * factor)
            if BANK == "one":
                total += tl.sum(product, axis=0)
            elif BANK == "each":
                tl.store(gain_grad + place, product, mask=valid)
            else:
                c = context_rows(context, m, M, contexts)
                first = tl.min(tl.where(m < M, c, contexts - 1))
                last = tl.max(tl.where(m < M, c, 0))
                for row in range(first, last + 1):
                    of_row = tl.sum(tl.where((c == row)[:, None], product, 0.0), axis=0)
                    sums = gain_grad + row * N + n
                    of_row += tl.load(sums, mask=in_row, other=0.0)
                    # Several threads may hold a column: all have read before one writes, and it has
                    # written before any reads again.
                    tl.debug_barrier()
                    tl.store(sums, of_row, mask=in_row)
                    tl.debug_barrier()
    if gain_grad is not None and BANK == "one":
        total += tl.load(gain_grad + n, mask=in_row, other=0.0)
        tl.store(gain_grad + n, total, mask=in_row)
