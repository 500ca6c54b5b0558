"""The CPU's rows of the target table: dense products, sparse projection, FlyNet's step, call overhead.

Rivals are what PyTorch offers for the same result with weights that are stored: its linear layer in the
same dtype, the dense product and the CSR product for the projection, and the authors' formulation (dense
encoder, stored decoder) for the network.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from benchmarks.harness import Case, Report, check
from nmkern import RandomMatrix, modulated_linear, nn, sparse_project
from nmkern.models import FlyNet

BATCHES = (1, 2, 4, 6, 8, 10, 12, 13, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
FEW_BATCHES = (1, 4, 8, 16, 64, 256, 1024)
QUICK_BATCHES = (1, 4, 16, 64)
_BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
# A rival so much slower is not followed to larger batches: without AVX-512, PyTorch's product of bfloat16
# with an untransposed weight (its backward pass) takes half a second a row at 8192 x 8192.
_HOPELESS = 50


def _target(m: int, dtype: torch.dtype, family: str) -> float | None:
    """Stored time over ours that this regime must reach (16 < M < 64 has one in bfloat16 only)."""
    if dtype == torch.float32:
        if m == 1:
            return 8 if family == "rademacher" else 6
        return 5 if m <= 16 else 0.95 if m >= 64 else None
    if m == 1:
        return 4
    return 3 if m <= 8 else 1.3 if m <= 32 else 0.95 if m >= 64 else None


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dense(report: Report, size: int, batches: tuple[int, ...], family: str, seconds: float) -> None:
    """Forward and backward to x, float32 and bfloat16, against stored weights."""
    matrix = RandomMatrix(size, size, seed=1, family=family, scale=size**-0.5)
    weight = matrix.materialize(torch.float32)
    stored = {torch.float32: weight, torch.bfloat16: weight.bfloat16()}
    some = slice(0, 64)  # outputs that are compared with float64
    exact = matrix[some].materialize(torch.float64)
    exact_t = matrix[:, some].materialize(torch.float64)
    hopeless: set[tuple[torch.dtype, bool]] = set()
    for m in batches:
        x = torch.randn(m, size, generator=_generator())
        for dtype, w in stored.items():
            inputs = [x.to(dtype).clone() for _ in range(4)]
            case = Case("linear", m, size, size, _name(dtype), family, size * size, _target(m, dtype, family))
            for transposed in (False, True):
                if (dtype, transposed) in hopeless:
                    continue
                y = modulated_linear(inputs[0], matrix.T if transposed else matrix)
                reference = inputs[0].double() @ (exact_t if transposed else exact.T)
                error = check(y[:, some], reference, _BOUNDS[dtype])
                turn = _rotate(inputs)
                view, stored_w = (matrix.T, w.T) if transposed else (matrix, w)
                ratios = report.measure(
                    replace(case, name="linear, transposed") if transposed else case,
                    lambda view=view, turn=turn: modulated_linear(next(turn), view),
                    {"stored": lambda w=stored_w, turn=turn: F.linear(next(turn), w)},
                    error,
                    seconds,
                )
                if ratios["stored"] > _HOPELESS:
                    hopeless.add((dtype, transposed))


def _rotate(inputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    while True:
        yield from inputs


def gains(report: Report, size: int, batches: tuple[int, ...], seconds: float) -> None:
    """A training step of a layer with gains and bias: forward, backward to x and all of them."""
    layer = nn.ModulatedLinear(size, size, seed=1, gain="both")
    weight = layer.matrix.materialize()
    (in_gain, out_gain, bias) = (p.detach().clone().requires_grad_() for p in layer.parameters())
    for m in batches:
        x = torch.randn(m, size, generator=_generator()).requires_grad_()

        def ours(x=x):
            return layer(x)

        def theirs(x=x):
            return F.linear(x * in_gain, weight) * out_gain + bias

        def step(forward):
            return lambda: forward().sum().backward()

        error = check(ours().detach(), theirs().detach(), 4e-6)
        case = Case("layer, trained", m, size, size, "float32", "uniform", size * size)
        report.measure(case, step(ours), {"stored": step(theirs)}, error, seconds)


def projection(report: Report, seconds: float) -> None:
    """The fly's projection, 784 -> 7840, at batch 128."""
    matrix = RandomMatrix(7840, 784, seed=1, family="sparse", fan_in=7)
    dense_weight = matrix.materialize()
    csr = dense_weight.to_sparse_csr()
    for view, name in ((matrix, "projection"), (matrix.T, "projection, transposed")):
        w = dense_weight if view is matrix else dense_weight.T.contiguous()
        c = csr if view is matrix else w.to_sparse_csr()
        x = torch.randn(128, view.cols, generator=_generator())
        error = check(sparse_project(x, view), x.double() @ w.double().T, 2e-6)
        case = Case(
            name, 128, view.cols, view.rows, "float32", "sparse", 7840 * 7, 20, {"targets": {"csr": 2}}
        )
        rivals = {"dense": lambda x=x, w=w: F.linear(x, w), "csr": lambda x=x, c=c: (c @ x.T).T}
        report.measure(case, lambda x=x, view=view: sparse_project(x, view), rivals, error, seconds)


def flynet_step(report: Report, seconds: float) -> None:
    """A FlyNet training step (forward, backward to context and strength) at the paper's size."""
    net = FlyNet(784, 10)
    encoder, decoder = net.encoder.matrix.materialize(), net.decoder.matrix.materialize()
    gain, strength = (p.detach().clone().requires_grad_() for p in net.parameters())
    x = torch.randn(128, 784, generator=_generator())
    labels = torch.randint(10, (128,), generator=_generator())

    def authors():
        m = x @ encoder.T
        r = torch.relu(m - m.mean(-1, keepdim=True))
        return F.linear(r * gain, decoder * strength)

    def step(forward, parameters):
        def run():
            for p in parameters:
                p.grad = None
            F.cross_entropy(forward(), labels).backward()

        return run

    error = check(net(x).detach(), authors().detach(), 4e-6)
    case = Case("flynet, trained", 128, 784, 7840, "float32", "uniform", 7840 * 17, 10)
    ours = step(lambda: net(x), list(net.parameters()))
    report.measure(case, ours, {"authors": step(authors, [gain, strength])}, error, seconds)


def overhead(report: Report, seconds: float) -> None:
    """What a call costs when there is nothing to compute: 64 x 64 at M = 1."""
    matrix = RandomMatrix(64, 64, seed=1)
    weight = matrix.materialize()
    x = torch.randn(1, 64, generator=_generator())
    error = check(modulated_linear(x, matrix), F.linear(x, weight).double(), 2e-6)
    for grad in (False, True):
        x = x.detach().requires_grad_(grad)
        name = f"call overhead, gradients {'on' if grad else 'off'}"
        case = Case(name, 1, 64, 64, "float32", "uniform", 4096, target=0.5)
        rivals = {"stored": lambda x=x: F.linear(x, weight)}
        report.measure(case, lambda x=x: modulated_linear(x, matrix), rivals, error, seconds, calls=200)


def run(report: Report, quick: bool) -> None:
    """All rows; ``quick`` takes a minute and is for a first look."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    seconds = 0.3 if quick else 0.8
    size = 2048 if quick else 8192
    dense(report, size, QUICK_BATCHES if quick else BATCHES, "uniform", seconds)
    if not quick:
        dense(report, size, FEW_BATCHES, "normal", seconds)
        dense(report, size, FEW_BATCHES, "rademacher", seconds)
    gains(report, size, QUICK_BATCHES, seconds)
    projection(report, seconds)
    flynet_step(report, seconds)
    overhead(report, seconds)
