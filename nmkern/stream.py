"""The weight stream, version 1, in plain NumPy: the normative definition of every weight.

    element(family, seed, row, col) = code / rms(family) * scale

The code is a small integer read from a Philox4x32-7 word. One call of the generator yields four
words and word r belongs to row ``4 * c1 + r``, so that a call covers a patch of four rows:

    family      bits  counter (c0, c1, c2, c3)          field f of the word is column  code
    rademacher  1     (col // 32, row // 4, 0, 0x101)   32 * c0 + f                    2 * bit - 1
    uniform     4     (col // 8, row // 4, 0, 0x102)    8 * c0 + f                     2 * u - 15
    normal      8     (col // 4, row // 4, 0, 0x103)    4 * c0 + f                     table[u]
    sparse      -     (draw // 4, row, 0, 0x104)        -                              1, at k columns

The invariant: an element depends on nothing else. No shape, offset, tile, thread, device or dtype
is part of it, and every other implementation (PyTorch, C++, Triton, CUDA) is tested against this
file. Changing a bit here is stream version 2, never an edit.

Generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

VERSION = 1
ROUNDS = 7  # the smallest count for which Philox4x32 passes BigCrush (SC'11, table 2)
ROWS_PER_PATCH = 4
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL_KEYS = (0x9E3779B9, 0xBB67AE85)

# Centroids of the 128 equally likely bins above zero of a standard normal, times 85:
# round(85 * 256 * (phi(q_j) - phi(q_{j+1}))), q_j the quantile at (128 + j) / 256.
# fmt: off
_NORMAL_UPPER_HALF = np.array(
    [
        0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13,
        14, 15, 15, 16, 17, 18, 19, 20, 21, 21, 22, 23, 24, 25, 26, 27,
        28, 28, 29, 30, 31, 32, 33, 34, 35, 36, 36, 37, 38, 39, 40, 41,
        42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57,
        58, 59, 60, 61, 62, 63, 64, 65, 67, 68, 69, 70, 71, 72, 74, 75,
        76, 77, 79, 80, 81, 82, 84, 85, 87, 88, 89, 91, 92, 94, 95, 97,
        99, 100, 102, 104, 105, 107, 109, 111, 113, 115, 117, 119, 122, 124, 126, 129,
        132, 135, 138, 141, 144, 148, 152, 156, 161, 166, 172, 179, 188, 199, 215, 252,
    ],
    dtype=np.int16,
)
# fmt: on
NORMAL_TABLE = np.concatenate([-_NORMAL_UPPER_HALF[::-1], _NORMAL_UPPER_HALF])


@dataclass(frozen=True)
class Family:
    """How a dense family packs its codes: ``bits`` per code, ``tag`` is the counter's last word."""

    name: str
    tag: int
    bits: int
    rms: float

    @property
    def columns_per_word(self) -> int:
        return 32 // self.bits


RADEMACHER = Family("rademacher", 0x101, 1, 1.0)
UNIFORM = Family("uniform", 0x102, 4, float(np.sqrt(85.0)))
NORMAL = Family("normal", 0x103, 8, float(np.sqrt(np.mean(NORMAL_TABLE.astype(np.float64) ** 2))))
DENSE_FAMILIES = {family.name: family for family in (RADEMACHER, UNIFORM, NORMAL)}
SPARSE_TAG = 0x104


def philox4x32(counter: tuple, key: tuple[int, int], rounds: int = ROUNDS) -> NDArray[np.uint32]:
    """Philox4x32: the four output words, stacked on a new last axis.

    ``counter`` is four integers or integer arrays below 2^32, which broadcast; ``key`` two
    integers below 2^32. Returns uint32 of shape ``broadcast(counter) + (4,)``.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        p0 = np.uint64(MULTIPLIERS[0]) * c0
        p1 = np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0 = (k0 + WEYL_KEYS[0]) & 0xFFFFFFFF
        k1 = (k1 + WEYL_KEYS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def key_of(seed: int) -> tuple[int, int]:
    """The Philox key of a seed in [0, 2^64): its low and its high 32 bits."""
    return seed & 0xFFFFFFFF, seed >> 32


def words(family: str, seed: int, rows: ArrayLike, cols: ArrayLike) -> NDArray[np.uint32]:
    """The 32-bit word that holds element (row, col), for broadcastable integer arrays."""
    layout = DENSE_FAMILIES[family]
    row, col = np.broadcast_arrays(np.asarray(rows, np.uint64), np.asarray(cols, np.uint64))
    c0 = col // np.uint64(layout.columns_per_word)
    c1 = row // np.uint64(ROWS_PER_PATCH)
    patch = philox4x32((c0, c1, 0, layout.tag), key_of(seed))
    r = (row % np.uint64(ROWS_PER_PATCH)).astype(np.intp)
    return np.take_along_axis(patch, r[..., None], axis=-1)[..., 0]


def decode(family: str, fields: NDArray[np.uint32]) -> NDArray[np.int16]:
    """The codes of extracted fields (each below ``2**bits``)."""
    if family == "rademacher":
        return (2 * fields.astype(np.int16) - 1).astype(np.int16)
    if family == "uniform":
        return (2 * fields.astype(np.int16) - 15).astype(np.int16)
    return NORMAL_TABLE[fields]


def codes(family: str, seed: int, rows: ArrayLike, cols: ArrayLike) -> NDArray[np.int16]:
    """The integer codes of a dense family at broadcastable row and column indices."""
    layout = DENSE_FAMILIES[family]
    f = np.asarray(cols, np.uint64) % np.uint64(layout.columns_per_word)
    shift = (f * np.uint64(layout.bits)).astype(np.uint32)
    fields = (words(family, seed, rows, cols) >> shift) & np.uint32(2**layout.bits - 1)
    return decode(family, fields)


def codes_block(family: str, seed: int, rows: range, cols: range) -> NDArray[np.int16]:
    """``codes`` over contiguous ranges, hashing each patch once; shape ``(len(rows), len(cols))``."""
    layout = DENSE_FAMILIES[family]
    width = layout.columns_per_word
    c0 = np.arange(cols.start // width, -(-cols.stop // width), dtype=np.uint64)
    c1 = np.arange(rows.start // ROWS_PER_PATCH, -(-rows.stop // ROWS_PER_PATCH), dtype=np.uint64)
    patches = philox4x32((c0, c1[:, None], 0, layout.tag), key_of(seed))
    shifts = np.arange(0, 32, layout.bits, dtype=np.uint32)
    fields = (patches[..., None] >> shifts) & np.uint32(2**layout.bits - 1)
    block = decode(family, fields).transpose(0, 2, 1, 3)  # patch row, r, word, field
    block = block.reshape(len(c1) * ROWS_PER_PATCH, len(c0) * width)
    top, left = rows.start % ROWS_PER_PATCH, cols.start % width
    return block[top : top + len(rows), left : left + len(cols)]


def sparse_columns(seed: int, rows: ArrayLike, n: int, fan_in: int) -> NDArray[np.int64]:
    """The ``fan_in`` distinct columns out of ``n`` that hold a one, per row, in drawing order.

    Floyd's sampling without replacement: draw s picks t uniformly from [0, j], j = n - fan_in + s,
    and takes j instead where t is already chosen. Shape ``rows.shape + (fan_in,)``.
    """
    row = np.asarray(rows, np.uint64)
    chosen = np.empty((*row.shape, fan_in), np.int64)
    for s in range(fan_in):
        if s % 4 == 0:
            patch = philox4x32((s // 4, row, 0, SPARSE_TAG), key_of(seed))
        j = n - fan_in + s
        # w * (j + 1) stays below 2^64 because n is at most 2^32.
        t = (patch[..., s % 4].astype(np.uint64) * np.uint64(j + 1) >> np.uint64(32)).astype(np.int64)
        taken = (chosen[..., :s] == t[..., None]).any(axis=-1)
        chosen[..., s] = np.where(taken, j, t)
    return chosen
