"""The reference backend: the primitives in plain PyTorch, on any device.

It decodes the stream tile by tile with 64-bit integer tensors and multiplies in float64, so it never
holds more than a tile of weights, and other backends are tested against it. The invariant: codes
equal those of ``nmkern.stream``.
"""

import itertools

import torch
from torch import Tensor

from nmkern import stream
from nmkern.backends import primitives

_TILE_ROWS = 64  # 64 x 4096 codes: 2 MiB in float64, a handful of such temporaries
_TILE_COLS = 4096
_LOW = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    # The 64-bit product wraps as a signed integer, but its bits are those of the unsigned one.
    product = word * multiplier
    return (product >> 32) & _LOW, product & _LOW


def _philox(c0: Tensor, c1: Tensor, tag: int, seed: int) -> list[Tensor]:
    """``stream.philox4x32((c0, c1, 0, tag), key)`` on int64 tensors that hold 32-bit words."""
    k0, k1 = stream.key_of(seed % 2**64)
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2, c3 = torch.zeros_like(c0), torch.full_like(c0, tag)
    for _ in range(stream.ROUNDS):
        hi0, lo0 = _mul_hi_lo(stream.MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(stream.MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + stream.WEYL_KEYS[0]) & _LOW, (k1 + stream.WEYL_KEYS[1]) & _LOW
    return [c0, c1, c2, c3]


def _codes(family: stream.Family, seed: int, rows: range, cols: range, device: torch.device) -> Tensor:
    """``stream.codes_block`` as a float64 tensor on ``device``."""
    width = family.columns_per_word
    c0 = torch.arange(cols.start // width, -(-cols.stop // width), device=device)
    c1 = torch.arange(rows.start // 4, -(-rows.stop // 4), device=device)
    patches = torch.stack(_philox(c0, c1[:, None], family.tag, seed), dim=1)  # patch row, r, word
    shifts = torch.arange(0, 32, family.bits, device=device)
    fields = (patches[..., None] >> shifts) & (2**family.bits - 1)
    fields = fields.reshape(4 * len(c1), width * len(c0))
    top, left = rows.start % 4, cols.start % width
    fields = fields[top : top + len(rows), left : left + len(cols)]
    if family.name == "normal":
        table = torch.from_numpy(stream.NORMAL_TABLE).to(device, torch.float64)
        return table[fields]
    offset = 2**family.bits - 1
    return (2 * fields - offset).to(torch.float64)


def _ranges(offset: int, size: int, tile: int) -> list[range]:
    """``size`` indices from ``offset`` in tiles whose inner borders are multiples of ``tile``."""
    stop = offset + size
    borders = [offset, *range((offset // tile + 1) * tile, stop, tile), stop]
    return [range(a, b) for a, b in itertools.pairwise(borders)]


def _product(
    x: Tensor,
    in_gain: Tensor | None,
    context: Tensor | None,
    tag: int,
    seed: int,
    row_offset: int,
    col_offset: int,
    rows: int,
    cols: int,
    transposed: bool,
    factor: float,
) -> Tensor:
    """z of ``primitives``, in the dtype of sums."""
    family = next(f for f in stream.DENSE_FAMILIES.values() if f.tag == tag)
    wide = primitives.sum_dtype(x.dtype)
    x = x.to(wide)
    if in_gain is not None:
        x = x * primitives.bank_rows(in_gain, context)
    x = x.to(torch.float64)
    total = x.new_zeros(x.shape[0], cols if transposed else rows)
    for row_range in _ranges(row_offset, rows, _TILE_ROWS):
        r = slice(row_range.start - row_offset, row_range.stop - row_offset)
        for col_range in _ranges(col_offset, cols, _TILE_COLS):
            c = slice(col_range.start - col_offset, col_range.stop - col_offset)
            codes = _codes(family, seed, row_range, col_range, x.device)
            if transposed:
                total[:, c] += x[:, r] @ codes
            else:
                total[:, r] += x[:, c] @ codes.T
    return total.to(wide) * factor


def modulated_matmul(
    x: Tensor,
    in_gain: Tensor | None,
    out_gain: Tensor | None,
    bias: Tensor | None,
    context: Tensor | None,
    *matrix,
) -> Tensor:
    y = _product(x, in_gain, context, *matrix)
    if out_gain is not None:
        y = y * primitives.bank_rows(out_gain, context)
    if bias is not None:
        y = y + primitives.bank_rows(bias, context)
    return y.to(x.dtype)


def modulated_matmul_gain_grad(
    x: Tensor,
    in_gain: Tensor | None,
    out_gain: Tensor | None,
    other: Tensor,
    context: Tensor | None,
    contexts: int,
    need_product: bool,
    *matrix,
) -> tuple[Tensor, Tensor]:
    z = _product(x, in_gain, context, *matrix)
    gain_grad = primitives.segment_sum(other.to(z.dtype) * z, context, contexts, z.dtype)
    if not need_product:
        return x.new_empty(0, z.shape[1]), gain_grad
    product = z if out_gain is None else z * primitives.bank_rows(out_gain, context)
    # A float32 or float64 product without a gain would alias z, never the inputs.
    return product.to(x.dtype), gain_grad


def _sparse_columns(seed: int, rows: Tensor, population: int, fan_in: int) -> Tensor:
    """``stream.sparse_columns`` on an int64 tensor of rows."""
    chosen: list[Tensor] = []
    for s in range(fan_in):
        if s % 4 == 0:
            patch = _philox(torch.full_like(rows, s // 4), rows, stream.SPARSE_TAG, seed)
        j = population - fan_in + s
        # floor(w * (j + 1) / 2^32) with j + 1 up to 2^32: the product can pass 2^63, where its bits
        # are those of the unsigned one.
        t = ((patch[s % 4] * (j + 1)) >> 32) & _LOW
        for earlier in chosen:
            t = torch.where(earlier == t, -1, t)
        chosen.append(torch.where(t < 0, j, t))
    return torch.stack(chosen, dim=-1)


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
    wide = primitives.sum_dtype(x.dtype)
    # A column of zeros behind the last takes the ones that lie outside of the view.
    source = x.to(torch.float64)
    size = cols if transposed else rows
    total = source.new_zeros(x.shape[0], size + 1)
    if not transposed:
        source = torch.cat([source, source.new_zeros(x.shape[0], 1)], dim=1)
    for row_range in _ranges(row_offset, rows, _TILE_COLS):
        r = slice(row_range.start - row_offset, row_range.stop - row_offset)
        index = torch.arange(row_range.start, row_range.stop, device=x.device)
        drawn = _sparse_columns(seed, index, population, fan_in) - col_offset
        drawn = torch.where((drawn >= 0) & (drawn < cols), drawn, cols)
        for s in range(fan_in):  # one draw at a time: batch x rows temporaries, not x fan_in
            if transposed:
                _index_add_columns(total, drawn[:, s], source[:, r])
            else:
                total[:, r] += source[:, drawn[:, s]]
    return (total[:, :size].to(wide) * factor).to(x.dtype)


def _index_add_columns(total: Tensor, columns: Tensor, values: Tensor) -> None:
    if total.device.type == "cpu":  # sequential there
        total.index_add_(1, columns, values)
    else:  # sorts by index instead of using float atomics
        total.T.index_put_((columns,), values.T, accumulate=True)


def _hidden(x: Tensor, encoder: tuple) -> Tensor:
    """The representation of FlyNet, max(0, m - mean(m)), in the dtype of sums."""
    matrix = (*encoder[:-1], False, encoder[-1])
    m = sparse_matmul(x.to(primitives.sum_dtype(x.dtype)), *matrix)
    return torch.relu(m - m.mean(1, keepdim=True))


def _decoder(encoder: tuple, decoder: tuple) -> tuple:
    """The decoder as the arguments of the dense primitives."""
    hidden = encoder[3]
    family, seed, row_offset, col_offset, classes, factor = decoder
    return family, seed, row_offset, col_offset, classes, hidden, False, factor


def flynet_logits(x: Tensor, gain: Tensor, context: Tensor | None, *matrices) -> Tensor:
    encoder, decoder = matrices[:8], matrices[8:]
    y = _product(_hidden(x, encoder), gain, context, *_decoder(encoder, decoder))
    return y.to(x.dtype)


def flynet_gain_grad(x: Tensor, d_logits: Tensor, context: Tensor | None, contexts: int, *matrices) -> Tensor:
    encoder, decoder = matrices[:8], matrices[8:]
    r = _hidden(x, encoder)
    *matrix, _, factor = _decoder(encoder, decoder)
    matrix += [True, factor]  # transposed
    du = _product(d_logits.to(r.dtype), None, None, *matrix)
    return primitives.segment_sum(r * du, context, contexts, r.dtype)


def refusal(family: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a call cannot run here; None where it can."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return f"computes float64, float32, bfloat16 and float16, not {dtype}".replace("torch.", "")
    return None


def kernel() -> str:
    return "reference (PyTorch)"


def _register() -> None:
    """Define the operators and give each its kernel, for every device."""
    primitives.define("reference")
    for primitive in (
        modulated_matmul,
        modulated_matmul_gain_grad,
        sparse_matmul,
        flynet_logits,
        flynet_gain_grad,
    ):
        primitives.LIBRARY.impl(f"reference_{primitive.__name__}", primitive, "CompositeExplicitAutograd")


_register()
