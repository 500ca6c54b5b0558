"""The cases that every device has: one function each, from operands to a row of the report.

Rivals are what PyTorch offers for the same result with weights that are stored: its linear layer in the
same dtype, the dense product and the CSR product for the projection, and the authors' formulation (dense
encoder, stored decoder) for the network. On a CUDA device with CUDA's clock a call is captured in a graph,
unless the reference serves it, which looks at the host.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from benchmarks.clocks import Call, Eager, HostClock
from benchmarks.harness import Case, Report, check
from nmkern import RandomMatrix, explain, modulated_linear, nn, sparse_project
from nmkern.backends import selection
from nmkern.models import FlyNet

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
_INPUTS = 4  # copies of x that calls take in turn


def generator(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_turn(values: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from values


def served(call: Call, backend: str) -> Call:
    """``call`` as its clock may take it: the reference is not to be captured in a graph."""
    return Eager(call) if backend == "reference" else call


def materialized(matrix: RandomMatrix, dtype: torch.dtype, device: str) -> torch.Tensor:
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
    """A square matrix, its stored forms, and what some of its outputs must be.

    ``copies``: how many of each stored form, taken in turn, so that a cache cannot hold them.
    """

    def __init__(
        self,
        size: int,
        family: str,
        dtypes: tuple[torch.dtype, ...],
        device: str = "cpu",
        copies: int = 1,
    ) -> None:
        self.matrix = RandomMatrix(size, size, seed=1, family=family, scale=size**-0.5)
        self.device = device
        wide = materialized(self.matrix, dtypes[0], device)
        self.stored = {
            dtype: [wide.to(dtype), *(wide.to(dtype, copy=True) for _ in range(copies - 1))]
            for dtype in dtypes
        }
        self._exact: dict[bool, list[tuple[slice, torch.Tensor]]] = {}

    def exact(self, transposed: bool) -> list[tuple[slice, torch.Tensor]]:
        """Outputs at both ends and in the middle, each with its rows of the weights in float64."""
        if transposed not in self._exact:
            view = self.matrix.T if transposed else self.matrix
            self._exact[transposed] = exact_slices(view, self.device)
        return self._exact[transposed]


def exact_slices(view: RandomMatrix, device: str) -> list[tuple[slice, torch.Tensor]]:
    """Three times 24 outputs of a matrix, which start and end at odd places, and their weights."""
    n, some = view.rows, 24
    places = [slice(0, some), slice(n // 2 - 11, n // 2 - 11 + some), slice(n - some, n)]
    return [(place, view[place].materialize(torch.float64).to(device)) for place in places]


def check_slices(
    y: torch.Tensor, x: torch.Tensor, slices: list[tuple[slice, torch.Tensor]], bound: float
) -> float:
    return max(check(y[:, place], x.double() @ weights.T, bound) for place, weights in slices)


def linear(
    report: Report,
    layer: Layer,
    m: int,
    dtype: torch.dtype,
    transposed: bool,
    seconds: float,
    target: float | None = None,
    calls: int = 1,
    generate: bool = False,
) -> dict[str, float]:
    """One product against stored weights; ``generate``: also against weights made by torch, each time."""
    matrix = layer.matrix.T if transposed else layer.matrix
    stored = [w.T if transposed else w for w in layer.stored[dtype]]
    x = torch.randn(m, matrix.cols, generator=generator(layer.device), device=layer.device).to(dtype)
    y = modulated_linear(x, matrix)
    error = check_slices(y, x, layer.exact(transposed), BOUNDS[dtype])
    check(y, F.linear(x, stored[0]), 4 * BOUNDS[dtype])  # all of it; both are rounded
    del y
    inputs, weights = in_turn([x.clone() for _ in range(_INPUTS)]), in_turn(stored)
    rivals: dict[str, Call] = {"stored": lambda: F.linear(next(inputs), next(weights))}
    if generate:
        kept, numbers = torch.empty_like(stored[0]), generator(layer.device)
        rivals["generate"] = Eager(lambda: F.linear(next(inputs), kept.uniform_(-1, 1, generator=numbers)))
    case = Case(
        "linear, transposed" if transposed else "linear",
        *(m, *matrix.shape[::-1], name_of(dtype), matrix.family, matrix.rows * matrix.cols, target),
        {"backend": explain(matrix, dtype, layer.device).backend},
    )
    ours = served(lambda: modulated_linear(next(inputs), matrix), str(case.extra["backend"]))
    return report.measure(case, ours, rivals, error, seconds, calls)


def gains(report: Report, weights: Layer, m: int, dtype: torch.dtype, seconds: float, calls: int = 1) -> None:
    """A training step of a layer with gains and bias: forward, backward to x and all of them."""
    matrix, device = weights.matrix, weights.device
    size, weight = matrix.rows, weights.stored[dtype][0]
    layer = nn.ModulatedLinear(
        size, size, seed=matrix.seed, scale=matrix.scale, gain="both", device=device, dtype=dtype
    )
    assert layer.matrix == matrix
    parameters = list(layer.parameters())
    in_gain, out_gain, bias = theirs = [p.detach().clone().requires_grad_() for p in parameters]
    numbers = generator(device)
    x, dy = (torch.randn(m, size, generator=numbers, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()

    def step(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Call:
        # Not .backward(): leaves that accumulate belong to the stream that they were first used on.
        return lambda: torch.autograd.grad(forward(), [x, *leaves], dy)

    ours = step(lambda: layer(x), parameters)
    stored = step(lambda: F.linear(x * in_gain, weight) * out_gain + bias, theirs)
    bound = 2 * BOUNDS[dtype]
    error = check(layer(x).detach(), (F.linear(x * in_gain, weight) * out_gain + bias).detach(), bound)
    for found, want in zip(ours(), stored(), strict=True):
        check(found, want, 2 * bound)
    backend = explain(matrix, dtype, device).backend
    case = Case(
        *("layer, trained", m, size, size, name_of(dtype), matrix.family, size * size, None),
        {"backend": backend},
    )
    report.measure(case, served(ours, backend), {"stored": stored}, error, seconds, calls)


def projection(report: Report, seconds: float, transposed: bool, device: str = "cpu", calls: int = 1) -> None:
    """The fly's projection, 784 -> 7840, at batch 128, and its transpose."""
    matrix = RandomMatrix(7840, 784, seed=1, family="sparse", fan_in=7)
    view = matrix.T if transposed else matrix
    weight = view.materialize().to(device).contiguous()
    csr = weight.to_sparse_csr()
    x = torch.randn(128, view.cols, generator=generator()).to(device)
    error = check(sparse_project(x, view), x.double() @ weight.double().T, 2e-6)
    backend = explain(matrix, torch.float32, device).backend
    case = Case(
        "projection, transposed" if transposed else "projection",
        *(128, view.cols, view.rows, "float32", "sparse", 7840 * 7, 20),
        {"targets": {"csr": 2}, "backend": backend},
    )
    rivals = {"dense": lambda: F.linear(x, weight), "csr": Eager(lambda: (csr @ x.T).T)}
    ours = served(lambda: sparse_project(x, view), backend)
    report.measure(case, ours, rivals, error, seconds, calls)


def flynet_step(report: Report, seconds: float, device: str = "cpu", calls: int = 1) -> None:
    """A FlyNet training step (forward, backward to context and strength) at the paper's size."""
    net = FlyNet(784, 10, device=device)
    encoder = net.encoder.matrix.materialize().to(device)
    decoder = net.decoder.matrix.materialize().to(device)
    parameters = list(net.parameters())
    gain, strength = theirs = [p.detach().clone().requires_grad_() for p in parameters]
    x = torch.randn(128, 784, generator=generator()).to(device)
    labels = torch.randint(10, (128,), generator=generator()).to(device)

    def authors() -> torch.Tensor:
        m = x @ encoder.T
        r = torch.relu(m - m.mean(-1, keepdim=True))
        return F.linear(r * gain, decoder * strength)

    def step(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Call:
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
    extra: Mapping[str, object] = {"backend": explain(matrix, torch.float32, device).backend}
    case = Case(name, 1, 64, 64, "float32", "uniform", 4096, 0.5, extra)
    rivals = {"stored": lambda: F.linear(x, weight)}
    report.measure(case, lambda: modulated_linear(x, matrix), rivals, error, seconds, calls=200, clock=clock)
