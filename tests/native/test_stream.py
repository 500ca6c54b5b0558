"""The golden vectors against C++: the header on its own, and the weights that kernels multiply by."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nmkern import RandomMatrix, modulated_linear, sparse_project

HERE = Path(__file__).parent
VECTORS = HERE.parent / "vectors.txt"
LINES = [line.split() for line in VECTORS.read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_header_reproduces_every_vector(tmp_path):
    program = tmp_path / "stream_vectors"
    source = HERE / "stream_vectors.cpp"
    subprocess.run(["c++", "-std=c++20", "-O1", "-Wall", "-Werror", source, "-o", program], check=True)
    done = subprocess.run([program, VECTORS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{len(LINES)}\n")


def test_kernels_multiply_by_the_dense_vectors(backend, few):
    """One element at a time, as a 1 x 1 matrix at its place, from both sides."""
    checked = 0
    for _, family, seed, row, col, _, code in few((line for line in LINES if line[0] == "dense"), 12):
        if max(int(row), int(col)) == 2**34 - 1:
            continue  # the stream has the element; a matrix of 2^34 rows or columns is refused
        element = RandomMatrix(1, 1, seed=int(seed), family=family, row_offset=int(row), col_offset=int(col))
        want = np.float32(int(code)) * np.float32(element.factor)
        one = torch.ones(1, 1)
        assert modulated_linear(one, element).item() == modulated_linear(one, element.T).item() == want
        checked += 1
    assert checked > (20 if backend == "triton" else 200)


def test_kernels_draw_the_sparse_vectors(backend, few):
    checked = 0
    for _, seed, row, n, k, *columns in few((line for line in LINES if line[0] == "sparse"), 3, cuda=3):
        if int(n) > 100_000 or int(row) == 2**32 - 1:
            continue  # x would not fit, or the row is one that a matrix cannot have
        row_of = RandomMatrix(1, int(n), seed=int(seed), family="sparse", fan_in=int(k), row_offset=int(row))
        drawn = sparse_project(torch.ones(1, 1), row_of.T)[0].nonzero().flatten()
        assert drawn.tolist() == sorted(map(int, columns))
        checked += 1
    assert checked > (1 if backend in ("triton", "cuda") else 5)
