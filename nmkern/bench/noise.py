"""How well a figure is known: intervals from the interleaved rounds, and what else the machine did.

    interval of median(rival) / median(ours)    bootstrap over the rounds, 95 %

A row is noisy where an interval reaches further than 5 % from its ratio, so that two quiet runs agree
within 10 %, or where other processes took more than a tenth of the processor.
"""

import time

import numpy as np
import psutil
from numpy.typing import NDArray
from scipy.stats import bootstrap

HALF_WIDTH = 0.05  # of the ratio
REPRODUCIBLE = 0.1  # between two quiet runs of one command
FOREIGN_LOAD = 0.1  # of all cores' time
_RESAMPLES = 999
_SEED = 0  # the same rounds always give the same interval

Interval = tuple[float, float]


def _medians(a: NDArray, b: NDArray, axis: int) -> NDArray:
    return np.median(b, axis) / np.median(a, axis)


def ratio_interval(ours: NDArray[np.float64], rival: NDArray[np.float64]) -> Interval:
    """Where the ratio of medians, rival over ours, lies; both sampled in at least two rounds."""
    return _bootstrap((ours, rival), _medians)


def median_interval(samples: NDArray[np.float64]) -> Interval:
    """Where the median of ``samples`` lies."""
    return _bootstrap((samples,), np.median)


def _bootstrap(samples, statistic) -> Interval:
    found = bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        vectorized=True,
        paired=False,  # some rivals are timed apart, in fewer rounds
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def half_width(ratio: float, interval: Interval) -> float:
    """How far the interval reaches from the ratio, relative to it."""
    return max(interval[1] - ratio, ratio - interval[0]) / ratio


def noisy_names(
    ours: float, ours_interval: Interval, ratios: dict[str, float], intervals: dict[str, Interval]
) -> list[str]:
    """The rivals whose ratio is not known within 5 %; without rivals "ours", if our time is not."""
    known = {name: (ratio, intervals[name]) for name, ratio in ratios.items()} or {
        "ours": (ours, ours_interval)
    }
    return [name for name, figure in known.items() if half_width(*figure) > HALF_WIDTH]


class Load:
    """The share of all cores that other processes, or other guests of the host, took since it was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = time.monotonic()
        self._before = self._foreign()

    def _foreign(self) -> float:
        machine, own = psutil.cpu_times(), self._process.cpu_times()
        kinds = ("user", "system", "nice", "irq", "softirq", "steal")  # not all systems count all of them
        return sum(getattr(machine, kind, 0.0) for kind in kinds) - own.user - own.system

    def share(self) -> float:
        passed = (time.monotonic() - self._start) * (psutil.cpu_count() or 1)
        return max(0.0, self._foreign() - self._before) / max(passed, 1e-9)
