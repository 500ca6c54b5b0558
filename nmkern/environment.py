"""The environment variables that nmkern reads: all of them, here and nowhere else.

None of them can change a weight. ``nmkern info`` prints this table.
"""

import functools
import os

VARIABLES = {
    "NMKERN_BACKEND": "force one backend for every call (cpu, cuda, triton, reference)",
    "NMKERN_CPU_ISA": "force CPU kernels: amx, avx512_bf16, avx512, avx2_subnormal, avx2, neon, portable",
    "NMKERN_TRITON_AUTOTUNE": "1: choose the tiles of Triton's kernels by timing, once per GPU and shape",
    "XDG_CACHE_HOME": "where those choices are kept, in nmkern/tiles (default: ~/.cache)",
    "TRITON_INTERPRET": "1: Triton's kernels run on CPU tensors too, in its interpreter (for tests)",
}


@functools.cache
def read(name: str) -> str | None:
    """The value of a variable of ``VARIABLES``; None where unset or empty.

    It is read once: a later change of the variable changes nothing (asking the system each time was an
    eighth of a small call).
    """
    assert name in VARIABLES, name
    return os.environ.get(name) or None
