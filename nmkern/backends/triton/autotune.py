"""NMKERN_TRITON_AUTOTUNE=1: the tile of a product, chosen by timing on the device at hand, once.

    first call of a class -> every candidate timed -> the fastest, kept in a JSON file -> later calls, runs

A class is what a tile's speed depends on: family, orientation, dtypes, banks, and the sizes to the next
power of two. The file names the GPU and the versions of Triton and nmkern, and lies in XDG_CACHE_HOME (or
~/.cache)/nmkern. The invariant: a choice changes no bit of a result, for all candidates of a call sum in
the same order (see ``configs``); what is timed writes what the call itself writes, or the same over it.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
import triton
import triton.testing

from nmkern import __version__, environment
from nmkern.backends.triton.configs import Tile


def enabled(device: torch.device) -> bool:
    """Whether calls on ``device`` choose their tiles; in an interpreter there is nothing to time."""
    return environment.read("NMKERN_TRITON_AUTOTUNE") == "1" and device.type == "cuda"


class Choices:
    """Tiles by class, in memory and in a file that other processes may write to as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._read()

    def tile(self, key: str, candidates: Sequence[Tile], seconds: Callable[[Tile], float]) -> Tile:
        """The choice for a class: known, or the one of least ``seconds``, which is then written."""
        known = self.known(key, candidates)
        if known is None:
            known = self._known[key] = min(candidates, key=seconds)
            self._write()
        return known

    def known(self, key: str, candidates: Sequence[Tile]) -> Tile | None:
        """The choice for a class; None where there is none, or one that is no candidate any more."""
        known = self._known.get(key)
        return known if known in candidates else None

    def _read(self) -> dict[str, Tile]:
        # A file that is missing, cut off or of another kind costs a measurement, not an error.
        try:
            return {key: Tile(*fields) for key, fields in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        """Add to what is in the file by now, and replace it at once; no file where it cannot be written."""
        self._known = {**self._read(), **self._known}
        lines = [f"{json.dumps(key)}: {json.dumps(astuple(t))}" for key, t in sorted(self._known.items())]
        new = self.path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            new.replace(self.path)


@functools.cache
def choices(gpu: str) -> Choices:
    """The choices that were made on GPUs of that name, with these versions."""
    name = f"{gpu}-triton-{triton.__version__}-nmkern-{__version__}.json"
    name = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    folder = environment.read("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Choices(Path(folder, "nmkern", "tiles", name))


def tile_for(
    device: torch.device, key: str, candidates: Sequence[Tile], launch: Callable[[Tile], object]
) -> Tile:
    """The tile for a call of class ``key`` on a CUDA device, timed with ``launch`` if it is not known."""
    made = choices(torch.cuda.get_device_name(device))
    if torch.cuda.is_current_stream_capturing():  # no place to wait for a measurement: it is not kept
        return made.known(key, candidates) or candidates[0]
    return made.tile(key, candidates, lambda tile: seconds_of(lambda: launch(tile)))


def seconds_of(call: Callable[[], object]) -> float:
    """The median time of a call on the device; infinite where it asks for more than the device has.

    Between two calls Triton's own benchmark clears the cache, which also keeps the device busy while the
    host issues the next: else a call that is shorter than its launch would measure the host.
    """
    try:
        return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3
    except triton.runtime.errors.OutOfResources:
        return float("inf")
