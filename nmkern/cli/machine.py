"""What runs a network: versions, the machine, and the kernels that serve it, for results.json."""

import platform

import torch

from nmkern.backends import selection
from nmkern.machine import cpu_model, versions


def kernels(device: str) -> dict[str, str]:
    """The kernel of each layer of a FlyNet: one for the whole network. RuntimeError where there is none."""
    backend = selection.select("flynet", torch.float32, torch.device(device).type)
    return dict.fromkeys(("encoder", "decoder"), selection.BACKENDS[backend].kernel())


def provenance(device: str) -> dict[str, object]:
    """What results.json says of the run beside its settings; in JSON's types."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "versions": versions(),
        "platform": {"system": platform.platform(), "cpu": cpu_model(), "gpu": gpu},
        "kernels": kernels(device),
    }
