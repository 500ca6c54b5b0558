"""The sparse projection's share of emulated_cuda.py."""

import pytest
import torch
from formula import generator, integers, stored_weights

import nmkern
from native import emulated_library
from native.emulated_library import CUDA
from nmkern import RandomMatrix
from nmkern.backends import cuda, primitives, triton

OP = primitives.overload("cuda", "sparse_matmul")


def project(x, matrix):
    return OP.redispatch(CUDA, x, *primitives.sparse_args(matrix))


def sparse(rows, cols, fan_in, seed=5):
    return RandomMatrix(rows, cols, seed=seed, family="sparse", fan_in=fan_in)


def check_the_formula(library):
    """Both ways, views of a matrix, dtypes, layouts, fan-in up to the number of columns."""
    before = library.emulated_calls()
    calls = 0
    for fan_in, rows in ((1, 3), (7, 40), (37, 2)):
        wide = sparse(70, 37, fan_in, seed=2**63 + fan_in)
        for number, matrix in enumerate((wide, wide.T, wide[3:, 5:], wide[3:60, 5:30].T)):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(number + fan_in) % 3]
            x = integers((rows, matrix.cols), 2, generator(number), dtype)
            want = (x.double() @ stored_weights(matrix).T).to(dtype)
            for like in (x, x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
                y = project(like, matrix)
                assert y.dtype == dtype and torch.equal(y, want), (fan_in, number)
                calls += 1
    every = torch.ones(1, 37).expand(6, 37)
    assert torch.equal(project(every, wide), torch.full((6, 70), 37.0))
    assert project(every[:0], wide).shape == (0, 70)
    assert library.emulated_calls() == before + calls + 2


def check_what_has_no_room(library):
    """Is Triton's, and explain says so."""
    matrix = sparse(6, 5000, 2)
    handed = []

    def taken(*args):
        handed.append(args)
        return args[0].new_full((args[0].shape[0], 6), 3.0)

    primitives.LIBRARY.impl("triton_sparse_matmul", taken, "CPU", allow_override=True)
    before = library.emulated_calls()
    x = torch.ones(3, 5000)
    assert torch.equal(project(x, matrix), torch.full((3, 6), 3.0))
    assert handed[0][0] is x or torch.equal(handed[0][0], x)
    assert handed[0][1:] == primitives.sparse_args(matrix)
    assert library.emulated_calls() == before
    assert cuda.hands_on_sparse(matrix, 3, 0) == (
        "its kernels have no room on this GPU for 6 x 5000 of fan-in 2 at batch 3"
    )
    assert cuda.hands_on_sparse(sparse(6, 900, 2), None, 0) is None
    large = sparse(2**20, 2**20, 7)
    assert "1048576 x 1048576 transposed of fan-in 7 at batch 1" in cuda.hands_on_sparse(large.T, None, 0)


def check_through_the_public_operator(library):
    primitives.LIBRARY.impl(
        "triton_sparse_matmul", triton.launcher("sparse_matmul"), "CPU", allow_override=True
    )
    matrix = sparse(21, 50, 4)[2:, 3:]
    g = generator(3)
    x, dy = integers((9, 47), 2, g).requires_grad_(), integers((9, 19), 2, g)
    before = library.emulated_calls()
    with emulated_library.serving():
        y = nmkern.sparse_project(x, matrix)
        grad = torch.autograd.grad(y, x, dy)[0]
    assert library.emulated_calls() == before + 2
    weights = stored_weights(matrix)
    assert torch.equal(y.detach(), (x.detach().double() @ weights.T).float())
    assert torch.equal(grad, (dy.double() @ weights).float())


def check_errors(library):
    matrix = sparse(7, 12, 3)
    for refused, x in (
        ("x: expected shape [4, 12]", torch.ones(4, 11)),
        ("x: expected float32, bfloat16 or float16", torch.ones(4, 12).double()),
    ):
        with pytest.raises(RuntimeError) as raised:
            project(x, matrix)
        assert refused in str(raised.value)
    library.emulated_error(7)
    with pytest.raises(RuntimeError, match="cuda backend: launching a kernel: error 7"):
        project(torch.ones(4, 12), matrix)
    assert library.emulated_guards() == 0


def check_all(library):
    check_the_formula(library)
    check_what_has_no_room(library)
    check_through_the_public_operator(library)
    check_errors(library)
