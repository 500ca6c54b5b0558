"""Which backend serves a call, and why the others do not.

Backends stand in order of preference; the first that does not refuse (family, dtype, device) serves.
The choice is made in Python, outside of the dispatcher, so that a caller can ask for it. The number of rows
has no part in it: the cuda backend's operator itself hands batches on to Triton's, so that a compiled
graph keeps its operator whatever the batch; ``explain`` tells of that too.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from nmkern import environment
from nmkern.backends import cpu, cuda, primitives, reference, triton
from nmkern.backends.packed import Everyday
from nmkern.matrix import RandomMatrix
from nmkern.stream import DENSE_FAMILIES

BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "reference": reference,
}

_forced: str | None = None
_choices: dict[tuple[str, torch.dtype, str], str] = {}


class _Ways(dict[torch.dtype, Everyday | None]):
    """The ways of a device by dtype; what has not been chosen yet is chosen when it is looked up.

    So the first call goes the way of all later ones: a checkpoint compares what both save.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __missing__(self, dtype: torch.dtype) -> Everyday | None:
        try:
            select("uniform", dtype, self.device)  # dense families have one backend
        except RuntimeError:  # of a call that is checked, in its place
            return None
        return self.setdefault(dtype, None)


# _choices for a quick look: how everyday eager calls of dense products (see nmkern.ops.eager) are made, by
# device and dtype; None where the backend that was chosen has no way of its own for them.
everyday = {device: _Ways(device) for device in ("cpu", "cuda")}


@dataclass(frozen=True)
class Explanation:
    """The answer of ``explain``: the backend that serves, its kernel, and the refusals by backend."""

    backend: str
    kernel: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.kernel} serves this call"]
        lines += [f"{name} does not: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def backends_with(primitive: str) -> list[str]:
    """The backends that have an operator for a primitive."""
    return [name for name in BACKENDS if name in primitives.DEFINED[primitive]]


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def forced_backend() -> str | None:
    """The backend that ``use_backend`` or NMKERN_BACKEND forces; None where the choice is free."""
    if _forced is not None:
        return _forced
    variable = environment.read("NMKERN_BACKEND")
    return None if variable is None else _check_name(variable, "NMKERN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for all calls of this process while the context is open."""
    global _forced
    previous, _forced = _forced, _check_name(name, "backend")
    _forget()
    try:
        yield
    finally:
        _forced = previous
        _forget()


def _forget() -> None:
    _choices.clear()
    for dtypes in everyday.values():
        dtypes.clear()


def _refusals(family: str, dtype: torch.dtype, device: str) -> tuple[str | None, dict[str, str]]:
    forced = forced_backend()
    refused: dict[str, str] = {}
    chosen = None
    for name, backend in BACKENDS.items():
        if forced is not None and name != forced:
            refused[name] = f"{forced} is forced"
        elif chosen is not None:
            refused[name] = f"{chosen} comes first"
        elif reason := backend.refusal(family, dtype, device):
            refused[name] = reason
        else:
            chosen = name
    return chosen, refused


def explain(
    matrix: RandomMatrix,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batch: int | None = None,
) -> Explanation:
    """Which kernel multiplies ``dtype`` inputs on ``device`` by ``matrix``, and why no other does.

    ``batch`` is the number of rows that are multiplied; without, the answer is for all of them. RuntimeError
    where no backend can.
    """
    where = torch.device(device)
    chosen, refused = _refusals(matrix.family, dtype, where.type)
    if chosen is None:
        raise _no_backend(refused)
    if chosen != "cuda":
        return Explanation(chosen, BACKENDS[chosen].kernel(), refused)
    if matrix.family not in DENSE_FAMILIES:
        reason = cuda.hands_on_sparse(matrix, batch, where.index)
        kernel = "cuda"
    else:
        reason = None if batch is None else cuda.hands_on(batch, where.index)
        kernel = cuda.kernel(batch, where.index)
    if reason is None:
        return Explanation(chosen, kernel, refused)
    refused["cuda"] = reason
    others = {name: refused[name] for name in BACKENDS if name != "triton"}
    return Explanation("triton", triton.kernel(), others)


def _no_backend(refused: dict[str, str]) -> RuntimeError:
    return RuntimeError(
        "no backend can serve this call: "
        + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    )


def select(family: str, dtype: torch.dtype, device: str) -> str:
    """The name of the backend for a call; RuntimeError where none can serve it.

    ``family`` is the matrix's, or "flynet" for the primitives of the whole network.

    torch.compile runs it while tracing and keeps the answer: a graph keeps its backend.
    """
    key = (family, dtype, device)
    known = _choices.get(key)
    if known is None:
        known, refused = _refusals(family, dtype, device)
        if known is None:
            raise _no_backend(refused)
        _choices[key] = known
        # Triton's interpreter is nothing for every day.
        if family in DENSE_FAMILIES and (known == device or (known, device) == ("triton", "cuda")):
            everyday[device][dtype] = BACKENDS[known].everyday()
    return known


# What torch.compiler.assume_constant_result sets; calling it here would import the whole compiler.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]
