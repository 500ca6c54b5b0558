"""How a figure is measured, checked and written.

    ratio = median time of the rival / median time of ours

Variants are called in turn, ours and its rivals, so that drift of the machine hits all alike; medians
and 20/80 percentiles come from those interleaved calls. The invariant: nothing is timed before its result
has been compared with the reference, and every row says where and from what it was measured.
"""

import datetime
import functools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

import nmkern
from nmkern import stream
from nmkern.backends import cpu
from nmkern.cli.machine import cpu_model, versions

Call = Callable[[], object]


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


@dataclass(frozen=True)
class Timing:
    median: float
    p20: float
    p80: float


def check(ours: torch.Tensor, reference: torch.Tensor, bound: float) -> float:
    """The relative Frobenius error; AssertionError where it exceeds ``bound``."""
    reference = reference.double()
    error = float((ours.double() - reference).norm() / reference.norm())
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.2e}: not timed"
    return error


def interleave(calls: Mapping[str, Call], seconds: float) -> dict[str, Timing]:
    """Time the calls in turn for about ``seconds``: at least 7 rounds, or 3 that are longer than that."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    least = 7 if time.perf_counter() - start < seconds else 3
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: Timing(*(float(v) for v in np.percentile(s, (50, 20, 80)))) for name, s in samples.items()}


def repeated(call: Call, times: int) -> Call:
    """``call`` several times over, for calls that are shorter than a clock can tell."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def peak_bytes(call: Call) -> int:
    """The most that PyTorch's allocator held during ``call`` beyond what it held before."""
    call()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@functools.cache
def provenance() -> dict[str, object]:
    """Where a row comes from: commit, machine, versions, kernel, date."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    dirty = subprocess.run([*git, "status", "--porcelain", "nmkern", "csrc"], capture_output=True, text=True)
    return {
        "commit": commit.strip() + ("-dirty" if dirty.stdout.strip() else ""),
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "system": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
        "kernel": cpu.kernel(),
        "stream": stream.VERSION,
        "versions": {**versions(), "nmkern": nmkern.__version__},
    }


class Report:
    """Rows as JSON lines, appended, and a line of text for each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, object]] = []

    def measure(
        self, case: Case, ours: Call, rivals: Mapping[str, Call], error: float, seconds: float, calls: int = 1
    ) -> dict[str, float]:
        """Time ``ours`` against ``rivals`` (each ``calls`` times); write the row, return the ratios."""
        peak = peak_bytes(ours)
        variants = {"ours": ours, **rivals}
        timings = interleave({name: repeated(call, calls) for name, call in variants.items()}, seconds)
        scaled = {
            name: {key: value / calls for key, value in asdict(timing).items()}
            for name, timing in timings.items()
        }
        ours_median = scaled["ours"]["median"]
        ratios = {name: scaled[name]["median"] / ours_median for name in rivals}
        row = {
            **asdict(case),
            "seconds": scaled,
            "ratios": ratios,
            "weights_per_second": case.weights / ours_median,
            "peak_bytes": peak,
            "relative_error": error,
            **provenance(),
        }
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        told = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        goal = "" if case.target is None else f"  (target {case.target:g})"
        shape = f"{case.name:<22} M={case.m:<5} {case.k} -> {case.n} {case.dtype} {case.family}"
        print(f"{shape:<70} {1e3 * ours_median:9.3f} ms   {told}{goal}", flush=True)
        return ratios
