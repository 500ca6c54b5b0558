"""The triton backend: kernels for CUDA tensors, compiled by Triton at their first call.

Neither Triton nor a kernel is imported before that. On CPU tensors the kernels run under Triton's
interpreter, where TRITON_INTERPRET=1 asks for it: slow, and there to test them without a GPU.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from nmkern import environment
from nmkern.backends import primitives
from nmkern.backends.packed import Everyday

primitives.define("triton")

# Which module launches the kernels of a primitive.
_LAUNCHERS = {
    "modulated_matmul": "launch",
    "modulated_matmul_gain_grad": "launch",
    "sparse_matmul": "sparse",
    "flynet_logits": "flynet",
    "flynet_gain_grad": "flynet",
}


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return (environment.read("TRITON_INTERPRET") or "0").lower() in ("1", "true", "yes", "on", "y")


def refusal(family: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a call cannot run here; None where it can."""
    if device == "cpu" and not _interpreted():
        return "runs on CUDA tensors; on the CPU only under TRITON_INTERPRET=1"
    if device not in ("cpu", "cuda"):
        return f"runs on CUDA tensors, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {dtype}".replace("torch.", "")
    if not _installed():
        return "triton is not installed"
    return None


def kernel() -> str:
    return "triton (interpreted)" if _interpreted() else "triton"


def everyday() -> Everyday:
    """How everyday eager calls are made."""
    return importlib.import_module("nmkern.backends.triton.eager").EVERYDAY


def launcher(primitive: str) -> Callable[..., Any]:
    """What launches the kernels of a primitive; it is imported when first called."""
    module = f"nmkern.backends.triton.{_LAUNCHERS[primitive]}"

    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), primitive)

    def call(*args):
        return function()(*args)

    return call


for _primitive in _LAUNCHERS:
    for _key in ("CUDA", "CPU"):
        primitives.LIBRARY.impl(f"triton_{_primitive}", launcher(_primitive), _key)
