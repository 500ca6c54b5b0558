"""The sparse projection: which columns each row draws, and sums over them, both ways.

    y[m, n] = factor * sum over s < fan_in: x[m, column[s, n]]                    forward
    y[m, k] = factor * sum over the draws (s, n) with column[s, n] = k: x[m, n]   transposed

``draw_kernel`` samples without replacement (Floyd) into fan_in words a row, for as many rows at a time as
``DRAWS`` words hold. Forward, a program adds what its rows drew. Transposed, the draws are sorted by
column (a stable sort of integers), and a program adds the draws of its columns: no index but the draws
of one chunk is ever stored, and no weight.

A drawn column lies in memory as a signed word, column - 2^31, which sorts as the column does; draws
outside of the view fall outside of what is looked up.

The invariant: each sum has one owner and one order, that of the draws (transposed: by chunk, draw and
row), so that bits depend on the matrix and ``DRAWS`` alone; nothing is added atomically but integers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmkern import stream
from nmkern.backends.triton import launch
from nmkern.backends.triton.dense import narrow, widen
from nmkern.backends.triton.stream import SPARSE, philox4x32
from nmkern.backends.triton.variant import Variant

# Draws that are held at a time, but one row's at least: 8 MiB, and sorting them takes some 50 MiB.
DRAWS = 2**21
# Draws of a row that are compared in registers; those beyond, in memory, at a cost of fan_in^2 / 2 reads.
HELD = 2048
_DRAW_TILE = 65536 if launch.INTERPRETED else 1024  # elements of a tile of draw_kernel, but one row at least
# A tile of the sums: 8 registers a thread at most. Every figure gives the same bits; the interpreter pays
# by the operation, hardly by the element.
OUTPUTS = 512 if launch.INTERPRETED else 32
SMALL_BATCH, BATCH = 16, 128 if launch.INTERPRETED else 32
# From this many rows on, x is copied so that rows of the batch are neighbours in memory, and a draw reads
# whole sectors instead of a word of each: up to eight times less traffic.
_COPY_BATCH = 8


@triton.jit
def _pick(chosen, w, j, s, lane, row, columns, rows, fan_in, counts, shift, cols, HELD: tl.constexpr):
    """Floyd's step s: the candidate if it is new, else j; both biased. Returns the tile of those chosen."""
    bias = tl.zeros_like(w) + 0x80000000
    j = tl.zeros_like(w) + j
    candidate = tl.umulhi(w, j + 1) ^ bias
    drawn = (row < rows) & (tl.zeros_like(row) + s < fan_in)
    if HELD:
        taken = tl.max(((chosen == candidate[:, None]) & (lane < s)[None, :]).to(tl.int32), axis=1)
    else:
        taken = tl.zeros_like(w).to(tl.int32)
        for first in range(0, s, lane.shape[0]):
            place = first + lane
            earlier = tl.load(
                columns + place.to(tl.int64)[None, :] * rows + row[:, None],
                mask=(place < s)[None, :] & drawn[:, None],
                other=0,
            ).to(tl.uint32, bitcast=True)
            equal = (earlier == candidate[:, None]) & (place < s)[None, :]
            taken = tl.maximum(taken, tl.max(equal.to(tl.int32), axis=1))
    value = tl.where(taken > 0, j ^ bias, candidate)
    signed = value.to(tl.int32, bitcast=True)
    tl.store(columns + s.to(tl.int64) * rows + row, signed, mask=drawn)
    if counts is not None:
        k = signed.to(tl.int64) + shift
        tl.atomic_add(counts + k, 1, mask=drawn & (k >= 0) & (k < cols), sem="relaxed")
    if HELD:
        chosen = tl.where((lane == s)[None, :], value[:, None], chosen)
    else:
        tl.debug_barrier()  # other threads read what this one has stored
    return chosen


@triton.jit(do_not_specialize=["k0", "k1", "first_row", "lowest", "shift", "rows", "cols", "fan_in"])
def draw_kernel(
    columns,  # [fan_in, rows] int32: column - 2^31
    counts,  # [cols] int32 or None: to it is added how often each column of the view is drawn
    k0,  # the halves of the seed, and the two below, are uint32 passed as int32
    k1,
    first_row,
    lowest,  # j of the first draw: population - fan_in
    shift,  # 2^31 - col_offset: from a signed word to a column of the view
    rows,
    cols,
    fan_in,
    HELD: tl.constexpr,  # whether BF lanes hold all that a row chooses
    BR: tl.constexpr,
    BF: tl.constexpr,
):
    """The columns of ``rows`` rows of the matrix. population < 2^32, so that j + 1 is a word."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c1 = row.to(tl.uint32) + first_row.to(tl.uint32, bitcast=True)
    k0 = k0.to(tl.uint32, bitcast=True)
    k1 = k1.to(tl.uint32, bitcast=True)
    lowest = lowest.to(tl.uint32, bitcast=True)
    lane = tl.arange(0, BF)
    zero = tl.zeros_like(c1)
    chosen = tl.zeros([BR, BF], tl.uint32)
    for step in range(0, fan_in, 4):
        s = tl.cast(step, tl.int32)
        w0, w1, w2, w3 = philox4x32(zero + (s // 4).to(tl.uint32), c1, zero, zero + SPARSE, k0, k1)
        j = lowest + s.to(tl.uint32)
        chosen = _pick(chosen, w0, j, s, lane, row, columns, rows, fan_in, counts, shift, cols, HELD)
        chosen = _pick(chosen, w1, j + 1, s + 1, lane, row, columns, rows, fan_in, counts, shift, cols, HELD)
        chosen = _pick(chosen, w2, j + 2, s + 2, lane, row, columns, rows, fan_in, counts, shift, cols, HELD)
        chosen = _pick(chosen, w3, j + 3, s + 3, lane, row, columns, rows, fan_in, counts, shift, cols, HELD)


@triton.jit
def _column(columns, s, n, inside, rows, cols, fan_in, shift):
    """The column of the view that rows n drew in step s, and whether there is one."""
    drawn = inside & (tl.zeros_like(n) + s < fan_in)
    k = tl.load(columns + s.to(tl.int64) * rows + n, mask=drawn, other=0).to(tl.int64) + shift
    return k, drawn & (k >= 0) & (k < cols)


@triton.jit
def _read(x, k, valid, in_batch, stride):
    """x at columns k for the rows of the batch whose addresses x holds."""
    return widen(tl.load(x + (k * stride)[:, None], mask=valid[:, None] & in_batch[None, :], other=0.0))


@triton.jit
def gather(total, x, columns, n, inside, in_batch, rows, cols, fan_in, shift, stride):
    """total [outputs, batch] + the columns that rows n drew, in the order of the draws.

    ``x`` holds the addresses of the rows of the batch, [1, batch].
    """
    # Two at a time: their loads are under way together, where each depends on its column's.
    for step in range(0, fan_in, 2):
        s = tl.cast(step, tl.int32)
        k0, valid0 = _column(columns, s, n, inside, rows, cols, fan_in, shift)
        k1, valid1 = _column(columns, s + 1, n, inside, rows, cols, fan_in, shift)
        v0 = _read(x, k0, valid0, in_batch, stride)
        v1 = _read(x, k1, valid1, in_batch, stride)
        total += v0
        total += v1
    return total


@triton.jit(do_not_specialize=["M", "first", "rows", "cols", "fan_in", "shift", "m_blocks"])
def gather_kernel(
    x,  # [M, cols]
    columns,  # [fan_in, rows]
    y,  # [M, N], of which columns first to first + rows are written
    factor,
    M,
    N,
    first,
    rows,
    cols,
    fan_in,
    shift,
    m_blocks,
    stride_xm,
    stride_xk,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """The product of the rows whose columns have been drawn."""
    pid = tl.program_id(0)
    n = (pid // m_blocks).to(tl.int64) * BN + tl.arange(0, BN)
    m = (pid % m_blocks).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros([BN, BM], tl.float32)
    x += (m * stride_xm)[None, :]
    total = gather(total, x, columns, n, n < rows, m < M, rows, cols, fan_in, shift, stride_xk)
    place = (n + first)[:, None] + m[None, :] * N
    valid = (n < rows)[:, None] & (m < M)[None, :]
    tl.store(y + place, narrow(total * factor, y.dtype.element_ty), mask=valid)


@triton.jit
def _drawing_row(order, i, stop, rows, first):
    """The i-th row that drew a column, and whether there is one."""
    valid = i < stop
    place = tl.load(order + i, mask=valid, other=0).to(tl.int32)
    return (place % rows).to(tl.int64) + first, valid


@triton.jit(do_not_specialize=["M", "first", "rows", "cols", "m_blocks"])
def scatter_kernel(
    x,  # [M, K]
    starts,  # [cols + 1] int32: where the draws of a column start among the sorted
    order,  # int64: the places that sorted draws had, in [fan_in, rows]
    total,  # [M, cols] float32: unscaled sums over the chunks so far
    y,  # [M, cols]
    factor,
    M,
    first,  # the chunk's first row, an index along K
    rows,
    cols,
    m_blocks,
    stride_xm,
    stride_xk,
    ADD: tl.constexpr,  # whether there were chunks before
    DONE: tl.constexpr,  # whether this is the last, which writes y
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """The transposed product: a program owns its columns, and adds the rows that drew them in order."""
    pid = tl.program_id(0)
    n = (pid // m_blocks).to(tl.int64) * BN + tl.arange(0, BN)
    m = (pid % m_blocks).to(tl.int64) * BM + tl.arange(0, BM)
    in_batch = m < M
    start = tl.load(starts + n, mask=n < cols, other=0)
    stop = tl.load(starts + n + 1, mask=n < cols, other=0)
    x += (m * stride_xm)[None, :]
    place = n[:, None] + m[None, :] * cols
    valid = (n < cols)[:, None] & in_batch[None, :]
    sums = tl.zeros([BN, BM], tl.float32)
    if ADD:
        sums += tl.load(total + place, mask=valid, other=0.0)
    for i in range(0, tl.max(stop - start), 4):
        k0, valid0 = _drawing_row(order, start + i, stop, rows, first)
        k1, valid1 = _drawing_row(order, start + i + 1, stop, rows, first)
        k2, valid2 = _drawing_row(order, start + i + 2, stop, rows, first)
        k3, valid3 = _drawing_row(order, start + i + 3, stop, rows, first)
        v0 = _read(x, k0, valid0, in_batch, stride_xk)
        v1 = _read(x, k1, valid1, in_batch, stride_xk)
        v2 = _read(x, k2, valid2, in_batch, stride_xk)
        v3 = _read(x, k3, valid3, in_batch, stride_xk)
        sums += v0
        sums += v1
        sums += v2
        sums += v3
    if DONE:
        tl.store(y + place, narrow(sums * factor, y.dtype.element_ty), mask=valid)
    else:
        tl.store(total + place, sums, mask=valid)


_DRAW = Variant(draw_kernel, num_warps=4, enable_fp_fusion=False)
_GATHER = Variant(gather_kernel, BN=OUTPUTS, num_warps=4, enable_fp_fusion=False)
_SCATTER = Variant(scatter_kernel, BN=OUTPUTS, num_warps=4, enable_fp_fusion=False)


def tile_rows(lanes: int) -> int:
    """Rows of a tile of draw_kernel."""
    return max(1, _DRAW_TILE // lanes)


def shift_of(col_offset: int) -> int:
    """What a word of ``draw`` needs to become a column of the view."""
    return 2**31 - col_offset


def draw(
    like: Tensor,
    seed: int,
    first_row: int,
    rows: int,
    col_offset: int,
    cols: int,
    population: int,
    fan_in: int,
    counts: Tensor | None = None,
) -> Tensor:
    """The columns of ``rows`` rows, ``[fan_in, rows]`` int32 on the device of ``like``; see draw_kernel."""
    columns = like.new_empty(fan_in, rows, dtype=torch.int32)
    lanes = min(1 << (fan_in - 1).bit_length(), HELD)  # Triton's next_power_of_2 takes 4 us
    block = tile_rows(lanes)
    k0, k1 = stream.key_of(seed % 2**64)
    words = map(launch.signed32, (k0, k1, first_row, population - fan_in))
    _DRAW(
        launch.cdiv(rows, block),
        (columns, counts),
        (*words, shift_of(col_offset), rows, cols, fan_in),
        HELD=fan_in <= lanes,
        BR=block,
        BF=lanes,
    )
    return columns


def gatherable(x: Tensor) -> Tensor:
    """x, copied so that the batch is contiguous where that pays and fits the scratch."""
    x = x.resolve_neg()
    if x.shape[0] < _COPY_BATCH or x.numel() * x.element_size() > launch.SCRATCH:
        return x
    return x.t().contiguous().t()


def _blocks(outputs: int, batch: int) -> tuple[int, int, int]:
    """Programs, how many of them share outputs, and the batch rows of each."""
    rows = SMALL_BATCH if batch <= SMALL_BATCH else BATCH
    m_blocks = launch.cdiv(batch, rows)
    return launch.cdiv(outputs, OUTPUTS) * m_blocks, m_blocks, rows


def _add_rows(x, columns, y, first: int, cols: int, shift: int, factor: float) -> None:
    """Launch gather_kernel: the outputs from ``first`` on of the rows that ``columns`` has."""
    fan_in, rows = columns.shape
    programs, m_blocks, tile = _blocks(rows, x.shape[0])
    sizes = (*y.shape, first, rows, cols, fan_in, shift, m_blocks)
    _GATHER(programs, (x, columns, y, factor), (*sizes, *x.stride()), BM=tile)


def _add_columns(x, columns, edges, total, y, first: int, factor: float, add: bool, done: bool) -> None:
    """Sort a chunk's draws by column and launch scatter_kernel."""
    keys, order = columns.flatten().sort(stable=True)
    starts = torch.searchsorted(keys, edges, out_int32=True)
    programs, m_blocks, tile = _blocks(y.shape[1], x.shape[0])
    sizes = (x.shape[0], first, columns.shape[1], y.shape[1], m_blocks)
    values = (x, starts, order, total, y, factor)
    _SCATTER(programs, values, (*sizes, *x.stride()), ADD=add, DONE=done, BM=tile)


def sparse_matmul(
    x: Tensor,
    seed: int,
    row_offset: int,
    col_offset: int,
    rows: int,
    cols: int,
    population: int,
    fan_in: int,
    transposed: bool,
    factor: float,
) -> Tensor:
    y = x.new_empty(x.shape[0], cols if transposed else rows)
    if x.shape[0] == 0:
        return y
    x = gatherable(x)
    at_once = max(1, DRAWS // fan_in)
    chunks = [(first, min(at_once, rows - first)) for first in range(0, rows, at_once)]

    def drawn(first: int, count: int) -> Tensor:
        return draw(x, seed, row_offset + first, count, col_offset, cols, population, fan_in)

    with launch.on_device(x.device):
        if not transposed:
            for chunk in chunks:
                _add_rows(x, drawn(*chunk), y, chunk[0], cols, shift_of(col_offset), factor)
            return y
        lowest = -shift_of(col_offset)
        edges = torch.arange(lowest, lowest + cols + 1, dtype=torch.int32, device=x.device)
        # Sums over several chunks are held in y itself where it is float32.
        own = len(chunks) > 1 and y.dtype != torch.float32
        for part in launch.parts(x.shape[0], 4 * cols) if own else [launch.WHOLE]:
            some, to = launch.rows_of(x, part), launch.rows_of(y, part)
            total = torch.empty_like(to, dtype=torch.float32) if own else to
            for i, chunk in enumerate(chunks):
                done = i == len(chunks) - 1
                _add_columns(some, drawn(*chunk), edges, total, to, chunk[0], factor, i > 0, done)
    return y
