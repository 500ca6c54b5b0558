"""The cuda backend: CUDA C++ kernels for dense layers and small batches, loaded when first needed.

The library is built by setup.py where there is nvcc. Its kernel is the right one up to ``most_rows`` rows;
its operators hand larger batches to Triton's, once their size is known, so that one graph of
torch.compile serves every batch. The sparse projection and FlyNet are theirs at every batch, but for what
has no room in a block's shared memory or in 64 MiB of scratch.
"""

import ctypes
import functools

import torch

from nmkern.backends import build, primitives, triton
from nmkern.matrix import RandomMatrix

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
    library.nmkern_cuda_most_rows.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
    library.nmkern_cuda_most_rows.restype = ctypes.c_char_p
    library.nmkern_cuda_set_most_rows.argtypes = [ctypes.c_int64]
    library.nmkern_cuda_set_most_rows.restype = None
    sizes, flag = [ctypes.c_int64] * 4, ctypes.c_bool
    library.nmkern_cuda_sparse_fits.argtypes = [ctypes.c_int, *sizes, flag, ctypes.POINTER(flag)]
    library.nmkern_cuda_sparse_fits.restype = ctypes.c_char_p


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"cuda backend: {reason}")
    return library


def most_rows(index: int | None = None) -> int:
    """Rows of a batch that the kernel serves on a GPU (default: the current one); 0 where it cannot run.

    RuntimeError where CUDA's runtime has no answer.
    """
    rows = ctypes.c_int64(0)
    index = torch.cuda.current_device() if index is None else index
    error = _library().nmkern_cuda_most_rows(index, ctypes.byref(rows))
    if error is not None:
        raise RuntimeError(f"cuda backend: CUDA's runtime answers: {error.decode()}")
    return rows.value


def set_most_rows(rows: int | None) -> None:
    """Let the kernel serve other batches than those it is right for; for tests and measurements.

    None: its own choice again. Holds for the whole process, and is no part of a compiled graph.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    _library().nmkern_cuda_set_most_rows(rows or 0)


def refusal(family: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a call cannot run here; None where it can."""
    if device != "cuda":
        return f"runs on CUDA tensors, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"computes float32, bfloat16 and float16, not {dtype}".replace("torch.", "")
    _, reason = _load()
    return reason or _gpu_refusal() or _triton_refusal(family, dtype)


def _gpu_refusal() -> str | None:
    """Why no GPU of this machine can run the kernels; None where one can."""
    if not torch.cuda.is_available():
        return "there is no GPU that PyTorch finds"
    try:
        if any(most_rows(index) for index in range(torch.cuda.device_count())):
            return None
    except RuntimeError as error:
        return str(error).removeprefix("cuda backend: ")
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


def _triton_refusal(family: str, dtype: torch.dtype) -> str | None:
    reason = triton.refusal(family, dtype, "cuda")
    return reason and f"needs triton for larger batches: {reason}"


def hands_on(batch: int, index: int | None = None) -> str | None:
    """Why a batch goes on to Triton's kernels; None where it does not."""
    rows = most_rows(index)
    return None if batch <= rows else f"its kernel serves up to {rows} rows on this GPU, not {batch}"


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


def kernel(index: int | None = None) -> str:
    return f"cuda (up to {most_rows(index)} rows; beyond, triton)"
