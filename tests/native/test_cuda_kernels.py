"""The CUDA kernels' own code, compiled for the host: no GPU is needed, nor nvcc."""

import shutil
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_blocks_of_every_kernel_compute_the_product(tmp_path):
    """On a simulated warp: 6 kernels' directions, ragged sizes, splits, gains; outputs to the bit."""
    assert run_program(tmp_path, "skinny_block") == (0, "96 cases, 42 kernels\n")
