"""The CPU's operators under pytest-benchmark, to compare commits with its own tools.

    pytest benchmarks -n 0 --benchmark-autosave
    pytest benchmarks -n 0 --benchmark-compare

Each group holds ours and what PyTorch offers with stored weights. Equality is checked before anything is
timed. (``python -m benchmarks cpu`` interleaves the variants and is what published ratios come from.)
"""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from nmkern import RandomMatrix, modulated_linear, sparse_project
from nmkern.bench.cases import BOUNDS, generator, name_of
from nmkern.bench.rivals import check

SIZE = 2048


def _input(m: int, features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, features, generator=generator()).to(dtype)


@pytest.mark.parametrize("variant", ["ours", "stored"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("family", ["uniform", "normal", "rademacher"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=name_of)
@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_modulated_linear(benchmark, m, dtype, family, transposed, variant):
    matrix = RandomMatrix(SIZE, SIZE, seed=1, family=family, scale=SIZE**-0.5)
    matrix = matrix.T if transposed else matrix
    x = _input(m, SIZE, dtype)
    weight = matrix.materialize()
    check(modulated_linear(x, matrix), x.double() @ weight.double().T, BOUNDS[dtype])
    weight = weight.to(dtype)
    benchmark.group = (
        f"modulated_linear {family} {name_of(dtype)} M={m} {'transposed' if transposed else 'forward'}"
    )
    call = (lambda: modulated_linear(x, matrix)) if variant == "ours" else (lambda: F.linear(x, weight))
    benchmark(call)


@pytest.mark.parametrize("variant", ["ours", "dense"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_sparse_project(benchmark, transposed, variant):
    matrix = RandomMatrix(7840, 784, seed=1, family="sparse", fan_in=7)
    matrix = matrix.T if transposed else matrix
    x, weight = _input(128, matrix.cols), matrix.materialize()
    check(sparse_project(x, matrix), x.double() @ weight.double().T, BOUNDS[torch.float32])
    benchmark.group = f"sparse_project {'transposed' if transposed else 'forward'}"
    benchmark((lambda: sparse_project(x, matrix)) if variant == "ours" else (lambda: F.linear(x, weight)))
