"""flynet: the paper's network as one operator, which keeps no activation of hidden size.

    m = P x                             P sparse, hidden x inputs
    r = max(0, m - mean over units of m)
    logits[b] = strength[c] * D (gain[c] * r[b])          D dense, classes x hidden; c = context of b

The logits are linear in the gain, so one primitive and its adjoint are closed under differentiation to
the gain and strength: the backward pass sweeps the hidden units again. Where x needs a gradient the
same network is composed of ``sparse_project`` and ``modulated_linear``, which is also its test. Under vmap
and in a traced program nobody can tell; there the gradient to x is composed in the backward pass, as its
tangent always is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nmkern.backends import primitives, selection
from nmkern.matrix import RandomMatrix
from nmkern.ops import checks
from nmkern.ops.dense import OPERATORS as _DENSE
from nmkern.ops.dense import total
from nmkern.ops.modulated_linear import modulated_linear
from nmkern.ops.modulation import modulate
from nmkern.ops.rules import batch_first, differentiable, fold_batch
from nmkern.ops.sparse_projection import OPERATORS as _SPARSE
from nmkern.ops.sparse_projection import sparse_project


def flynet_hidden(x: Tensor, encoder: RandomMatrix) -> Tensor:
    """The representation that all contexts share: ``[..., inputs] -> [..., hidden]``."""
    m = sparse_project(x, encoder)
    return torch.relu(m - m.mean(-1, keepdim=True))


def flynet(
    x: Tensor,
    encoder: RandomMatrix,
    decoder: RandomMatrix,
    *,
    gain: Tensor,
    context: Tensor | int | None = None,
    strength: Tensor | float | None = None,
) -> Tensor:
    """FlyNet's logits: ``[..., inputs] -> [..., classes]``.

    ``encoder`` is a sparse matrix ``[hidden, inputs]``, ``decoder`` a dense one ``[classes, hidden]``;
    ``gain`` (features: hidden), ``context`` and ``strength`` are those of ``modulated_linear``, and so
    are dtypes and errors. Memory beyond the arguments is proportional to batch x inputs + hidden.
    Source: arXiv:2204.04297, section 3.
    """
    checks.check_matrix("encoder", encoder, dense=False)
    checks.check_matrix("decoder", decoder, dense=True)
    checks.check_input(x, encoder)
    if not isinstance(gain, Tensor):
        raise TypeError(f"gain: expected a tensor, got {type(gain).__name__}")
    if decoder.cols != encoder.rows:
        raise ValueError(f"decoder: expected {encoder.rows} columns, the encoder's rows, got {decoder.cols}")
    if (torch.is_grad_enabled() and x.requires_grad) or encoder.transposed or decoder.transposed:
        r = flynet_hidden(x, encoder)
        return modulated_linear(r, decoder, in_gain=gain, context=context, strength=strength)
    x, cast = checks.autocast(x)
    banks, selector, factor = modulate(
        x, decoder, {"gain": gain}, {"gain": encoder.rows}, context, strength, fold_into="gain", cast=cast
    )
    backend = selection.select("flynet", x.dtype, x.device.type)
    *args, _ = primitives.flynet_args(encoder, decoder)
    logits = OPERATORS[backend].logits(x.reshape(-1, encoder.cols), banks["gain"], selector, *args, factor)
    return logits.reshape(*x.shape[:-1], decoder.rows)


_HIDDEN, _FACTOR, _DECODER, _CLASSES = 3, 7, 8, 12  # positions among the matrix arguments


class _Operators:
    """The two flynet primitives of one backend with their rules."""

    def __init__(self, backend: str) -> None:
        self.dense, self.sparse = _DENSE[backend], _SPARSE[backend].matmul
        self.logits = differentiable(
            primitives.overload(backend, "flynet_logits"),
            tensors=3,
            fake=self.fake_logits,
            setup_context=self.setup_logits,
            backward=self.backward_logits,
            jvp=self.jvp_logits,
            vmap=self.vmap_logits,
        )
        self.gain_grad = differentiable(
            primitives.overload(backend, "flynet_gain_grad"),
            tensors=3,
            fake=self.fake_gain_grad,
            setup_context=self.setup_gain_grad,
            backward=self.backward_gain_grad,
            jvp=self.jvp_gain_grad,
            vmap=self.vmap_gain_grad,
        )

    # logits = flynet_logits(x, gain, context, matrices)

    def fake_logits(self, x, gain, context, *matrices) -> Tensor:
        return x.new_empty(x.shape[0], matrices[_CLASSES])

    def setup_logits(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, gain, context, *ctx.matrices = inputs
        ctx.contexts = gain.shape[0]
        ctx.save_for_backward(x, gain if ctx.needs_input_grad[0] else None, context)

    def backward_logits(self, ctx: Any, d_logits: Tensor) -> tuple:
        x, gain, context = ctx.saved_tensors
        need_x, need_gain = ctx.needs_input_grad[:2]
        dx = d_gain = None
        if need_x:
            dx = self.input_gradient(x, gain, d_logits, context, ctx.matrices)
        if need_gain:
            d_gain = self.gain_grad(x, d_logits, context, ctx.contexts, *ctx.matrices)
        return dx, d_gain, None, *[None] * len(ctx.matrices)

    def jvp_logits(self, primals: Sequence, tangents: Sequence) -> Tensor:
        x, gain, context, *matrices = primals
        dx, d_gain, _ = tangents
        terms = []
        if dx is not None:
            *decoder, classes, factor = matrices[_DECODER:]
            d_r = self.hidden_tangent(x, dx, matrices)
            dense = *decoder, classes, matrices[_HIDDEN], False, factor
            terms.append(self.dense.matmul(d_r, gain, None, None, context, *dense))
        if d_gain is not None:
            terms.append(self.logits(x, d_gain, context, *matrices))
        return total(terms, self.fake_logits(*primals))

    def hidden_tangent(self, x, dx, matrices) -> Tensor:
        """Of the representation ``[M, hidden]``, differentiable itself."""
        m, d_m = (self.sparse(v, *matrices[:_FACTOR], False, matrices[_FACTOR]) for v in (x, dx))
        return (d_m - d_m.mean(-1, keepdim=True)) * (m > m.mean(-1, keepdim=True))

    def input_gradient(self, x, gain, d_logits, context, matrices) -> Tensor:
        """To x, of sum(d_logits * logits): differentiable itself, and it holds activations of hidden size."""
        encoder, factor = matrices[:_FACTOR], matrices[_FACTOR]
        *decoder, classes, decoder_factor = matrices[_DECODER:]
        m = self.sparse(x, *encoder, False, factor)
        active = m > m.mean(-1, keepdim=True)
        d_r = self.dense.matmul(
            d_logits, None, gain, None, context, *decoder, classes, matrices[_HIDDEN], True, decoder_factor
        )
        d_centred = d_r * active
        d_m = d_centred - d_centred.mean(-1, keepdim=True)
        return self.sparse(d_m, *encoder, True, factor)

    def vmap_logits(self, info, in_dims, x, gain, context, *matrices):
        x, context, (gain,) = fold_batch(
            info.batch_size, x, in_dims[0], (gain,), in_dims[1:2], context, in_dims[2]
        )
        logits = self.logits(x, gain, context, *matrices)
        return logits.unflatten(0, (info.batch_size, -1)), 0

    # gain_grad = flynet_gain_grad(x, d_logits, context, contexts, matrices): its adjoint

    def fake_gain_grad(self, x, d_logits, context, contexts, *matrices) -> Tensor:
        return x.new_empty(contexts, matrices[_HIDDEN], dtype=primitives.sum_dtype(x.dtype))

    def setup_gain_grad(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, d_logits, context, _, *ctx.matrices = inputs
        ctx.save_for_backward(x, d_logits if ctx.needs_input_grad[0] else None, context)

    def backward_gain_grad(self, ctx: Any, d_grad: Tensor) -> tuple:
        x, d_logits, context = ctx.saved_tensors
        need_x, need_logits = ctx.needs_input_grad[:2]
        dx = d_d_logits = None
        if need_x:  # sum(d_grad * gain_grad) is sum(d_logits * logits) with d_grad for the gain
            dx = self.input_gradient(x, d_grad, d_logits, context, ctx.matrices)
        if need_logits:
            d_d_logits = self.logits(x, d_grad, context, *ctx.matrices)
        return dx, d_d_logits, None, None, *[None] * len(ctx.matrices)

    def jvp_gain_grad(self, primals: Sequence, tangents: Sequence) -> Tensor:
        x, d_logits, context, contexts, *matrices = primals
        dx, d_d_logits, _ = tangents
        terms = []
        if dx is not None:  # for gain_grad is the sum of r * (decoder.T d_logits) over the rows of a context
            *decoder, classes, factor = matrices[_DECODER:]
            d_r = self.hidden_tangent(x, dx, matrices)
            dense = *decoder, classes, matrices[_HIDDEN], True, factor
            terms.append(self.dense.gain_grad(d_logits, None, None, d_r, context, contexts, False, *dense)[1])
        if d_d_logits is not None:
            terms.append(self.gain_grad(x, d_d_logits, context, contexts, *matrices))
        return total(terms, self.fake_gain_grad(*primals))

    def vmap_gain_grad(self, info, in_dims, x, d_logits, context, contexts, *matrices):
        batch = info.batch_size
        x, d_logits = batch_first(x, in_dims[0], batch), batch_first(d_logits, in_dims[1], batch)
        per_item = None if context is None else batch_first(context, in_dims[2], batch)
        grads = [
            self.gain_grad(x[b], d_logits[b], None if per_item is None else per_item[b], contexts, *matrices)
            for b in range(batch)
        ]
        return torch.stack(grads), 0


OPERATORS = {backend: _Operators(backend) for backend in selection.backends_with("flynet_logits")}
