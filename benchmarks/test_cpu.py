"""The operators under pytest-benchmark, to compare commits with its own tools.

    pytest benchmarks -n 0 --benchmark-autosave
    pytest benchmarks -n 0 --benchmark-compare

Each group holds ours and the rivals that ``nmkern bench`` knows, built and checked by the same harness before
anything is timed. (``nmkern bench`` and ``python -m benchmarks cpu`` interleave the variants and are what
published ratios come from.)
"""

import functools

import pytest
import torch

from nmkern.bench import cases, rivals
from nmkern.bench.sweep import DTYPES

SIZE = 2048
_OURS = "ours"


@functools.cache
def _layer(family: str) -> cases.Layer:
    return cases.Layer(7840, 784, family, fan_in=7) if family == "sparse" else cases.Layer(SIZE, SIZE, family)


def _measure(benchmark, family: str, m: int, dtype: torch.dtype, transposed: bool, variant: str) -> None:
    against = () if variant == _OURS else (variant,)
    ready = cases.prepare(_layer(family), m, dtype, transposed, against)
    way = "transposed" if transposed else "forward"
    benchmark.group = f"{ready.case.name} {family} {cases.name_of(dtype)} M={m} {way}"
    if variant in ready.case.not_timed:
        pytest.skip(f"{variant}: {ready.case.not_timed[variant]}")
    benchmark(ready.ours if variant == _OURS else ready.rivals[variant])


@pytest.mark.parametrize("variant", [_OURS, "stored", "generate"])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("family", ["uniform", "normal", "rademacher"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_modulated_linear(benchmark, m, dtype, family, transposed, variant):
    _measure(benchmark, family, m, DTYPES[dtype], transposed, variant)


@pytest.mark.parametrize("variant", [_OURS, *rivals.names_of("sparse")])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_sparse_project(benchmark, transposed, variant):
    _measure(benchmark, "sparse", 128, torch.float32, transposed, variant)
