"""Which tile serves which call: frozen tables, chosen by the shape alone.

A tile computes BO outputs for BM rows of the batch, taking BR reduction indices at a time. The choices come
from static figures (benchmarks/results/triton_resources.json), not yet from timings. The invariant:
BR is fixed by family and orientation, so the order of a sum depends on the split alone, which follows
from shapes and this table; never from the device, nor from a measurement on it.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tile:
    """``fields``: transposed, how many fields of a word one program computes."""

    outputs: int
    batch: int
    warps: int
    fields: int = 4


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
