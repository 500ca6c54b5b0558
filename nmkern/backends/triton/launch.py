"""From the arguments of the dense primitives to launches of their kernels.

    parts of the batch -> prepare_kernel or prepare_rows_kernel -> product_kernel, the reduction in splits
    -> finish_kernel

Few rows without gains, in a dtype that tl.dot multiplies, go to product_kernel as they are; a reduction in
one split needs no finish_kernel, if one out_gain and one bias serve the whole batch.

What follows from the matrix, the dtype and the shape alone is worked out once and kept (``_plan``). The
invariant: sums and prepared x take ``SCRATCH`` bytes each, or 128 rows of the batch, whatever its size; the
split follows from the shape alone, so no tile changes a bit; and nothing here waits for the device or reads
from it, so that calls can be captured in a CUDA graph (but for NMKERN_TRITON_AUTOTUNE, which times the first
call of its class).
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nmkern import stream
from nmkern.backends.triton import autotune, configs, dense
from nmkern.backends.triton.variant import VERSION, Variant

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Bytes of a call's partial sums, and of its prepared x: a batch that needs more is taken in parts, of at
# least 128 rows.
SCRATCH = 64 * 2**20
# Programs that a split aims at, two for each of an H100's 132 multiprocessors, and the least steps that
# are worth a program. Constants, not the device's own count: the same sums on every GPU.
_PROGRAMS = 264
_LEAST_STEPS = 8
FINISH_ROWS, FINISH_COLS = 16, 64
_LEAST_TILES = 4  # tiles of FINISH_ROWS rows that are worth a program of their own
# Values that a program of prepare_kernel takes, and of prepare_rows_kernel at a time, which has whole rows.
PREPARED, PREPARED_OF_ROWS = 2048, 8192

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Plan:
    """What a launch needs that does not depend on tensors."""

    request: tuple  # what it is the plan of: the arguments of ``_plan``
    tile: configs.Tile
    outputs: int
    reduction: int
    splits: int
    partial: bool  # whether sums go to scratch, for finish_kernel
    grid: int
    # The kernel's arguments from N to o_blocks: outputs, reduction; k0 and k1; first counter and skip of
    # outputs and of the reduction; chunk, tiles, m_blocks, o_blocks.
    numbers: tuple[int, ...]
    parts: int  # that each value of x is prepared in; 0: x is read as it is
    steps: int
    table: torch.dtype
    scaled: bool  # whether rows are prepared by prepare_rows_kernel
    product: Variant  # the kernels, with their constants and options
    prepare: Variant
    prepared_bytes: int  # of a row of x


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; 0.2 us, where Triton's own function, which kernels may call, takes 4."""
    return -(-a // b)


def signed32(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


@functools.lru_cache(maxsize=1024)
def _plan(
    matrix: tuple,
    batch: int,
    dtype: torch.dtype,
    gained: bool,
    banks: bool,
    tf32: bool,
    tile: configs.Tile | None = None,
) -> Plan:
    """The plan of a product: is there an in_gain, have out_gain or bias several rows, may tf32 be used.

    ``tile``: another than the frozen table's; splits are the same with any.
    """
    tag, seed, row_offset, col_offset, rows, cols, transposed = matrix
    width = next(f.columns_per_word for f in stream.DENSE_FAMILIES.values() if f.tag == tag)
    operand, split = operand_of(dtype, gained, tf32)
    scaled = gained or dtype == torch.float32
    parts = split if scaled or batch > configs.DIRECT_ROWS else 0
    tile = tile or configs.tile_of(tag, transposed, batch, split)
    by_row, by_col = (divmod(row_offset, 4), rows), (divmod(col_offset, width), cols)
    (o_place, outputs), (r_place, reduction) = (by_col, by_row) if transposed else (by_row, by_col)
    per_unit, per_unit_r = (width, 4) if transposed else (4, width)
    o_units = triton.cdiv(o_place[1] + outputs, per_unit)
    if transposed:
        o_blocks = triton.cdiv(o_units, tile.outputs // tile.fields) * (width // tile.fields)
    else:
        o_blocks = triton.cdiv(o_units, tile.outputs // 4)
    step = configs.REDUCTION[tag][transposed]
    steps = triton.cdiv(r_place[1] + reduction, step)
    assert step % per_unit_r == 0
    m_blocks = triton.cdiv(batch, tile.batch)
    wanted = max(1, min(_PROGRAMS // configs.blocks(outputs, batch), steps // _LEAST_STEPS))
    wanted = max(1, min(wanted, SCRATCH // (4 * batch * outputs)))
    chunk = triton.cdiv(steps, wanted)
    splits = triton.cdiv(steps, chunk)
    key = stream.key_of(seed % 2**64)
    places = (signed32(o_place[0]), o_place[1], signed32(r_place[0]), r_place[1])
    both = {
        "TAG": tag,
        "TRANSPOSED": transposed,
        "DTYPE": DTYPES[operand],
        "BR": step,
        "enable_fp_fusion": False,
    }
    constants = {
        **both,
        "PARTS": parts,
        "CHAINS": dtype == torch.float32 and parts > 1,
        "FIELDS": tile.fields,
        "BO": tile.outputs,
        "BM": tile.batch,
        "WARPS": tile.warps,
        "num_warps": tile.warps,
        **product_options(),
    }
    prepare = {**both, "BM": max(1, PREPARED // step), "num_warps": 4}
    if scaled:
        at_once = min(triton.next_power_of_2(steps), PREPARED_OF_ROWS // step)
        some = PREPARED_OF_ROWS // (step * at_once)
        prepare |= {"BM": some, "TILES": at_once, "PARTS": parts, "num_warps": 8}
    prepare_kernel = dense.prepare_rows_kernel if scaled else dense.prepare_kernel
    halves = (signed32(half) for half in key)
    numbers = (outputs, reduction, *halves, *places, chunk, steps, m_blocks, o_blocks)
    request = (matrix, batch, dtype, gained, banks, tf32)
    grid = m_blocks * o_blocks * splits
    partial = splits > 1 or banks
    return Plan(
        *(request, tile, outputs, reduction, splits, partial, grid, numbers, parts, steps, operand, scaled),
        *(Variant(dense.product_kernel, **constants), Variant(prepare_kernel, **prepare)),
        steps * step * parts * operand.itemsize + 4 * scaled,
    )


def _tuned(plan: Plan, device: torch.device, launch: Callable[[Plan], object]) -> Plan:
    """The plan with the tile that NMKERN_TRITON_AUTOTUNE chooses; ``launch`` is what it times."""
    key, candidates = _class_of(plan.request)
    tile = autotune.tile_for(device, key, candidates, lambda tile: launch(_plan(*plan.request, tile)))
    return _plan(*plan.request, tile)


@functools.lru_cache(maxsize=1024)
def _class_of(request: tuple) -> tuple[str, tuple[configs.Tile, ...]]:
    """What timings are kept under (equal for calls that one tile should serve), and the tiles to time."""
    matrix, batch, dtype, gained, banks, tf32 = request
    plan, tag, transposed = _plan(*request), matrix[0], matrix[-1]
    said = {"transposed": transposed, "gained": gained, "banks": banks, "tf32": tf32}
    words = [f"{tag:#x}", str(dtype).removeprefix("torch."), *(word for word, so in said.items() if so)]
    sizes = {"M": batch, "N": plan.outputs, "K": plan.reduction}
    words += [f"{letter}{triton.next_power_of_2(size)}" for letter, size in sizes.items()]
    return " ".join(words), configs.candidates(tag, transposed, batch, max(1, plan.parts))


def operand_of(dtype: torch.dtype, gained: bool, tf32: bool) -> tuple[torch.dtype, int]:
    """The dtype of tl.dot's operands, and in how many parts of it x is multiplied.

    Weights are exact in every one. float32 is two float16 of a scaled row, 23 of its 24 bits; where tf32 may
    be used, one, which has the 11 bits of tf32 in the tensor cores' time of float16. One also serves x of 16
    bits times in_gain, which a product with stored weights rounds to the dtype of x, in bfloat16 to 8 bits.
    (Three bfloat16, which are exact, took tensor cores 1.5 and 3 times as long.) The interpreter multiplies
    in float32 throughout.
    """
    if INTERPRETED:
        return torch.float32, 1
    if dtype == torch.float32:
        return torch.float16, 1 if tf32 else 2
    return torch.float16 if gained else dtype, 1


@functools.cache
def table_of(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The normal family's codes on a device, where they stay."""
    return torch.from_numpy(stream.NORMAL_TABLE).to(device, dtype)


def may_use_tf32(dtype: torch.dtype) -> bool:
    """Whether PyTorch's setting for float32 products on CUDA allows tf32, and the product is one."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


_AS_IT_IS = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a CUDA device the current one: 2.7 us, or 0.8 to see that it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(device)


def strides_of(bank: Tensor | None) -> tuple[int, int]:
    """Strides of a bank; 0 from row to row where there is one."""
    if bank is None:
        return 0, 0
    return (0 if bank.shape[0] == 1 else bank.stride(0)), bank.stride(1)


def contexts_of(bank: Tensor | None) -> int:
    return 1 if bank is None else bank.shape[0]


@functools.cache
def major_of(device: torch.device) -> int:
    """The first number of a GPU's compute capability; 0 of a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def product_options() -> dict[str, int]:
    """What product_kernel is compiled with besides: on AMD, the products that ``dense`` is ordered for."""
    return {"matrix_instr_nonkdim": 16} if configs.AMD and not INTERPRETED else {}


def stages(tile: configs.Tile, major: int) -> int:
    """How many tiles of x product_kernel has in flight on a GPU of a compute capability.

    In a loop that it pipelines for Hopper, Triton before 3.9 overwrites registers that wgmma may still read
    (16 of the 50 kernels in the committed table, by Triton 3.6, 3.7.1 and 3.8 alike), and before 3.7.1 it
    leaves out the fence between cp.async and wgmma. One tile is not pipelined, and has neither.

    On AMD, most of whose GPUs give a program 64 KiB of shared memory, one: then all products fit.
    """
    if configs.AMD:
        return 1
    return 1 if VERSION < (3, 9) and major == 9 else tile.stages


def pieces(major: int, batch: int) -> int:
    """In how many pieces product_kernel multiplies ``batch`` rows of x on a GPU of a compute capability.

    Before Hopper, Triton gives the warps of a single square product columns too, and weights would go through
    shared memory; of two products with the same weights, each warp owns whole rows. On AMD it does so beyond
    64 rows.
    """
    if configs.AMD:
        return 1 if batch <= 64 else 2
    return 1 if batch < 64 or major in (0, 9, 10) else 2


def _prepare(x, in_gain, context, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """x times in_gain as the plan's product reads it, ``[steps, parts, M, BR]``, and its rows' scales."""
    rows, constants = x.shape[0], plan.prepare.constants
    prepared = x.new_empty(plan.steps, plan.parts, rows, constants["BR"], dtype=plan.table)
    blocks = cdiv(rows, constants["BM"])
    sizes = (rows, plan.reduction, plan.numbers[7], plan.steps)
    if not plan.scaled:
        plan.prepare(plan.steps * blocks, (x, prepared), (*sizes, *x.stride()))
        return prepared, None
    row_scale = x.new_empty(rows, dtype=torch.float32)
    contexts = contexts_of(in_gain)
    plan.prepare(
        blocks,
        (x, in_gain, context, prepared, row_scale),
        (*sizes, contexts, *x.stride(), *strides_of(in_gain)),
        IN_BANK=contexts > 1,
    )
    return prepared, row_scale


def _product(x, in_gain, out_gain, bias, context, y, plan: Plan, factor: float, partial: bool) -> None:
    """Launch the kernels up to product_kernel on rows that one plan covers; ``context`` is in_gain's."""
    rows, strides, row_scale = x.shape[0], x.stride(), None
    if plan.parts:
        (x, row_scale), strides = _prepare(x, in_gain, context, plan), (0, 0)
    device, major = x.device, major_of(x.device)
    values = (x, out_gain, bias, y, table_of(device, plan.table), row_scale, factor)
    layout = (*strides, strides_of(out_gain)[1], strides_of(bias)[1])

    def launch(plan: Plan) -> None:
        plan.product(
            plan.grid,
            values,
            (rows, *plan.numbers, *layout),
            PARTIAL=partial,
            PIECES=pieces(major, plan.tile.batch),
            num_stages=stages(plan.tile, major),
        )

    if autotune.enabled(device):
        plan = _tuned(plan, device, launch)
    launch(plan)


def by_context(context: Tensor, contexts: int) -> tuple[Tensor, Tensor]:
    """The rows of the batch in the order of their contexts, and where those of each context start."""
    # A context out of range counts for the nearest, as kernels read it.
    key, order = context.clamp(0, contexts - 1).sort(stable=True)
    return order, torch.searchsorted(key, torch.arange(contexts + 1, device=context.device))


_FINISH = Variant(dense.finish_kernel, BM=FINISH_ROWS, BN=FINISH_COLS, num_warps=4, enable_fp_fusion=False)


def finish(
    partial: Tensor,
    y: Tensor | None,
    factor: float,
    out_gain: Tensor | None = None,
    bias: Tensor | None = None,
    context: Tensor | None = None,
    other: Tensor | None = None,
    contexts: int = 1,
    products: Tensor | None = None,
) -> Tensor | None:
    """Launch finish_kernel on partial sums, ``[splits, rows, outputs]``.

    With ``other``, the gradient of a gain goes to ``products`` if it has a row for each row of the batch;
    else it is returned, ``[contexts, outputs]``.
    """
    splits, rows, outputs = partial.shape
    col_blocks, row_blocks = cdiv(outputs, FINISH_COLS), cdiv(rows, FINISH_ROWS)
    order = starts = sums = None
    slices, segments = 1, row_blocks
    if other is not None and products is None:
        slices = max(1, min(_PROGRAMS // (col_blocks * contexts), row_blocks // _LEAST_TILES))
        segments = contexts * slices
        sums = partial.new_empty(contexts, slices, outputs)
        if contexts > 1:
            assert context is not None
            order, starts = by_context(context, contexts)
    banks = (contexts_of(out_gain), contexts_of(bias))
    strides = (0, 0) if other is None else other.stride()
    sizes = (rows, outputs, splits, slices, col_blocks)
    _FINISH(
        col_blocks * segments,
        (partial, y, out_gain, bias, other, sums, products, context, order, starts, factor),
        (*sizes, *banks, *strides, *strides_of(out_gain), *strides_of(bias)),
        OUT_BANK=banks[0] > 1,
        BIAS_BANK=banks[1] > 1,
    )
    if sums is None:
        return None
    return sums.sum(1) if slices > 1 else sums.squeeze(1)


WHOLE = slice(None)  # a batch that is one part: nothing is cut, as a view takes 2 us


def rows_of(tensor: Tensor, part: slice) -> Tensor:
    return tensor if part is WHOLE else tensor[part]


def _bank_of(bank: Tensor | None, context: Tensor | None, part: slice) -> Tensor | None:
    """The rows of a bank that serve a part of the batch: a bank with a row for each row is cut alike."""
    if bank is None or bank.shape[0] == 1 or context is not None:
        return bank
    return rows_of(bank, part)


def parts(rows: int, *row_bytes: int) -> list[slice]:
    """The batch in parts whose scratch, of so many bytes a row, fits; multiples of 128 rows where several."""
    most = max(128, SCRATCH // max(1, *row_bytes) // 128 * 128)
    if rows <= most:
        return [WHOLE]
    return [slice(first, min(first + most, rows)) for first in range(0, rows, most)]


def modulated_matmul(
    x: Tensor,
    in_gain: Tensor | None,
    out_gain: Tensor | None,
    bias: Tensor | None,
    context: Tensor | None,
    *matrix: Any,
) -> Tensor:
    view, factor = matrix[:-1], matrix[-1]
    rows, outputs = x.shape[0], view[5] if view[6] else view[4]
    y = x.new_empty(rows, outputs)
    if rows == 0:
        return y
    x = x.resolve_neg()
    context = None if context is None else context.contiguous()
    banks = contexts_of(out_gain) > 1 or contexts_of(bias) > 1
    request = (x.dtype, in_gain is not None, banks, may_use_tf32(x.dtype))
    plan = _plan(view, rows, *request)
    with on_device(x.device):
        for part in parts(rows, plan.prepared_bytes, 4 * outputs if plan.partial else 0):
            some, to = rows_of(x, part), rows_of(y, part)
            in_rows = _bank_of(in_gain, context, part)
            out_rows, bias_rows = _bank_of(out_gain, context, part), _bank_of(bias, context, part)
            selected = None if context is None else rows_of(context, part)
            if part is not WHOLE:
                plan = _plan(view, some.shape[0], *request)
            if plan.partial:
                partial = x.new_empty(plan.splits, *to.shape, dtype=torch.float32)
                _product(some, in_rows, None, None, selected, partial, plan, factor, partial=True)
                finish(partial, to, factor, out_rows, bias_rows, selected)
            else:
                _product(some, in_rows, out_rows, bias_rows, selected, to, plan, factor, partial=False)
    return y


def modulated_matmul_gain_grad(
    x: Tensor,
    in_gain: Tensor | None,
    out_gain: Tensor | None,
    other: Tensor,
    context: Tensor | None,
    contexts: int,
    need_product: bool,
    *matrix: Any,
) -> tuple[Tensor, Tensor]:
    view, factor = matrix[:-1], matrix[-1]
    rows, outputs = x.shape[0], view[5] if view[6] else view[4]
    product = x.new_empty(rows if need_product else 0, outputs)
    if rows == 0:
        return product, x.new_zeros(contexts, outputs, dtype=torch.float32)
    x, other = x.resolve_neg(), other.resolve_neg()
    context = None if context is None else context.contiguous()
    gain_grad = None
    each = x.new_empty(rows, outputs, dtype=torch.float32) if contexts > 1 and context is None else None
    request = (x.dtype, in_gain is not None, False, may_use_tf32(x.dtype))
    plan = _plan(view, rows, *request)
    with on_device(x.device):
        for part in parts(rows, plan.prepared_bytes, 4 * outputs):
            some = rows_of(x, part)
            if part is not WHOLE:
                plan = _plan(view, some.shape[0], *request)
            selected = None if context is None else rows_of(context, part)
            partial = x.new_empty(plan.splits, some.shape[0], outputs, dtype=torch.float32)
            gain = _bank_of(in_gain, context, part)
            _product(some, gain, None, None, selected, partial, plan, factor, partial=True)
            out_rows = _bank_of(out_gain, context, part) if need_product else None
            to = rows_of(product, part) if need_product else None
            products = None if each is None else rows_of(each, part)
            by = rows_of(other, part)
            found = finish(partial, to, factor, out_rows, None, selected, by, contexts, products)
            if found is not None:
                gain_grad = found if gain_grad is None else gain_grad.add_(found)
    result = gain_grad if each is None else each
    assert result is not None
    return product, result
