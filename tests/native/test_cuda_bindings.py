"""The library for CUDA without a GPU: bindings, host code and PTX, called on CPU tensors."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from native import device_programs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc, CUDA's compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has its own library for CUDA"),
]


TARGET = "90a"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The library over a runtime that executes PTX, and what stands for PyTorch's library for CUDA."""
    folder = tmp_path_factory.mktemp("emulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        flags = runpy.run_path(str(ROOT / "setup.py"))["FLAGS"]
    made, stub = folder / "emulated_cuda.so", folder / "libtorch_cuda.so"
    sources = [*(ROOT / "csrc/cuda").glob("*.cpp"), HERE / "emulated_guard.cpp"]
    command = ["c++", *flags, "-w", "-fPIC", "-shared", "-pthread", "-Wl,-Bsymbolic"]
    with_torch = [f"-I{TORCH / 'include'}", *sources, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    objects = device_programs.emulated_objects(TARGET)
    subprocess.run([*command, *with_torch, *objects, "-o", made], check=True)
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}"]
    subprocess.run([*command, HERE / "torch_cuda_stub.c", "-o", stub], check=True)
    return made, stub, device_programs.emulation(objects[-1], TARGET)


@pytest.mark.parametrize("with_stub", [True, False], ids=["cuda", "no cuda"])
def test_calls_without_a_gpu(libraries, with_stub):
    made, stub, environment = libraries
    done = subprocess.run(
        [sys.executable, HERE / "emulated_cuda.py", made, stub if with_stub else "none"],
        env={**environment, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr
