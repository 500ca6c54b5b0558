"""Argument checks of the operators: once, in Python, before a pointer leaves it."""

import math

import torch
from torch import Tensor

from nmkern.backends import primitives
from nmkern.matrix import RandomMatrix, as_float, float32

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TRACING = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


def _name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def check_matrix(name: str, matrix: RandomMatrix, *, dense: bool) -> None:
    """A RandomMatrix of a dense family, or of the sparse one."""
    if not isinstance(matrix, RandomMatrix):
        raise TypeError(f"{name}: expected a RandomMatrix, got {type(matrix).__name__}")
    if dense == (matrix.family == "sparse"):
        want, use = ("dense", "sparse_project") if dense else ("sparse", "modulated_linear")
        raise ValueError(
            f"{name}: expected a {want} family, got {matrix.family!r}, which {use} multiplies by"
        )


def check_input(x: Tensor, matrix: RandomMatrix) -> None:
    """A strided floating-point tensor with as many features as the matrix has columns."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a strided tensor, got layout {_name(x.layout)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected {', '.join(map(_name, _DTYPES))}, got {_name(x.dtype)}")
    if x.ndim == 0 or x.shape[-1] != matrix.cols:
        raise ValueError(
            f"x: expected shape [..., {matrix.cols}] for a matrix of shape "
            f"{list(matrix.shape)}, got {list(x.shape)}"
        )


def autocast(x: Tensor) -> tuple[Tensor, bool]:
    """x as an enabled torch.autocast wants it for a linear layer, and whether one is enabled."""
    if not torch._C._is_any_autocast_enabled():
        return x, False
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, False
    return (x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))), True


def check_context(context: Tensor | int | None, x: Tensor) -> Tensor | int | None:
    """The context as an int, or as an int64 tensor with the leading shape of x."""
    if context is None or (isinstance(context, int) and not isinstance(context, bool)):
        return context
    if not isinstance(context, Tensor):
        raise TypeError(f"context: expected an int or an integer tensor, got {context!r}")
    if context.dtype.is_floating_point or context.dtype.is_complex or context.dtype == torch.bool:
        raise TypeError(f"context: expected an integer dtype, got {_name(context.dtype)}")
    if context.device != x.device:
        raise RuntimeError(f"context: expected device {x.device}, that of x, got {context.device}")
    lead = x.shape[:-1]
    if not _broadcasts(context.shape, lead):
        raise ValueError(
            f"context: expected shape {list(lead)}, the leading shape of x, got {list(context.shape)}"
        )
    return context.to(torch.int64).expand(lead)


def select_row(name: str, bank: Tensor | None, index: int) -> Tensor | None:
    """Row ``index`` of a bank ``[T, ...]``; a vector serves every context."""
    if bank is None or not isinstance(bank, Tensor) or (bank.ndim < 2 and name != "strength"):
        return bank
    if not 0 <= index < bank.shape[0]:
        raise ValueError(
            f"context: expected 0 <= context < {bank.shape[0]}, the contexts of {name}, got {index}"
        )
    return bank[index]


def normalize_bank(
    name: str,
    bank: Tensor | None,
    features: int,
    x: Tensor,
    context: Tensor | None,
    cast: bool,
) -> Tensor | None:
    """A gain, bias or strength as the primitives take it: ``[T, features]`` in the dtype of sums.

    ``cast`` says that autocast chose the dtype of x: banks may then come in any.
    """
    if bank is None:
        return None
    if not isinstance(bank, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(bank).__name__}")
    wide = primitives.sum_dtype(x.dtype)
    if bank.dtype not in (_DTYPES if cast else (x.dtype, wide)):
        want = _name(x.dtype) if x.dtype == wide else f"{_name(x.dtype)} or {_name(wide)}"
        raise TypeError(f"{name}: expected {want} for x of {_name(x.dtype)}, got {_name(bank.dtype)}")
    if bank.device != x.device:
        raise RuntimeError(f"{name}: expected device {x.device}, that of x, got {bank.device}")
    # What only messages need is worked out there: a small call's time is in these lines.
    if bank.ndim == 0 or bank.shape[-1] != features:
        raise ValueError(f"{name}: expected [..., {features}], got shape {_shape(name, bank)}")
    if bank.ndim == 1:
        bank = bank.unsqueeze(0)
    elif context is not None:
        if bank.ndim != 2 or bank.shape[0] == 0:
            raise ValueError(
                f"{name}: expected a vector or a bank [contexts, {features}] beside context, "
                f"got shape {_shape(name, bank)}"
            )
        _check_range(name, bank.shape[0], context)
    elif all(size == 1 for size in bank.shape[:-1]):
        bank = bank.reshape(1, features)
    elif _broadcasts(bank.shape[:-1], x.shape[:-1]):
        bank = bank.expand(*x.shape[:-1], features).reshape(-1, features)
    else:
        raise ValueError(
            f"{name}: expected a vector, or one per row that broadcasts to {list(x.shape[:-1])} rows, "
            f"got shape {_shape(name, bank)}; a bank of contexts needs context="
        )
    return bank if bank.dtype == wide else bank.to(wide)


def _shape(name: str, bank: Tensor) -> list[int]:
    """The shape that a caller gave: a strength gets a last dimension of its own on the way."""
    return list(bank.shape[:-1] if name == "strength" else bank.shape)


def scaled_factor(matrix: RandomMatrix, strength: float) -> float:
    """The matrix's factor times a number, rounded to float32 as the factor itself is."""
    if not isinstance(strength, (int, float)) or isinstance(strength, bool):
        raise TypeError(f"strength: expected a number or a tensor, got {strength!r}")
    if torch.compiler.is_compiling():
        # A number that varies has no place to be rounded in a graph: every value gets a graph of its own.
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        strength = guard_scalar(strength)
    factor = float32(matrix.factor * as_float(strength))
    if not math.isfinite(factor):
        raise ValueError(f"strength: expected a finite number, got {strength}")
    return factor


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(size in (1, want) for size, want in zip(shape, tail, strict=True))


def _check_range(name: str, contexts: int, context: Tensor) -> None:
    # Reading values needs data at hand: not while tracing, not for a batched tensor of vmap, and a
    # device would have to be waited for (kernels check there).
    if (
        torch.compiler.is_compiling()
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACING)
        or context.device.type != "cpu"
        or torch._C._functorch.is_functorch_wrapped_tensor(context)
        or context.numel() == 0
    ):
        return
    low, high = (int(v) for v in context.aminmax())
    if low < 0 or high >= contexts:
        raise ValueError(
            f"context: expected 0 <= context < {contexts}, the contexts of {name}, "
            f"got values from {low} to {high}"
        )
