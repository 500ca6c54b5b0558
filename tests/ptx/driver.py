"""A driver for Triton without a GPU: what is compiled for one is executed by emulator.py, on CPU tensors.

    install(90)    before the first kernel is launched, without TRITON_INTERPRET

Triton binds, specializes and compiles as ever, to PTX; only ptxas, which turns that into machine code, is
left out.
"""

import ctypes
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from ptx import emulator

_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float, "i1": ctypes.c_int8}
_SHARED = {80: 163 << 10, 90: 227 << 10}


class Utils:
    """What Triton asks of the library that loads machine code."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple:
        module = emulator.Module(ptx.decode())
        return module, (name, module), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[self.arch], "multiprocessor_count": 4, "warpSize": 32}


class Launcher:
    """Of a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.threads = 32 * metadata.num_warps
        self.shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, function: tuple, *rest: Any) -> None:
        name, module = function
        arguments = rest[4:]
        assert len(arguments) == len(self.kinds)
        given = []
        for kind, value in zip(self.kinds, arguments, strict=True):
            if kind == "constexpr":
                continue
            given.append(value if kind.startswith("*") else _NUMBERS[kind](value))
        # Scratch of Triton's own, which no kernel here has, and of its profiler's.
        module.launch(name, (x, y, z), (self.threads,), [*given, None, None], self.shared)


class Driver:
    """One device with one stream."""

    launcher_cls = Launcher

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.utils = Utils(arch)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def install(arch: int) -> None:
    """Have every kernel of this process compiled for sm_``arch``, and emulated."""
    driver.set_active(Driver(arch))
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode()
    # A cache of cubins must not be taken for one of these.
    triton.knobs.cache.dir = str(emulator.BUILT / f"triton-{triton.__version__}")
