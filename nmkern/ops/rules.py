"""What makes a backend's primitive an operator that PyTorch can differentiate, batch and trace.

One set of rules serves three ways in, because none serves all callers well:

- registered with the dispatcher, for torch.compile, export and direct calls (47 us a call in eager
  mode, and torch.func.grad refuses it);
- a ``torch.autograd.Function`` with ``setup_context``, for torch.func (30 us);
- one without, for everyday eager mode (9 us); where nothing needs a gradient, no Function at all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(
    op: torch._ops.OpOverload,
    *,
    fake: Callable,
    setup_context: Callable,
    backward: Callable,
    vmap: Callable,
) -> Callable[..., Any]:
    """Register the rules of ``op``; the result calls it by the way that the moment needs."""
    torch.library.register_fake(op, fake)
    torch.library.register_vmap(op, vmap)
    torch.library.register_autograd(op, backward, setup_context=setup_context)

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def eager_forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(*args)
        setup_context(ctx, args, output)
        return output

    name = op.name().replace("::", "_").replace(".", "_")
    eager: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(eager_forward), "backward": staticmethod(backward)},
    )
    functional: Any = type(
        f"{name}_functional",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "vmap": staticmethod(vmap),
        },
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        needs_grad = torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        )
        if torch._C._functorch.maybe_current_level() is not None:
            return functional.apply(*args) if needs_grad else op(*args)
        return eager.apply(*args) if needs_grad else below_autograd(*args)

    return call
