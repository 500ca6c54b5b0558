"""``nmkern info``: versions, machine, backends with their kernels or refusals, environment.

It needs nothing beyond the package itself, so that it can tell what is missing.
"""

import argparse
from collections.abc import Mapping
from types import ModuleType

import torch

from nmkern import environment
from nmkern.backends import cpu, cuda
from nmkern.backends.selection import BACKENDS
from nmkern.cli.usage import user_errors
from nmkern.machine import cpu_model, versions

_EPILOG = """\
examples:
  nmkern info
  NMKERN_BACKEND=reference nmkern info
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "info",
        help="show versions, kernels of this machine, and the environment",
        description="Show versions, which backend runs on this machine (float32, family uniform) with "
        "its kernel, why others do not, and the environment variables that nmkern reads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with user_errors():
        sections: dict[str, Mapping[str, object]] = {
            "versions": {name: value or "absent" for name, value in versions().items()},
            "machine": _machine(),
            "backends, on CPU tensors": {name: _kernel(b, "cpu") for name, b in BACKENDS.items()},
            "backends, on CUDA tensors": {name: _kernel(b, "cuda") for name, b in BACKENDS.items()},
            "native library": cpu.build_record(),
            "CUDA library": cuda.build_record(),
            "environment": {
                name: f"{environment.read(name) or 'unset'}  ({purpose})"
                for name, purpose in environment.VARIABLES.items()
            },
        }
    for title, entries in sections.items():
        _print_section(title, entries)
    return 0


def _machine() -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_model(),
        "cpu capability": f"{torch.backends.cpu.get_cpu_capability()} (PyTorch's kernels)",
        "torch threads": str(torch.get_num_threads()),
        "gpu": ", ".join(gpus) or "none that PyTorch finds",
    }


def _kernel(backend: ModuleType, device: str) -> str:
    """The kernel, which names the instruction set where the backend has several, or the refusal."""
    reason = backend.refusal("uniform", torch.float32, device)
    if device == "cuda" and reason is None and not torch.cuda.is_available():
        reason = "no GPU that PyTorch finds"
    return backend.kernel() if reason is None else f"refuses: {reason}"


def _print_section(title: str, entries: Mapping[str, object]) -> None:
    width = max(map(len, entries))
    print(title)
    for name, value in entries.items():
        print(f"  {name:<{width}}  {value}")
