"""What a rival is, and its gate.

A rival computes y = x W^T for the x of a case. One that can be given weights gets ours, and its outputs
are compared with ours, all of them. One that makes or rounds its own is checked against its own: columns
of its matrix are read off by unit vectors, and products must be sums of those columns and be linear.
The invariant: no rival is timed that has not passed one of the two.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmkern.bench.clocks import Call
from nmkern.matrix import RandomMatrix

PROBED = 3  # columns of a rival's own matrix that are read off


class RefusedError(Exception):
    """A rival does not do this case; the text says why."""


def check(found: Tensor, reference: Tensor, bound: float) -> float:
    """The relative Frobenius error; AssertionError where it exceeds ``bound``."""
    reference = reference.double()
    error = float((found.double() - reference).norm() / reference.norm())
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.2e}: not timed"
    return error


def in_turn(values: Iterable[Any]) -> Iterator[Any]:
    return itertools.cycle(values)


@dataclass(frozen=True)
class Operands:
    """What a case hands to a rival.

    ``matrix`` is ``[N, K]``; ``inputs`` are equal copies of x ``[M, K]``, to be taken in turn; ``stored``
    makes the copies of W ``[N, K]`` on the device; ``ours`` is our output, already checked; ``bound`` is
    the relative error that one rounded output may have.
    """

    matrix: RandomMatrix
    inputs: list[Tensor]
    stored: Callable[[], list[Tensor]]
    ours: Tensor
    bound: float

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def device(self) -> str:
        return self.x.device.type

    def require(self, **wanted: Any) -> None:
        """RefusedError where x's dtype or device, or a size, is not among the ``wanted`` ones."""
        have = {"dtype": self.x.dtype, "device": self.device, "family": self.matrix.family}
        for name, values in wanted.items():
            if have[name] not in values:
                told = " or ".join(str(value).removeprefix("torch.") for value in values)
                raise RefusedError(f"needs {name} {told}")


Function = Callable[[Any], Tensor]  # from one of its inputs to y [M, N], a tensor on the device of x


@dataclass(frozen=True)
class Product:
    """A rival that is ready: ``function`` of each of ``inputs``, which are copies of x in its own form."""

    function: Function
    inputs: list[Any]
    convert: Callable[[Tensor], Any] = lambda x: x  # x in the form of ``inputs``
    kind: Callable[[Call], Call] = lambda call: call  # Eager, or Apart, where it is one for the clocks

    def call(self) -> Call:
        inputs = in_turn(self.inputs)
        return self.kind(lambda: self.function(next(inputs)))


@dataclass(frozen=True)
class Rival:
    """``own_weights``: it cannot multiply by our matrix, but by one that it makes or rounds itself."""

    name: str
    what: str
    families: tuple[str, ...]
    build: Callable[[Operands], Product]
    missing: Callable[[str], str | None] = lambda device: None
    own_weights: bool = False


def needs(*modules: str, package: str, device: str | None = None) -> Callable[[str], str | None]:
    """``missing`` for a rival that needs ``modules``, from ``package``, on a device."""

    def missing(have: str) -> str | None:
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if absent:
            return f"{package} is not installed"
        return None if device is None or have == device else f"needs a tensor on {device}, not on {have}"

    return missing


def gate(rival: Rival, product: Product, operands: Operands) -> None:
    """AssertionError where the rival's product is wrong."""
    y = product.function(product.inputs[0])
    if rival.own_weights:
        _probe(product, operands, y)
    else:
        check(y, operands.ours, 4 * operands.bound)  # both are rounded


def _probe(product: Product, operands: Operands, y: Tensor) -> None:
    """Check a product against the rival's own matrix, of which only products are known."""
    x, (n, k) = operands.x, operands.matrix.shape

    def function(given: Tensor) -> Tensor:
        return product.function(product.convert(given)).double()

    columns = sorted({round(i * (k - 1) / max(1, PROBED - 1)) for i in range(min(PROBED, k))})
    own = []
    for column in columns:
        unit = torch.zeros_like(x)
        unit[:, column] = 1
        found = function(unit)
        assert found.shape == (len(x), n), f"shape {tuple(found.shape)}, expected {(len(x), n)}: not timed"
        own.append(found[0])
        assert bool(own[-1].any()), f"column {column} of its matrix is zero: not timed"
    some = torch.zeros_like(x)
    some[:, columns] = x[:, columns]
    # Each column was rounded once, and so was the product.
    check(function(some), x[:, columns].double() @ torch.stack(own), 8 * operands.bound)
    check(function(x - some), y.double() - function(some), 16 * operands.bound)
