"""What runs a command: versions, the machine, and the kernels that serve a network.

``nmkern train`` writes it into results.json, ``nmkern info`` prints it.
"""

import platform
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from nmkern import __version__, stream
from nmkern.backends.selection import explain
from nmkern.models import FlyNet


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


def kernels(model: FlyNet, device: str) -> dict[str, str]:
    """The kernel that serves each layer of ``model``. RuntimeError where none can."""
    layers = {"encoder": model.encoder.matrix, "decoder": model.decoder.matrix}
    return {name: explain(matrix, torch.float32, device).kernel for name, matrix in layers.items()}


def provenance(model: FlyNet, device: str) -> dict[str, object]:
    """What results.json says of the run beside its settings; in JSON's types."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "versions": versions(),
        "platform": {"system": platform.platform(), "cpu": cpu_model(), "gpu": gpu},
        "kernels": kernels(model, device),
    }
