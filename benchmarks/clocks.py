"""The two clocks: the host's, and a CUDA device's events around replayed graphs.

Both call the variants in turn, ours and its rivals, so that drift of the machine hits all alike; medians
and 20/80 percentiles come from those interleaved rounds and are per call. All else about a measurement
(what, checked how, written where) is in ``harness`` and the same for both.
"""

import contextlib
import functools
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from nmkern import environment
from nmkern.backends import cpu, triton
from nmkern.cli.machine import cpu_model

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Eager:
    """A call that a CUDA graph cannot hold (it copies from the host, or moves a generator)."""

    call: Call

    def __call__(self) -> object:
        return self.call()


def summary(samples: list[float], calls: int) -> Timing:
    return Timing(*(float(v) / calls for v in np.percentile(samples, (50, 20, 80))))


def repeated(call: Call, times: int) -> Call:
    """``call`` several times over, for calls that are shorter than a clock can tell."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


class HostClock:
    """Wall time on the host. ``settle`` waits for what the calls left running, outside of the time."""

    def __init__(self, settle: Call = lambda: None) -> None:
        self.settle = settle

    def time(self, variants: Mapping[str, Call], seconds: float, calls: int = 1) -> dict[str, Timing]:
        """Time the variants in turn for about ``seconds``: 7 rounds at least, or 3 longer than that."""
        plays = {name: repeated(call, calls) for name, call in variants.items()}
        start = time.perf_counter()
        for play in plays.values():
            play()
        least = 7 if time.perf_counter() - start < seconds else 3
        samples: dict[str, list[float]] = {name: [] for name in plays}
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < least or time.perf_counter() < end:
            for name, play in plays.items():
                self.settle()
                start = time.perf_counter()
                play()
                samples[name].append(time.perf_counter() - start)
            rounds += 1
        self.settle()
        return {name: summary(s, calls) for name, s in samples.items()}

    def peak_bytes(self, call: Call) -> int:
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

    def machine(self) -> dict[str, object]:
        """What a row says of the machine that this clock times."""
        return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "kernel": cpu.kernel()}


class CudaClock:
    """A CUDA device's own time: events around a graph that holds ``calls`` calls.

    Two things would spoil short calls: a device that waits for the host between the events, and operands
    that are in its cache here but not in use. So between two timings the device reads 512 MiB, which takes
    it longer (some 150 us) than the host needs to issue what follows, and leaves nothing else in the cache
    (50 MiB on an H100). Reads, because written lines would be written back in the next call's time.
    Variants bring several copies of operands that are larger than the cache.
    """

    def __init__(self) -> None:
        self._filler = torch.zeros(128 * 2**20, device="cuda")

    def time(
        self, variants: Mapping[str, Call], seconds: float, calls: int = 1, least: int = 7
    ) -> dict[str, Timing]:
        """As ``HostClock.time``."""
        # What is not in a graph is no short call, and is not made several times over.
        times = {name: 1 if isinstance(call, Eager) else calls for name, call in variants.items()}
        plays = {name: self._playable(call, times[name]) for name, call in variants.items()}
        samples: dict[str, list[float]] = {name: [] for name in plays}
        for play in plays.values():
            play()
        torch.cuda.synchronize()
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < least or time.perf_counter() < end:
            events = {}
            for name, play in plays.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._filler.max()
                start.record()
                play()
                stop.record()
                events[name] = (start, stop)
            torch.cuda.synchronize()
            for name, (start, stop) in events.items():
                samples[name].append(start.elapsed_time(stop) / 1e3)
            rounds += 1
        return {name: summary(s, times[name]) for name, s in samples.items()}

    def _playable(self, call: Call, calls: int) -> Call:
        many = repeated(call, calls)
        with _side_stream():
            for _ in range(2):  # compiles, allocates, and is the warm-up that a capture asks for
                many()
        if isinstance(call, Eager):
            return many
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        return graph.replay

    def peak_bytes(self, call: Call) -> int:
        """As ``HostClock.peak_bytes``, from the counters of PyTorch's CUDA allocator."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def machine(self) -> dict[str, object]:
        """As ``HostClock.machine``."""
        return self._machine

    @functools.cached_property
    def _machine(self) -> dict[str, object]:
        device = torch.cuda.get_device_properties()
        return {
            "gpu": device.name,
            "multiprocessors": device.multi_processor_count,
            "l2_bytes": device.L2_cache_size,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cpu": cpu_model(),
            "kernel": triton.kernel(),
            "autotune": environment.read("NMKERN_TRITON_AUTOTUNE") is not None,
        }


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """A stream of its own that starts after, and ends before, the work around it."""
    stream, around = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(around)
    with torch.cuda.stream(stream):
        yield
    around.wait_stream(stream)


def _driver() -> str | None:
    """The version of NVIDIA's driver, which PyTorch does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.split("\n")[0].strip()
