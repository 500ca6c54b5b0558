"""The everyday call of modulated_linear: plain tensors in eager mode, gains and bias as vectors.

CPU tensors, and CUDA tensors. The checks, the operator's arguments and the node of the graph are most of a
small call's time, so this way has the fewest of each. In microseconds at 64 x 64 and M = 1 on one machine:
checks 1.1, entering the operator 0.7, allocating the result 0.6, the product 0.6, and where a gradient is
needed the node 2.9; in all 3.1 and 6.0, where torch's own linear layer took 2.5 and 3.1, and the checked way
three times ours. On CUDA tensors, with launches that took no time, a call took the host 4.5, with an in_gain
and a bias 5.8, and the checked way 14 and 22.

The invariant: it computes what the checked way computes, bit for bit, and declines (None) whatever it
does not know to be plain or right; the checked way then serves the call, or words the error.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _pop_mode_temporarily

from nmkern.backends import packed, primitives, selection
from nmkern.matrix import RandomMatrix
from nmkern.ops.dense import OPERATORS
from nmkern.ops.rules import plain_apply

_PLAIN = (Tensor, torch.nn.Parameter)
_F32 = torch.float32
# Looked up once: a dotted name costs as much as the answer. Dynamo knows the first by its identity; whatever
# else compiles or exports has a mode.
_compiling = torch.compiler.is_dynamo_compiling
_tracing = torch._C._is_tracing
_grad_enabled = torch.is_grad_enabled
# A torch that cannot tell whether a mode is active has every call checked, as with more modes than may pass.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 2)
_transform = torch._C._functorch.maybe_current_level
_autocast = torch._C._is_any_autocast_enabled
_on_cpu, _on_cuda = selection.everyday["cpu"], selection.everyday["cuda"]


def _way_of(x: Tensor) -> packed.Everyday | None:
    """How calls with x are made; None where a subclass, mode or transform has a say, or no kernel reads x."""
    if (
        not _compiling()  # first: what follows is not for the compiler to trace
        and not _tracing()  # by torch.jit, whose graph would lose the gradient
        and type(x) in _PLAIN
        and (x.ndim == 2 or x.is_contiguous())
        and not _dispatch_modes()
        and not _function_modes()
        and _transform() is None
        and forward_ad._current_level < 0
    ):
        return _on_cpu[x.dtype] if x.is_cpu else _on_cuda[x.dtype] if x.is_cuda else None
    return None


def _only_default_device() -> bool:
    """Whether the one mode is torch.set_default_device's, which concerns new tensors only."""
    if _compiling() or _function_modes() != 1:
        return False
    from torch.utils._device import DeviceContext  # imported by who set one

    return type(torch._C._get_function_stack_at(0)) is DeviceContext


def eager_matmul(
    x: Tensor, matrix: RandomMatrix, in_gain: Tensor | None, out_gain: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """``modulated_linear`` without context and strength; None where the checked way has to take the call."""
    if not (way := _way_of(x)) or _autocast() or type(matrix) is not RandomMatrix:
        if _only_default_device():  # it would slow every look at x down
            with _pop_mode_temporarily():
                return eager_matmul(x, matrix, in_gain, out_gain, bias)
        return None
    if not (forms := matrix._packed or packed.pack(matrix)):
        return None
    try:
        if in_gain is out_gain is bias is None:
            if x.requires_grad and _grad_enabled():
                return _apply_bare(x, matrix, way)
            return way.matmul_bare(x, forms[0])
        needs_grad = x.requires_grad
        for vector in (in_gain, out_gain, bias):
            if vector is not None:
                if type(vector) not in _PLAIN or vector.ndim != 1 or vector.dtype is not _F32:
                    return None
                needs_grad = needs_grad or vector.requires_grad
        if needs_grad and _grad_enabled():
            return _apply(x, in_gain, out_gain, bias, matrix, way)
        return way.matmul(x, in_gain, out_gain, bias, forms[0])
    except RuntimeError:  # a shape, a device or a layout that does not fit
        return None


class ModulatedMatmul(torch.autograd.Function):
    """The node of a call with gains or bias."""

    @staticmethod
    def forward(ctx: Any, x, in_gain, out_gain, bias, matrix: RandomMatrix, way: packed.Everyday) -> Tensor:
        ctx.matrix, ctx.way = matrix, way
        needs = ctx.needs_input_grad
        # x is needed for the gradients of gains only.
        ctx.save_for_backward(x if needs[1] or needs[2] else None, in_gain, out_gain)
        return way.matmul(x, in_gain, out_gain, bias, matrix._packed[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, in_gain, out_gain = ctx.saved_tensors
        return *_gradients(ctx.needs_input_grad[:4], dy, x, in_gain, out_gain, ctx), None, None


class RandomMatmul(torch.autograd.Function):
    """The node of a call without: fewer arguments and nothing to save, 0.7 of 10 microseconds less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: RandomMatrix, way: packed.Everyday) -> Tensor:
        ctx.matrix, ctx.way = matrix, way
        return way.matmul_bare(x, matrix._packed[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        dx, *_ = _gradients((True, False, False, False), dy, None, None, None, ctx)
        return dx, None, None


_apply, _apply_bare = plain_apply(ModulatedMatmul), plain_apply(RandomMatmul)


def _gradients(needs, dy, x, in_gain, out_gain, ctx: Any) -> tuple:
    """To x, in_gain, out_gain and bias: None for each that does not need one."""
    matrix, way = ctx.matrix, ctx.way
    if _grad_enabled() or not _way_of(dy):  # the backward pass is itself recorded, or watched
        if not _grad_enabled() and _only_default_device():
            with _pop_mode_temporarily():
                return _gradients(needs, dy, x, in_gain, out_gain, ctx)
        return _gradients_by_primitives(needs, dy, x, in_gain, out_gain, matrix, way.backend)
    need_x, need_in, need_out, need_bias = needs
    dx = d_in = d_out = d_bias = None
    forward, transpose = packed.pack(matrix)
    if need_in:
        dx, d_in = way.gain_grad(dy, out_gain, in_gain, x, need_x, transpose)
        dx = dx if need_x else None
    elif need_x:
        dx = way.matmul(dy, out_gain, in_gain, None, transpose)
    if need_out:
        _, d_out = way.gain_grad(x, in_gain, None, dy, False, forward)
    if need_bias:
        rows = dy if dy.ndim == 2 else dy.reshape(-1, matrix.rows)
        d_bias = rows.to(_F32).sum(0)
    return dx, d_in, d_out, d_bias


def _gradients_by_primitives(needs, dy, x, in_gain, out_gain, matrix: RandomMatrix, backend: str) -> tuple:
    """The same by the differentiable primitives, which take rows and banks in two dimensions."""
    in_bank, out_bank = (None if gain is None else gain.unsqueeze(0) for gain in (in_gain, out_gain))
    rows = None if x is None else x.reshape(-1, matrix.cols)
    dx, *d_banks = OPERATORS[backend].gradients(
        needs, dy.reshape(-1, matrix.rows), rows, in_bank, out_bank, None, 1, primitives.dense_args(matrix)
    )
    dx = None if dx is None else dx.reshape(*dy.shape[:-1], matrix.cols)
    return dx, *(None if bank is None else bank.squeeze(0) for bank in d_banks)
