"""The CUDA kernels as nvcc compiles them, executed on the CPU: host code and all, but for machine code.

The programs are those that run on a GPU. Beside wrong results they end with what a GPU would not do, or not
always: see machine.h.
"""

import shutil

import pytest
from native import device_programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc, CUDA's compiler"),
]


@pytest.mark.parametrize("target", ["90a", "80"])
@pytest.mark.parametrize("kernels", device_programs.KERNELS)
def test_what_nvcc_made_of_the_kernels_computes_the_product(kernels, target):
    assert device_programs.emulated(kernels, target) == (
        0,
        device_programs.printed(kernels, target),
    )
