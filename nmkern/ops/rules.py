"""What makes a backend's primitive an operator that PyTorch can differentiate, batch and trace.

One set of rules serves three ways in, because none serves all callers well:

- registered with the dispatcher, for torch.compile, export, torch.jit.trace and direct calls (34 us a call
  in eager mode);
- a ``torch.autograd.Function`` with ``setup_context``, for torch.func and forward mode (30 us);
- one without, for everyday eager mode (9 us); where nothing needs a gradient, no Function at all.

Small calls of modulated_linear on the CPU go by a way of their own: nmkern.ops.eager.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from nmkern.backends import primitives

_dispatched = threading.local()


@contextlib.contextmanager
def _within_dispatch() -> Iterator[None]:
    """While a rule runs half way through a transform, where the dispatcher has called it and no Function can
    be applied: what it calls goes through the dispatcher as well.
    """
    before, _dispatched.now = getattr(_dispatched, "now", False), True
    try:
        yield
    finally:
        _dispatched.now = before


def _may_have_tangents() -> bool:
    # A compiled program enters levels of torch.func, and none of forward_ad that Python knows of.
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for calls outside of torch.func, of a Function without ``setup_context``.

    What torch's Python adds for the others is 2.7 of 9.6 microseconds; where a torch has no such method
    below it, that is what is called.
    """
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def differentiable(
    op: torch._ops.OpOverload,
    *,
    tensors: int,
    fake: Callable,
    setup_context: Callable,
    backward: Callable,
    jvp: Callable,
    vmap: Callable,
) -> Callable[..., Any]:
    """Register the rules of ``op``; the result calls it by the way that the moment needs.

    The first ``tensors`` arguments are tensors or None; no later one has a gradient. ``jvp`` takes the
    arguments and the tangents of those tensors (None where one has none), at least one.
    """

    def registered_vmap(info: Any, in_dims: tuple, *args: Any) -> Any:
        with _within_dispatch():
            return vmap(info, in_dims, *args)

    torch.library.register_fake(op, fake)
    torch.library.register_vmap(op, registered_vmap)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def eager_forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(*args)
        setup_context(ctx, args, output)
        return output

    def plain_backward(ctx: Any, *grads: Any) -> Any:
        return backward(ctx, *grads)  # a bound method; compiled autograd takes functions only

    def setup(ctx: Any, inputs: tuple, output: Any) -> Any:
        setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:tensors])  # for the moment until plain_jvp has run
        ctx.rest = inputs[tensors:]
        return output

    # A level's rule is itself differentiated by the levels outside, so forward mode is on; not by its own,
    # so arguments go without their tangents. Passed are zeros, too, for those that have none.
    def plain_jvp(ctx: Any, *_: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = ctx.saved_tensors
            duals = ((None, None) if v is None else forward_ad.unpack_dual(v, level=0) for v in saved)
            primals, tangents = zip(*duals, strict=True)
            return jvp((*primals, *ctx.rest), tangents)

    name = op.name().replace("::", "_").replace(".", "_")
    eager: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(eager_forward), "backward": staticmethod(plain_backward)},
    )
    eager_apply = plain_apply(eager)

    # What torch.library.register_autograd does, whose Function torch.func refuses, compiled or not. The
    # dispatcher calls the kernel once for each level of torch.func: a Function is of that level alone, and
    # outer levels record what it calls, for which gradients are on.
    def registered_forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            output = redispatch(keyset, inputs)
        return setup(ctx, tuple(inputs), output)

    def redispatch(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def registered_jvp(ctx: Any, *tangents: Any) -> Any:
        with _within_dispatch():
            return plain_jvp(ctx, *tangents)

    registered: Any = type(
        f"{name}_registered",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(registered_forward),
            "backward": staticmethod(lambda ctx, *grads: (*backward(ctx, *grads), None)),
            "jvp": staticmethod(registered_jvp),
        },
    )
    registered_apply = plain_apply(registered)

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        needs_grad = torch.is_grad_enabled() and any(
            arg is not None and arg.requires_grad for arg in args[:tensors]
        )
        if needs_grad or (_may_have_tangents() and forward_ad._is_fwd_grad_enabled()):
            with enable_single_level_autograd_function():
                return registered_apply(*args, keyset)
        return redispatch(keyset, args)

    primitives.LIBRARY.impl(op.name().partition("::")[2], autograd_kernel, "Autograd", with_keyset=True)

    functional: Any = type(
        f"{name}_functional",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(plain_backward),
            "jvp": staticmethod(plain_jvp),
            "vmap": staticmethod(vmap),
        },
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return op(*args)
        if getattr(_dispatched, "now", False):
            return op(*args)
        if _may_have_tangents():
            return functional.apply(*args)
        if torch.is_grad_enabled():
            for arg in args[:tensors]:  # all of them, in any(), cost 4 of 11 microseconds
                if arg is not None and arg.requires_grad:
                    return eager_apply(*args)
        return below_autograd(*args)

    return call


def batch_first(value: Tensor, dim: int | None, batch: int) -> Tensor:
    """A vmapped argument with its mapped dimension in front, expanded where it is not mapped."""
    if dim is None:
        return value.expand(batch, *value.shape)
    return value.movedim(dim, 0)


def fold_batch(batch, x, x_dim, banks, bank_dims, context, context_dim):
    """Fold the vmapped dimension into the rows of x: (x, context, banks) of the same primitive.

    Banks stay as they are where neither they nor the context are mapped; otherwise every bank with
    more than one row, or mapped, becomes one vector per row.
    """
    x = batch_first(x, x_dim, batch)
    rows = x.shape[1]
    mapped = context_dim is not None or any(dim is not None for dim in bank_dims)
    many = any(bank is not None and bank.shape[0] > 1 for bank in banks)
    if not mapped and (context is not None or not many):
        folded = None if context is None else context.repeat(batch)
        return x.flatten(0, 1), folded, banks
    contexts = None if context is None else batch_first(context, context_dim, batch)
    per_row = []
    for bank, dim in zip(banks, bank_dims, strict=True):
        if bank is not None and (dim is not None or bank.shape[0] > 1):
            bank = batch_first(bank, dim, batch)
            if bank.shape[1] == 1:
                bank = bank.expand(-1, rows, -1)
            elif contexts is not None:
                bank = bank.gather(1, contexts[..., None].expand(-1, -1, bank.shape[2]))
            bank = bank.flatten(0, 1)
        per_row.append(bank)
    return x.flatten(0, 1), None, per_row
