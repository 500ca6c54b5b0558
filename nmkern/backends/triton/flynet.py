"""FlyNet in one sweep over its hidden units, and the adjoint of that sweep.

    hidden[u, m] = max(0, factor * sum over s: x[m, column[s, u]] - mean[m])
    partial[s, m, c] = sum over the units u of split s: code[c, u] * (gain[t, u] * hidden[u, m])
    pulled[u, m] = factor * sum over c: code[c, u] * d_logits[m, c]
    gain_grad[t, u] = sum over the rows m of context t: hidden[u, m] * pulled[u, m]

The columns are drawn once, fan_in words a unit; drawing also counts how often each input is drawn, which
gives the mean over the units without a sweep. What the units compute stays in registers: scratch is x's
transpose, the columns and the partial sums. For the adjoint, rows of the batch are put in the order of
their contexts, so that a program owns 64 units and one context, whose rows are neighbours.

The decoder's words are hashed once each, on a tile of patches x words that is then spread over its fields.

The invariant: a sum's order follows from shapes alone; nothing is added atomically but the counts, integers.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmkern import stream
from nmkern.backends.triton import launch, sparse
from nmkern.backends.triton.dense import context_rows, widen
from nmkern.backends.triton.stream import code_scale, columns_per_word, decode, word_of_row, words
from nmkern.backends.triton.variant import Variant

# A step takes that many units (whole words of every family) and batch rows; the hidden tile is 8 registers a
# thread: at 16, or with four draws read at once, variants spilled. Fixed, as the order of sums must be.
UNITS = 64
_SMALL_BATCH, _BATCH = 16, 32
_LEAST_CLASSES, _MOST_CLASSES = 16, 64  # of a program: a power of two
# Programs that a launch aims at: two of 8 warps for each of an H100's 132 multiprocessors.
_PROGRAMS = 264


@triton.jit
def _truncate(value):
    """The eight leading bits of a float32, a value that bfloat16 holds."""
    return (value.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _parts(value):
    """A float32 in three truncated parts, which bfloat16 holds and which sum to it exactly."""
    high = _truncate(value)
    # An infinity has no rest; the difference would be a NaN.
    rest = tl.where(tl.abs(value) == float("inf"), 0.0, value - high)
    middle = _truncate(rest)
    return high, middle, rest - middle


@triton.jit
def _to_part(value, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:
        part = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        part = value.to(DTYPE)
    return part


@triton.jit
def _dot(w, value, acc, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """acc + w @ value, in one, two or three parts of DTYPE, the smallest first.

    Several in a chain of its own, since tensor cores truncate when they add up: see dense.py.
    """
    if PARTS == 1:
        acc = tl.dot(w, value, acc)
    else:
        high, middle, low = _parts(value)
        if PARTS == 3:
            chain = tl.dot(w, _to_part(low, DTYPE))
            chain = tl.dot(w, _to_part(middle, DTYPE), chain)
        else:
            chain = tl.dot(w, _to_part(middle, DTYPE))
        acc += tl.dot(w, _to_part(high, DTYPE), chain)
    return acc


@triton.jit(do_not_specialize=["M", "inputs", "hidden"])
def mean_kernel(x, counts, mean, factor, M, inputs, hidden, BI: tl.constexpr, BM: tl.constexpr):
    """mean[m] = factor * (sum over i: counts[i] * x[i, m]) / hidden, for x [inputs, M]."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros([BI, BM], tl.float32)
    for first in range(0, inputs, BI):
        i = tl.cast(first, tl.int64) + tl.arange(0, BI)
        count = tl.load(counts + i, mask=i < inputs, other=0)
        # Not even a NaN of an input that no unit draws.
        drawn = (count > 0)[:, None] & (m < M)[None, :]
        value = widen(tl.load(x + i[:, None] * M + m[None, :], mask=drawn, other=0.0))
        total += count.to(tl.float32)[:, None] * value
    sums = tl.sum(total, axis=0) * factor
    size = tl.zeros_like(sums) + tl.cast(hidden, tl.float32)
    tl.store(mean + m, tl.div_rn(sums, size), mask=m < M)


@triton.jit
def _hidden(x, columns, mean, factor, u, m, in_batch, M, inputs, hidden, fan_in, shift, BU: tl.constexpr):
    """hidden[u, m], and zero where there is no such unit; x is [inputs, M]."""
    BM: tl.constexpr = m.shape[0]
    inside = (u >= 0) & (u < hidden)
    sums = tl.zeros([BU, BM], tl.float32)
    x += m[None, :]
    sums = sparse.gather(sums, x, columns, u, inside, in_batch, hidden, inputs, fan_in, shift, M)
    centre = tl.load(mean + m, mask=in_batch, other=0.0)
    value = sums * factor - centre[None, :]
    # Comparing so keeps a NaN.
    return tl.where(inside[:, None] & in_batch[None, :], tl.where(value < 0.0, 0.0, value), 0.0)


@triton.jit
def _decoder(
    patch, word, k0, k1, table, TAG: tl.constexpr, DTYPE: tl.constexpr, BC: tl.constexpr, BU: tl.constexpr
):
    """Codes over ``code_scale`` [BC, BU]: BC / 4 patches and BU / (columns per word) words, by counters."""
    WIDTH: tl.constexpr = columns_per_word(TAG)
    w0, w1, w2, w3 = words(word[None, :], patch[:, None], k0, k1, TAG)
    r = tl.arange(0, 4)[None, :, None, None]
    f = tl.arange(0, WIDTH).to(tl.uint32)[None, None, None, :]
    w = word_of_row(w0[:, None, :, None], w1[:, None, :, None], w2[:, None, :, None], w3[:, None, :, None], r)
    w, f = tl.broadcast(w, f)
    return tl.reshape(decode(w, f, table, TAG, DTYPE), [BC, BU])


_SCALARS = [
    *("M", "fan_in", "shift", "k0", "k1", "c_first", "c_skip", "u_first", "u_skip", "chunk"),
    *("m_blocks", "c_blocks"),
]


@triton.jit(do_not_specialize=_SCALARS)
def logits_kernel(
    x,  # [inputs, M]
    columns,  # [fan_in, hidden]
    mean,  # [M] float32
    gain,  # [contexts, hidden] float32
    context,  # [M] int64 or None
    partial,  # [splits, M, classes] float32: unscaled sums
    table,  # NORMAL_TABLE in DTYPE
    encoder_factor,
    M,
    inputs,
    hidden,
    classes,
    fan_in,
    shift,
    k0,  # the halves of the decoder's seed, and the first counters, are uint32 passed as int32
    k1,
    c_first,  # the patch of the first class, and how many of its rows lie before the class
    c_skip,
    u_first,  # the word of the first unit, and how many of its columns lie before the unit
    u_skip,
    chunk,  # steps over the units that a split takes
    m_blocks,
    c_blocks,
    contexts,
    stride_gt,
    stride_gf,
    BANK: tl.constexpr,  # whether gain has several rows
    TAG: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BC: tl.constexpr,
    BU: tl.constexpr,
    BM: tl.constexpr,
):
    """Partial logits of BC classes for BM rows: a sweep over the hidden units of a split."""
    WIDTH: tl.constexpr = columns_per_word(TAG)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    pid = tl.program_id(0)
    m = (pid % m_blocks).to(tl.int64) * BM + tl.arange(0, BM)
    in_batch = m < M
    c_block = pid // m_blocks % c_blocks
    split = pid // m_blocks // c_blocks
    patch = tl.arange(0, BC // 4).to(tl.uint32) + tl.cast(c_block, tl.uint32) * (BC // 4)
    patch += c_first.to(tl.uint32, bitcast=True)
    c = c_block.to(tl.int64) * BC + tl.arange(0, BC) - c_skip
    if BANK:
        row = gain + (context_rows(context, m, M, contexts) * stride_gt)[None, :]
    acc = tl.zeros([BC, BM], tl.float32)
    for step in range(split * chunk, (split + 1) * chunk):
        u = tl.cast(step, tl.int64) * BU + tl.arange(0, BU) - u_skip
        value = _hidden(
            x, columns, mean, encoder_factor, u, m, in_batch, M, inputs, hidden, fan_in, shift, BU
        )
        inside = (u >= 0) & (u < hidden)
        if BANK:
            valid = inside[:, None] & in_batch[None, :]
            value *= tl.load(row + (u * stride_gf)[:, None], mask=valid, other=0.0)
        else:
            value *= tl.load(gain + u * stride_gf, mask=inside, other=0.0)[:, None]
        word = tl.arange(0, BU // WIDTH).to(tl.uint32) + tl.cast(step, tl.uint32) * (BU // WIDTH)
        word += u_first.to(tl.uint32, bitcast=True)
        w = _decoder(patch, word, k0, k1, table, TAG, DTYPE, BC, BU)
        acc = _dot(w, value, acc, PARTS, DTYPE)
    place = (split.to(tl.int64) * M + m)[None, :] * classes + c[:, None]
    acc *= code_scale(TAG, DTYPE)
    tl.store(partial + place, acc, mask=((c >= 0) & (c < classes))[:, None] & in_batch[None, :])


@triton.jit(do_not_specialize=[*_SCALARS, "segments"])
def gain_grad_kernel(
    x,  # [inputs, M]
    columns,
    mean,
    d_logits,  # [M, classes]
    starts,  # [segments + 1] int64: the rows of a segment; None: ``chunk`` rows each
    out,  # [segments, hidden] float32; EACH: [M, hidden], a product for each row
    table,
    encoder_factor,
    decoder_factor,
    M,
    inputs,
    hidden,
    classes,
    fan_in,
    shift,
    k0,
    k1,
    c_first,
    c_skip,
    u_first,
    u_skip,
    chunk,
    c_blocks,
    segments,
    stride_dm,
    stride_dc,
    EACH: tl.constexpr,
    TAG: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BC: tl.constexpr,
    BU: tl.constexpr,
    BM: tl.constexpr,
):
    """The sums over the rows of one segment of the batch, for BU hidden units."""
    WIDTH: tl.constexpr = columns_per_word(TAG)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    pid = tl.program_id(0)
    segment = (pid % segments).to(tl.int64)
    step = pid // segments
    if starts is None:
        begin = segment * chunk
        end = tl.minimum(begin + chunk, M)
    else:
        begin = tl.load(starts + segment)
        end = tl.load(starts + segment + 1)
    u = step.to(tl.int64) * BU + tl.arange(0, BU) - u_skip
    inside = (u >= 0) & (u < hidden)
    word = tl.arange(0, BU // WIDTH).to(tl.uint32) + step.to(tl.uint32) * (BU // WIDTH)
    word += u_first.to(tl.uint32, bitcast=True)
    total = tl.zeros([BU], tl.float32)
    for first in range(begin, end, BM):
        m = tl.cast(first, tl.int64) + tl.arange(0, BM)
        in_batch = m < end
        pulled = tl.zeros([BU, BM], tl.float32)
        for c_block in range(c_blocks):
            patch = tl.arange(0, BC // 4).to(tl.uint32) + tl.cast(c_block, tl.uint32) * (BC // 4)
            patch += c_first.to(tl.uint32, bitcast=True)
            c = tl.cast(c_block, tl.int64) * BC + tl.arange(0, BC) - c_skip
            valid = ((c >= 0) & (c < classes))[:, None] & in_batch[None, :]
            there = (c * stride_dc)[:, None] + (m * stride_dm)[None, :]
            d = tl.load(d_logits + there, mask=valid, other=0.0)
            if d.dtype != DTYPE:
                d = widen(d)
            w = _decoder(patch, word, k0, k1, table, TAG, DTYPE, BC, BU)
            pulled = _dot(tl.trans(w), d, pulled, PARTS, DTYPE)
        value = _hidden(
            x, columns, mean, encoder_factor, u, m, in_batch, M, inputs, hidden, fan_in, shift, BU
        )
        product = value * (pulled * code_scale(TAG, DTYPE) * decoder_factor)
        if EACH:
            place = m[None, :] * hidden + u[:, None]
            tl.store(out + place, product, mask=inside[:, None] & in_batch[None, :])
        else:
            total += tl.sum(product, axis=1)  # here, for a tile of sums would cost registers: spills
    if not EACH:
        tl.store(out + segment * hidden + u, total, mask=inside)


@dataclass(frozen=True)
class Plan:
    """What the launches need that does not depend on tensors."""

    batch: int  # rows of a tile
    m_blocks: int
    c_blocks: int
    steps: int  # over the units
    counters: tuple[int, ...]  # k0 and k1, then first counter and skip of classes and units
    table: torch.dtype
    logits: Variant
    gain_grad: Variant


def operand_of(dtype: torch.dtype, gained: bool, tf32: bool) -> tuple[torch.dtype, int]:
    """The dtype of tl.dot's operands, and in how many parts of it a float32 is multiplied.

    Weights are exact in every one, and three parts of bfloat16 are all of a float32. Where tf32 may be used,
    two do: 16 bits to tf32's 11, in the same time on tensor cores, and in half the instructions. The
    interpreter multiplies in float32 throughout.
    """
    if launch.INTERPRETED:
        return torch.float32, 1
    if dtype == torch.float32:
        return torch.bfloat16, 2 if tf32 else 3
    return (torch.bfloat16, 3) if gained else (dtype, 1)


@functools.lru_cache(maxsize=1024)
def plan_of(
    decoder: tuple, hidden: int, rows: int, dtype: torch.dtype, gained: bool, tf32: bool = False
) -> Plan:
    """``dtype`` and ``gained``: what the weights multiply, and whether that is times a gain."""
    tag, seed, row_offset, col_offset, classes = decoder
    width = next(f.columns_per_word for f in stream.DENSE_FAMILIES.values() if f.tag == tag)
    c_first, c_skip = divmod(row_offset, 4)
    u_first, u_skip = divmod(col_offset, width)
    block = min(max(triton.next_power_of_2(c_skip + classes), _LEAST_CLASSES), _MOST_CLASSES)
    batch = _SMALL_BATCH if rows <= _SMALL_BATCH else _BATCH
    operand, parts = operand_of(dtype, gained, tf32)
    constants = {
        "TAG": tag,
        "PARTS": parts,
        "DTYPE": launch.DTYPES[operand],
        "BC": block,
        "BU": UNITS,
        "BM": batch,
        "num_warps": batch // 4,
        "num_stages": 2,
        "enable_fp_fusion": False,
    }
    counters = (*stream.key_of(seed % 2**64), c_first, c_skip, u_first, u_skip)
    return Plan(
        batch,
        triton.cdiv(rows, batch),
        triton.cdiv(c_skip + classes, block),
        triton.cdiv(u_skip + hidden, UNITS),
        tuple(map(launch.signed32, counters)),
        operand,
        Variant(logits_kernel, **constants),
        Variant(gain_grad_kernel, **constants),
    )


_MEAN = Variant(mean_kernel, BI=64, BM=_SMALL_BATCH, num_warps=4, enable_fp_fusion=False)


def _encode(x: Tensor, encoder: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """x transposed, the columns that units draw, and the mean over the units of each row."""
    seed, row_offset, col_offset, hidden, inputs, population, fan_in, factor = encoder
    counts = x.new_zeros(inputs, dtype=torch.int32)
    columns = sparse.draw(x, seed, row_offset, hidden, col_offset, inputs, population, fan_in, counts)
    across = x.t().contiguous()
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    rows = x.shape[0]
    programs = launch.cdiv(rows, _SMALL_BATCH)
    _MEAN(programs, (across, counts, mean, factor), (rows, inputs, hidden))
    return across, columns, mean


def _sizes(x: Tensor, encoder: tuple, decoder: tuple) -> tuple[int, ...]:
    """The arguments from M to shift of both kernels."""
    _, _, col_offset, hidden, inputs, _, fan_in, _ = encoder
    return x.shape[0], inputs, hidden, decoder[4], fan_in, sparse.shift_of(col_offset)


def flynet_logits(x: Tensor, gain: Tensor, context: Tensor | None, *matrices: Any) -> Tensor:
    encoder, decoder, factor = matrices[:8], matrices[8:-1], matrices[-1]
    rows, hidden, classes = x.shape[0], encoder[3], decoder[4]
    y = x.new_empty(rows, classes)
    if rows == 0:
        return y
    plan = plan_of(decoder, hidden, rows, x.dtype, True, launch.may_use_tf32(x.dtype))
    wanted = max(1, min(plan.steps, _PROGRAMS // (plan.m_blocks * plan.c_blocks)))
    wanted = max(1, min(wanted, launch.SCRATCH // (4 * rows * classes)))
    chunk = launch.cdiv(plan.steps, wanted)
    splits = launch.cdiv(plan.steps, chunk)
    context = None if context is None else context.contiguous()
    with launch.on_device(x.device):
        across, columns, mean = _encode(x.resolve_neg(), encoder)
        partial = x.new_empty(splits, rows, classes, dtype=torch.float32)
        contexts = gain.shape[0]
        table = launch.table_of(x.device, plan.table)
        blocks = (chunk, plan.m_blocks, plan.c_blocks)
        plan.logits(
            plan.m_blocks * plan.c_blocks * splits,
            (across, columns, mean, gain, context, partial, table, encoder[-1]),
            (*_sizes(x, encoder, decoder), *plan.counters, *blocks, contexts, *launch.strides_of(gain)),
            BANK=contexts > 1,
        )
        launch.finish(partial, y, factor)
    return y


def flynet_gain_grad(
    x: Tensor, d_logits: Tensor, context: Tensor | None, contexts: int, *matrices: Any
) -> Tensor:
    encoder, decoder, factor = matrices[:8], matrices[8:-1], matrices[-1]
    rows, hidden = x.shape[0], encoder[3]
    if rows == 0:
        return x.new_zeros(contexts, hidden, dtype=torch.float32)
    tf32 = launch.may_use_tf32(d_logits.dtype)
    plan = plan_of(decoder, hidden, rows, d_logits.dtype, False, tf32)
    each = contexts > 1 and context is None
    starts = None
    # Rows of the batch that a program takes where it takes no context's.
    chunk = plan.batch
    if contexts == 1:
        chunk *= launch.cdiv(plan.m_blocks, max(1, _PROGRAMS // plan.steps))
    with launch.on_device(x.device):
        x, d_logits = x.resolve_neg(), d_logits.resolve_neg()
        if contexts > 1 and context is not None:
            order, starts = launch.by_context(context, contexts)
            x, d_logits = x.index_select(0, order), d_logits.index_select(0, order)
        segments = launch.cdiv(rows, chunk) if starts is None else contexts
        across, columns, mean = _encode(x, encoder)
        out = x.new_empty(rows if each else segments, hidden, dtype=torch.float32)
        table = launch.table_of(x.device, plan.table)
        blocks = (chunk, plan.c_blocks, segments)
        plan.gain_grad(
            plan.steps * segments,
            (across, columns, mean, d_logits, starts, out, table, encoder[-1], factor),
            (*_sizes(x, encoder, decoder), *plan.counters, *blocks, *d_logits.stride()),
            EACH=each,
        )
        return out.sum(0, keepdim=True) if contexts == 1 and segments > 1 else out
