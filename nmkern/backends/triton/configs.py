"""Which tile serves which call: frozen tables, chosen by the shape alone.

A tile computes BO outputs for BM rows of the batch, taking BR reduction indices at a time. The choices come
from static figures (benchmarks/results/triton_resources.json), not yet from timings; ``candidates`` are
what NMKERN_TRITON_AUTOTUNE may choose instead. The invariant: BR is fixed by family and orientation, and
the split by the shape (``blocks``), so the order of a sum depends neither on the tile, nor on the device,
nor on a measurement on it: every tile of a call gives the same bits.
"""

import itertools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """``fields``: transposed, how many fields of a word one program computes; ``stages`` of x in flight."""

    outputs: int
    batch: int
    warps: int
    fields: int = 4
    stages: int = 2


# Reduction indices of a step: four words of each row, or (transposed) eight patches. More, and the weights
# of a step no longer stay in registers.
REDUCTION = {
    0x101: {False: 128, True: 32},
    0x102: {False: 32, True: 32},
    0x103: {False: 16, True: 32},
}

# By the size of the batch, up to and with. The accumulators take outputs * batch / (32 * warps) registers:
# 32, 32 and 64; at 128 (a batch of 128) variants spilled on sm_80 and sm_90 alike. A program takes the
# most outputs it can, since each tile loads x again.
_SMALL, _MIDDLE = Tile(outputs=256, batch=16, warps=4), Tile(outputs=256, batch=32, warps=8)
_LARGE = Tile(outputs=256, batch=64, warps=8)


def tile_of(tag: int, transposed: bool, batch: int, banks: bool = False) -> Tile:
    """The tile for a batch of that many rows; ``banks``: whether out_gain or bias have several rows."""
    rademacher, uniform, _ = REDUCTION
    if batch <= _SMALL.batch:
        if transposed:  # all fields of a word, or 8 of 32, so that each is hashed once
            return replace(_SMALL, fields=8) if tag in (rademacher, uniform) else _SMALL
        # Four words of 32 columns are many weights for a thread: 4 warps spilled 200 bytes on sm_80.
        return replace(_SMALL, warps=8) if tag == rademacher else _SMALL
    # So do the addresses of banks, element by element (900 bytes on sm_90), and rademacher's weights.
    if batch <= _MIDDLE.batch or banks or (tag == rademacher and not transposed):
        return _MIDDLE
    return _LARGE


def blocks(outputs: int, batch: int) -> int:
    """How many programs a product of that shape counts as, when it is decided into how many splits it goes.

    Counted in 256 outputs by the batch's own regime, never in the tile that serves: a tile of half the
    outputs launches twice the programs, and leaves the split, and with it every bit of the result, alone.
    """
    rows = next((t.batch for t in (_SMALL, _MIDDLE) if batch <= t.batch), _LARGE.batch)
    return -(-outputs // 256) * -(-batch // rows)


# Outputs and warps of tiles to choose from. Accumulators of up to 64 registers: with more, variants
# spilled. Of these none does on sm_90 (bfloat16, no banks; 56 to 255 registers a thread), four by 8 to 128
# bytes on sm_80; timing passes them over.
_SHAPES = ((128, 4), (256, 4), (256, 8), (512, 8))
_MOST_SUMS = 64


def candidates(tag: int, transposed: bool, batch: int, banks: bool = False) -> tuple[Tile, ...]:
    """Tiles to choose from by timing; the first is the frozen table's. All of them give the same bits."""
    frozen = tile_of(tag, transposed, batch, banks)
    rows = sorted({min(frozen.batch, _MIDDLE.batch), frozen.batch})
    fields = (4, 8) if transposed and tag != max(REDUCTION) else (4,)  # a word of normal has four
    found = [frozen, replace(frozen, stages=3), replace(frozen, stages=4)]
    for (outputs, warps), m, f in itertools.product(_SHAPES, rows, fields):
        whole = outputs % (8 * warps * (f if transposed else 4)) == 0
        if whole and outputs * m <= _MOST_SUMS * 32 * warps:
            found.append(Tile(outputs, m, warps, f))
    return tuple(dict.fromkeys(found))
