"""What float32 keeps of float32: digits at any size, bounded errors of sums, gradients, flushed modes."""

import pytest
import torch
from formula import generator, normals, stored_weights

from nmkern import RandomMatrix, modulated_linear, stream

FAMILIES = tuple(stream.DENSE_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_float32_error_at_k_8192(backend, family, transposed):
    """Relative Frobenius error against float64 of at most 2e-6, the house bound.

    Partial sums of x * W walk randomly whatever the sign of x, since W has mean zero: after k terms of size
    s they are about sqrt(k) s. An addition errs by up to half a unit in the last place, a mean square of
    0.18 (2^-24)^2 relative to the sum (uniform error, mantissas spread logarithmically). A single chain of
    K additions so errs by sqrt(0.18 K / 2) 2^-24 = 1.6e-6 of the result: the bound leaves no room for more
    than that one chain. It holds for positive inputs (a ReLU's) as for any, where a kernel that multiplied
    by unsigned codes and subtracted the mean at the end would lose a factor of sqrt(K).
    """
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter multiplies in float32, without the parts that this is about")
    matrix = RandomMatrix(*((8192, 96) if transposed else (96, 8192)), seed=4, family=family)
    matrix = matrix.T if transposed else matrix
    weights = stored_weights(matrix)
    g = generator(1)
    noise = normals((33, 8192), g)
    x = torch.cat([noise[:11], noise[11:22].relu(), 1 + noise[22:].abs() / 100])
    gain = normals((8192,), g)
    for call, rows in (({}, x), ({}, x[9:14]), ({}, x[21:22]), ({}, x[22:23]), ({"in_gain": gain}, x[20:24])):
        want = (rows.double() * gain.double() if call else rows.double()) @ weights.T
        y = modulated_linear(rows, matrix, **call).double()
        error = (y - want).norm() / want.norm()
        assert error <= 2e-6, (len(rows), error)
        if len(rows) == 33:  # and for each kind of input on its own
            errors = [(a - b).norm() / b.norm() for a, b in zip(y.split(11), want.split(11), strict=True)]
            assert max(errors) <= 2e-6, errors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_float32_error_of_a_long_sum(backend, few, family, transposed):
    """The same bound at K = 2^17, where one chain of additions errs by 6.4e-6.

    A kernel that adds up runs of R <= 1024 steps apart, and then their sums, errs by at most
    sqrt(0.18 (1024 + 2^17 / 1024) / 2) 2^-24 = 6e-7.
    """
    if backend == "triton":
        pytest.skip("the interpreter's sums are NumPy's, not the kernel's")
    matrix = RandomMatrix(*((2**17, 20) if transposed else (20, 2**17)), seed=4, family=family)
    matrix = matrix.T if transposed else matrix
    x = normals((14, 2**17), generator(1))
    for rows in few((x, x[:2], x[:1]), 1, start=FAMILIES.index(family) + transposed, cuda=3):
        want = rows.double() @ stored_weights(matrix).T
        error = (modulated_linear(rows, matrix).double() - want).norm() / want.norm()
        assert error <= 2e-6, (len(rows), error)


@pytest.mark.parametrize("rows", [1, 5, 21])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_float32_has_its_digits_whatever_its_size(backend, rows, transposed):
    """A power of two times a row is that power times its result, bit for bit, if nothing is subnormal.

    Units that multiply bfloat16 parts count a part below 2^-126 as zero: the last of anything below 2^-102.
    """
    large = rows == 5 and backend != "triton"  # for such a matrix kernels prepare few rows
    for n in (40, 1400) if large else (40,):
        for family in FAMILIES:
            matrix = RandomMatrix(*((200, n) if transposed else (n, 200)), seed=4, family=family)
            matrix = matrix.T if transposed else matrix
            x = normals((rows, 200), generator(1))
            x = torch.where(x.abs() < 2**-10, 1.0, x)
            size = 2.0 ** torch.tensor([-100.0, 0.0, 90.0, -60.0, -70.0]).repeat(5)[:rows, None]
            assert torch.equal(modulated_linear(x * size, matrix), modulated_linear(x, matrix) * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 9, 21])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_rows_of_extremes(backend, rows, transposed, dtype):
    """Elements as large as their row's largest, in every pattern of signs that neighbours may have.

    Kernels that multiply integers have room for those and not for more.
    """
    for family in FAMILIES:
        matrix = RandomMatrix(*((264, 70) if transposed else (70, 264)), seed=4, family=family)
        matrix = matrix.T if transposed else matrix
        most = 2 - torch.finfo(dtype).eps  # all bits of the significand are ones
        signs = torch.ones(6, 264)
        signs[1], signs[2, ::2], signs[3, 1::2], signs[4, ::8], signs[5, 16::32] = -1, -1, -1, -1, -1
        x = (most * signs).repeat(4, 1)[:rows].to(dtype)
        want = x.double() @ stored_weights(matrix).T
        bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.01  # the result's rounding
        assert (modulated_linear(x, matrix).double() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("rows", [1, 5, 21])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_an_outlier_costs_no_accuracy(backend, rows, transposed):
    """The house bound where one element of a row is as large as all others together, or larger."""
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter multiplies in float32, without the parts that this is about")
    for family in FAMILIES:
        matrix = RandomMatrix(*((8192, 20) if transposed else (20, 8192)), seed=4, family=family)
        matrix = matrix.T if transposed else matrix
        x = normals((rows, 8192), generator(1))
        x[:, 77] = torch.tensor([8192.0, -(2.0**20), 100, 1e30, 2.0**17]).repeat(5)[:rows]
        want = x.double() @ stored_weights(matrix).T
        error = (modulated_linear(x, matrix).double() - want).norm(dim=1) / want.norm(dim=1)
        assert error.max() <= 2e-6, error


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy in Triton's interpreter
def test_any_nan_of_float32_is_one_in_the_result(backend):
    """Also one whose payload lies in the bits that the first of its bfloat16 parts has not."""
    x = torch.ones(3, 20)
    x.view(torch.int32)[1, 7] = 0x7F800001
    y = modulated_linear(x, RandomMatrix(9, 20, seed=4))
    assert y[1].isnan().all() and y[::2].isfinite().all()


@pytest.mark.parametrize("rows", [4, 8, 40])
def test_gradients_of_gains_are_float32_whatever_x_is(backend, rows):
    """Of products of bfloat16, which are not rounded before they are summed: the house bound of float32.

    The outlier is for kernels that hold a row as integers, where others would have few bits left.
    """
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter multiplies in float32")
    for family in FAMILIES:
        matrix = RandomMatrix(40, 2000, seed=4, family=family)
        g = generator(1)
        x, dy = normals((rows, 2000), g).bfloat16(), normals((rows, 40), g).bfloat16()
        x[:, 5] = 1e4
        gain = torch.ones(40, requires_grad=True)
        (found,) = torch.autograd.grad(modulated_linear(x, matrix, out_gain=gain), gain, dy)
        want = (dy.double() * (x.double() @ stored_weights(matrix).T)).sum(0)
        assert (found.double() - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_flushing_subnormal_numbers_changes_no_weight(backend_once, family):
    """Kernels may hold weights as subnormal numbers, which PyTorch can be told to count as zero."""
    matrix = RandomMatrix(900, 300, seed=4, family=family)
    g, tiny = generator(1), torch.tensor([2.0**-140])
    x, dy = normals((3, 300), g), normals((3, 900), g)
    wants = modulated_linear(x, matrix), modulated_linear(dy, matrix.T)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormal numbers")
    try:
        found = modulated_linear(x, matrix), modulated_linear(dy, matrix.T)
        flushed = tiny * 2
    finally:
        torch.set_flush_denormal(False)
    assert flushed == 0, "a call has changed the mode of its thread"
    assert all(map(torch.equal, found, wants))
