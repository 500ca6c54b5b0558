"""How a figure is checked and written, whatever clock measures it.

    ratio = median time of the rival / median time of ours

The invariant: nothing is timed before its result has been compared with the reference, every row says
where and from what it was measured, and a row is on disk before the next one begins.

A row is the case, then ``seconds`` of a call by variant (median, p20, p80), ``ratios`` and their 95 %
``intervals`` by rival, ``ours_interval`` in seconds, ``load`` (the share of the processor that others took),
``noisy`` (rivals whose ratio is known to no better than 5 %, "ours" for our time where there is no rival,
"machine" where load exceeds a tenth),
``weights_per_second``, ``peak_bytes``, ``relative_error``, commit, date, machine and versions.
"""

import datetime
import functools
import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import nmkern
from nmkern import stream
from nmkern.bench import noise
from nmkern.bench.clocks import Call, CudaClock, HostClock, Samples
from nmkern.machine import versions

Clock = HostClock | CudaClock


@dataclass(frozen=True)
class Case:
    """What was measured: name and shape; ``weights`` is how many weights a call multiplies by.

    ``not_timed``: rivals that were asked for, with the reason why they are missing. ``own_weights``: rivals
    that multiply by random weights of their own, and are checked against those.
    """

    name: str
    m: int
    k: int
    n: int
    dtype: str
    family: str
    weights: int
    target: float | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    not_timed: Mapping[str, str] = field(default_factory=dict)
    own_weights: tuple[str, ...] = ()


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
    """The commit of this checkout, or "unknown" where there is no history."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: the version tells what it is
        return "unknown"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        changes = [*git, "status", "--porcelain", "nmkern", "csrc"]
        dirty = subprocess.run(changes, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("-dirty" if dirty else "")


def print_at_once(text: str) -> None:
    print(text, flush=True)


def _summary(samples: Samples) -> dict[str, float]:
    median, p20, p80 = map(float, np.percentile(samples, (50, 20, 80)))
    return {"median": median, "p20": p20, "p80": p80}


class Report:
    """Rows as JSON lines, appended, and a line of text for each.

    ``by``: what is made to serve the calls for now, where it is not what serves them of itself. Such rows are
    cases of their own. ``also``: what else every row is to say.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Clock,
        commit: str | None = None,
        tell: Callable[[str], object] = print_at_once,
        also: Mapping[str, object] | None = None,
    ) -> None:
        self.path = path
        self.clock = clock
        self.commit = commit
        self.tell = tell
        self.also = also or {}
        self.by: str | None = None
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
        load = noise.Load()
        samples = (clock or self.clock).time({"ours": ours, **rivals}, seconds, calls)
        foreign = load.share()
        medians = {name: float(np.median(found)) for name, found in samples.items()}
        mine = samples.pop("ours")
        ratios = {name: medians[name] / medians["ours"] for name in samples}
        intervals = {name: noise.ratio_interval(mine, found) for name, found in samples.items()}
        ours_interval = noise.median_interval(mine)
        noisy = noise.noisy_names(medians["ours"], ours_interval, ratios, intervals)
        self.write(
            {
                **asdict(case),
                "seconds": {name: _summary(found) for name, found in {"ours": mine, **samples}.items()},
                "ratios": ratios,
                "intervals": intervals,
                "ours_interval": ours_interval,
                "load": foreign,
                "noisy": [*noisy, *(["machine"] if foreign > noise.FOREIGN_LOAD else [])],
                "weights_per_second": case.weights / medians["ours"],
                "peak_bytes": peak,
                "relative_error": error,
            }
        )
        told = ", ".join(f"{name} {'~' * (name in noisy)}{ratio:.2f}x" for name, ratio in ratios.items())
        goal = "" if case.target is None else f"  (target {case.target:g})"
        name = case.name if self.by is None else f"{case.name} by {self.by}"
        shape = f"{name:<22} M={case.m:<5} {case.k} -> {case.n} {case.dtype} {case.family}"
        self.tell(f"{shape:<70} {1e3 * medians['ours']:9.3f} ms   {told}{goal}")
        return ratios

    def write(self, row: dict[str, object]) -> None:
        """Keep a row, with where it comes from, and append it to the file."""
        row = {**row, **provenance(), **self.clock.machine(), **self.also}
        if self.by is not None:
            row["by"] = self.by
        if self.commit is not None:
            row["commit"] = self.commit
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
