"""How a figure is checked and written, whatever clock measures it.

    ratio = median time of the rival / median time of ours

The invariant: nothing is timed before its result has been compared with the reference, every row says
where and from what it was measured, and a row is on disk before the next one begins.
"""

import datetime
import functools
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import nmkern
from benchmarks.clocks import Call, CudaClock, HostClock
from nmkern import stream
from nmkern.cli.machine import versions

Clock = HostClock | CudaClock


@dataclass(frozen=True)
class Case:
    """What was measured: name and shape; ``weights`` is how many weights a call multiplies by."""

    name: str
    m: int
    k: int
    n: int
    dtype: str
    family: str
    weights: int
    target: float | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


def check(ours: torch.Tensor, reference: torch.Tensor, bound: float) -> float:
    """The relative Frobenius error; AssertionError where it exceeds ``bound``."""
    reference = reference.double()
    error = float((ours.double() - reference).norm() / reference.norm())
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.2e}: not timed"
    return error


@functools.cache
def provenance() -> dict[str, object]:
    """Where a row comes from, beside the machine: commit, system, versions, date."""
    return {
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "system": platform.platform(terse=True),
        "stream": stream.VERSION,
        "versions": {**versions(), "nmkern": nmkern.__version__},
    }


def _commit() -> str:
    """The commit of this checkout, or "unknown" where it came without its history."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changes = [*git, "status", "--porcelain", "nmkern", "csrc"]
        dirty = subprocess.run(changes, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("-dirty" if dirty else "")


class Report:
    """Rows as JSON lines, appended, and a line of text for each."""

    def __init__(self, path: Path | None, clock: Clock, commit: str | None = None) -> None:
        self.path = path
        self.clock = clock
        self.commit = commit
        self.rows: list[dict[str, object]] = []

    def measure(
        self,
        case: Case,
        ours: Call,
        rivals: Mapping[str, Call],
        error: float,
        seconds: float,
        calls: int = 1,
        clock: Clock | None = None,
    ) -> dict[str, float]:
        """Time ``ours`` against ``rivals``, ``calls`` at a time; write the row, return the ratios."""
        peak = self.clock.peak_bytes(ours)
        timings = (clock or self.clock).time({"ours": ours, **rivals}, seconds, calls)
        ours_median = timings["ours"].median
        ratios = {name: timings[name].median / ours_median for name in rivals}
        self.write(
            {
                **asdict(case),
                "seconds": {name: asdict(timing) for name, timing in timings.items()},
                "ratios": ratios,
                "weights_per_second": case.weights / ours_median,
                "peak_bytes": peak,
                "relative_error": error,
            }
        )
        told = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        goal = "" if case.target is None else f"  (target {case.target:g})"
        shape = f"{case.name:<22} M={case.m:<5} {case.k} -> {case.n} {case.dtype} {case.family}"
        print(f"{shape:<70} {1e3 * ours_median:9.3f} ms   {told}{goal}", flush=True)
        return ratios

    def write(self, row: dict[str, object]) -> None:
        """Keep a row, with where it comes from, and append it to the file."""
        row = {**row, **provenance(), **self.clock.machine()}
        if self.commit is not None:
            row["commit"] = self.commit
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
