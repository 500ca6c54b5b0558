"""sparse_project: sums of a few random inputs, the fly's projection.

    y[m, n] = scale * sum over the fan_in ones k of row n: x[m, k]

The ones are drawn inside of the kernel; no index is stored. The gradient to x is the same operator
on the transposed matrix, so derivatives of every order exist.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nmkern.backends import primitives, selection
from nmkern.matrix import RandomMatrix
from nmkern.ops import checks
from nmkern.ops.rules import differentiable

_TRANSPOSED = -2  # position of ``transposed`` in the matrix arguments


def sparse_project(x: Tensor, matrix: RandomMatrix) -> Tensor:
    """Multiply by a ``sparse`` random matrix: ``[..., K] -> [..., N]``, for a matrix ``[N, K]``.

    ``x`` is float32, float64, bfloat16 or float16 with any leading dimensions; sums are held in
    float32 (float64 for float64). Deterministic, forward and backward. Raises as
    ``modulated_linear`` does. Source: arXiv:2204.04297, section 3 (the encoder of FlyNet).
    """
    checks.check_matrix("matrix", matrix, dense=False)
    checks.check_input(x, matrix)
    x, _ = checks.autocast(x)
    backend = selection.select(matrix.family, x.dtype, x.device.type)
    y = OPERATORS[backend].matmul(x.reshape(-1, matrix.cols), *primitives.sparse_args(matrix))
    return y.reshape(*x.shape[:-1], matrix.rows)


class _Operator:
    """``sparse_matmul`` of one backend with its rules: call ``matmul``."""

    def __init__(self, backend: str) -> None:
        self.matmul = differentiable(
            primitives.overload(backend, "sparse_matmul"),
            tensors=1,
            fake=self.fake,
            setup_context=self.setup_context,
            backward=self.backward,
            jvp=self.jvp,
            vmap=self.vmap,
        )

    def fake(self, x, *matrix) -> Tensor:
        rows, cols, transposed = matrix[3], matrix[4], matrix[_TRANSPOSED]
        return x.new_empty(x.shape[0], cols if transposed else rows)

    def setup_context(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, *ctx.matrix = inputs

    def backward(self, ctx: Any, dy: Tensor) -> tuple:
        matrix = list(ctx.matrix)
        matrix[_TRANSPOSED] = not matrix[_TRANSPOSED]
        return self.matmul(dy, *matrix), *[None] * len(matrix)

    def jvp(self, primals: Sequence, tangents: Sequence) -> Tensor:
        return self.matmul(tangents[0], *primals[1:])

    def vmap(self, info, in_dims, x, *matrix):
        y = self.matmul(x.movedim(in_dims[0], 0).flatten(0, 1), *matrix)
        return y.unflatten(0, (info.batch_size, -1)), 0


OPERATORS = {backend: _Operator(backend) for backend in selection.backends_with("sparse_matmul")}
