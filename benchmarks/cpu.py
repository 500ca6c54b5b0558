"""The CPU's rows of the target table: dense products, sparse projection, FlyNet's step, call overhead."""

import torch

from nmkern.bench import cases
from nmkern.bench.harness import Report

BATCHES = (1, 2, 4, 6, 8, 10, 12, 13, 16, 24, 32, 48, 64, 128, 256, 512, 1024)
FEW_BATCHES = (1, 4, 8, 16, 64, 256, 1024)
QUICK_BATCHES = (1, 4, 16, 64)
DTYPES = (torch.float32, torch.bfloat16)
_FOUR_BITS = 64  # rows up to which PyTorch's product with 4-bit weights is measured: it is meant for few
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


def dense(report: Report, layer: cases.Layer, batches: tuple[int, ...], seconds: float) -> None:
    """Forward and backward to x, float32 and bfloat16, against stored weights."""
    hopeless: set[tuple[torch.dtype, bool]] = set()
    for m in batches:
        for dtype in DTYPES:
            for transposed in (False, True):
                if (dtype, transposed) in hopeless:
                    continue
                target = _target(m, dtype, layer.matrix.family)
                against = ["stored"]
                if dtype == torch.bfloat16 and not transposed and m <= _FOUR_BITS:
                    against.append("int4")  # not of normal
                ratios = cases.product(report, layer, m, dtype, transposed, seconds, target, against=against)
                if ratios["stored"] > _HOPELESS:
                    hopeless.add((dtype, transposed))


def run(report: Report, quick: bool) -> None:
    """All rows; ``quick`` takes a minute and is for a first look."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    seconds = 0.3 if quick else 0.8
    size = 2048 if quick else 8192
    uniform = cases.Layer(size, size, "uniform")
    dense(report, uniform, QUICK_BATCHES if quick else BATCHES, seconds)
    if not quick:
        for family in ("normal", "rademacher"):
            dense(report, cases.Layer(size, size, family), FEW_BATCHES, seconds)
    for m in QUICK_BATCHES:
        cases.gains(report, uniform, m, torch.float32, seconds)
    for transposed in (False, True):
        cases.projection(report, seconds, transposed)
    cases.flynet_step(report, seconds)
    for grad in (False, True):
        cases.overhead(report, seconds, grad)
