"""The two dense primitives of each backend as differentiable operators.

    y = modulated_matmul(x, in_gain, out_gain, bias, context, matrix)
    product, gain_grad = modulated_matmul_gain_grad(x, in_gain, out_gain, other, context, ..., matrix)

What differentiation, vmap and tracing need of them is registered here; ``modulated_linear`` calls them. The
invariant: the backward pass is the same pair of primitives on ``W.T``, so every derivative of every
order is exact and regenerates W.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nmkern.backends import primitives, selection
from nmkern.backends.primitives import bank_rows, segment_sum
from nmkern.ops.rules import batch_first, differentiable, fold_batch

_TRANSPOSED = -2  # position of ``transposed`` in the matrix arguments of a dense primitive


def _transpose(matrix: tuple) -> tuple:
    return (*matrix[:_TRANSPOSED], not matrix[_TRANSPOSED], *matrix[_TRANSPOSED + 1 :])


def _features(matrix: tuple) -> int:
    """N of the primitives, from the matrix arguments."""
    rows, cols, transposed = matrix[4:7]
    return cols if transposed else rows


def total(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of tangents; zeros ``like`` the result where there is none."""
    return functools.reduce(torch.add, terms) if terms else torch.zeros_like(like)


class DenseOperators:
    """The two dense primitives of one backend with their rules: call ``matmul`` and ``gain_grad``."""

    def __init__(self, backend: str) -> None:
        self.matmul = differentiable(
            primitives.overload(backend, "modulated_matmul"),
            tensors=5,
            fake=self.fake_matmul,
            setup_context=self.setup_matmul,
            backward=self.backward_matmul,
            jvp=self.jvp_matmul,
            vmap=self.vmap_matmul,
        )
        self.gain_grad = differentiable(
            primitives.overload(backend, "modulated_matmul_gain_grad"),
            tensors=5,
            fake=self.fake_gain_grad,
            setup_context=self.setup_gain_grad,
            backward=self.backward_gain_grad,
            jvp=self.jvp_gain_grad,
            vmap=self.vmap_gain_grad,
        )

    # y = modulated_matmul(x, in_gain, out_gain, bias, context, matrix)

    def fake_matmul(self, x, in_gain, out_gain, bias, context, *matrix) -> Tensor:
        return x.new_empty(x.shape[0], _features(matrix))

    def setup_matmul(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, in_gain, out_gain, bias, context, *ctx.matrix = inputs
        ctx.bias_contexts = None if bias is None else bias.shape[0]
        # x is needed for the gradients of gains only.
        keep_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if keep_x else None, in_gain, out_gain, context)

    def backward_matmul(self, ctx: Any, dy: Tensor) -> tuple:
        x, in_gain, out_gain, context = ctx.saved_tensors
        needs, matrix = ctx.needs_input_grad[:4], tuple(ctx.matrix)
        found = self.gradients(needs, dy, x, in_gain, out_gain, context, ctx.bias_contexts, matrix)
        return *found, *[None] * (1 + len(matrix))

    def gradients(self, needs, dy, x, in_gain, out_gain, context, bias_contexts, matrix) -> tuple:
        """To x, in_gain, out_gain and bias: None for each that does not need one."""
        need_x, need_in, need_out, need_bias = needs
        dx = d_in = d_out = d_bias = None
        transposed = _transpose(matrix)
        if need_in:
            dx, d_in = self.gain_grad(
                dy, out_gain, in_gain, x, context, in_gain.shape[0], need_x, *transposed
            )
            dx = dx if need_x else None
        elif need_x:
            dx = self.matmul(dy, out_gain, in_gain, None, context, *transposed)
        if need_out:
            _, d_out = self.gain_grad(x, in_gain, None, dy, context, out_gain.shape[0], False, *matrix)
        if need_bias:
            wide = primitives.sum_dtype(dy.dtype)
            d_bias = segment_sum(dy, context, bias_contexts, wide)
        return dx, d_in, d_out, d_bias

    def jvp_matmul(self, primals: Sequence, tangents: Sequence) -> Tensor:
        x, in_gain, out_gain, _, context, *matrix = primals
        dx, d_in, d_out, d_bias, _ = tangents
        terms = []
        if dx is not None:
            terms.append(self.matmul(dx, in_gain, out_gain, None, context, *matrix))
        if d_in is not None:
            terms.append(self.matmul(x, d_in, out_gain, None, context, *matrix))
        if d_out is not None:
            terms.append(self.matmul(x, in_gain, d_out, None, context, *matrix))
        if d_bias is not None:
            terms.append(bank_rows(d_bias, context).to(x.dtype).expand(len(x), -1))
        return total(terms, self.fake_matmul(*primals))

    def vmap_matmul(self, info, in_dims, x, in_gain, out_gain, bias, context, *matrix):
        banks = (in_gain, out_gain, bias)
        x, context, banks = fold_batch(
            info.batch_size, x, in_dims[0], banks, in_dims[1:4], context, in_dims[4]
        )
        y = self.matmul(x, *banks, context, *matrix)
        return y.unflatten(0, (info.batch_size, -1)), 0

    # product, gain_grad = modulated_matmul_gain_grad(x, in_gain, out_gain, other, context, ...)

    def fake_gain_grad(
        self, x, in_gain, out_gain, other, context, contexts, need_product, *matrix
    ) -> tuple[Tensor, Tensor]:
        n = _features(matrix)
        product = x.new_empty(x.shape[0] if need_product else 0, n)
        return product, x.new_empty(contexts, n, dtype=primitives.sum_dtype(x.dtype))

    def setup_gain_grad(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        x, in_gain, out_gain, other, context, ctx.contexts, ctx.need_product, *ctx.matrix = inputs
        ctx.save_for_backward(x, in_gain, out_gain, other, context)
        ctx.set_materialize_grads(True)

    def backward_gain_grad(self, ctx: Any, d_product: Tensor, d_grad: Tensor) -> tuple:
        x, in_gain, out_gain, other, context = ctx.saved_tensors
        need_x, need_in, need_out, need_other = ctx.needs_input_grad[:4]
        dx = d_in = d_out = d_other = None
        # The loss depends on z through both results: dz is its gradient.
        dz = other * bank_rows(d_grad, context)
        if ctx.need_product:
            through = d_product if out_gain is None else d_product * bank_rows(out_gain, context)
            dz = dz + through
        dz = dz.to(x.dtype)
        transposed = _transpose(tuple(ctx.matrix))
        if need_in:
            dx, d_in = self.gain_grad(dz, None, in_gain, x, context, in_gain.shape[0], need_x, *transposed)
            dx = dx if need_x else None
        elif need_x:
            dx = self.matmul(dz, None, in_gain, None, context, *transposed)
        if need_out and ctx.need_product:
            d_other, d_out = self.gain_grad(
                x, in_gain, d_grad, d_product, context, out_gain.shape[0], need_other, *ctx.matrix
            )
            d_other = d_other if need_other else None
        elif need_other:
            d_other = self.matmul(x, in_gain, d_grad, None, context, *ctx.matrix)
        return dx, d_in, d_out, d_other, *[None] * (3 + len(ctx.matrix))

    def jvp_gain_grad(self, primals: Sequence, tangents: Sequence) -> tuple[Tensor, Tensor]:
        x, in_gain, out_gain, other, context, contexts, need_product, *matrix = primals
        dx, d_in, d_out, d_other, _ = tangents
        last = context, contexts, need_product, *matrix
        pairs = []
        if dx is not None:
            pairs.append(self.gain_grad(dx, in_gain, out_gain, other, *last))
        if d_in is not None:
            pairs.append(self.gain_grad(x, d_in, out_gain, other, *last))
        products, grads = ([pair[i] for pair in pairs] for i in (0, 1))
        if d_out is not None and need_product:
            products.append(self.matmul(x, in_gain, d_out, None, context, *matrix))
        if d_other is not None:
            _, grad = self.gain_grad(x, in_gain, None, d_other, context, contexts, False, *matrix)
            grads.append(grad)
        product, grad = self.fake_gain_grad(*primals)
        return total(products, product), total(grads, grad)

    def vmap_gain_grad(
        self, info, in_dims, x, in_gain, out_gain, other, context, contexts, need_product, *matrix
    ):
        batch = info.batch_size
        other = batch_first(other, in_dims[3], batch)
        per_item = None if context is None else batch_first(context, in_dims[4], batch)
        x, folded, (in_gain, out_gain) = fold_batch(
            batch, x, in_dims[0], (in_gain, out_gain), in_dims[1:3], context, in_dims[4]
        )
        z = self.matmul(x, in_gain, None, None, folded, *matrix)
        weighted = other * z.unflatten(0, (batch, -1))
        wide = primitives.sum_dtype(x.dtype)
        grads = torch.stack(
            [
                segment_sum(weighted[b], None if per_item is None else per_item[b], contexts, wide)
                for b in range(batch)
            ]
        )
        if not need_product:
            return (z.new_empty(batch, 0, z.shape[1]), grads), (0, 0)
        if out_gain is not None:
            z = (z * bank_rows(out_gain, folded)).to(x.dtype)
        return (z.unflatten(0, (batch, -1)), grads), (0, 0)


OPERATORS = {backend: DenseOperators(backend) for backend in selection.backends_with("modulated_matmul")}
