"""The triton backend compiled, on CUDA tensors: the formula's checks, the error bound, CUDA graphs."""

from functools import partial

import pytest
import torch
from formula import KINDS, Expected, arguments, exact_matrix, generator, integers, normals, stored_weights

import nmkern
from nmkern import RandomMatrix, modulated_linear, stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
FAMILIES = tuple(stream.DENSE_FAMILIES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def compiled():
    with nmkern.use_backend("triton"):
        yield


def run(x, matrix, named, dy):
    """Result and gradients, computed on the GPU and brought back."""
    leaves = {"x": x.cuda().requires_grad_()}
    moved = {}
    for name, value in named.items():
        moved[name] = value.cuda() if torch.is_tensor(value) else value
        if torch.is_tensor(value) and value.is_floating_point():
            leaves[name] = moved[name] = moved[name].requires_grad_()
    y = modulated_linear(leaves["x"], matrix, **moved)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.cuda())
    return y.detach().cpu(), {k: v.cpu() for k, v in zip(leaves, grads, strict=True)}


# A test each: together they compile some 350 kernels, which workers share.
@pytest.mark.parametrize(("rows", "kind"), list(zip((1, 5, 16, 17, 33, 64, 70, 130, 2), KINDS, strict=False)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_integers_give_exact_results_and_gradients(family, dtype, rows, kind):
    g = generator(rows)
    wide = exact_matrix(family, 104, 156, -10)[3:, 7:]
    for matrix in (wide, exact_matrix(family, 156, 104, -10)[7:, 3:].T):
        x, dy = integers((rows, 149), 1, g, dtype), integers((rows, 101), 1, g, dtype)
        named = arguments(kind, (rows,), matrix, partial(integers, limit=2, generator=g), g)
        named.pop("strength", None)
        want = Expected(x, matrix, named, dy)
        y, grads = run(x, matrix, named, dy)
        assert torch.equal(y, want.y.to(dtype))
        for name, grad in grads.items():
            assert torch.equal(grad, want.grads[name].to(grad.dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_float32_error_at_k_8192(family, transposed):
    matrix = RandomMatrix(*((8192, 96) if transposed else (96, 8192)), seed=4, family=family)
    matrix = matrix.T if transposed else matrix
    for rows in (1, 33, 200):
        x = normals((rows, 8192), generator(rows))
        want = x.double() @ stored_weights(matrix).T
        y = modulated_linear(x.cuda(), matrix).double().cpu()
        assert (y - want).norm() / want.norm() <= 2e-6


@pytest.mark.parametrize("rows", [4, 70])
def test_a_call_can_be_captured_in_a_cuda_graph(rows):
    matrix = RandomMatrix(300, 4100, seed=1)
    x = normals((rows, 4100), generator(1), torch.bfloat16).cuda()
    want = modulated_linear(x, matrix)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modulated_linear(x, matrix)
    graph.replay()
    assert torch.equal(y, want)


def test_repeats_give_the_same_bits():
    matrix = RandomMatrix(8192, 8192, seed=1)
    x = normals((7, 8192), generator(1), torch.bfloat16).cuda()
    first = modulated_linear(x, matrix)
    assert all(torch.equal(modulated_linear(x, matrix), first) for _ in range(5))
