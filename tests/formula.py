"""What the operators compute, in plain float64 PyTorch, with a bound on the rounding of an honest kernel.

    y[m, n] = out_gain[c(m), n] * strength[c(m)] * sum_k x[m, k] * in_gain[c(m), k] * W[n, k] + bias[c(m), n]

The formula is written here a second time, from stored weights, and differentiated by autograd: nothing
but ``RandomMatrix.materialize`` is shared with the package.

The bound. Let u be the unit roundoff of the sums (2^-24 for float32). A value that comes of at most r
roundings along every path from an input, by products and sums in any order, differs from the exact value
by at most r u / (1 - r u) times the *magnitude*: the same formula with the absolute value of every input
and weight, for it is a polynomial with positive coefficients (Higham, Accuracy and Stability of Numerical
Algorithms, section 3). The same holds for each gradient, whose magnitude is the gradient of the magnitude.
``roundings`` counts them; a float32 input split in three bfloat16 parts makes sums of K terms 3 K long.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmkern import RandomMatrix, stream

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Half of the smallest subnormal: what rounding to it can lose where relative bounds end.
SUBNORMAL = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}

Arguments = dict[str, Any]


def _per_row(bank: Tensor | None, context: Tensor | int | None, lead: torch.Size, vector: int):
    """The rows of a bank that serve the rows of x; ``vector`` is the ndim of a single one."""
    if bank is None or bank.ndim == vector or context is None:
        return bank
    return bank[context] if isinstance(context, int) else bank[context.long().expand(lead)]


def modulated(
    x: Tensor, weights: Tensor, *, in_gain=None, out_gain=None, bias=None, context=None, strength=None
) -> Tensor:
    """The formula at the top, in the dtype of its arguments; ``weights`` is ``[N, K]``."""
    lead = x.shape[:-1]
    in_gain = _per_row(in_gain, context, lead, 1)
    out_gain = _per_row(out_gain, context, lead, 1)
    bias = _per_row(bias, context, lead, 1)
    y = (x if in_gain is None else x * in_gain) @ weights.T
    if isinstance(strength, Tensor):
        y = y * _per_row(strength, context, lead, 0)[..., None]
    elif strength is not None:
        y = y * strength
    if out_gain is not None:
        y = y * out_gain
    return (y if bias is None else y + bias).reshape(*lead, weights.shape[0])


@functools.lru_cache(maxsize=16)
def stored_weights(matrix) -> Tensor:
    """The weights in float64, exactly. Not to be written to: they are kept for the next call."""
    return matrix.materialize(torch.float64)


def _map(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with every floating-point tensor changed, and numbers likewise."""
    mapped = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            mapped[name] = change(value.detach())
        elif isinstance(value, float):
            mapped[name] = change(torch.tensor(value, dtype=torch.float64)).item()
        else:
            mapped[name] = value
    return mapped


class Expected:
    """The exact result of ``modulated`` on given arguments, its gradients, and the bounds of both."""

    def __init__(self, x: Tensor, matrix, arguments: Arguments, dy: Tensor | None = None) -> None:
        self.dtype = x.dtype
        self.unit = UNIT[torch.float64 if x.dtype == torch.float64 else torch.float32]
        self.roundings = 3 * sum(matrix.shape) + x.shape[:-1].numel() + 16
        weights = stored_weights(matrix)
        named = {"x": x, **arguments}
        self.y, self.grads = self._run(_map(named, torch.Tensor.double), weights, dy)
        magnitudes = _map(named, lambda value: value.double().abs())
        self.magnitude, self.grad_magnitudes = self._run(
            magnitudes, weights.abs(), None if dy is None else dy.abs()
        )

    @staticmethod
    def _run(named: Arguments, weights: Tensor, dy: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {
            name: value.requires_grad_()
            for name, value in named.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        y = modulated(named.pop("x"), weights, **named)
        if dy is None:
            return y.detach(), {}
        grads = torch.autograd.grad(y, list(leaves.values()), dy.double())
        return y.detach(), dict(zip(leaves, grads, strict=True))

    def check(self, y: Tensor, rounded: float = 0.0) -> None:
        """One rounding to the dtype of the result beyond the sums'; ``rounded``: one of x * in_gain too."""
        assert y.dtype == self.dtype
        last = self.y.abs() * UNIT[y.dtype] + self.magnitude * rounded
        self._compare("y", y, self.y, self.magnitude, last)

    def check_grads(self, grads: dict[str, Tensor], rounded: float = 0.0) -> None:
        """As ``check``, of dy * out_gain too."""
        assert grads.keys() == self.grads.keys()
        for name, grad in grads.items():
            exact, magnitude = self.grads[name], self.grad_magnitudes[name]
            # The gradient of a narrow bank is a sum over rows of narrow numbers, rounded again.
            narrow = exact.abs() if name == "x" else 2 * magnitude
            self._compare(name, grad, exact, magnitude, narrow * UNIT[grad.dtype] + magnitude * rounded)

    def _compare(self, name: str, actual: Tensor, exact: Tensor, magnitude: Tensor, last: Tensor) -> None:
        assert actual.shape == exact.shape, (name, actual.shape, exact.shape)
        error = (actual.detach().double() - exact).abs()
        ru = self.roundings * self.unit
        bound = ru / (1 - ru) * magnitude + last + SUBNORMAL[actual.dtype]
        worst = (error - bound).flatten()
        assert not (~(error <= bound)).any(), (
            f"{name}: an error of {error.flatten()[worst.argmax()]:.3g} where "
            f"{bound.flatten()[worst.argmax()]:.3g} is the bound"
        )


def integers(shape, limit: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random integers from -limit to limit, as floating-point numbers."""
    return torch.randint(-limit, limit + 1, shape, generator=generator).to(dtype)


def normals(shape, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poisoned(value: Tensor, margin: int = 67) -> Tensor:
    """The same values as a contiguous tensor between NaNs: a kernel that reads beyond it shows."""
    buffer = torch.full((value.numel() + 2 * margin,), float("nan"), dtype=value.dtype)
    inside = buffer[margin : margin + value.numel()].view(value.shape)
    return inside.copy_(value)


def signs(shape, generator: torch.Generator) -> Tensor:
    """Random +1 and -1."""
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def exact_matrix(family: str, rows: int, cols: int, exponent: int = 0, seed: int = 5) -> RandomMatrix:
    """A matrix whose factor is a power of two: products with integers are then exact."""
    scale = stream.DENSE_FAMILIES[family].rms * 2.0**exponent
    matrix = RandomMatrix(rows, cols, seed=seed, family=family, scale=scale)
    assert matrix.factor == 2.0**exponent
    return matrix


KINDS = (
    *("plain", "in", "out", "strength", "vectors", "banks", "one of banks"),
    *("rows", "broadcast rows", "mixed"),
)
T = 3  # contexts of a bank


def arguments(kind: str, lead: tuple[int, ...], matrix: RandomMatrix, make, g) -> Arguments:
    """Every kind of gains, bias, strength and context that the operator takes; ``make(shape)`` fills."""
    k, n = matrix.cols, matrix.rows
    context = torch.randint(T, lead, generator=g)
    builders = {
        "plain": lambda: {},
        "in": lambda: {"in_gain": make((k,))},
        "out": lambda: {"out_gain": make((n,)), "bias": make((n,))},
        "strength": lambda: {"strength": make(())},
        "vectors": lambda: {
            "in_gain": make((k,)),
            "out_gain": make((n,)),
            "bias": make((n,)),
            "strength": make(()),
        },
        "banks": lambda: {
            "in_gain": make((T, k)),
            "out_gain": make((T, n)),
            "bias": make((T, n)),
            "strength": make((T,)),
            "context": context,
        },
        "one of banks": lambda: {
            "in_gain": make((T, k)),
            "bias": make((T, n)),
            "strength": make((T,)),
            "context": 1,
        },
        "rows": lambda: {
            "in_gain": make((*lead, k)),
            "out_gain": make((*lead, n)),
            "bias": make((*lead, n)),
            "strength": make(tuple(lead)),
        },
        "broadcast rows": lambda: {
            "in_gain": make((*lead[1:], k)),
            "out_gain": make((*lead[:1], *(1 for _ in lead[1:]), n)),
            "bias": make((*(1 for _ in lead), n)),
        },
        "mixed": lambda: {
            "in_gain": make((T, k)),
            "out_gain": make((n,)),
            "strength": -0.5,
            "context": context.to(torch.int32)[:1] if lead else context,
        },
    }
    return builders[kind]()
