"""What runs a network: versions, the machine, and the kernels that serve it, for results.json."""

import platform

import torch

from nmkern.backends.selection import explain
from nmkern.machine import cpu_model, versions
from nmkern.models import FlyNet


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
