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


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as the system tells it, on x86 with its family and model.

    A virtual machine's is often the name of a line of products (AMD EPYC), of several generations.
    """
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    first = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    told = {key.strip(): value.strip() for key, _, value in first}
    name = told.get("model name") or platform.processor() or platform.machine()
    if told.keys() >= {"cpu family", "model"}:
        name += f" (family {told['cpu family']}, model {told['model']})"
    return name
