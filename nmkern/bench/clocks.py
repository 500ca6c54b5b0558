"""The two clocks: the host's, and a CUDA device's events around replayed graphs.

Both call the variants in turn, ours and its rivals, so that drift of the machine hits all alike, and
return the seconds of a call in each of those interleaved rounds. All else about a measurement (what,
checked how, written where) is in ``harness`` and the same for both.
"""

import contextlib
import ctypes
import functools
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nmkern import environment
from nmkern.backends.selection import explain
from nmkern.machine import cpu_model
from nmkern.matrix import RandomMatrix
from nmkern.memory.meters import AllocatorMeter

Call = Callable[[], object]
Samples = NDArray[np.float64]

_LEAST = 7  # rounds that every variant is in, and
_LEAST_LONG = 3  # where a round takes longer than the time for all
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_PAUSE = 0.05  # seconds until the threads of another library sleep, or ours


@dataclass(frozen=True)
class Eager:
    """A call that a CUDA graph cannot hold (it copies from the host, or moves a generator)."""

    call: Call

    def __call__(self) -> object:
        return self.call()


@dataclass(frozen=True)
class Apart(Eager):
    """A call that leaves the processor's threads in another state than ours does.

    Libraries with threads of their own, which spin for a while once they have worked: without a pause
    NumPy's BLAS made the next call of ours take 3.7 ms instead of 0.08 (two cores). And long work of one
    thread, after which ours have to wake up.
    """


def repeated(call: Call, times: int) -> Call:
    """``call`` several times over, for calls that are shorter than a clock can tell."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, as it does for a loop of one kind of call; False where there is no glibc.

    With its defaults, a rival's large temporaries that are freed give the top of the heap back to the system,
    and each result of the next call is fresh pages: the projection's 4 MB took 0.84 ms instead of 0.45.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**30) and mallopt(_MMAP_THRESHOLD, 2**25))


class HostClock:
    """Wall time on the host. ``settle`` waits for what the calls left running, outside of the time."""

    def __init__(self, settle: Call = lambda: None) -> None:
        self.settle = settle
        keep_freed_memory()

    def time(self, variants: Mapping[str, Call], seconds: float, calls: int = 1) -> dict[str, Samples]:
        """Seconds of a call of each variant, one a round, for about ``seconds`` in all.

        Each is in 7 rounds at least, or in 3 where one round is longer than ``seconds``. Those that are
        ``Apart`` come after the others, each on its own, for as long as the others had each.
        """
        plays = {name: repeated(call, calls) for name, call in variants.items()}
        together = {name: play for name, play in plays.items() if not isinstance(variants[name], Apart)}
        samples = self._rounds(together, seconds)
        for name, play in plays.items():
            if name not in together:
                time.sleep(_PAUSE)  # our threads spin too
                samples |= self._rounds({name: play}, seconds / len(together))
        if len(together) < len(plays):
            time.sleep(_PAUSE)
        return {name: np.array(samples[name]) / calls for name in plays}

    def _rounds(self, plays: Mapping[str, Call], seconds: float) -> dict[str, list[float]]:
        start = time.perf_counter()
        for play in plays.values():
            play()
        least = _LEAST if time.perf_counter() - start < seconds else _LEAST_LONG
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
        return samples

    def peak_bytes(self, call: Call) -> int:
        """The most that PyTorch's allocator held during ``call`` beyond what it held before."""
        call()
        return AllocatorMeter("cpu").measure(call).peak

    def machine(self) -> dict[str, object]:
        """What a row says of the machine that this clock times."""
        return {"cpu": cpu_model(), "threads": torch.get_num_threads(), "kernel": _kernel("cpu")}


class CudaClock:
    """A CUDA device's own time: events around a graph that holds ``calls`` calls.

    Two things would spoil short calls: a device that waits for the host between the events, and operands
    that are in its cache here but not in use. So between two timings the device reads 512 MiB, which takes
    it longer (some 150 us) than the host needs to issue what follows, and leaves nothing else in the cache
    (50 MiB on an H100). Reads, because written lines would be written back in the next call's time.
    Variants bring several copies of operands that are larger than the cache.

    Calls in a graph follow each other at once. On Hopper the first kernel of one of ours may begin while the
    last of the one before ends, as in a chain of our layers, not after another library's kernel.
    """

    def __init__(self) -> None:
        self._filler = torch.zeros(128 * 2**20, device="cuda")

    def time(
        self, variants: Mapping[str, Call], seconds: float, calls: int = 1, least: int = _LEAST
    ) -> dict[str, Samples]:
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
        return {name: np.array(found) / times[name] for name, found in samples.items()}

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
        return AllocatorMeter("cuda").measure(call).peak

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
            "kernel": _kernel("cuda"),
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


def _kernel(device: str) -> str:
    return explain(RandomMatrix(1, 1, seed=0), device=device).kernel


def _driver() -> str | None:
    """The version of NVIDIA's driver, which PyTorch does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.split("\n")[0].strip()
