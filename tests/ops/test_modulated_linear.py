"""modulated_linear: the same weights, sums and gradients as the formula, on every backend.

Where the weights can be read off (the identity) or every sum is exact (integers), results are compared
bit for bit; elsewhere with a bound that follows from the number of roundings (see formula.py).
"""

import ctypes
import itertools
import mmap
import random
from functools import partial

import pytest
import torch
from formula import (
    KINDS,
    UNIT,
    Expected,
    T,
    arguments,
    exact_matrix,
    generator,
    integers,
    modulated,
    normals,
    poisoned,
    signs,
    stored_weights,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from nmkern import RandomMatrix, modulated_linear, stream

FAMILIES = tuple(stream.DENSE_FAMILIES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(x, matrix, named, dy):
    """The result and the gradient of every floating-point tensor among the arguments."""
    leaves = {"x": x.detach().requires_grad_()}
    for name, value in named.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            leaves[name] = value.detach().requires_grad_()
    y = modulated_linear(leaves["x"], matrix, **{**named, **{k: v for k, v in leaves.items() if k != "x"}})
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


# The weights themselves

corners = st.one_of(
    st.integers(0, 70),
    *(st.integers(border - 40, border + 40) for border in (2**31, 2**32, 2**33)),
    st.integers(2**34 - 90, 2**34 - 42),
)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    corner=st.tuples(corners, corners),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.sampled_from([0, 1, 12345678901, 2**32, 2**63, 2**64 - 1]),
    dtype=st.sampled_from(DTYPES),
    batch=st.sampled_from([1, 3, 5, 16, 40]),
    count=st.integers(1, 8),
)
def test_the_identity_gives_the_weights(
    backend, threads, passed_over, family, corner, shape, seed, dtype, batch, count
):
    """Forward, transposed and in the backward pass; a batch of any size, any number of threads."""
    if passed_over(6):
        return
    batch = max(batch, 16) if backend == "triton" else batch
    threads(count, backend)
    (top, left), (rows, cols) = corner, shape
    whole = RandomMatrix(2**34 - 1, 2**34 - 1, seed=seed, family=family, scale=0.7)
    matrix = whole[top : top + rows, left : left + cols]
    want = matrix.materialize(dtype)
    by_row = [modulated_linear(part, matrix.T) for part in torch.eye(rows, dtype=dtype).split(batch)]
    assert torch.equal(torch.cat(by_row), want)
    by_col = [modulated_linear(part, matrix) for part in torch.eye(cols, dtype=dtype).split(batch)]
    assert torch.equal(torch.cat(by_col).T, want)
    x = torch.zeros(rows, cols, dtype=dtype, requires_grad=True)
    y = modulated_linear(x, matrix)
    assert torch.equal(torch.autograd.grad(y, x, torch.eye(rows, dtype=dtype))[0], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_gives_the_weights_of_a_matrix_of_many_tiles(backend, family):
    whole = RandomMatrix(400_003, 300_007, seed=3, family=family)  # 1.2e11 elements
    # Two tiles each way are enough for the interpreter, where this would take a minute, and for PTX.
    rows, cols = 259, {"triton": 3, "cuda": 300}.get(backend, 1030)
    matrix = whole[-rows:, -cols:]
    want = matrix.materialize()
    assert torch.equal(modulated_linear(torch.eye(cols), matrix).T, want)
    if backend == "triton":
        rows, cols = 3, 259
        matrix = whole[-rows:, -cols:]
        want = matrix.materialize()
    assert torch.equal(modulated_linear(torch.eye(rows), matrix.T), want)


# Exact sums
#
# Let x and dy be integers of modulus at most 1, gains at most 2, bias at most 8, codes c at most 252,
# the factor f a power of two. Then, in units of f (bias and d_bias: of 1), every partial sum in whatever
# order is an integer of modulus at most
#     z, dz        K * 2 * 252 and N * 2 * 252              product, dx: twice that
#     d_in, d_out  M * N * 2 * 252 and M * K * 2 * 252
# With M = 130, N = 101, K = 149 that is 9.8e6, below 2^24 = 1.67e7; so float32 is exact whatever
# the order, y and the gradients are correctly rounded values of exact ones, and equality is bit for bit.
# Gains times x stay below 2^8 too: exact in bfloat16, should a kernel hold them so.


def integer_case(family, kind, rows, k, n, dtype, exponent=-10):
    g = generator(rows)
    matrix = exact_matrix(family, n, k, exponent)
    x = integers((rows, k), 1, g, dtype)
    dy = integers((rows, n), 1, g, dtype)
    named = arguments(kind, (rows,), matrix, partial(integers, limit=2, generator=g), g)
    named.pop("strength", None)  # its gradient sums over all of K or N: not below 2^24
    if "bias" in named:
        named["bias"] = 4 * named["bias"]
    return x, matrix, named, dy


def same_bits(actual, exact):
    """Equal to the exact value rounded to the dtype (float64 holds the exact value)."""
    want = exact.to(actual.dtype)
    assert torch.equal(want.double(), exact) or actual.dtype in (torch.bfloat16, torch.float16)
    assert torch.isfinite(want).all()
    assert torch.equal(actual, want)


def check_exactly(x, matrix, named, dy):
    want = Expected(x, matrix, named, dy)
    y, grads = run(x, matrix, named, dy)
    same_bits(y, want.y)
    for name, grad in grads.items():
        same_bits(grad, want.grads[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_integers_give_exact_results_and_gradients(backend, threads, few, family, dtype):
    kinds = ("vectors", "banks", "rows", "plain", "mixed", "in", "out", "one of banks", "broadcast rows")
    # Kernels have a form of their own for each small batch, and others for larger ones.
    batches = (*range(1, 14), 16, 24, 25, 33, 70, 130)
    cases = zip(batches, itertools.cycle(kinds), itertools.cycle((8, 1, 3, 2)), strict=False)
    for rows, kind, count in few(cases, 10, FAMILIES.index(family) + 3 * DTYPES.index(dtype)):
        threads(count, backend)
        x, matrix, named, dy = integer_case(family, kind, rows, 149, 101, dtype)
        for view in (matrix, exact_matrix(family, 149, 101, -10).T):
            check_exactly(x, view, named, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_integers_give_exact_results_and_gradients_of_few_rows(backend, threads, few, family, dtype):
    """By matrices so large that kernels prepare x for them; sums are at most M * K * 2 * 252 = 2.1e6."""
    if backend == "triton":
        pytest.skip("the interpreter takes minutes, and the kernels are those of small matrices")
    kinds = itertools.cycle(("vectors", "rows", "banks", "plain", "mixed", "in", "out"))
    cases = zip(range(1, 8), kinds, itertools.cycle((1, 2, 3)), strict=False)
    for rows, kind, count in few(cases, 1, FAMILIES.index(family), cuda=3):
        threads(count, backend)
        x, _, named, dy = integer_case(family, kind, rows, 600, 523, dtype)
        check_exactly(x, exact_matrix(family, 528, 613, -10)[5:, 13:], named, dy)
        check_exactly(x, exact_matrix(family, 613, 528, -10)[13:, 5:].T, named, dy)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("k", "n"), [(5003, 67), (67, 5003), (1, 2500), (2500, 1)])
def test_integers_give_exact_results_on_long_sums(backend, threads, few, family, k, n):
    if backend == "triton" and (family != "uniform" or k != 2500):
        pytest.skip("the interpreter takes too long for all of them")
    # Signs as gains: y is at most K * 252, d_in M * N * 252, d_out M * K * 252 = 1.5e7 < 2^24 at M = 12.
    for rows, count in few(((1, 2), (2, 1), (3, 7), (12, 2)), 4, start=2):
        threads(count, backend)
        g = generator(rows)
        matrix = exact_matrix(family, n, k)
        x, dy = integers((rows, k), 1, g), integers((rows, n), 1, g)
        check_exactly(x, matrix, {"in_gain": signs((k,), g), "out_gain": signs((n,), g)}, dy)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_every_regime_over_neighbouring_tiles(backend, threads, family, transposed):
    """Words and tiles that a kernel makes ahead, for the next run or the next tile, are the right ones.

    The sizes leave several tiles to a thread, and runs that end in the middle of what is made ahead; the
    batches stand on both sides of each border between regimes. Sums are at most 1103 * 252 < 2^24.
    """
    if backend == "triton":
        pytest.skip("the interpreter takes minutes, and its kernels make nothing ahead")
    matrix = exact_matrix(family, 1103, 700)
    matrix = matrix.T if transposed else matrix
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 17, 23):
        threads(1 + rows % 2, backend)
        x = integers((rows, matrix.cols), 1, generator(rows))
        exact = x.double() @ stored_weights(matrix).T
        same_bits(modulated_linear(x, matrix), exact)
        same_bits(modulated_linear(x.bfloat16(), matrix), exact)


def test_a_batch_larger_than_any_scratch(backend, threads):
    """70 rows of 2^16 inputs, 18 MiB: kernels that bound their scratch take it in parts.

    With signs for weights and gains every sum is at most M * K = 4.6e6 < 2^24.
    """
    if backend == "triton":
        pytest.skip("the interpreter takes minutes; test_a_batch_in_parts bounds the scratch instead")
    if backend == "cuda":
        pytest.skip("its scratch is larger; tests/native/skinny_cases.h bounds it instead")
    threads(2, backend)
    g = generator(0)
    matrix = exact_matrix("rademacher", 3, 2**16)
    x, dy = integers((70, 2**16), 1, g), integers((70, 3), 1, g)
    named = {"in_gain": signs((T, 2**16), g), "out_gain": signs((T, 3), g)}
    check_exactly(x, matrix, {**named, "context": torch.randint(T, (70,), generator=g)}, dy)


def test_a_batch_of_more_rows_than_a_tile_is_generated_for(backend, threads, few):
    """530 rows with many tiles in both directions; every sum is at most M * N = 1.2e6 < 2^24."""
    if backend == "triton":
        pytest.skip("the interpreter takes minutes; its tiles hold few rows in any case")
    threads(2, backend)
    g = generator(0)
    for n, k in few(((2101, 66), (66, 2100)), 1, cuda=2):
        x, dy = integers((530, k), 1, g), integers((530, n), 1, g)
        context = torch.randint(T, (530,), generator=g)
        named = {"in_gain": signs((T, k), g), "out_gain": signs((T, n), g), "context": context}
        check_exactly(x, exact_matrix("rademacher", n, k), named, dy)
        check_exactly(x, exact_matrix("rademacher", n, k), {}, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_a_product_that_is_cut_in_every_direction(backend, threads, dtype, transposed):
    """Rows, inputs and outputs beyond what a kernel takes at a time; sums are at most 2600 * 45 < 2^24."""
    if backend == "triton":
        pytest.skip("the interpreter takes minutes; its tiles are small in any case")
    threads(2, backend)
    n, k = (500, 900) if backend == "cuda" else (1100, 2600)
    matrix = exact_matrix("uniform", *((k, n) if transposed else (n, k)))
    matrix = matrix.T if transposed else matrix
    x = integers((270, k), 3, generator(1), dtype)
    same_bits(modulated_linear(x, matrix), x.double() @ stored_weights(matrix).T)


@pytest.mark.parametrize("family", FAMILIES)
def test_factor_gain_and_bias_are_rounded_one_after_the_other(backend, family):
    """y = fl(fl(fl(S * factor) * out_gain) + bias) with S an exact integer: no fused multiply-add."""
    for rows, n, k in ((1, 90, 130), (4, 90, 130), (7, 90, 130), (40, 90, 130), (2, 523, 600), (5, 523, 600)):
        matrix = RandomMatrix(n, k, seed=8, family=family, scale=0.123)
        codes = exact_matrix(family, n, k, seed=8).materialize()
        g = generator(rows)
        x = integers((rows, k), 3, g)
        out_gain, bias = normals((n,), g), normals((n,), g)
        total = (x.double() @ codes.double().T).float()  # at most 600 * 3 * 252 < 2^24
        want = total * matrix.factor * out_gain + bias
        assert torch.equal(modulated_linear(x, matrix, out_gain=out_gain, bias=bias), want)
        half = modulated_linear(x.bfloat16(), matrix, out_gain=out_gain, bias=bias)
        assert torch.equal(half, want.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_give_the_same_bits(backend, few, dtype):
    matrix = RandomMatrix(201, 333, seed=2)
    for rows in few((1, 5, 67), 3, start=1):
        g = generator(rows)
        x, dy = normals((rows, 333), g, dtype), normals((rows, 201), g, dtype)
        named = arguments("banks", (rows,), matrix, partial(normals, generator=g), g)
        first, first_grads = run(x, matrix, named, dy)
        for _ in few(range(3), 3):
            y, grads = run(x, matrix, named, dy)
            assert torch.equal(y, first)
            assert all(torch.equal(grads[name], first_grads[name]) for name in grads)


# Rounding


def test_products_of_pytorch_in_between(backend):
    """Registers whose shape a kernel sets, as AMX's tiles, are set anew by whoever comes next."""
    x, w = normals((40, 96), generator(1)).bfloat16(), normals((64, 96), generator(2)).bfloat16()
    matrix = RandomMatrix(50, 96, seed=4)
    ours, theirs = [modulated_linear(x[:rows], matrix) for rows in (1, 40, 17)], functional.linear(x, w)
    for y in ours:
        assert torch.equal(modulated_linear(x[: len(y)], matrix), y)
        assert torch.equal(functional.linear(x, w), theirs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["plain", "in", "vectors", "banks"])
def test_narrow_dtypes_are_rounded_once(backend, gain_rounding, dtype, kind):
    """y is the exact result rounded, or what rounding gives within the error of float32 sums.

    Rounding is monotonic: if z is the float32 value and |z - exact| <= d, then y = round(z) lies between
    round(exact - d) and round(exact + d). A second rounding to the narrow dtype, of gains times x, of
    a partial sum or of the sum before the gain, leaves that bracket.
    """
    matrix = RandomMatrix(67, 90, seed=6, family="normal")
    for rows in (1, 3, 8, 40):
        g = generator(rows)
        x = normals((rows, 90), g, dtype)
        named = arguments(kind, (rows,), matrix, partial(normals, generator=g), g)
        want = Expected(x, matrix, named)
        gained = gain_rounding if "in_gain" in named else 0.0
        d = (want.roundings * UNIT[torch.float32] + gained) * want.magnitude
        y = modulated_linear(x, matrix, **named)
        assert y.dtype == dtype
        assert ((want.y - d).to(dtype) <= y).all() and (y <= (want.y + d).to(dtype)).all()


def test_every_float16_is_read_and_rounded_to(backend):
    """Each of the 2^16 values times a sign; and what lies at, beside and beyond the middle of two of them."""
    matrix = exact_matrix("rademacher", 1, 1)
    sign = matrix.materialize().item()
    step = {"triton": 61, "cuda": 7}.get(backend, 1)  # the interpreter takes minutes for all of them
    every = torch.arange(-(2**15), 2**15, step, dtype=torch.int16).view(torch.float16)[:, None]
    y = modulated_linear(every, matrix)
    assert torch.equal(y.isnan(), every.isnan())
    assert torch.equal(y.nan_to_num(), (every * sign).nan_to_num())

    finite = every[every.isfinite()].float().unique()
    middle = (finite[1:] + finite[:-1]) / 2  # exact, and a tie: 2^-25 and 65520 are such
    middle = torch.cat([middle, torch.tensor([-65520.0, 65520.0, -1e9, 1e9, float("inf"), float("nan")])])
    away = torch.full_like(middle, float("inf"))
    gain = torch.cat([middle, middle.nextafter(away), middle.nextafter(-away)])[:, None]
    y = modulated_linear(torch.full((len(gain), 1), sign, dtype=torch.float16), matrix, out_gain=gain)
    assert torch.equal(y.isnan(), gain.isnan())
    assert torch.equal(y.nan_to_num().view(torch.int16), gain.half().nan_to_num().view(torch.int16))


# Shapes and layouts

sizes = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 33, 63, 64, 65, 127, 130, 257]))
leads = st.one_of(
    st.tuples(st.one_of(st.integers(0, 20), st.integers(0, 75))),
    st.sampled_from([(), (2, 3), (2, 0, 3), (3, 1, 2), (1, 1), (5, 7, 2)]),
)
layouts = st.sampled_from(["contiguous", "transposed", "strided", "wide rows", "expanded", "expanded rows"])


def laid_out(value, layout):
    """The same values, or for expanded layouts some of them, between NaNs in another layout."""
    *lead, k = value.shape
    if layout == "transposed" and lead:
        return poisoned(value.transpose(0, -1).contiguous()).transpose(0, -1)
    if layout == "strided":
        buffer = torch.full((*lead, 2 * k), float("nan"), dtype=value.dtype)
        buffer[..., ::2] = value
        return buffer[..., ::2]
    if layout == "wide rows":
        buffer = torch.full((*lead, k + 5), float("nan"), dtype=value.dtype)
        buffer[..., 3 : 3 + k] = value
        return buffer[..., 3 : 3 + k]
    if layout == "expanded":
        return value[..., :1].clone().expand(value.shape)
    if layout == "expanded rows" and lead and value.numel():
        return value[:1].clone().expand(value.shape)
    return poisoned(value)


@given(
    lead=leads,
    k=sizes,
    n=sizes,
    offset=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    transposed=st.booleans(),
    family=st.sampled_from(FAMILIES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    narrow=st.booleans(),
    layout=layouts,
)
@settings(max_examples=80)
@example((0,), 5, 4, (1, 2), False, "normal", "banks", torch.float32, False, "contiguous")
@example((), 1, 1, (0, 0), True, "uniform", "rows", torch.float32, False, "contiguous")
@example((70,), 257, 130, (3, 5), True, "normal", "banks", torch.bfloat16, True, "transposed")
def test_any_shape_and_layout(
    backend, gain_rounding, passed_over, lead, k, n, offset, transposed, family, kind, dtype, narrow, layout
):
    if passed_over(10):
        return
    g = generator(k + 1000 * n)
    whole = RandomMatrix(offset[0] + n, offset[1] + k, seed=7, family=family, scale=k**-0.5)
    matrix = whole[offset[0] :, offset[1] :]
    if transposed:
        rows, cols = offset[0] + k, offset[1] + n
        matrix = RandomMatrix(rows, cols, seed=7, family=family, scale=k**-0.5)[offset[0] :, offset[1] :].T
    bank_dtype = dtype if narrow else torch.float32

    def make(shape):
        value = normals(shape, g, bank_dtype)
        return laid_out(value, layout) if value.ndim else value

    x, dy = laid_out(normals((*lead, k), g, dtype), layout), laid_out(normals((*lead, n), g, dtype), layout)
    named = arguments(kind, lead, matrix, make, g)
    before = {name: value.clone() for name, value in named.items() if isinstance(value, torch.Tensor)}
    want = Expected(x, matrix, named, dy)
    y, grads = run(x, matrix, named, dy)
    rounded = 0.0 if dtype == torch.float32 else gain_rounding
    want.check(y, rounded)
    want.check_grads(grads, rounded)
    assert all(torch.equal(named[name], value) for name, value in before.items())  # inputs are left alone


def test_a_lazily_negated_input(backend_once):
    """The imaginary part of a conjugate is a view whose sign is kept in a bit of the tensor."""
    g = generator(1)
    matrix = exact_matrix("uniform", 9, 6)
    z = torch.complex(integers((3, 6), 3, g), integers((3, 6), 3, g))
    x = z.conj().imag
    assert x.is_neg()
    want = modulated(x.double(), stored_weights(matrix), in_gain=x[0].double())
    assert torch.equal(modulated_linear(x, matrix, in_gain=x[0]).double(), want)


def test_meta_tensors_have_shapes_only():
    """As every operator of PyTorch: what builds models without memory asks for shapes."""
    matrix = RandomMatrix(2**18, 2**18, seed=1)
    x = torch.empty(2, 3, 2**18, device="meta", dtype=torch.bfloat16)
    y = modulated_linear(x, matrix, in_gain=torch.empty(2**18, device="meta"))
    assert y.device.type == "meta" and y.shape == (2, 3, 2**18) and y.dtype == torch.bfloat16


def test_float64_is_held_in_float64():
    """The reference computes float64 throughout; no other backend claims to."""
    matrix = RandomMatrix(30, 200, seed=1, family="normal")
    for kind in KINDS:
        g = generator(2)
        named = arguments(kind, (6,), matrix, partial(normals, generator=g, dtype=torch.float64), g)
        x, dy = normals((6, 200), g, torch.float64), normals((6, 30), g, torch.float64)
        want = Expected(x, matrix, named, dy)
        y, grads = run(x, matrix, named, dy)
        want.check(y)
        want.check_grads(grads)


def before_a_forbidden_page(value):
    """The same values, ending where the next byte may not be read: to read on ends the process."""
    size = value.numel() * value.itemsize
    pages = -(-size // mmap.PAGESIZE) + 1
    area = mmap.mmap(-1, pages * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = (pages - 1) * mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(address + end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    inside = torch.frombuffer(area, dtype=value.dtype, count=value.numel(), offset=end - size)
    return inside.view(value.shape).copy_(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_behind_the_end(backend, dtype):
    for rows, k, n in ((1, 1, 1), (1, 37, 3), (2, 130, 33), (5, 77, 70), (37, 65, 19)):
        g = generator(rows)
        matrix = exact_matrix("uniform", n, k, -10)

        def make(shape, g=g):
            return before_a_forbidden_page(integers(shape, 1, g))

        x, dy = (before_a_forbidden_page(integers((rows, size), 1, g, dtype)) for size in (k, n))
        named = arguments("banks", (rows,), matrix, make, g)
        named["context"] = before_a_forbidden_page(named["context"])
        want = Expected(x, matrix, named, dy)
        y, grads = run(x, matrix, named, dy)
        same_bits(y, want.y)
        same_bits(grads["x"], want.grads["x"])


# Manners


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_autocast_gives_the_dtype_of_a_linear_layer(backend_once, dtype):
    if backend_once == "cpu" and dtype == torch.float64:
        pytest.skip("the cpu backend does not compute float64")
    matrix = RandomMatrix(7, 12, seed=3)
    x = normals((5, 12), generator(1), dtype).requires_grad_()
    gain = normals((12,), generator(2), dtype).requires_grad_()
    weights = matrix.materialize(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = functional.linear(x, weights)
        y = modulated_linear(x, matrix, in_gain=gain)
        with torch.autocast("cpu", enabled=False):
            assert modulated_linear(x, matrix).dtype == dtype
    assert y.dtype == want.dtype
    grads = torch.autograd.grad(y, (x, gain), torch.ones_like(y))
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    if dtype == torch.float32:
        assert torch.equal(y, modulated_linear(x.bfloat16(), matrix, in_gain=gain))


@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_nan_reaches_its_own_row_and_context_only(backend, rows):
    g = generator(rows)
    matrix = exact_matrix("normal", 19, 45)
    nan = float("nan")
    x, dy = integers((rows, 45), 1, g), integers((rows, 19), 1, g)
    bank = integers((T, 45), 1, g)
    context = torch.arange(rows) % T

    def outputs(x, bank, dy):
        y, grads = run(x, matrix, {"in_gain": bank, "context": context}, dy)
        return y, grads["x"], grads["in_gain"]

    def expect(found, poisoned_rows, clean):
        assert found[poisoned_rows].isnan().all()
        assert torch.equal(found[~poisoned_rows], clean[~poisoned_rows])

    clean = outputs(x, bank, dy)
    row, contexts = torch.arange(rows) == rows // 2, torch.arange(T) == (rows // 2) % T
    hurt = x.clone()
    hurt[rows // 2, 7] = nan
    y, dx, d_bank = outputs(hurt, bank, dy)
    expect(y, row, clean[0])
    assert torch.equal(dx, clean[1])  # the derivative in x does not depend on x
    assert d_bank[contexts, 7].isnan().all() and d_bank.isnan().sum() == 1
    hurt = dy.clone()
    hurt[rows // 2, 3] = nan
    y, dx, d_bank = outputs(x, bank, hurt)
    assert torch.equal(y, clean[0])
    expect(dx, row, clean[1])
    expect(d_bank, contexts, clean[2])
    hurt = bank.clone()
    hurt[contexts, 7] = nan
    y, dx, _ = outputs(x, hurt, dy)
    expect(y, context == (rows // 2) % T, clean[0])
    assert dx[:, 7].isnan().equal(context == (rows // 2) % T) and dx.isnan().sum() == dx[:, 7].isnan().sum()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 9, 40])
def test_a_row_that_is_not_finite_changes_no_bit_of_others(backend, rows, dtype):
    """A context that diverges shares batches with others, which are to be as if it were not there."""
    for family in FAMILIES:
        # Of few rows kernels prepare x for a matrix that is large.
        matrix = RandomMatrix(900 if rows == 3 and backend != "triton" else 19, 300, seed=4, family=family)
        x = normals((rows, 300), generator(1)).to(dtype)
        clean, others = modulated_linear(x, matrix), torch.arange(rows) != rows // 2
        for value in (float("nan"), float("-inf")):
            hurt = x.clone()
            hurt[rows // 2, 7] = value
            y = modulated_linear(hurt, matrix)
            assert not y[rows // 2].isfinite().any()
            assert torch.equal(y[others], clean[others])


def test_a_row_of_subnormal_products_has_its_digits(backend_once):
    matrix = RandomMatrix(40, 300, seed=4)
    x = normals((8, 300), generator(1)).bfloat16()
    small = {"in_gain": torch.full((300,), 2.0**-70), "out_gain": torch.full((40,), 2.0**70)}
    y = modulated_linear(x * 2.0**-70, matrix, **small).double() * 2.0**70
    want = x.double() @ stored_weights(matrix).T
    # Of a product x * in_gain: 2^-149 at most, half of that on average, of some 2^-140.
    assert (y - want).norm() <= 2.0**-8 * want.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
def test_an_infinity_gives_what_stored_weights_give(backend, rows, dtype):
    matrix = exact_matrix("uniform", 19, 45)  # no weight is zero, so no NaN comes of it
    x = integers((rows, 45), 1, generator(rows), dtype)
    x[rows // 2, 11] = float("-inf")
    want = (x.double() @ matrix.materialize(torch.float64).T).to(dtype)
    assert want.isinf().sum() == 19 and not want.isnan().any()
    assert torch.equal(modulated_linear(x, matrix), want)


def test_no_global_random_state_is_moved(backend):
    """Neither by a call nor by its derivatives. (A fixture holds every test of the suite to it.)"""
    g = generator(0)
    matrix = RandomMatrix(40, 50, seed=1)
    x, dy = normals((6, 50), g), normals((6, 40), g)
    named = arguments("vectors", (6,), matrix, partial(normals, generator=g), g)
    before = torch.get_rng_state(), random.getstate()
    run(x, matrix, named, dy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
