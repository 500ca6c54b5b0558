"""The bindings of csrc/cuda without a GPU: built over simulated warps, and called on CPU tensors."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has its own library for CUDA"),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The bindings over the simulation, and what stands for PyTorch's library for CUDA."""
    folder = tmp_path_factory.mktemp("simulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        flags = [flag for flag in runpy.run_path(str(ROOT / "setup.py"))["FLAGS"] if flag[:2] != "-O"]
    made, stub = folder / "simulated_cuda.so", folder / "libtorch_cuda.so"
    sources = [*(ROOT / "csrc/cuda").glob("*.cpp"), *HERE.glob("cuda_simulated*.cpp")]
    command = ["c++", *flags, "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wl,-Bsymbolic"]
    with_torch = [f"-I{TORCH / 'include'}", *sources, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*command, *with_torch, "-o", made], check=True)
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{stub.name}"]
    subprocess.run([*command, HERE / "torch_cuda_stub.c", "-o", stub], check=True)
    return made, stub


@pytest.mark.parametrize("with_stub", [True, False], ids=["cuda", "no cuda"])
def test_calls_on_simulated_warps(libraries, with_stub):
    made, stub = libraries
    done = subprocess.run(
        [sys.executable, HERE / "simulated_cuda.py", made, stub if with_stub else "none"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr
