"""Everyday eager calls of dense products, straight to their launchers.

Functions, where cpu and cuda have operators (backends/packed.py): a kernel in Python costs the dispatcher
some 20 us, as much as the launch of a small product. A call of modulated_linear, 64 x 64 at M = 1, takes the
host 35 us instead of the checked way's 55, with in_gain and bias 80 instead of 112 (a driver that does
nothing). They compute what the primitives compute, and raise RuntimeError where a shape or a device does not
fit, for the checked way to word the error.
"""

import torch
from torch import Tensor

from nmkern.backends.packed import Everyday
from nmkern.backends.triton import launch


def _rows(tensor: Tensor, features: int, like: Tensor) -> Tensor:
    """[..., features] as [M, features]."""
    if tensor.ndim == 0 or tensor.shape[-1] != features or tensor.device != like.device:
        raise RuntimeError(f"expected [..., {features}] on {like.device}")
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, features)


def _bank(vector: Tensor | None, features: int, like: Tensor) -> Tensor | None:
    """A vector as a bank of one row."""
    if vector is None:
        return None
    if vector.shape != (features,) or vector.dtype != torch.float32 or vector.device != like.device:
        raise RuntimeError(f"expected float32 of shape [{features}] on {like.device}")
    return vector.unsqueeze(0)


def _sizes(matrix: Tensor) -> tuple[int, int]:
    """N and K."""
    rows, cols, transposed = matrix.arguments[4:7]  # type: ignore[attr-defined]
    return (cols, rows) if transposed else (rows, cols)


def matmul(
    x: Tensor, in_gain: Tensor | None, out_gain: Tensor | None, bias: Tensor | None, matrix: Tensor
) -> Tensor:
    outputs, inputs = _sizes(matrix)
    banks = _bank(in_gain, inputs, x), _bank(out_gain, outputs, x), _bank(bias, outputs, x)
    y = launch.modulated_matmul(_rows(x, inputs, x), *banks, None, *matrix.arguments)  # type: ignore[attr-defined]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], outputs)


def matmul_bare(x: Tensor, matrix: Tensor) -> Tensor:
    return matmul(x, None, None, None, matrix)


def gain_grad(
    x: Tensor,
    in_gain: Tensor | None,
    out_gain: Tensor | None,
    other: Tensor,
    need_product: bool,
    matrix: Tensor,
) -> tuple[Tensor, Tensor]:
    outputs, inputs = _sizes(matrix)
    if other.shape[:-1] != x.shape[:-1]:
        raise RuntimeError("expected the leading shape of x")
    product, grad = launch.modulated_matmul_gain_grad(
        _rows(x, inputs, x),
        _bank(in_gain, inputs, x),
        _bank(out_gain, outputs, x),
        _rows(other, outputs, x),
        *(None, 1, need_product),
        *matrix.arguments,  # type: ignore[attr-defined]
    )
    if need_product and x.ndim != 2:
        product = product.view(*x.shape[:-1], outputs)
    return product, grad.squeeze(0)


EVERYDAY = Everyday("triton", matmul, matmul_bare, gain_grad)
