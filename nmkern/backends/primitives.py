"""The primitives that every backend implements, as PyTorch operators ``nmkern::<backend>_<primitive>``.

    modulated_matmul(x, ...)            y[m, n] = (z[m, n] * out_gain[c, n]) + bias[c, n]
    modulated_matmul_gain_grad(x, ...)  product[m, n] = z[m, n] * out_gain[c, n]
                                        gain_grad[c, n] = sum over the rows m of c: other[m, n] * z[m, n]
        with z[m, n] = factor * sum_k (x[m, k] * in_gain[c, k]) * code[n, k]
    sparse_matmul(x, ...)               y[m, n] = factor * sum over the ones k of row n: x[m, k]
    flynet_logits(x, gain, ...)         the paper's network, see nmkern.ops.flynet: linear in gain
    flynet_gain_grad(x, d_logits, ...)  its adjoint: the gradient of gain, a bank of ``contexts`` rows

x is ``[M, K]``, other is ``[M, N]``; gains and bias are banks ``[T, features]`` in the dtype that sums
are held in (float32; float64 for float64). Row m reads row c of a bank: 0 where T = 1, else
``context[m]``, else (no context, T = M) m itself; ``contexts`` is the T of the result ``gain_grad``.
The matrix is given in the stream's orientation, ``rows x cols`` at an offset, and ``transposed`` swaps
the roles of N and K. ``seed`` is its 64 bits read as a signed integer.

Invariant: the sum is multiplied by factor, then by out_gain, then bias is added, each rounded on its
own, so that integer-valued inputs give the same bits on every backend.
"""

from collections.abc import Iterable

import torch

from nmkern.matrix import RandomMatrix
from nmkern.stream import DENSE_FAMILIES

LIBRARY = torch.library.Library("nmkern", "DEF")

_DENSE = (
    "int family, int seed, int row_offset, int col_offset, int rows, int cols, bool transposed, float factor"
)
_FLYNET = (
    "int encoder_seed, int encoder_row, int encoder_col, int hidden, int inputs, int population, "
    "int fan_in, float encoder_factor, int family, int decoder_seed, int decoder_row, "
    "int decoder_col, int classes, float decoder_factor"
)
SCHEMAS = {
    "modulated_matmul": (
        f"(Tensor x, Tensor? in_gain, Tensor? out_gain, Tensor? bias, Tensor? context, {_DENSE}) -> Tensor"
    ),
    "modulated_matmul_gain_grad": (
        "(Tensor x, Tensor? in_gain, Tensor? out_gain, Tensor other, Tensor? context, "
        f"int contexts, bool need_product, {_DENSE}) -> (Tensor, Tensor)"
    ),
    "sparse_matmul": (
        "(Tensor x, int seed, int row_offset, int col_offset, int rows, int cols, "
        "int population, int fan_in, bool transposed, float factor) -> Tensor"
    ),
    "flynet_logits": f"(Tensor x, Tensor gain, Tensor? context, {_FLYNET}) -> Tensor",
    "flynet_gain_grad": (f"(Tensor x, Tensor d_logits, Tensor? context, int contexts, {_FLYNET}) -> Tensor"),
}


# The backends that define a primitive.
DEFINED: dict[str, list[str]] = {primitive: [] for primitive in SCHEMAS}


def define(backend: str, primitives: Iterable[str] = tuple(SCHEMAS)) -> None:
    """Define the operators of a backend; their kernels are registered by the backend itself."""
    for primitive in primitives:
        LIBRARY.define(f"{backend}_{primitive}{SCHEMAS[primitive]}", tags=(torch.Tag.pt2_compliant_tag,))
        DEFINED[primitive].append(backend)


def overload(backend: str, primitive: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.nmkern, f"{backend}_{primitive}").default


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def dense_args(matrix: RandomMatrix) -> tuple:
    """The matrix arguments of the two modulated primitives."""
    rows, cols = matrix.stream_shape
    return (
        DENSE_FAMILIES[matrix.family].tag,
        _signed(matrix.seed),
        matrix.row_offset,
        matrix.col_offset,
        rows,
        cols,
        matrix.transposed,
        matrix.factor,
    )


def sparse_args(matrix: RandomMatrix) -> tuple:
    """The matrix arguments of ``sparse_matmul``."""
    rows, cols = matrix.stream_shape
    return (
        _signed(matrix.seed),
        matrix.row_offset,
        matrix.col_offset,
        rows,
        cols,
        matrix.population,
        matrix.fan_in,
        matrix.transposed,
        matrix.factor,
    )


def flynet_args(encoder: RandomMatrix, decoder: RandomMatrix) -> tuple:
    """The matrix arguments of the flynet primitives, for matrices that are not transposed."""
    e, d = encoder, decoder
    return (
        *(_signed(e.seed), e.row_offset, e.col_offset, e.rows, e.cols, e.population, e.fan_in, e.factor),
        *(DENSE_FAMILIES[d.family].tag, _signed(d.seed), d.row_offset, d.col_offset, d.rows, d.factor),
    )


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and gains are held in for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bank_rows(bank: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """The bank's row for every row of the batch: ``[1, F]`` (broadcasts) or ``[M, F]``."""
    if bank.shape[0] == 1 or context is None:
        return bank
    return bank.index_select(0, context)


def segment_sum(
    values: torch.Tensor, context: torch.Tensor | None, contexts: int, dtype: torch.dtype
) -> torch.Tensor:
    """Sums of ``values [M, F]`` over the rows of each context, in a fixed order: ``[contexts, F]``."""
    values = values.to(dtype)
    if contexts == 1:
        return values.sum(0, keepdim=True)
    if context is None:
        return values
    out = values.new_zeros(contexts, values.shape[1])
    if values.device.type == "cpu":  # sequential there
        return out.index_add(0, context, values)
    # Sorts by index instead of using float atomics.
    return out.index_put((context,), values, accumulate=True)
