"""What the CUDA kernels share with the host, compiled for it; and the kernels, where there is a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from native import device_programs

HERE = Path(__file__).parent
VECTORS = HERE.parent / "vectors.txt"
FLAGS = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Werror"]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


def run_program(folder, name, *arguments):
    program = folder / name
    subprocess.run(["c++", *FLAGS, HERE / f"{name}.cpp", "-o", program], check=True)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_registers_hold_the_dense_vectors(tmp_path):
    dense = sum(line.startswith("dense ") for line in VECTORS.read_text().splitlines())
    assert run_program(tmp_path, "cuda_vectors", VECTORS) == (0, f"{dense}\n")


def test_plans_keep_a_gpu_at_work(tmp_path):
    assert run_program(tmp_path, "plans") == (0, "passed\n")


needs_gpu = (
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
)


def build_for_gpu(kernels):
    """The program that runs the cases on this GPU, and what it prints."""
    target = device_programs.arch(torch.cuda.get_device_capability())
    return device_programs.program(kernels, target), device_programs.printed(kernels, target)


@pytest.mark.gpu
@pytest.mark.nvcc
@pytest.mark.parametrize("kernels", [pytest.param(name, marks=needs_gpu) for name in device_programs.KERNELS])
def test_a_gpu_computes_the_same_cases(kernels):
    program, printed = build_for_gpu(kernels)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, printed)


@pytest.mark.slow
@pytest.mark.sanitizer
@pytest.mark.parametrize("kernels", [pytest.param(name, marks=needs_gpu) for name in device_programs.KERNELS])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer")
def test_the_sanitizer_finds_nothing(tmp_path, kernels, tool):
    program, printed = build_for_gpu(kernels)
    told = tmp_path / f"{tool}-{kernels}.txt"
    status = device_programs.watch(program, tool, told)
    assert status == 0 and printed in told.read_text(), told.read_text()[-4000:]
