"""The cuda backend: CUDA C++ kernels for dense layers, loaded when first needed.

The library is built by setup.py where there is nvcc. Its operators choose a kernel by the batch, once its
size is known, so that one graph of torch.compile serves every batch: mma.sync for small ones (of integers
for the smallest), wgmma for larger ones on Hopper, and elsewhere Triton's operators. The sparse projection
and FlyNet are its own at every batch, but for what has no room in a block's shared memory or in 64 MiB of
scratch.
"""

import ctypes
import functools
from typing import NamedTuple

import torch

from nmkern.backends import build, packed, primitives, triton
from nmkern.matrix import RandomMatrix
from nmkern.stream import DENSE_FAMILIES

LIBRARY_PATH = build.PACKAGE / "_cuda.so"
BUILD_RECORD = build.PACKAGE / "cuda_build.json"
LEAST_CAPABILITY = (8, 0)  # mma.sync in bfloat16

primitives.define("cuda")


@functools.cache
def build_record() -> dict[str, str]:
    """What setup.py wrote about the build of the library: ``built`` ("yes" or "no") and ``detail``."""
    return build.read(BUILD_RECORD)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason why there is none."""
    if not LIBRARY_PATH.exists():
        detail = build_record()["detail"]
        return None, (
            f"its library was not built: {detail}; to get it, reinstall nmkern with CUDA's nvcc on PATH"
        )
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
        library = ctypes.CDLL(str(LIBRARY_PATH))  # the same handle, for the queries below
    except OSError as error:
        return None, f"its library does not load: {error}"
    _declare(library)
    return library, None


def _declare(library: ctypes.CDLL) -> None:
    """The types of the queries that the library exports."""
    library.nmkern_cuda_archs.restype = ctypes.c_char_p
    found = (ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_int))
    library.nmkern_cuda_kernels.argtypes = [ctypes.c_int, *found]
    library.nmkern_cuda_kernels.restype = ctypes.c_char_p
    library.nmkern_cuda_set_small_rows.argtypes = [ctypes.c_int64]
    library.nmkern_cuda_set_small_rows.restype = None
    library.nmkern_cuda_set_overlap.argtypes = [ctypes.c_bool]
    library.nmkern_cuda_set_overlap.restype = None
    library.nmkern_cuda_set_fixed_point.argtypes = [ctypes.c_bool]
    library.nmkern_cuda_set_fixed_point.restype = None
    sizes, flag = [ctypes.c_int64] * 4, ctypes.c_bool
    library.nmkern_cuda_sparse_fits.argtypes = [ctypes.c_int, *sizes, flag, ctypes.POINTER(flag)]
    library.nmkern_cuda_sparse_fits.restype = ctypes.c_char_p


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"cuda backend: {reason}")
    return library


class Kernels(NamedTuple):
    """The library's kernels for a GPU."""

    small_rows: int  # rows of a batch that mma.sync's serves; 0 where it cannot run
    wide: bool  # whether wgmma's serves larger batches


def kernels(index: int | None = None) -> Kernels:
    """The kernels for a GPU (default: the current one). RuntimeError where CUDA's runtime has no answer."""
    rows, wide = ctypes.c_int64(0), ctypes.c_int(0)
    index = torch.cuda.current_device() if index is None else index
    error = _library().nmkern_cuda_kernels(index, ctypes.byref(rows), ctypes.byref(wide))
    if error is not None:
        raise RuntimeError(f"cuda backend: CUDA's runtime answers: {error.decode()}")
    return Kernels(rows.value, bool(wide.value))


def set_small_rows(rows: int | None) -> None:
    """Let the kernel for small batches serve other ones; for tests and measurements.

    None: its own choice again. Holds for the whole process, and is no part of a compiled graph.
    """
    if rows is not None and rows < 0:
        raise ValueError(f"rows: expected at least 0, got {rows}")
    _library().nmkern_cuda_set_small_rows(-1 if rows is None else rows)


def set_overlap(allowed: bool) -> None:
    """Let kernels begin while the one before them ends, on GPUs that can do that; for measurements.

    Holds for the whole process, from the next launch on.
    """
    _library().nmkern_cuda_set_overlap(allowed)


def set_fixed_point(allowed: bool) -> None:
    """Multiply few rows as integers, which is the choice, or as floats; for tests and measurements.

    Holds for the whole process, from the next call on.
    """
    _library().nmkern_cuda_set_fixed_point(allowed)


def refusal(family: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a call cannot run here; None where it can."""
    if device != "cuda":
        return f"runs on CUDA tensors, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {dtype}".replace("torch.", "")
    _, reason = _load()
    return reason or _gpu_refusal(family, dtype)


def _gpu_refusal(family: str, dtype: torch.dtype) -> str | None:
    """Why no GPU of this machine can run the kernels; None where one can."""
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch finds"
    try:
        found = [kernels(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:
        return str(error).removeprefix("cuda backend: ")
    if serving := [one for one in found if one.small_rows or one.wide]:
        dense = family in DENSE_FAMILIES
        if dense and all(one.wide for one in serving):
            return None
        reason = triton.refusal(family, dtype, "cuda")
        return reason and f"needs triton for {'larger batches' if dense else 'what has no room'}: {reason}"
    capability = torch.cuda.get_device_capability()
    has = f"{torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return f"needs a GPU of compute capability 8.0, {has}"
    arch = f"{capability[0]}{capability[1]}"
    built = _library().nmkern_cuda_archs().decode()
    return (
        f"its library was built for compute capabilities {built}, {has}; "
        f"to get it, reinstall nmkern with NMKERN_CUDA_ARCHS={arch}"
    )


def everyday() -> packed.Everyday:
    """How everyday eager calls are made."""
    return packed.everyday("cuda")


def hands_on(batch: int, index: int | None = None) -> str | None:
    """Why a batch goes on to Triton's kernels; None where it does not."""
    rows, wide = kernels(index)
    served = wide or batch <= rows
    return None if served else f"its kernel serves up to {rows} rows on this GPU, not {batch}"


def hands_on_sparse(matrix: RandomMatrix, batch: int | None, index: int | None = None) -> str | None:
    """Why a product with a sparse matrix goes on to Triton's kernels; None where it does not."""
    rows, cols = matrix.stream_shape
    fits = ctypes.c_bool(False)
    index = torch.cuda.current_device() if index is None else index
    error = _library().nmkern_cuda_sparse_fits(
        index, batch or 1, rows, cols, matrix.fan_in, matrix.transposed, ctypes.byref(fits)
    )
    if error is not None:
        raise RuntimeError(f"cuda backend: CUDA's runtime answers: {error.decode()}")
    if fits.value:
        return None
    shape = f"{rows} x {cols}{' transposed' * matrix.transposed} of fan-in {matrix.fan_in}"
    return f"its kernels have no room on this GPU for {shape} at batch {batch or 1}"


def kernel(batch: int | None = None, index: int | None = None) -> str:
    """What serves a batch, or batches, that are not handed on."""
    rows, wide = kernels(index)
    if batch is not None:
        return f"cuda ({'mma.sync' if batch <= rows else 'wgmma'})"
    return f"cuda (mma.sync up to {rows} rows; beyond, {'wgmma' if wide else 'triton'})"
