"""The environment variables that nmkern reads: all of them, here and nowhere else.

None of them can change a weight. ``nmkern info`` prints this table.
"""

import functools
import os

VARIABLES = {
    "NMKERN_BACKEND": "force one backend for every call (reference, cpu)",
    "NMKERN_CPU_ISA": "instruction set of the CPU kernels (avx512_bf16, avx512, avx2, portable)",
}


@functools.cache
def read(name: str) -> str | None:
    """The value of a variable of ``VARIABLES``; None where unset or empty.

    It is read once: a later change of the variable changes nothing (asking the system each time was an
    eighth of a small call).
    """
    assert name in VARIABLES, name
    return os.environ.get(name) or None
