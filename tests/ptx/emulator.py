"""PTX executed on the CPU: machine.h for Python.

    module = Module(ptx)
    module.launch("kernel", grid, threads, arguments)

Built with the C++ compiler when first asked for, and kept: build/ptx/<hash of sources and flags>.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build/ptx"
SOURCES = ("reader", "machine", "arithmetic", "memory", "warps", "tensor")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
_ERROR = 1000


def objects() -> list[Path]:
    """The machine's object files."""
    with _folder() as folder:
        return _compiled(folder, SOURCES)


@functools.cache
def _library() -> ctypes.CDLL:
    with _folder() as folder:
        made, parts = folder / "libptx.so", _compiled(folder, (*SOURCES, "library"))
        if not made.exists():
            _run(["c++", "-shared", "-pthread", *parts], made)
    return ctypes.CDLL(str(made))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where all is built, while no other process builds there."""
    told = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")]):
        told.update(path.read_bytes())
    folder = BUILT / told.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the file, even where this process is killed
        yield folder


def _compiled(folder: Path, names: Sequence[str]) -> list[Path]:
    made = {name: folder / f"{name}.o" for name in names}
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda name: _run(["c++", *FLAGS, "-c", HERE / f"{name}.cpp"], made[name]),
                (name for name, path in made.items() if not path.exists()),
            )
        )
    return list(made.values())


def _run(command: list, made: Path) -> None:
    part = made.with_suffix(".part")
    subprocess.run([*command, "-o", part], check=True)
    part.rename(made)


class Module:
    """Kernels in PTX; RuntimeError where one has an instruction that the machine does not know."""

    def __init__(self, text: str) -> None:
        self._handle = ctypes.c_void_p()
        error = ctypes.create_string_buffer(_ERROR)
        given = text.encode(), ctypes.byref(self._handle), error, ctypes.c_size_t(_ERROR)
        if _library().ptx_read(*given):
            raise RuntimeError(error.value.decode())

    def __del__(self) -> None:
        _library().ptx_free(self._handle)

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        threads: Sequence[int],
        arguments: Sequence[torch.Tensor | ctypes._SimpleCData | None],
        shared_bytes: int = 0,
    ) -> None:
        """Run all blocks; RuntimeError for what a GPU would not do, or not always.

        Arguments are tensors, which are all the memory that a kernel may touch, None for no pointer, and
        numbers of a type of ctypes.
        """
        parameters, memory = bytearray(), []
        for one in arguments:
            value = one
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                memory += [storage.data_ptr(), storage.nbytes()]
                value = ctypes.c_uint64(one.data_ptr())
            elif one is None:
                value = ctypes.c_uint64(0)
            size = ctypes.sizeof(value)
            parameters += bytes(-len(parameters) % size) + bytes(value)
        error = ctypes.create_string_buffer(_ERROR)
        whole = [(*given, *(1,) * (3 - len(given))) for given in (grid, threads)]
        failed = _library().ptx_launch(
            self._handle,
            name.encode(),
            *((ctypes.c_uint32 * 3)(*given) for given in whole),
            ctypes.c_int64(shared_bytes),
            bytes(parameters),
            ctypes.c_int64(len(parameters)),
            (ctypes.c_uint64 * len(memory))(*memory),
            ctypes.c_int64(len(memory) // 2),
            error,
            ctypes.c_size_t(_ERROR),
        )
        if failed:
            raise RuntimeError(f"{name}: {error.value.decode()}")
