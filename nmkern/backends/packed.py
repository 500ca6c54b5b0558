"""The dense primitives as everyday eager calls make them, with fewer, packed arguments.

    packed_matmul(x, in_gain, out_gain, bias, matrix)
    packed_matmul.bare(x, matrix)
    packed_matmul_gain_grad(x, in_gain, out_gain, other, need_product, matrix)

The cpu backend has them for CPU tensors, the cuda backend for CUDA tensors. For the triton backend, functions
stand for them (``Everyday``).

x is ``[..., K]``, of two dimensions or contiguous; gains, bias and the gradient of a gain are vectors in
float32. ``matrix`` holds the matrix arguments of the primitives in one int64 tensor: an argument of a
PyTorch operator costs 0.2 to 0.4 microseconds, and with all thirteen the call costs 5.3 before any work,
with these five 2.2 (an int[] 3.4, a string 3.0). It is a CPU tensor whatever the device of x.

They have no rules: nothing here is differentiated, batched or traced. The kernels check shapes and
dtypes to guard memory and raise RuntimeError; who calls them words the error.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nmkern import stream
from nmkern.backends import primitives
from nmkern.matrix import RandomMatrix

_GAINS = "Tensor x, Tensor? in_gain, Tensor? out_gain"
SCHEMAS = {
    "packed_matmul": f"({_GAINS}, Tensor? bias, Tensor matrix) -> Tensor",
    "packed_matmul.bare": "(Tensor x, Tensor matrix) -> Tensor",
    "packed_matmul_gain_grad": (
        f"({_GAINS}, Tensor other, bool need_product, Tensor matrix) -> (Tensor, Tensor)"
    ),
}


class Everyday(NamedTuple):
    """A backend's way of everyday calls: functions of the arguments above, operators where it has them."""

    backend: str
    matmul: Callable[..., Any]
    matmul_bare: Callable[..., Any]
    gain_grad: Callable[..., Any]


def _define(name: str) -> Callable[..., Any]:
    primitives.LIBRARY.define(name + SCHEMAS[name])
    # Past autograd, which is not asked to record them: a guard around the call would cost 0.7 us.
    primitives.LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.nmkern, packet), overload or "default")
    return getattr(op, "_op", op)  # what the overload calls itself: 0.4 us less


matmul = _define("packed_matmul")
matmul_bare = _define("packed_matmul.bare")
gain_grad = _define("packed_matmul_gain_grad")


def everyday(backend: str) -> Everyday:
    """Of a backend that registers the operators."""
    return Everyday(backend, matmul, matmul_bare, gain_grad)


def pack(matrix: RandomMatrix) -> tuple[torch.Tensor, ...]:
    """A matrix and its transpose as the operators take them, kept as ``matrix._packed``; () for a sparse one.

    To be called where no mode is active: a mode's tensors would be kept.
    """
    if not matrix._packed and matrix.family in stream.DENSE_FAMILIES:
        *integers, transposed, factor = primitives.dense_args(matrix)
        (bits,) = struct.unpack("q", struct.pack("d", factor))
        views = ([*integers, int(swapped), bits] for swapped in (transposed, not transposed))
        tensors = tuple(torch.tensor(view, dtype=torch.int64, device="cpu") for view in views)
        for tensor, swapped in zip(tensors, (transposed, not transposed), strict=True):
            tensor.arguments = (*integers, swapped, factor)  # type: ignore[attr-defined]  # for functions
        object.__setattr__(matrix, "_packed", tensors)
    return matrix._packed
