"""The GPU's rows of the target table, in order of importance, and the table of what was measured.

Sizes: 8192 x 8192 in bfloat16 is 128 MiB, 16384 x 16384 is 512 MiB, each more than the cache of an H100
(50 MiB) or H200 (60 MiB), and the stored weights are there in several copies, taken in turn. 2^18 x 2^18
would take 128 GiB stored, and is measured against the time that its number of weights predicts.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nmkern import use_backend
from nmkern.backends import cuda
from nmkern.bench import cases, huge
from nmkern.bench.harness import Report
from nmkern.bench.plan import Outcome, Row
from nmkern.bench.rows import not_timed

BF16, F32 = torch.bfloat16, torch.float32
FOUR_BITS = ("stored", "int4")  # up to _SMALL rows
_SMALL = 64
# In the rows of a few batches; a missing one is named there.
RIVALS = ("stored", "int4", "generate", "fast_jl", "bitsandbytes", "torchao", "marlin")


@dataclass(frozen=True)
class Extent:
    """How much is measured. ``first`` batches come before all else, ``rest`` once the other rows are in."""

    device: str = "cuda"
    sizes: tuple[int, ...] = (8192, 16384)
    first: tuple[int, ...] = (1, 4, 16, 64, 256, 4096)
    rest: tuple[int, ...] = (2, 8, 32, 1024, 2048, 8192)
    few: tuple[int, ...] = (1, 16, 64, 4096)
    border: tuple[int, ...] = (8, 16, 32, 64)  # where the small-batch kernel should end
    large: tuple[int, ...] = (2048,)  # Triton's, where another backend comes first
    serial: tuple[int, ...] = (1, 16)  # with each kernel launched only after the one before
    floats: tuple[int, ...] = (1, 8)  # with few rows multiplied as 9 to 16 are
    huge: int = 2**18
    huge_batches: tuple[int, ...] = (1, 16, 64)
    copied: int = 2**30  # bytes
    seconds: float = 0.4
    calls: int = 4  # in a graph: each takes another of the copies of x and of the stored weights


QUICK = Extent(
    **{
        "sizes": (8192,),
        "first": (1, 16, 64, 4096),
        "rest": (),
        "few": (1, 64),
        "border": (16, 32),
        "large": (),
        "serial": (),
        "floats": (1,),
    },
    **{"huge_batches": (1,), "seconds": 0.2},
)


def target(m: int, family: str, dtype: torch.dtype) -> float | None:
    """Stored time over ours that a row must reach."""
    if dtype != BF16:
        return None
    if m <= 16:
        return {"uniform": 4.0, "rademacher": 5.0}.get(family)
    return 0.95 if m >= 2048 else None


@contextlib.contextmanager
def forced(report: Report, backend: str, way: str | None = None) -> Iterator[None]:
    """One backend; of cuda one kernel for any number of rows (mma.sync, wgmma), no overlap (serial), or no
    integers (floats).
    """
    switch, on, off = {
        None: (lambda _: None, None, None),
        "mma.sync": (cuda.set_small_rows, 2**20, None),
        "wgmma": (cuda.set_small_rows, 0, None),
        "serial": (cuda.set_overlap, False, True),
        "floats": (cuda.set_fixed_point, False, True),
    }[way]
    with use_backend(backend):
        report.by = f"{backend} ({way})" if way else backend
        switch(on)
        try:
            yield
        finally:
            switch(off)
            report.by = None


def by(report: Report, backend: str, rows: Iterator[Row], way: str | None = None) -> Iterator[Row]:
    name = f"{backend} ({way})" if way else backend
    for row in rows:
        yield Row(f"{row.label} by {name}", row.expected, forced(report, backend, way)(row.measure))


def rows(report: Report, extent: Extent) -> Iterator[Row]:
    """The plan. Weights are stored once, for the first row that needs them."""
    # Checks, graphs and the first call of a kernel, then the clock's time and what goes with it. A row of
    # which more is expected is left although it would have fit.
    short = 1.5 + 4 * extent.seconds

    @functools.cache
    def layer(size: int, family: str) -> cases.Layer:
        return cases.Layer(size, size, family, extent.device, copies=extent.calls)

    def dense(
        size: int, batches, family="uniform", dtype=BF16, against=("stored",), all_of: tuple[int, ...] = ()
    ):
        """``against`` on the way forward up to 64 rows, all rivals at the batches of ``all_of``."""
        for m in batches:
            for transposed in (False, True):
                these = ("stored",)
                if not transposed and m in all_of:
                    these = RIVALS
                elif not transposed and m <= _SMALL:
                    these = against
                way = "linear, transposed" if transposed else "linear"
                yield Row(
                    f"{way} M={m} {size}x{size} {cases.name_of(dtype)} {family}",
                    # Generating 8192 x 8192 weights by NumPy takes 1.5 s on one core.
                    short + ((size / 8192) ** 2 if m == min(batches) else 0),
                    lambda m=m, transposed=transposed, these=these: cases.product(
                        report,
                        layer(size, family),
                        m,
                        dtype,
                        transposed,
                        extent.seconds,
                        target(m, family, dtype),
                        extent.calls,
                        against=these,
                    ),
                )

    def sparse():
        for transposed in (False, True):
            yield Row(
                f"projection{', transposed' if transposed else ''}",
                10,
                lambda transposed=transposed: cases.projection(
                    report, extent.seconds, transposed, extent.device, extent.calls
                ),
            )
        yield Row(
            "flynet, trained",
            15,
            lambda: cases.flynet_step(report, extent.seconds, extent.device, extent.calls),
        )

    both = cuda.refusal("uniform", BF16, extent.device) is None
    hopper = both and cuda.kernels().wide
    small, large = min(extent.sizes), max(extent.sizes)
    yield Row("copy", short, lambda: cases.copy(report, extent.copied, extent.seconds, extent.device))
    yield from dense(small, extent.first, against=FOUR_BITS, all_of=extent.few)
    for size in extent.sizes[1:]:
        yield from dense(size, extent.first, against=FOUR_BITS)
    for m in extent.huge_batches:
        yield Row(
            f"huge M={m}",
            20,
            lambda m=m: huge.measure(report, extent.huge, m, BF16, extent.device, extent.seconds),
        )
    yield from dense(small, extent.few, "rademacher", against=FOUR_BITS)
    if both:
        yield from by(report, "triton", dense(small, (*extent.border, *extent.large)))
        for kernel in ("mma.sync", "wgmma") if hopper else ("mma.sync",):
            yield from by(report, "cuda", dense(small, extent.border), kernel)
        yield from by(report, "cuda", dense(small, extent.floats), "floats")
        if hopper:  # elsewhere kernels never overlap
            yield from by(report, "cuda", dense(small, extent.serial), "serial")
    for grad in (False, True):
        yield Row(
            f"call overhead, gradients {'on' if grad else 'off'}",
            short,
            lambda grad=grad: cases.overhead(report, extent.seconds, grad, extent.device),
        )
    for m in extent.few:
        yield Row(
            f"layer, trained M={m}",
            short,
            lambda m=m: cases.gains(report, layer(small, "uniform"), m, BF16, extent.seconds, extent.calls),
        )
    yield from sparse()
    if both:
        yield from by(report, "triton", sparse())
        if hopper and extent.serial:
            yield from by(report, "cuda", sparse(), "serial")
    yield from dense(small, extent.few, "normal")
    yield from dense(small, extent.few, "uniform", F32)
    for size in extent.sizes:
        yield from dense(size, extent.rest)
    if large != small:
        yield from dense(large, extent.few, "rademacher")


def table(found: list[dict[str, Any]], outcome: Outcome) -> str:
    """The rows as text: times, ratios, rates; then what failed and what was not measured."""
    measured = [row for row in found if "seconds" in row]
    lines = []
    if found and "tests" in found[0]:
        lines.append(f"GPU tests: {found[0]['tests']}")
    if measured:
        first = measured[0]
        versions = first["versions"]
        lines += [
            f"{first.get('gpu') or first['cpu']}, driver {first.get('driver')}, CUDA {first.get('cuda')}, "
            f"torch {versions['torch']}, triton {versions['triton']}, commit {first['commit']}, "
            f"{first['date']}",
            "medians of a call; ratios are the rival's time over ours, above 1 we are faster; "
            "weights and outputs do not stay in cache",
            "",
            f"{'case':<28}{'M':>5} {'K -> N':<17}{'dtype':<9} {'family':<10} {'by':<15} {'ms':>10} "
            f"{'Gw/s':>8} {'TFLOP/s':>8}  against",
        ]
    lines += [_line(row) for row in measured]
    lines += [f"{name}: {reason}" for name, reason in not_timed(measured).items()]
    for title, these in (("failed", outcome.failed), ("not measured", outcome.left)):
        lines += [f"{title}: {label}: {reason.splitlines()[0]}" for label, reason in these.items()]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    seconds, extra = row["seconds"]["ours"]["median"], row["extra"]
    against = [f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items()]
    if row["target"] is not None:
        against.append(f"(target {row['target']:g})")
    if extra.get("predicted_seconds"):
        against.append(f"{seconds / extra['predicted_seconds']:.2f} of the predicted time (target 1.3)")
    if "bytes" in extra:
        against.append(f"{extra['bytes'] / seconds / 1e9:.0f} GB/s read and written")
    rate, shape = row["weights"] / seconds, f"{row['k']} -> {row['n']}"
    by = row.get("by") or extra.get("backend", "torch")
    return (
        f"{row['name']:<28}{row['m']:>5} {shape:<17}"
        f"{row['dtype']:<9} {row['family']:<10} {by:<15} {1e3 * seconds:10.4f} "
        f"{rate / 1e9:8.2f} {2 * rate * row['m'] / 1e12:8.1f}  {', '.join(against)}"
    )
