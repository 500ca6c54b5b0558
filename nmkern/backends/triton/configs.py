"""Which tile serves which call: frozen tables, chosen by the shape alone.

A tile computes BO outputs for BM rows of the batch, taking BR reduction indices at a time. The choices come
from static figures (benchmarks/results/triton_resources.json), not yet from timings; ``candidates`` are
what NMKERN_TRITON_AUTOTUNE may choose instead. The invariant: BR is fixed by family and orientation, and
the split by the shape (``blocks``), so the order of a sum depends neither on the tile, nor on the device,
nor on a measurement on it: every tile of a call gives the same bits.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import torch

# Whether the tiles are those for AMD's matrix cores.
AMD = torch.version.hip is not None


@dataclass(frozen=True)
class Tile:
    """``fields``: transposed, how many fields of a word one program computes; ``stages`` of x in flight."""

    outputs: int
    batch: int
    warps: int = 4
    fields: int = 4
    stages: int = 3


# Reduction indices of a step: four words of each row (normal: eight), or (transposed) eight patches. More,
# and the weights of a step no longer stay in registers.
REDUCTION = {
    0x101: {False: 128, True: 32},
    0x102: {False: 32, True: 32},
    0x103: {False: 32, True: 32},
}

# By the size of the batch, up to and with. The accumulators take outputs * batch / (32 * warps) registers of
# 255: 32, 64, and 128 in the last two, so that two programs fit a multiprocessor and one hashes while the
# other multiplies. The loop takes 2.8, 2.8, 3.1 and 4.2 instructions a weight (sm_90, uniform, forward), so
# the next tile pays from the first row on that would need two of the one before. At 128 rows a weight keeps
# the tensor cores busy for 1/16 of a clock, and issuing those 4.2 instructions takes 1/30.
_SMALL, _MIDDLE = Tile(outputs=256, batch=16), Tile(outputs=256, batch=32)
_LARGE, _HUGE = Tile(outputs=256, batch=64), Tile(outputs=128, batch=128)

# The most accumulators of a thread.
_MOST_SUMS = 128

# Up to so many rows x is read as it is, unless it has to be multiplied or split first: preparing it saves no
# instruction there, and is a launch.
DIRECT_ROWS = _SMALL.batch


# AMD: a lane holds four tiles of 16 outputs of four warps, or the eight fields of a word of two; and of sums
# at most _MOST_SUMS, which a warp of 32 lanes (RDNA) has at half of the rows: with more it spilled 1 KiB.
_ON_AMD = tuple(Tile(outputs=256, batch=rows) for rows in (16, 32, 64, 128))


@functools.cache
def warp_lanes() -> int:
    """Lanes of a warp: 32, and on most of AMD's GPUs 64."""
    if not AMD:
        return 32
    return torch.cuda.get_device_properties().warp_size if torch.cuda.is_available() else 64


def _fits(tile: Tile, lanes: int) -> bool:
    return tile.outputs * tile.batch <= _MOST_SUMS * lanes * tile.warps


def _tile_on_amd(tag: int, transposed: bool, batch: int, parts: int, lanes: int) -> Tile:
    tiles = [tile for tile in _ON_AMD if _fits(tile, lanes) and (parts == 1 or tile.batch < 128)]
    tile = next((tile for tile in tiles if batch <= tile.batch), tiles[-1])
    if transposed and tag != max(REDUCTION) and parts == 1:
        wider = replace(tile, fields=8, warps=2)
        return wider if _fits(wider, lanes) else tile
    return tile


def tile_of(tag: int, transposed: bool, batch: int, parts: int = 1, lanes: int | None = None) -> Tile:
    """The tile for a batch of that many rows, whose values are multiplied in so many parts.

    ``lanes`` of a warp: those of the GPU at hand, or another's.
    """
    if AMD:
        return _tile_on_amd(tag, transposed, batch, parts, lanes or warp_lanes())
    rademacher, _, normal = REDUCTION
    # Signs of four words of 32 columns are 128 weights a thread in a tile of 128 outputs: spilled 96 bytes.
    words = tag == rademacher and not transposed
    if batch > _LARGE.batch and parts == 1 and not words:
        return _HUGE  # with several parts, it spilled
    # float32, in several parts, has sums of its own in each step: in tiles of 64 rows they spilled up to 296
    # bytes on sm_90 (none on sm_80, where such a tile would take a third fewer instructions a row).
    larger = _LARGE if parts == 1 else _MIDDLE
    tile = next((t for t in (_SMALL, _MIDDLE) if batch <= t.batch), larger)
    if transposed and tag != normal:  # all fields of a word, or 8 of 32, so that each is hashed once
        tile = replace(tile, fields=8)
    if words and (tile.batch == _LARGE.batch or parts > 1):
        tile = replace(tile, warps=8)
    return tile


def blocks(outputs: int, batch: int) -> int:
    """How many programs a product of that shape counts as, when it is decided into how many splits it goes.

    Counted in 256 outputs by the batch's own regime, never in the tile that serves: a tile of half the
    outputs launches twice the programs, and leaves the split, and with it every bit of the result, alone.
    (128 outputs by 128 rows are as much.)
    """
    rows = next((t.batch for t in (_SMALL, _MIDDLE) if batch <= t.batch), _LARGE.batch)
    return -(-outputs // 256) * -(-batch // rows)


# Outputs and warps of tiles to choose from.
_SHAPES = ((128, 4), (256, 4), (256, 8))
_SHAPES_ON_AMD = ((128, 2), (256, 2), (256, 4))


def candidates(tag: int, transposed: bool, batch: int, parts: int = 1) -> tuple[Tile, ...]:
    """Tiles to choose from by timing; the first is the frozen table's. All of them give the same bits."""
    frozen = tile_of(tag, transposed, batch, parts)
    rows = sorted({max(frozen.batch // 2, _SMALL.batch), frozen.batch})
    fields = (4, 8) if transposed and tag != max(REDUCTION) else (4,)  # a word of normal has four
    found = [frozen, *(replace(frozen, stages=stages) for stages in (2, 4) if not AMD)]
    row_lanes = 16 if AMD else 8  # of a warp: those that hold rows of their own
    for (outputs, warps), m, f in itertools.product(_SHAPES_ON_AMD if AMD else _SHAPES, rows, fields):
        tile = Tile(outputs, m, warps, f)
        whole = outputs % (row_lanes * warps * (f if transposed else 4)) == 0
        if whole and _fits(tile, warp_lanes()):
            found.append(tile)
    return tuple(dict.fromkeys(found))
