"""From the arguments of the dense primitives to launches of their kernels.

    chunks of the batch -> product_kernel, the reduction in one or several splits -> finish_kernel

What follows from the matrix, the dtype and the shape alone is worked out once and kept (``_plan``). The
invariant: scratch is bounded by ``SCRATCH`` bytes whatever the layer's size; the split follows from the
shape alone, so no tile changes a bit; and nothing here waits for the device or reads from it, so that calls
can be captured in a CUDA graph (but for NMKERN_TRITON_AUTOTUNE, which times the first call of its class).
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
from nmkern.backends import primitives
from nmkern.backends.triton import autotune, configs, dense

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Partial sums of a call, in bytes: a batch that needs more is taken in parts.
SCRATCH = 64 * 2**20
# Programs that a split aims at, two for each of an H100's 132 multiprocessors, and the least steps that
# are worth a program. Constants, not the device's own count: the same sums on every GPU.
_PROGRAMS = 264
_LEAST_STEPS = 8
_FINISH_ROWS, _FINISH_COLS = 16, 64

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Plan:
    """What a launch needs that does not depend on tensors."""

    request: tuple  # what it is the plan of: the arguments of ``_plan``
    tile: configs.Tile
    outputs: int
    reduction: int
    splits: int
    grid: tuple[int]
    # The kernel's arguments from N to o_blocks: outputs, reduction; k0 and k1; first counter and skip of
    # outputs and of the reduction; chunk, m_blocks, o_blocks.
    numbers: tuple[int, ...]
    table: torch.dtype
    constants: dict[str, Any]  # and the launch's options


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
    tile = tile or configs.tile_of(tag, transposed, batch, banks)
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
    operand, split_x = operand_of(dtype, gained, tf32)
    key = stream.key_of(seed % 2**64)
    places = (signed32(o_place[0]), o_place[1], signed32(r_place[0]), r_place[1])
    constants = {
        "TAG": tag,
        "TRANSPOSED": transposed,
        "SPLIT_X": split_x,
        "DTYPE": DTYPES[operand],
        "FIELDS": tile.fields,
        "BO": tile.outputs,
        "BR": step,
        "BM": tile.batch,
        "WARPS": tile.warps,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": False,
    }
    numbers = (outputs, reduction, *(signed32(half) for half in key), *places, chunk, m_blocks, o_blocks)
    request = (matrix, batch, dtype, gained, banks, tf32)
    grid = (m_blocks * o_blocks * splits,)
    return Plan(request, tile, outputs, reduction, splits, grid, numbers, operand, constants)


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
    return " ".join(words), configs.candidates(tag, transposed, batch, banks)


def operand_of(dtype: torch.dtype, gained: bool, tf32: bool) -> tuple[torch.dtype, bool]:
    """The dtype of tl.dot's operands, and whether x is split in three of it.

    Weights are exact in every one. x times in_gain is a float32, as x of float32 is; the interpreter
    multiplies in float32 throughout.
    """
    if INTERPRETED or (dtype == torch.float32 and tf32):
        return torch.float32, False
    if dtype == torch.float32 or gained:
        return torch.bfloat16, True
    return dtype, False


@functools.cache
def table_of(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The normal family's codes on a device, where they stay."""
    return torch.from_numpy(stream.NORMAL_TABLE).to(device, dtype)


def _tf32() -> bool:
    """Whether PyTorch's setting for float32 products on CUDA allows tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def strides_of(bank: Tensor | None) -> tuple[int, int]:
    """Strides of a bank; 0 from row to row where there is one."""
    if bank is None:
        return 0, 0
    return (0 if bank.shape[0] == 1 else bank.stride(0)), bank.stride(1)


def contexts_of(bank: Tensor | None) -> int:
    return 1 if bank is None else bank.shape[0]


def _product(x, in_gain, out_gain, bias, context, y, plan: Plan, factor: float, partial: bool) -> None:
    """Launch product_kernel on rows that one plan covers."""
    in_contexts, out_contexts, bias_contexts = contexts_of(in_gain), contexts_of(out_gain), contexts_of(bias)
    tensors = (x, in_gain, out_gain, bias, context, y, table_of(x.device, plan.table), factor, x.shape[0])
    layout = (
        *(in_contexts, out_contexts, bias_contexts),
        *x.stride(),
        *strides_of(in_gain),
        *strides_of(out_gain),
        *strides_of(bias),
        *(in_contexts > 1, out_contexts > 1, bias_contexts > 1),
    )

    def launch(plan: Plan) -> None:
        dense.product_kernel[plan.grid](*tensors, *plan.numbers, *layout, PARTIAL=partial, **plan.constants)

    if autotune.enabled(x.device):
        plan = _tuned(plan, x.device, launch)
    launch(plan)


def finish(partial, y, out_gain, bias, other, gain_grad, bank, context, contexts, factor: float) -> None:
    """Launch finish_kernel on partial sums, ``[splits, rows, outputs]``."""
    splits, rows, outputs = partial.shape
    row_tiles = triton.cdiv(rows, _FINISH_ROWS)
    # Who adds to a row of gain_grad must own its columns; else every row tile is a program of its own.
    in_turn = row_tiles if gain_grad is not None and bank != "each" else 1
    grid = (triton.cdiv(outputs, _FINISH_COLS), triton.cdiv(row_tiles, in_turn))
    dense.finish_kernel[grid](
        partial,
        y,
        out_gain,
        bias,
        other,
        gain_grad,
        context,
        factor,
        rows,
        outputs,
        splits,
        in_turn,
        contexts,
        contexts_of(out_gain),
        contexts_of(bias),
        *((0, 0) if other is None else other.stride()),
        *strides_of(out_gain),
        *strides_of(bias),
        OUT_BANK=contexts_of(out_gain) > 1,
        BIAS_BANK=contexts_of(bias) > 1,
        BANK=bank,
        BM=_FINISH_ROWS,
        BN=_FINISH_COLS,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _rows_of(bank: Tensor | None, context: Tensor | None, part: slice) -> Tensor | None:
    """The rows of a bank that serve a part of the batch: a bank with a row for each row is cut alike."""
    if bank is None or bank.shape[0] == 1 or context is not None:
        return bank
    return bank[part]


def parts(rows: int, outputs: int) -> list[slice]:
    """The batch in parts whose float32 sums fit the scratch; a multiple of 128 rows where several."""
    most = max(128, SCRATCH // (4 * outputs) // 128 * 128)
    return [slice(first, min(first + most, rows)) for first in range(0, rows, most)]


def modulated_matmul(
    x: Tensor,
    in_gain: Tensor | None,
    out_gain: Tensor | None,
    bias: Tensor | None,
    context: Tensor | None,
    *matrix: Any,
) -> Tensor:
    *view, factor = matrix
    rows, outputs = x.shape[0], view[5] if view[6] else view[4]
    y = x.new_empty(rows, outputs)
    if rows == 0:
        return y
    x = x.resolve_neg()
    context = None if context is None else context.contiguous()
    tf32 = x.dtype == torch.float32 and _tf32()
    banks = contexts_of(out_gain) > 1 or contexts_of(bias) > 1
    plan = _plan(tuple(view), rows, x.dtype, in_gain is not None, banks, tf32)
    with on_device(x.device):
        if plan.splits == 1:
            _product(x, in_gain, out_gain, bias, context, y, plan, factor, partial=False)
        else:
            partial = x.new_empty(plan.splits, rows, outputs, dtype=torch.float32)
            _product(x, in_gain, None, None, context, partial, plan, factor, partial=True)
            finish(partial, y, out_gain, bias, None, None, "one", context, 1, factor)
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
    *view, factor = matrix
    rows, outputs = x.shape[0], view[5] if view[6] else view[4]
    product = x.new_empty(rows if need_product else 0, outputs)
    bank = "one" if contexts == 1 else "each" if context is None else "context"
    gain_grad = x.new_zeros(contexts, outputs, dtype=primitives.sum_dtype(x.dtype))
    x, other = x.resolve_neg(), other.resolve_neg()
    context = None if context is None else context.contiguous()
    tf32 = x.dtype == torch.float32 and _tf32()
    with on_device(x.device):
        for part in parts(rows, outputs):
            some = x[part]
            plan = _plan(tuple(view), some.shape[0], x.dtype, in_gain is not None, False, tf32)
            selected = None if context is None else context[part]
            partial = x.new_empty(plan.splits, some.shape[0], outputs, dtype=torch.float32)
            gain = _rows_of(in_gain, context, part)
            _product(some, gain, None, None, selected, partial, plan, factor, partial=True)
            finish(
                partial,
                product[part] if need_product else None,
                _rows_of(out_gain, context, part) if need_product else None,
                None,
                other[part],
                gain_grad[part] if bank == "each" else gain_grad,
                bank,
                selected,
                contexts,
                factor,
            )
    return product, gain_grad
