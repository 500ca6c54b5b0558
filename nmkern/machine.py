"""What runs the code: versions of everything that a result may depend on, and the CPU's name."""

import platform
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from nmkern import __version__, stream


def versions() -> dict[str, str | int | None]:
    """Versions by name; None for Triton where it is not installed."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "nmkern": __version__,
        "stream": stream.VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "numpy": np.__version__,
    }


def cpu_model() -> str:
    """The CPU's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
