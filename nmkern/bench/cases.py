"""The cases that every device has: one function each, from operands to a row of the report.

Rivals of a product are those of ``rivals`` by name; for a training step it is the same layer with stored
weights, for FlyNet the authors' formulation (dense encoder, stored decoder). On a CUDA device with CUDA's
clock a call is captured in a graph, unless the reference serves it, which looks at the host.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from nmkern import RandomMatrix, explain, modulated_linear, nn, sparse_project
from nmkern.backends import selection
from nmkern.bench import rivals
from nmkern.bench.clocks import Call, Eager, HostClock
from nmkern.bench.harness import Case, Report
from nmkern.bench.rivals import VERA, Operands, check, in_turn
from nmkern.models import FlyNet

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
_INPUTS = 4  # copies of x that calls take in turn


def generator(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def served(call: Call, backend: str) -> Call:
    """``call`` as its clock may take it: the reference is not to be captured in a graph."""
    return Eager(call) if backend == "reference" else call


def materialized(matrix: RandomMatrix, dtype: torch.dtype, device: str) -> Tensor:
    """The stored weights, generated on all cores by the definition, not by the kernels under test."""
    out = torch.empty(matrix.shape, dtype=dtype, device=device)
    rows = max(1, 2**22 // matrix.cols)

    def fill(first: int) -> None:
        some = slice(first, min(first + rows, matrix.rows))
        out[some] = matrix[some].materialize(dtype)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, matrix.rows, rows)))
    return out


class Layer:
    """A matrix, its stored forms, made when first asked for, and what some of its outputs must be.

    ``copies``: how many of each stored form, taken in turn, so that a cache cannot hold them.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        family: str,
        device: str = "cpu",
        copies: int = 1,
        fan_in: int | None = None,
    ) -> None:
        scale = 1.0 if family == "sparse" else cols**-0.5
        self.matrix = RandomMatrix(rows, cols, seed=1, family=family, scale=scale, fan_in=fan_in)
        self.device = device
        self.copies = copies
        self._wide: Tensor | None = None
        self._stored: dict[torch.dtype, list[Tensor]] = {}
        self._exact: dict[bool, list[tuple[slice, Tensor]]] = {}

    def stored(self, dtype: torch.dtype) -> list[Tensor]:
        if self._wide is None:
            self._wide = materialized(self.matrix, torch.float32, self.device)
        if dtype not in self._stored:
            wide = self._wide
            copied = (wide.to(dtype, copy=True) for _ in range(self.copies - 1))
            self._stored[dtype] = [wide.to(dtype), *copied]
        return self._stored[dtype]

    def exact(self, transposed: bool) -> list[tuple[slice, Tensor]]:
        """Outputs at both ends and in the middle, each with its rows of the weights in float64."""
        if transposed not in self._exact:
            view = self.matrix.T if transposed else self.matrix
            self._exact[transposed] = exact_slices(view, self.device)
        return self._exact[transposed]


def exact_slices(view: RandomMatrix, device: str) -> list[tuple[slice, Tensor]]:
    """Three times 24 outputs of a matrix, which start and end at odd places, and their weights."""
    n, some = view.rows, min(24, view.rows)
    middle = max(0, n // 2 - 11)
    places = [slice(0, some), slice(middle, min(n, middle + some)), slice(n - some, n)]
    return [(place, view[place].materialize(torch.float64).to(device)) for place in places]


def check_slices(y: Tensor, x: Tensor, slices: list[tuple[slice, Tensor]], bound: float) -> float:
    return max(check(y[:, place], x.double() @ weights.T, bound) for place, weights in slices)


@dataclass(frozen=True)
class Ready:
    """A checked case: ``error`` is ours, rivals that did not pass are in ``case.not_timed``."""

    case: Case
    ours: Call
    rivals: dict[str, Call]
    error: float


def prepare(
    layer: Layer,
    m: int,
    dtype: torch.dtype,
    transposed: bool,
    against: Iterable[str] | None = ("stored",),
    target: float | None = None,
    targets: Mapping[str, float] | None = None,
) -> Ready:
    """One product, with W or its transpose, and rivals by name (None: all of the family), all checked."""
    matrix = layer.matrix.T if transposed else layer.matrix
    sparse = matrix.family == "sparse"
    multiply = sparse_project if sparse else modulated_linear
    x = torch.randn(m, matrix.cols, generator=generator(layer.device), device=layer.device).to(dtype)
    y = multiply(x, matrix)
    error = check_slices(y, x, layer.exact(transposed), BOUNDS[dtype])
    operands = Operands(
        matrix,
        [x.clone() for _ in range(_INPUTS)],
        lambda: [w.T if transposed else w for w in layer.stored(dtype)],
        y,
        BOUNDS[dtype],
    )
    prepared, not_timed, own = rivals.prepare(rivals.names_of(matrix.family, against), operands)
    inputs = in_turn(operands.inputs)
    name = "projection" if sparse else "linear"
    backend = explain(matrix, dtype, layer.device, m).backend
    case = Case(
        f"{name}, transposed" if transposed else name,
        *(m, *matrix.shape[::-1], name_of(dtype), matrix.family, weights_of(matrix), target),
        {"backend": backend, "stored_bytes": matrix.stored_bytes(dtype)}
        | ({} if targets is None else {"targets": dict(targets)}),
        not_timed,
        own,
    )
    ours = served(lambda: multiply(next(inputs), matrix), backend)
    return Ready(case, ours, prepared, error)


def product(
    report: Report,
    layer: Layer,
    m: int,
    dtype: torch.dtype,
    transposed: bool,
    seconds: float,
    target: float | None = None,
    calls: int = 1,
    against: Iterable[str] | None = ("stored",),
    targets: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """``prepare`` a product and measure it; the ratios."""
    ready = prepare(layer, m, dtype, transposed, against, target, targets)
    return report.measure(ready.case, ready.ours, ready.rivals, ready.error, seconds, calls)


def weights_of(matrix: RandomMatrix) -> int:
    """How many weights a row of x meets."""
    rows, cols = matrix.stream_shape
    return rows * (cast(int, matrix.fan_in) if matrix.family == "sparse" else cols)


def gains(report: Report, weights: Layer, m: int, dtype: torch.dtype, seconds: float, calls: int = 1) -> None:
    """A training step of a layer with gains and bias: forward, backward to x and all of them."""
    matrix, device = weights.matrix, weights.device
    (n, k), weight = matrix.shape, weights.stored(dtype)[0]
    layer = nn.ModulatedLinear(
        k,
        n,
        seed=matrix.seed,
        family=matrix.family,
        scale=matrix.scale,
        gain="both",
        device=device,
        dtype=dtype,
    )
    assert layer.matrix == matrix
    parameters = list(layer.parameters())
    in_gain, out_gain, bias = theirs = [p.detach().clone().requires_grad_() for p in parameters]
    numbers = generator(device)
    x, dy = (torch.randn(m, size, generator=numbers, device=device).to(dtype) for size in (k, n))
    x.requires_grad_()

    def step(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        # Not .backward(): leaves that accumulate belong to the stream that they were first used on.
        return lambda: torch.autograd.grad(forward(), [x, *leaves], dy)

    ours = step(lambda: layer(x), parameters)
    stored = step(lambda: F.linear(x * in_gain, weight) * out_gain + bias, theirs)
    bound = 2 * BOUNDS[dtype]
    error = check(layer(x).detach(), (F.linear(x * in_gain, weight) * out_gain + bias).detach(), bound)
    for found, want in zip(ours(), stored(), strict=True):
        check(found, want, 2 * bound)
    backend = explain(matrix, dtype, device, m).backend
    case = Case(
        *("layer, trained", m, k, n, name_of(dtype), matrix.family, n * k, None),
        {"backend": backend},
    )
    report.measure(case, served(ours, backend), {"stored": stored}, error, seconds, calls)


def vera(report: Report, m: int, k: int, n: int, seconds: float, rank: int = 256) -> dict[str, float]:
    """PEFT's VeRA, y = b * B (d * A x), with our matrices as its A [rank, K] and B [N, rank], in float32.

    The weights that it adapts are left out of both. ImportError where peft is not installed.
    """
    from peft import VeraConfig
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.vera.layer import Linear

    class NoBase(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nothing

    a = RandomMatrix(rank, k, seed=1, scale=k**-0.5)
    b = RandomMatrix(n, rank, seed=2, scale=rank**-0.5)
    nothing = torch.zeros(1)
    numbers = generator()
    x, d, gain = (torch.randn(*shape, generator=numbers) for shape in ((m, k), (rank,), (n,)))
    shared = [
        BufferDict({"default": materialized(w, torch.float32, "cpu")}, persistent=False) for w in (a, b)
    ]
    theirs = Linear(NoBase(k, n, bias=False), *shared, "default", VeraConfig(r=rank), r=rank)
    with torch.no_grad():
        theirs.vera_lambda_d["default"].copy_(d)
        theirs.vera_lambda_b["default"].copy_(gain)

    def ours() -> Tensor:
        return modulated_linear(modulated_linear(x, a, out_gain=d), b, out_gain=gain)

    wide = [w.materialize(torch.float64) for w in (a, b)]
    exact = (x.double() @ wide[0].T * d) @ wide[1].T * gain
    error = check(ours(), exact, 2 * BOUNDS[torch.float32])
    check(theirs(x).detach(), exact, 8 * BOUNDS[torch.float32])
    case = Case(
        *(f"vera, rank {rank}", m, k, n, "float32", "uniform", rank * (k + n)),
        extra={"backend": explain(a).backend, "stored_bytes": a.stored_bytes() + b.stored_bytes()},
    )

    def peft() -> Tensor:
        with torch.no_grad():
            return theirs(x)

    return report.measure(case, ours, {VERA: peft}, error, seconds)


def copy(report: Report, size: int, seconds: float, device: str = "cpu") -> None:
    """The roofline of stored weights: bytes read and written in a second by a copy of ``size`` bytes."""
    # Of random bits: memory may compress what is all the same, as no one's weights are.
    source = torch.randn(size // 4, generator=generator(device), device=device)
    copied = torch.empty_like(source)
    copied.copy_(source)
    assert torch.equal(copied, source), "the copy differs: not timed"
    case = Case("copy", *(1, 1, 1, "float32", "none", 0), extra={"bytes": 2 * size})
    report.measure(case, lambda: copied.copy_(source), {}, 0.0, seconds)


def projection(report: Report, seconds: float, transposed: bool, device: str = "cpu", calls: int = 1) -> None:
    """The fly's projection, 784 -> 7840, at batch 128, and its transpose."""
    layer = Layer(7840, 784, "sparse", device, fan_in=7)
    against, targets = ("dense", "csr"), {"csr": 2.0}
    product(report, layer, 128, torch.float32, transposed, seconds, 20, calls, against, targets)


def flynet_step(report: Report, seconds: float, device: str = "cpu", calls: int = 1) -> None:
    """A FlyNet training step (forward, backward to context and strength) at the paper's size."""
    net = FlyNet(784, 10, device=device)
    encoder = net.encoder.matrix.materialize().to(device)
    decoder = net.decoder.matrix.materialize().to(device)
    parameters = list(net.parameters())
    gain, strength = theirs = [p.detach().clone().requires_grad_() for p in parameters]
    x = torch.randn(128, 784, generator=generator()).to(device)
    labels = torch.randint(10, (128,), generator=generator()).to(device)

    def authors() -> Tensor:
        m = x @ encoder.T
        r = torch.relu(m - m.mean(-1, keepdim=True))
        return F.linear(r * gain, decoder * strength)

    def step(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Call:
        return lambda: torch.autograd.grad(F.cross_entropy(forward(), labels), leaves)

    error = check(net(x).detach(), authors().detach(), 4e-6)
    backend = selection.select("flynet", torch.float32, device)
    case = Case(
        *("flynet, trained", 128, 784, 7840, "float32", "uniform", 7840 * 17, 10),
        {"backend": backend},
    )
    ours = served(step(lambda: net(x), parameters), backend)
    report.measure(case, ours, {"authors": step(authors, theirs)}, error, seconds, calls)


def overhead(report: Report, seconds: float, grad: bool, device: str = "cpu") -> None:
    """What a call costs the host when there is nothing to compute: 64 x 64 at M = 1.

    On a GPU, the time to issue 200 calls, which the device is not waited for in.
    """
    matrix = RandomMatrix(64, 64, seed=1)
    weight = matrix.materialize().to(device)
    x = torch.randn(1, 64, generator=generator()).to(device)
    error = check(modulated_linear(x, matrix), F.linear(x, weight).double(), 2e-6)
    x.requires_grad_(grad)
    clock = HostClock(torch.cuda.synchronize) if device == "cuda" else None
    name = f"call overhead, gradients {'on' if grad else 'off'}"
    extra: Mapping[str, object] = {"backend": explain(matrix, torch.float32, device, 1).backend}
    case = Case(name, 1, 64, 64, "float32", "uniform", 4096, 0.5, extra)
    rivals = {"stored": lambda: F.linear(x, weight)}
    report.measure(case, lambda: modulated_linear(x, matrix), rivals, error, seconds, calls=200, clock=clock)
