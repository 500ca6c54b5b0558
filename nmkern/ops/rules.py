"""What makes a backend's primitive an operator that PyTorch can differentiate, batch and trace.

The same rules serve twice: registered with the dispatcher (torch.compile, export, direct calls), and
as a ``torch.autograd.Function``, which eager mode and torch.func go through: torch.func.grad refuses
operators whose autograd is registered, and a Function costs 9 us a call where they cost 47 us.
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
    members = {
        "forward": staticmethod(lambda *args: op(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "vmap": staticmethod(vmap),
    }
    function: Any = type(op.name().replace("::", "_"), (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        ):
            return function.apply(*args)
        return op(*args)

    return call
