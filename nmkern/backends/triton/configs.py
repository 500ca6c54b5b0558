"""Which tile serves which call: frozen tables, chosen by the shape alone.

A tile computes BO outputs for BM rows of the batch, taking BR reduction indices at a time. The invariant:
BR is fixed by family and orientation, and the split by shapes, so that no choice made here, or measured
on a machine, changes the order of a sum. (A row of the batch is summed alike whatever its BM.)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """``fields``: transposed, how many fields of a word one program computes."""

    outputs: int
    batch: int
    warps: int
    fields: int = 4


# Reduction indices of a step: four words of each row, or (transposed) four patches: 16 is the least
# that a tensor-core instruction takes; more, and the weights of a step do not stay in registers.
REDUCTION = {
    0x101: {False: 128, True: 32},
    0x102: {False: 32, True: 32},
    0x103: {False: 16, True: 32},
}

# By the size of the batch, up to and with. The accumulators take outputs * batch / (32 * warps) registers:
# 32, 64, 64 and 128. A small batch takes the most outputs, since x is loaded for each tile again.
_FORWARD = {
    16: Tile(outputs=256, batch=16, warps=4),
    32: Tile(outputs=256, batch=32, warps=4),
    64: Tile(outputs=128, batch=64, warps=4),
    None: Tile(outputs=256, batch=128, warps=8),
}
_TRANSPOSED = {
    16: Tile(outputs=256, batch=16, warps=4, fields=8),
    32: Tile(outputs=256, batch=32, warps=4, fields=8),
    64: Tile(outputs=128, batch=64, warps=4, fields=4),
    None: Tile(outputs=256, batch=128, warps=8, fields=4),
}


def tile_of(tag: int, transposed: bool, batch: int) -> Tile:
    """The tile for a batch of that many rows."""
    table = _TRANSPOSED if transposed else _FORWARD
    tile = next(tile for limit, tile in table.items() if limit is None or batch <= limit)
    if tag == 0x103 and tile.fields == 8:  # a word of the normal family has four fields
        tile = Tile(tile.outputs, tile.batch, tile.warps, 4)
    return tile
