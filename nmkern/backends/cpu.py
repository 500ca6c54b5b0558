"""The cpu backend: C++ kernels in a native library, loaded when first needed.

The library is built by setup.py against PyTorch's stable ABI and registers the primitives for CPU
tensors. Where it was not built, or does not load, the reason is kept and told.
"""

import ctypes
import functools

import torch

from nmkern import environment
from nmkern.backends import build, packed, primitives

LIBRARY_PATH = build.PACKAGE / "_native.so"
BUILD_RECORD = build.PACKAGE / "native_build.json"
ISAS = ("amx", "avx512_bf16", "avx512", "avx2_subnormal", "avx2", "neon", "portable")

primitives.define("cpu")


@functools.cache
def build_record() -> dict[str, str]:
    """What setup.py wrote about the native build: ``built`` ("yes" or "no") and ``detail``."""
    return build.read(BUILD_RECORD)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The native library, or the reason why there is none."""
    if not LIBRARY_PATH.exists():
        return None, f"the native library was not built: {build_record()['detail']}"
    cap = environment.read("NMKERN_CPU_ISA")
    if cap is not None and cap not in ISAS:
        raise ValueError(f"NMKERN_CPU_ISA: expected one of {', '.join(ISAS)}, got {cap!r}")
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
        library = ctypes.CDLL(str(LIBRARY_PATH))  # the same handle, for the queries below
    except OSError as error:
        return None, f"the native library does not load: {error}"
    library.nmkern_cpu_isa.restype = ctypes.c_char_p
    library.nmkern_cpu_set_isa.argtypes = [ctypes.c_char_p]
    library.nmkern_cpu_set_isa.restype = ctypes.c_int
    if cap is not None and library.nmkern_cpu_set_isa(cap.encode()) != 0:
        return None, f"NMKERN_CPU_ISA={cap}: this CPU or this build has no {cap}"
    return library, None


def refusal(family: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a call cannot run here; None where it can."""
    if device != "cpu":
        return f"runs on CPU tensors, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {dtype}".replace("torch.", "")
    _, reason = _load()
    return reason


def isa() -> str:
    """The instruction set that the kernels use: one of ``ISAS``."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"cpu backend: {reason}")
    return library.nmkern_cpu_isa().decode()


def set_isa(name: str) -> None:
    """Force an instruction set of ``ISAS`` for the whole process; for tests and measurements.

    RuntimeError where this CPU does not have it.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"cpu backend: {reason}")
    if library.nmkern_cpu_set_isa(name.encode()) != 0:
        raise RuntimeError(f"isa: this CPU or this build has no {name!r}, it has {isa()!r}")


def everyday() -> packed.Everyday:
    """How everyday eager calls are made."""
    return packed.everyday("cpu")


def kernel() -> str:
    return f"cpu ({isa()})"
