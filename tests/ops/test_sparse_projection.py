"""sparse_project: the sums of the drawn columns, and their transpose, exactly, on every backend."""

import math

import pytest
import torch
from formula import UNIT, generator, integers, normals, poisoned, stored_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from nmkern import RandomMatrix, sparse_project, stream
from nmkern.backends import cuda, primitives

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse(rows, cols, fan_in, **arguments):
    return RandomMatrix(rows, cols, family="sparse", fan_in=fan_in, **{"seed": 5, **arguments})


@st.composite
def views(draw):
    """A view of a sparse matrix: slices, transposes, offsets, from one element up."""
    rows, cols = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    fan_in = draw(st.one_of(st.integers(1, min(cols, 9)), st.just(cols)))
    view = sparse(rows, cols, fan_in, seed=draw(st.sampled_from([0, 2**32, 2**64 - 1])))
    for _ in range(draw(st.integers(0, 2))):
        top, left = (draw(st.integers(0, size - 1)) for size in view.shape)
        bottom, right = draw(st.integers(top + 1, view.rows)), draw(st.integers(left + 1, view.cols))
        view = view[top:bottom, left:right]
        view = view.T if draw(st.booleans()) else view
    return view


def run(x, matrix, dy):
    x = x.detach().requires_grad_()
    y = sparse_project(x, matrix)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def check_integers(x, matrix, dy):
    """Sums of at most 90 integers of modulus 8, times a power of two: exact in float32 in any order."""
    weights = matrix.materialize(torch.float64)
    y, dx = run(x, matrix, dy)
    assert torch.equal(y, (x.double() @ weights.T).to(x.dtype))
    assert torch.equal(dx, (dy.double() @ weights).to(x.dtype))


@given(
    matrix=views(),
    lead=st.sampled_from([(0,), (1,), (2,), (7,), (33,), (), (2, 3), (2, 0)]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    count=st.integers(1, 8),
)
@settings(max_examples=60)
def test_any_view_shape_and_layout_exactly(backend, threads, passed_over, matrix, lead, dtype, layout, count):
    if passed_over(8):
        return
    threads(count, backend)
    g = generator(matrix.rows)

    def make(size):
        value = integers((*lead, size), 8, g, dtype)
        if layout == "transposed" and lead:
            return poisoned(value.transpose(0, -1).contiguous()).transpose(0, -1)
        if layout == "strided":
            buffer = torch.full((*lead, 2 * size + 1), float("nan"), dtype=dtype)
            buffer[..., 1::2] = value
            return buffer[..., 1::2]
        if layout == "expanded":
            return value[..., :1].clone().expand(value.shape)
        return poisoned(value)

    check_integers(make(matrix.cols), matrix, make(matrix.rows))


@given(matrix=views(), dtype=st.sampled_from(DTYPES))
def test_the_identity_gives_the_weights(backend, passed_over, matrix, dtype):
    if passed_over(5):
        return
    want = matrix.materialize(dtype)
    assert torch.equal(sparse_project(torch.eye(matrix.cols, dtype=dtype), matrix).T, want)
    assert torch.equal(sparse_project(torch.eye(matrix.rows, dtype=dtype), matrix.T), want)


@pytest.mark.parametrize("rows", [1, 5, 128])
def test_the_paper_sizes(backend, threads, few, rows):
    if not few([rows], 2, start=rows // 128 + 1):
        return
    g = generator(rows)
    matrix = sparse(7840, 784, 7)
    for count in few((1, 2, 5), 3):
        threads(count, backend)
        check_integers(integers((rows, 784), 8, g), matrix, integers((rows, 7840), 8, g))


@pytest.mark.parametrize(
    ("rows", "cols", "fan_in"),
    [(70, 2000, 1500), (20_000, 500, 64), (40, 70_000, 5)],
    ids=["many draws", "many columns drawn", "wide inputs"],
)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_larger_than_any_scratch(backend, threads, few, rows, cols, fan_in, transposed):
    """Kernels hold some MiB of drawn columns and of inputs at a time, and compare only so many draws.

    Sums of at most 20000 integers of modulus 8, below 2^24.
    """
    if backend == "reference" and fan_in > 1000:
        pytest.skip("the reference compares each draw with all others, and has no scratch to pass")
    if backend == "triton" and fan_in > 5:
        pytest.skip("minutes in the interpreter; tests/backends/test_triton_sparse.py has less scratch")
    matrix = sparse(rows, cols, fan_in, seed=77)
    matrix = matrix.T if transposed else matrix
    if backend == "cuda" and (reason := cuda.hands_on_sparse(matrix, 70, 0)):
        pytest.skip(f"cuda: {reason}")
    threads(3, backend)
    weights = stored_weights(matrix).float()
    for batch in few((2, 70), 2, start=1, cuda=2):
        x = integers((batch, matrix.cols), 8, generator(batch))
        assert torch.equal(sparse_project(x, matrix), x @ weights.T)


def test_far_corners_of_a_matrix_of_1e19_elements(backend):
    """Draws out of 2^32 - 1 columns are kept apart in all of their bits."""
    size = 2**32 - 1
    for offset in (2**31, size - 1):
        row = sparse(size, size, 3, seed=2**63 + 1)[offset : offset + 1]
        for column in stream.sparse_columns(row.seed, offset, size, 3).tolist():
            left = max(0, column - 5)
            view = row[:, left : left + 9]
            want = view.materialize()
            assert want[0, column - left] == 1
            assert torch.equal(sparse_project(torch.eye(1), view.T), want)
            assert torch.equal(sparse_project(torch.eye(view.cols), view).T, want)


@pytest.mark.parametrize("fan_in", [1, 4, 90, 200])
def test_rounding(backend, few, fan_in):
    """fan_in - 1 additions and one product, each off by at most u = 2^-24, then one rounding to the dtype."""
    if backend == "triton" and fan_in == 200:
        return  # a fifth of a second a draw
    matrix = sparse(50, 200, fan_in, scale=1 / math.sqrt(fan_in))
    weights = matrix.materialize(torch.float64)
    for dtype in few(DTYPES, 3, start=fan_in):
        g = generator(fan_in)
        x, dy = normals((6, 200), g, dtype), normals((6, 50), g, dtype)
        y, dx = run(x, matrix, dy)
        # Transposed, a column is in 50 rows at most.
        for found, value, w, terms in ((y, x, weights.T, fan_in), (dx, dy, weights, 50)):
            exact, magnitude = value.double() @ w, value.double().abs() @ w.abs()
            d = (terms + 1) * UNIT[torch.float32] * magnitude
            assert ((exact - d).to(dtype) <= found).all() and (found <= (exact + d).to(dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_give_the_same_bits_on_any_number_of_threads(backend, threads, few, dtype):
    """The order of a sum is that of the draws, or of the rows: no thread is part of it."""
    matrix = sparse(1000, 300, 9)
    g = generator(1)
    x, dy = normals((20, 300), g, dtype), normals((20, 1000), g, dtype)
    first = run(x, matrix, dy)
    for count in few((1, 2, 3, 8), 4):
        threads(count, backend)
        assert all(torch.equal(a, b) for a, b in zip(run(x, matrix, dy), first, strict=True))


def test_float64_is_held_in_float64():
    matrix = sparse(40, 60, 11, scale=0.5)
    x = normals((3, 60), generator(1), torch.float64)
    want = x @ matrix.materialize(torch.float64).T
    assert (sparse_project(x, matrix) - want).abs().max() <= 11 * 2.0**-53 * want.abs().max() * 4


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_nan_and_infinities_reach_the_sums_they_are_in(backend, rows):
    matrix = sparse(80, 30, 4)
    weights = matrix.materialize()
    for value in (float("nan"), float("inf"), float("-inf")):
        x = integers((rows, 30), 8, generator(rows))
        clean = sparse_project(x, matrix)
        x[rows // 2, 11] = value
        y = sparse_project(x, matrix)
        hurt = torch.zeros(rows, 80, dtype=torch.bool)
        hurt[rows // 2] = weights[:, 11] != 0
        assert 0 < hurt.sum() < 80
        assert torch.equal(y[~hurt], clean[~hurt])
        assert torch.equal(y[hurt].nan_to_num(nan=1.5), torch.full_like(y[hurt], value).nan_to_num(nan=1.5))


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_gradcheck_and_gradgradcheck(transposed):
    matrix = sparse(5, 7, 3, scale=0.7)[1:, 2:]
    matrix = matrix.T if transposed else matrix
    g = generator(2)
    x = normals((3, matrix.cols), g, torch.float64).requires_grad_()
    dy = normals((3, matrix.rows), g, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(sparse_project, (x, matrix), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(sparse_project, (x, matrix), [dy], check_fwd_over_rev=True)


def test_torch_func_is_exact_on_integers(backend_once):
    matrix = sparse(9, 6, 3)
    weights = matrix.materialize()
    x = integers((4, 6), 8, generator(3))

    def loss(x):
        return (sparse_project(x, matrix) ** 2).sum()

    vmap = torch.func.vmap
    project = lambda row: sparse_project(row, matrix)  # noqa: E731
    assert torch.equal(vmap(project)(x), x @ weights.T)
    assert torch.equal(vmap(project, 1, 1)(x.T), (x @ weights.T).T)
    assert torch.equal(vmap(vmap(project))(x.view(2, 2, 6)), (x @ weights.T).view(2, 2, 9))
    assert torch.equal(torch.func.grad(loss)(x), 2 * x @ weights.T @ weights)
    assert torch.equal(vmap(torch.func.grad(loss))(x), 2 * x @ weights.T @ weights)
    assert torch.equal(torch.func.jacrev(project)(x[0]), weights)
    assert torch.equal(torch.func.jacrev(torch.func.jacrev(loss))(x[0]), 2 * weights.T @ weights)
    assert torch.equal(torch.func.jacfwd(project)(x[0]), weights)
    assert torch.equal(torch.func.hessian(loss)(x[0]), 2 * weights.T @ weights)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend_once, transposed, dtype):
    matrix = sparse(9, 6, 3)[2:, 1:]
    matrix = matrix.T if transposed else matrix
    x = normals((4, matrix.cols), generator(1), dtype).requires_grad_()
    op = primitives.overload(backend_once, "sparse_matmul")
    torch.library.opcheck(op, (x, *primitives.sparse_args(matrix)))


def test_compile_without_graph_breaks(backend_once):
    torch._dynamo.reset()
    matrix = sparse(9, 6, 3)
    compiled = torch.compile(sparse_project, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8, 21):
        x = integers((rows, 6), 8, generator(rows)).requires_grad_()
        dy = integers((rows, 9), 8, generator(rows))
        results = []
        for function in (sparse_project, compiled):
            y = function(x, matrix)
            results.append((y, torch.autograd.grad(y, x, dy)[0]))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_the_dtype_of_a_linear_layer(backend_once, dtype):
    matrix = sparse(9, 6, 3)
    x = normals((5, 6), generator(1), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = sparse_project(x, matrix), functional.linear(x, matrix.materialize(dtype))
    assert y.dtype == want.dtype
    assert torch.equal(y, sparse_project(x.bfloat16(), matrix))
