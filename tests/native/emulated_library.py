"""The library for CUDA without a GPU: bindings and host code, over a runtime that executes PTX (tests/ptx).

    load(90)              in this process, whose cuda backend is then that of a GPU of compute capability 9.0
    with serving(): ...   for CPU tensors

Built when first asked for, and kept beside the PTX of device_programs.py.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import nmkern
from native import device_programs
from nmkern.backends import cuda, primitives

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).parent
GUARD, STUB = HERE / "emulated_guard.cpp", HERE / "torch_cuda_stub.c"
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
EVERY_BATCH = 10**6


class Built(NamedTuple):
    library: Path
    stub: Path  # stands for PyTorch's library for CUDA
    environment: dict[str, str]  # of a process that loads them


def refusal() -> str | None:
    """Why it cannot be built or loaded; None where it can."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc, CUDA's compiler"
    if torch.version.cuda is not None:
        return "this PyTorch has its own library for CUDA"
    return None


def built(target: str) -> Built:
    """With the kernels as nvcc compiles them for GPUs of the architecture ``target``."""
    objects = device_programs.emulated_objects(target)
    flags = [*_flags(), "-w", "-fPIC", "-shared", "-pthread", "-Wl,-Bsymbolic", f"-I{TORCH / 'include'}"]
    told = hashlib.sha256(repr((flags, torch.__version__)).encode() + STUB.read_bytes())
    folder = objects[-1].parent / told.hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    library, stub = folder / "emulated_cuda.so", folder / "libtorch_cuda.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the file, even where this process is killed
        if not stub.exists():
            sources = [*(ROOT / "csrc/cuda").glob("*.cpp"), GUARD]
            _run(["c++", *flags, *sources, f"-L{TORCH / 'lib'}", "-ltorch_cpu", *objects], library)
            _run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", STUB], stub)
    return Built(library, stub, device_programs.emulation(objects[-1], target))


def _flags() -> list[str]:
    """Those of setup.py."""
    import setuptools  # which takes a while, and is seldom needed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path("setup.py")["FLAGS"]


def _run(command: list, made: Path) -> None:
    part = made.with_suffix(".part")
    subprocess.run([*command, "-o", part], check=True)
    part.rename(made)


def opened(path: str | Path) -> ctypes.CDLL:
    """The library as the cuda backend's own, its operators registered for CPU tensors too.

    Its environment is that of ``Built``.
    """
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.emulated_calls.restype = library.emulated_launches.restype = ctypes.c_int64
    cuda._declare(library)
    cuda._load = lambda: (library, None)
    for primitive in primitives.SCHEMAS:
        kernel = functools.partial(primitives.overload("cuda", primitive).redispatch, CUDA)
        primitives.LIBRARY.impl(f"cuda_{primitive}", kernel, "CPU")
    return library


@functools.cache
def load(arch: int) -> ctypes.CDLL:
    """The library, for a GPU of architecture ``arch``, all of whose dense products are its own."""
    made = built(device_programs.arch(divmod(arch, 10)))
    os.environ.update({name: made.environment[name] for name in ("NMKERN_PTX", "NMKERN_PTX_ARCH")})
    library = opened(made.library)
    ctypes.CDLL(str(made.stub))
    cuda.set_small_rows(None if cuda.kernels(0).wide else EVERY_BATCH)
    return library


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """CPU tensors are the cuda backend's, which is forced."""
    refuses = cuda.refusal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_gpu_refusal", lambda *_: None)
        patch.setattr(cuda, "refusal", lambda family, dtype, device: refuses(family, dtype, "cuda"))
        with nmkern.use_backend("cuda"):
            yield
