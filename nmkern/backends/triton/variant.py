"""Launches of compiled kernels, without what Triton works out anew for each.

    values, integers and flags of a call -> key -> known: the compiled kernel is launched
                                                -> new: kernel[grid](...) chooses, compiles, launches; kept

``kernel[grid](...)`` binds and specializes every argument (14 us of product_kernel's 41), compares the
constants of the modules that the kernel reads (10), makes a key (4), and launches. A known kernel is launched
in 9.3, and a call of modulated_matmul, 64 x 64, M = 1, takes the host 19 us instead of 65; with all gains,
which prepares x in a kernel of its own, 37 instead of 103. (Triton 3.9 on one core of an x86-64 server, with
a driver that does nothing; Triton 3.6: 18 instead of 53, 34 instead of 90.)

The invariant: calls of one key are calls of which Triton chooses the same compiled kernel. Integers, flags
and constants are in the key by value; tensors and floats as Triton's own function specializes them (0.4 us a
tensor; on AMD, where the size of its storage matters too and Python asks, 2); so are the device, and the
settings that change what Triton compiles. Where Triton has another interface than is used here, in its
interpreter, and where something wants to see or to change what it chooses, ``kernel[grid](...)`` launches.
"""

import functools
from operator import attrgetter
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

try:
    from triton._C.libtriton import native_specialize_impl
    from triton.compiler import CompiledKernel, make_backend
except ImportError:  # as before Triton 3.6
    native_specialize_impl = None

# Whether ``CompiledKernel.run`` takes what it takes in every Triton from 3.6 to 3.9; of others nobody knows.
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
RUNS = (3, 6) <= VERSION <= (3, 9)

# Kernels that a variant keeps: for each matrix, batch and layout one, so that a bound is for those who
# change them all the time. A new one costs what it did without.
MOST = 1024


def _settings() -> Any:
    """What reads the settings that Triton compiles by; not all of its versions have each."""
    names = ("instrumentation_mode", "fpsan_homomorphic_casts")
    there = [f"compilation.{name}" for name in names if hasattr(knobs.compilation, name)]
    return attrgetter("runtime.debug", *there)


_settings_of = _settings()


@functools.cache
def _backend(device: int) -> Any:
    """Triton's compiler for a CUDA device, which says what it specializes tensors for."""
    return make_backend(driver.active.get_current_target())


class Variant:
    """A kernel with some of its constants, and the options that it is compiled with.

    The kernel's parameters are tensors (or None) and floats, then integers, then constants.
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.kernel = kernel
        self.constants = constants
        self.known: dict[tuple, tuple[Any, tuple]] = {}
        self._keeps = native_specialize_impl is not None and isinstance(kernel, triton.JITFunction)

    def __call__(
        self, grid: int, values: tuple[Tensor | float | None, ...], integers: tuple[int, ...], **flags: Any
    ) -> None:
        """Launch that many programs on the current device and stream; ``flags`` are the other constants."""
        if not self._keeps or self.kernel.pre_run_hooks or _inspected():
            self.kernel[(grid,)](*values, *integers, **flags, **self.constants)
            return
        device = driver.active.get_current_device()
        backend = _backend(device)
        special = [v if v is None else native_specialize_impl(backend, v, False, True, True) for v in values]
        key = (device, _settings_of(knobs), integers, *flags.items(), *special)
        known = self.known.get(key)
        if known is None:
            compiled = self.kernel[(grid,)](*values, *integers, **flags, **self.constants)
            self._keep(key, compiled, len(values) + len(integers), flags)
            return
        compiled, constants = known
        stream = driver.active.get_current_stream(device)
        if _hooked() or not RUNS:
            compiled[grid, 1, 1](*values, *integers, *constants, stream=stream)
        else:
            # What ``compiled[grid]`` does where there are no hooks, in 3.1 us instead of 6.7. What lies
            # beneath takes 1.4, and is another with each version of Triton.
            launch = (stream, compiled.function, compiled.packed_metadata, None, None, None)
            compiled.run(grid, 1, 1, *launch, *values, *integers, *constants)

    def _keep(self, key: tuple, compiled: Any, arguments: int, flags: dict[str, Any]) -> None:
        if not isinstance(compiled, CompiledKernel):  # a hook took it, or it is compiled elsewhere meanwhile
            return
        if len(self.known) >= MOST:
            self.known.clear()
        given = {**flags, **self.constants}
        self.known[key] = compiled, tuple(given[name] for name in self.kernel.arg_names[arguments:])


def _inspected() -> bool:
    """Whether a hook adds something of its own to what Triton chooses a compiled kernel by."""
    return getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None


def _hooked() -> bool:
    """Whether anything is called before or after each launch, as profilers have it."""
    runtime = knobs.runtime
    # A chain of hooks, which may be empty, or None, or a function.
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )
