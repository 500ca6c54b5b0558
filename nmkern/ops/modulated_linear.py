"""modulated_linear: a linear layer whose weights are generated and modulated, never stored.

    y[m, n] = out_gain[c(m), n] * strength[c(m)]
              * sum_k (x[m, k] * in_gain[c(m), k]) * W[n, k] + bias[c(m), n]

This file checks and normalises arguments and calls the primitives of a backend: see nmkern.ops.dense. Plain
calls of everyday eager mode go past most of it: see nmkern.ops.eager.
"""

from torch import Tensor

from nmkern.backends import primitives, selection
from nmkern.matrix import RandomMatrix
from nmkern.ops import checks
from nmkern.ops.dense import OPERATORS
from nmkern.ops.eager import eager_matmul
from nmkern.ops.modulation import modulate


def modulated_linear(
    x: Tensor,
    matrix: RandomMatrix,
    *,
    in_gain: Tensor | None = None,
    out_gain: Tensor | None = None,
    bias: Tensor | None = None,
    context: Tensor | int | None = None,
    strength: Tensor | float | None = None,
) -> Tensor:
    """Multiply by a random matrix, modulated by gains: ``[..., K] -> [..., N]``.

    ``matrix`` has shape ``[N, K]`` and is generated inside of the kernel. Gains and bias may each be

    - one vector ``[features]`` for the whole batch;
    - a bank ``[T, features]``, from which ``context`` selects: an int for the whole batch, or an
      integer tensor with the leading shape of ``x``, one index per row;
    - without ``context``, one vector per row: anything that broadcasts to ``x.shape[:-1] + (features,)``.

    Args:
        x: float32, float64, bfloat16 or float16, any number of leading dimensions.
        in_gain, out_gain, bias: features K, N, N; in the dtype of ``x``, or float32 where that is
            narrower. They are applied in float32 (float64 for float64); on a GPU an ``x`` of 16 bits times
            ``in_gain`` is then multiplied in 11 bits, where PyTorch would round it to the dtype of ``x``.
        context: which row of the banks serves a row of ``x``.
        strength: a number, a scalar tensor, a bank ``[T]`` or one value per row: multiplies the weights.

    Gradients flow to ``x``, the gains, ``bias`` and ``strength`` (a tensor), to any order, in reverse and
    in forward mode. The backward pass keeps ``x`` only where a gain needs a gradient, and regenerates the
    weights.

    Raises TypeError (dtype), ValueError (shape, value) and RuntimeError (device, backend) before any
    work starts. Source: arXiv:2204.04297, section 3; the operator of context modulation.
    """
    if context is None and strength is None:
        # Not checked yet: what does not fit comes back as None.
        y = eager_matmul(x, matrix, in_gain, out_gain, bias)
        if y is not None:
            return y
    checks.check_matrix("matrix", matrix, dense=True)
    checks.check_input(x, matrix)
    x, cast = checks.autocast(x)
    backend = selection.select(matrix.family, x.dtype, x.device.type)
    rows = x if x.ndim == 2 else x.reshape(-1, matrix.cols)
    args = primitives.dense_args(matrix)
    if in_gain is out_gain is bias is context is strength is None:
        y = OPERATORS[backend].matmul(rows, None, None, None, None, *args)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], matrix.rows)
    banks, selector, factor = modulate(
        x,
        matrix,
        {"in_gain": in_gain, "out_gain": out_gain, "bias": bias},
        {"in_gain": matrix.cols, "out_gain": matrix.rows, "bias": matrix.rows},
        context,
        strength,
        # On the input side strength's gradient comes with that of x, without another product.
        fold_into="out_gain" if in_gain is None and out_gain is not None else "in_gain",
        cast=cast,
    )
    y = OPERATORS[backend].matmul(
        rows,
        banks["in_gain"],
        banks["out_gain"],
        banks["bias"],
        selector,
        *args[:-1],
        factor,
    )
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], matrix.rows)
