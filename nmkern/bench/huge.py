"""The layer that does not fit: its stored form exceeds the machine's memory, and it runs all the same.

    predicted seconds = weights / (weights per second of a smaller layer at the same M)

The invariant: nothing huge is started whose predicted time exceeds the limit.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from nmkern import RandomMatrix, explain, modulated_linear
from nmkern.bench import cases
from nmkern.bench.harness import Case, Report
from nmkern.bench.plan import Row

SMALLER = 8192  # the size whose rate predicts
# Seconds of one call. A row makes seven by the host's clock, and thirteen by CUDA's, which at a minute each
# would be more than all of the time on a GPU.
LIMITS = {"cpu": 60.0, "cuda": 1.5}
_EXPECTED = 60.0  # seconds of a row
_STEP = 1024  # sizes are multiples of it


def memory_bytes(device: str) -> int:
    """All memory of the machine, or of the current GPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return psutil.virtual_memory().total


def size_beyond(memory: int, dtype: torch.dtype) -> int:
    """The smallest size of a square layer that takes more than ``memory`` stored, rounded up."""
    size = math.isqrt(memory // dtype.itemsize) + 1
    return -(-size // _STEP) * _STEP


@dataclass(frozen=True)
class Huge:
    """Rows of layers beyond ``memory`` bytes (None: this machine's) at each of ``batches``."""

    device: str
    batches: list[int]
    seconds: float
    memory: int | None = None
    smaller: int | None = None

    def rows(self, report: Report) -> Iterator[Row]:
        """The plan: a smaller layer at a batch, then the huge one at it."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        size = size_beyond(memory_bytes(self.device) if self.memory is None else self.memory, dtype)
        smaller = self.smaller or SMALLER
        layer = cases.Layer(smaller, smaller, "uniform", self.device)
        for m in self.batches:
            label = f"M={m} {cases.name_of(dtype)}"
            small = functools.partial(
                cases.product, report, layer, m, dtype, False, self.seconds, against=("stored",)
            )
            yield Row(f"{label} {smaller} x {smaller}", 5, small)
            huge = functools.partial(measure, report, size, m, dtype, self.device, self.seconds)
            yield Row(f"{label} {size} x {size}", _EXPECTED, huge)

    def __len__(self) -> int:
        return 2 * len(self.batches)

    def missing(self) -> dict[str, str]:
        return {}


def measure(report: Report, size: int, m: int, dtype: torch.dtype, device: str, seconds: float) -> None:
    """A square layer of ``size``: predicted from the last smaller one in the report, then measured.

    RuntimeError where the prediction, if there is one, exceeds the device's of ``LIMITS``.
    """
    matrix = RandomMatrix(size, size, seed=1, scale=size**-0.5)
    predicted = predict(report, size, m, dtype)
    limit = LIMITS[device]
    if predicted is not None and predicted > limit:
        raise RuntimeError(f"m: a call would take {predicted:.1f} s, expected at most {limit:g} s")
    x = torch.randn(m, size, generator=cases.generator(device), device=device).to(dtype)
    slices = cases.exact_slices(matrix, device)
    error = cases.check_slices(modulated_linear(x, matrix), x, slices, cases.BOUNDS[dtype])
    backend = explain(matrix, dtype, device, m).backend
    extra = {
        "backend": backend,
        "predicted_seconds": predicted,
        "stored_bytes": matrix.stored_bytes(dtype),
        "memory_bytes": memory_bytes(device),
    }
    case = Case("linear, huge", *(m, size, size, cases.name_of(dtype), "uniform", size * size), extra=extra)
    call = cases.served(lambda: modulated_linear(x, matrix), backend)
    report.measure(case, call, {}, error, seconds)


def predict(report: Report, size: int, m: int, dtype: torch.dtype) -> float | None:
    """Seconds that the rate of the last smaller layer predicts; None where there was none at this batch."""
    wanted = ("linear", m, cases.name_of(dtype), "uniform", None)
    for row in reversed(report.rows):
        case = tuple(row.get(key) for key in ("name", "m", "dtype", "family", "by"))
        if case == wanted and "seconds" in row:
            rate = row["weights_per_second"]
            assert isinstance(rate, float)
            return size * size / rate
    return None
