"""Meters of a call: what it allocates at most, and what is left when it ends.

On the CPU PyTorch's allocation profiler tells what its allocator held, and the system the highest resident
size, which sees all else; on a CUDA device the counters of PyTorch's allocator tell.
"""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # what the kernel wants written to forget the highest resident size


@dataclass(frozen=True)
class Usage:
    """Bytes beyond those before a call: at most, and at its end."""

    peak: int
    held: int


class AllocatorMeter:
    """PyTorch's allocator of the CPU, or of a CUDA device ("cuda": the current one).

    ``start`` and ``stop`` are not nested.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            with _quiet():
                self._profile.start()

    def stop(self) -> Usage:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            held = torch.cuda.memory_allocated(self.device)
            return Usage(peak - self._before, held - self._before)
        with _quiet():
            self._profile.stop()
        held = peak = 0
        events: Any = self._profile.profiler
        for event in events.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return Usage(peak, held)

    def measure(self, call: Callable[[], object]) -> Usage:
        self.start()
        try:
            call()
        finally:
            usage = self.stop()
        return usage


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps a line of PyTorch 2.13's profiler, which no option silences, off the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class ResidentMeter:
    """The resident size of this process, where the system lets its highest mark be set back (Linux)."""

    def __init__(self) -> None:
        try:
            _CLEAR.write_text(_RESET_PEAK)
            self.available = True
        except OSError:
            self.available = False

    def size(self) -> int | None:
        """Bytes now."""
        if not self.available:
            return None
        _give_back()
        return _status("VmRSS")

    def growth(self, call: Callable[[], object]) -> int | None:
        """How far beyond the size before ``call`` it rose; None where that cannot be told."""
        if not self.available:
            call()
            return None
        _give_back()
        _CLEAR.write_text(_RESET_PEAK)
        before = _status("VmHWM")
        call()
        return max(0, _status("VmHWM") - before)


def _give_back() -> None:
    """Hand what was freed back to the system, or the next call would take it without growing."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    return int(_STATUS.read_text().split(f"{key}:")[1].split()[0]) << 10
