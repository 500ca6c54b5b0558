"""The library for CUDA run on CPU tensors, in a process of its own: see test_cuda_bindings.py.

    python emulated_cuda.py LIBRARY STUB

LIBRARY is all of nmkern's, its kernels as PTX that tests/ptx/runtime.cpp executes; STUB stands for PyTorch's
library for CUDA. The GPU is one of before Hopper, or Hopper where a check asks for it. Calls go to the
operator's kernel for CUDA by name of its dispatch key. Prints "passed".
"""

import ctypes
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import emulated_cuda_flynet
import emulated_cuda_sparse
import pytest
import torch
from formula import (
    KINDS,
    Expected,
    T,
    arguments,
    exact_matrix,
    generator,
    integers,
    normals,
    stored_weights,
)

import nmkern
from native import emulated_library
from native.emulated_library import CUDA
from nmkern import RandomMatrix, stream
from nmkern.backends import cuda, packed, primitives, triton

MATMUL = primitives.overload("cuda", "modulated_matmul")
GAIN_GRAD = primitives.overload("cuda", "modulated_matmul_gain_grad")


SMALL_ROWS = 16  # as Hopper's


def matmul(x, matrix, in_gain=None, out_gain=None, bias=None, context=None):
    args = primitives.dense_args(matrix)
    return MATMUL.redispatch(CUDA, x, in_gain, out_gain, bias, context, *args)


def gain_grad(x, other, matrix, contexts, context=None, in_gain=None, out_gain=None, product=True):
    args = (x, in_gain, out_gain, other, context, contexts, product, *primitives.dense_args(matrix))
    return GAIN_GRAD.redispatch(CUDA, *args)


def packed_call(name, *args):
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.nmkern, packet), overload or "default")
    return op.redispatch(CUDA, *args)


def bank(value):
    return value if value is None or value.ndim == 2 else value[None]


def check_the_formula(library):
    """All kinds of gains, contexts, dtypes, both ways, ragged."""
    before = library.emulated_calls()
    calls = 0
    for family in stream.DENSE_FAMILIES:
        for number, (rows, kind) in enumerate(zip((1, 3, 9, 16, 5, 12, 2, 7, 8), KINDS, strict=False)):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
            g = generator(number)
            wide = exact_matrix(family, 40, 90, -10)[3:, 7:]
            matrix = wide if number % 2 else exact_matrix(family, 90, 40, -10)[7:, 3:].T
            x = integers((rows, 83), 1, g, dtype)
            named = arguments(kind, (rows,), matrix, partial(integers, limit=2, generator=g), g)
            named.pop("strength", None)
            want = Expected(x, matrix, named, integers((rows, 37), 1, g, dtype)).y.to(dtype)
            context = named.get("context")
            gains = [named.get(name) for name in ("in_gain", "out_gain", "bias")]
            if isinstance(context, int):
                gains = [v[context] if v is not None and v.ndim == 2 else v for v in gains]
                context = None
            y = matmul(x, matrix, *(None if v is None else bank(v).float() for v in gains), context)
            assert y.dtype == dtype and torch.equal(y, want), (family, kind, dtype)
            calls += 1
    assert library.emulated_calls() == before + calls


def check_tensors_of_any_layout():
    g = generator(1)
    matrix = exact_matrix("uniform", 21, 50)
    weights = stored_weights(matrix)
    x = integers((6, 50), 2, g)
    context = torch.tensor([2, 2, 1, 1, 0, 0, 2, 2, 0, 0, 1, 1])[::2]
    gain, out = integers((50, T), 2, g), integers((1, 21), 2, g)
    want = ((x * gain.T[context]).double() @ weights.T * out).float()
    for like in (x, x.T.contiguous().T, x.repeat(1, 2)[:, :50], x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(matmul(like, matrix, gain.T, out.expand(6, 21), None, context), want)
    every = integers((1, 50), 2, g).expand(6, 50)
    assert torch.equal(matmul(every, matrix), (every.double() @ weights.T).float())
    assert matmul(x[:0], matrix).shape == (0, 21)


def check_contexts_out_of_range():
    g = generator(2)
    matrix = exact_matrix("uniform", 7, 12)
    x, banks = integers((4, 12), 2, g), [integers((T, size), 2, g) for size in (12, 7, 7)]
    wrong, right = torch.tensor([0, -5, T, 2**40]), torch.tensor([0, 0, T - 1, T - 1])
    assert torch.equal(matmul(x, matrix, *banks, wrong), matmul(x, matrix, *banks, right))


def check_infinities():
    """One in a row gives what stored weights give; no weight is zero."""
    for number, rows in enumerate((1, 3, 6, 9)):
        for family in ("uniform", "rademacher"):
            matrix, other = exact_matrix(family, 19, 45), exact_matrix(family, 45, 19).T
            dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
            x = integers((rows, 45), 1, generator(number), dtype)
            x[rows // 2, 11] = float("-inf")
            for used in (matrix, other):
                want = (x.double() @ stored_weights(used).T).to(x.dtype)
                assert want.isinf().sum() == 19
                assert torch.equal(matmul(x, used), want), (rows, family)


def check_gradients_of_gains():
    """Every kind of bank, with the product and without, other in any layout; a context out of range."""
    g = generator(4)
    for number, (contexts, rows) in enumerate(((1, 7), (9, 9), (T, 16), (T, 1), (1, 1))):
        matrix = exact_matrix("uniform", 21, 50)
        context = torch.randint(T, (rows,), generator=g) if contexts == T else None
        x, other = integers((rows, 50), 1, g), integers((21, rows), 2, g).T
        banks = [integers((contexts, size), 2, g) for size in (50, 21)]
        row = torch.arange(rows) % contexts if context is None else context
        z = (x.double() * banks[0][row]) @ stored_weights(matrix).T
        want = torch.zeros(contexts, 21, dtype=torch.float64).index_add_(0, row, other * z)
        given = context if context is None else torch.where(context == T - 1, 2**40, context)
        for wanted in (True, False):
            product, grad = gain_grad(x, other, matrix, contexts, given, *banks, product=wanted)
            assert torch.equal(grad.double(), want), (number, wanted)
            assert product.shape == (rows if wanted else 0, 21)
            assert not wanted or torch.equal(product.double(), z * banks[1][row])
    product, grad = gain_grad(x[:0], other[:0], matrix, 1)
    assert product.shape == (0, 21) and torch.equal(grad, torch.zeros(1, 21))


def check_larger_batches(library):
    """Are Triton's: the operators that it has, whatever serves there."""
    matrix = exact_matrix("uniform", 7, 12)
    handed = []

    def taken(*args):
        handed.append(args)
        y = args[0].new_full((args[0].shape[0], 7), 3.0)
        return y if len(args) == 13 else (y, args[0].new_full((T, 7), 5.0))

    for primitive in ("modulated_matmul", "modulated_matmul_gain_grad"):
        primitives.LIBRARY.impl(f"triton_{primitive}", taken, "CPU", allow_override=True)
    g = generator(3)
    context = torch.randint(T, (17,), generator=g)
    x, gain, other = integers((17, 12), 2, g), integers((T, 12), 2, g), integers((17, 7), 2, g)
    before = library.emulated_calls()
    assert torch.equal(matmul(x, matrix, gain, context=context), torch.full((17, 7), 3.0))
    product, grad = gain_grad(x, other, matrix, T, context, gain)
    assert torch.equal(product, torch.full((17, 7), 3.0)) and torch.equal(grad, torch.full((T, 7), 5.0))
    first, second = handed
    absent = (None, None)
    for found, want in zip(first, (x, gain, *absent, context), strict=False):
        assert found is want if want is None else torch.equal(found, want)
    for found, want in zip(second, (x, gain, None, other, context), strict=False):
        assert found is want if want is None else torch.equal(found, want)
    assert first[5:] == primitives.dense_args(matrix)
    assert second[5:] == (T, True, *primitives.dense_args(matrix))
    assert library.emulated_calls() == before
    cuda.set_small_rows(70)
    y = matmul(x.repeat(4, 1), matrix)
    assert torch.equal(y, (x.repeat(4, 1).double() @ stored_weights(matrix).T).float())
    assert (len(handed), library.emulated_calls()) == (2, before + 1)
    cuda.set_small_rows(SMALL_ROWS)


def check_larger_batches_by_wgmma(library):
    """Where there is wgmma, none is Triton's; as small ones, in every layout that x may have."""
    library.emulated_architecture(90)
    before, calls = library.emulated_launches(b"wide_kernel"), 0
    for number, (contexts, rows) in enumerate(((1, 17), (40, 40), (T, 70), (1, 129), (T, 300))):
        g = generator(number)
        matrix = exact_matrix("uniform", 21, 48)
        weights = stored_weights(matrix)
        context = torch.randint(T, (rows,), generator=g) if contexts == T else None
        row = torch.arange(rows) % contexts if context is None else context
        x, other = integers((rows, 48), 1, g), integers((21, rows), 2, g).T
        banks = [integers((contexts, size), 2, g) for size in (48, 21, 21)]
        z = (x.double() * banks[0][row]) @ weights.T
        want = z * banks[1][row] + banks[2][row]
        for like in (x, x.T.contiguous().T, x.bfloat16(), x.half()):
            found = matmul(like, matrix, *banks, context)
            assert found.dtype == like.dtype and torch.equal(found, want.to(like.dtype)), (number, like.dtype)
            assert torch.equal(matmul(like, matrix), (x.double() @ weights.T).to(like.dtype))
        gradient = torch.zeros(contexts, 21, dtype=torch.float64).index_add_(0, row, other * z)
        product, grad = gain_grad(x, other, matrix, contexts, context, *banks[:2])
        assert torch.equal(product.double(), z * banks[1][row]) and torch.equal(grad.double(), gradient)
        calls += 9
    assert library.emulated_launches(b"wide_kernel") == before + calls
    library.emulated_error(7)
    with pytest.raises(RuntimeError, match="cuda backend: launching a kernel: error 7"):
        matmul(x, matrix)
    library.emulated_architecture(89)


def check_rounding(library):
    """float32 keeps to 2e-6 at K = 8192, and 16 bits times their gain are rounded once: by both kernels.

    Sums of tensor cores are cut off, no finer than a GPU's.
    """
    library.emulated_architecture(90)
    for family in stream.DENSE_FAMILIES:
        for transposed in (False, True):
            matrix = RandomMatrix(*((8192, 70) if transposed else (70, 8192)), seed=4, family=family)
            matrix = matrix.T if transposed else matrix
            for rows in (1, 13, 40, 150):
                x = normals((rows, 8192), generator(rows))
                want = x.double() @ stored_weights(matrix).T
                off = (matmul(x, matrix).double() - want).norm() / want.norm()
                assert off <= 2e-6, (family, transposed, rows, off)
    matrix = RandomMatrix(96, 700, seed=4)
    for dtype in (torch.bfloat16, torch.float16):
        for rows in (5, 200):
            g = generator(rows)
            x, gain = normals((rows, 700), g, dtype), normals((700,), g)
            want = Expected(x, matrix, {"in_gain": gain})
            want.check(matmul(x, matrix, gain[None]), rounded=2.0**-11)
    library.emulated_architecture(89)


def check_packed_calls(library):
    """As the primitives, bit for bit, in any number of dimensions and by both kernels; what they refuse."""
    library.emulated_architecture(90)
    g = generator(5)
    matrix = exact_matrix("normal", 50, 21)[2:, 3:].T
    forward, transpose = packed.pack(matrix)
    (n, k), before, calls = matrix.shape, library.emulated_calls(), 0
    vectors = [integers((size,), 2, g) for size in (k, n, n)]
    for lead in ((), (5,), (2, 3), (40,), (3, 1, 20), (0,), (2, 0)):
        x, other = (integers((*lead, size), 2, g) for size in (k, n))
        rows = x.reshape(-1, k)
        for gains in (vectors, [None] * 3, [vectors[0], None, vectors[2]]):
            y = packed_call("packed_matmul", x, *gains, forward)
            want = matmul(rows, matrix, *(None if v is None else v[None] for v in gains))
            assert torch.equal(y, want.view(*lead, n))
            for wanted in (True, False):
                dx, grad = packed_call(
                    "packed_matmul_gain_grad", other, gains[1], gains[0], x, wanted, transpose
                )
                want = gain_grad(
                    other.reshape(-1, n),
                    rows,
                    matrix.T,
                    1,
                    None,
                    *(None if v is None else v[None] for v in (gains[1], gains[0])),
                    product=wanted,
                )
                assert torch.equal(grad, want[1][0])
                assert torch.equal(dx, want[0].view(*lead, k) if wanted else want[0])
            calls += 6
        assert torch.equal(packed_call("packed_matmul.bare", x, forward), matmul(rows, matrix).view(*lead, n))
        calls += 2
    assert library.emulated_calls() == before + calls
    for refused, gains in (
        (f"in_gain: expected float32 of shape [{k}]", (torch.ones(k - 1), None, None)),
        ("bias: expected the device of x", (None, None, torch.ones(n, device="meta"))),
    ):
        with pytest.raises(RuntimeError) as raised:
            packed_call("packed_matmul", torch.ones(4, k), *gains, forward)
        assert refused in str(raised.value)
    library.emulated_architecture(89)


def check_packed_calls_are_handed_on(library):
    """Of batches that are Triton's: as the primitives hand them on."""
    g = generator(6)
    matrix = exact_matrix("normal", 50, 21)[2:, 3:].T
    forward, transpose = packed.pack(matrix)
    (n, k), before = matrix.shape, library.emulated_launches(b"kernel")
    vectors = [integers((size,), 2, g) for size in (k, n, n)]
    for lead in ((17,), (3, 1, 20)):
        x, other = (integers((*lead, size), 2, g) for size in (k, n))
        z = (x.double() * vectors[0]) @ stored_weights(matrix).T
        want = (z * vectors[1] + vectors[2]).float()
        assert torch.equal(packed_call("packed_matmul", x, *vectors, forward), want)
        bare = (x.double() @ stored_weights(matrix).T).float()
        assert torch.equal(packed_call("packed_matmul.bare", x, forward), bare)
        dx = ((other.double() * vectors[1]) @ stored_weights(matrix)).float()
        for wanted in (True, False):
            args = (other, vectors[1], vectors[0], x, wanted, transpose)
            product, grad = packed_call("packed_matmul_gain_grad", *args)
            assert torch.equal(grad, (x * dx).reshape(-1, k).sum(0))
            assert torch.equal(product, dx * vectors[0]) if wanted else product.shape == (0, k)
    assert library.emulated_launches(b"kernel") == before


def check_through_the_public_operator(library):
    """Gradients, and one compiled graph for batches on both sides of the border. On CPU tensors, forced."""
    for primitive in ("modulated_matmul", "modulated_matmul_gain_grad"):
        launcher = triton.launcher(primitive)  # check_larger_batches left another
        primitives.LIBRARY.impl(f"triton_{primitive}", launcher, "CPU", allow_override=True)
    matrix = exact_matrix("uniform", 21, 50)
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    with emulated_library.serving():
        compiled = torch.compile(nmkern.modulated_linear, fullgraph=True, dynamic=True, backend=counted)
        for number, rows in enumerate((5, 20, 9, 16, 17)):
            g = generator(number)
            x, dy = integers((rows, 50), 2, g), integers((rows, 21), 2, g)
            gain, bias = integers((50,), 2, g), integers((21,), 2, g)
            named = {"in_gain": gain, "bias": bias}
            want = Expected(x, matrix, named, dy)
            leaves = [v.clone().requires_grad_() for v in (x, gain, bias)]
            before = library.emulated_calls()
            y = nmkern.modulated_linear(leaves[0], matrix, in_gain=leaves[1], bias=leaves[2])
            assert library.emulated_calls() - before == (rows <= 16)
            grads = torch.autograd.grad(y, leaves, dy)
            assert library.emulated_calls() - before == 2 * (rows <= 16)
            assert torch.equal(y.detach(), want.y.float())
            for name, grad in zip(("x", "in_gain", "bias"), grads, strict=True):
                assert torch.equal(grad, want.grads[name].float()), name
            assert torch.equal(compiled(x, matrix, in_gain=gain, bias=bias), want.y.float())
    assert len(graphs) == 1


def check_errors(library):
    matrix = exact_matrix("uniform", 7, 12)
    x = torch.ones(4, 12)
    for refused, call in (
        ("x: expected shape [4, 12]", lambda: matmul(x[:, 1:], matrix)),
        ("x: expected float32, bfloat16 or float16", lambda: matmul(x.double(), matrix)),
        ("in_gain: expected float32 of shape [contexts, 12]", lambda: matmul(x, matrix, x[:, 1:])),
        ("bias: expected 1 or 4 rows", lambda: matmul(x, matrix, bias=torch.ones(3, 7))),
        ("context: expected int64 of shape [4]", lambda: matmul(x, matrix, x, context=torch.zeros(3).long())),
    ):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert refused in str(raised.value)
    library.emulated_error(7)
    with pytest.raises(RuntimeError, match="cuda backend: launching a kernel: error 7"):
        matmul(x, matrix)
    assert library.emulated_guards() == 0
    assert matmul(x, matrix).shape == (4, 7)


def main(path, stub):
    library = emulated_library.opened(path)
    if stub == "none":
        with pytest.raises(RuntimeError, match="this PyTorch was built without CUDA"):
            matmul(torch.ones(4, 12), exact_matrix("uniform", 7, 12))
    else:
        ctypes.CDLL(stub)
        library.emulated_architecture(89)
        cuda.set_small_rows(SMALL_ROWS)
        check_the_formula(library)
        check_tensors_of_any_layout()
        check_contexts_out_of_range()
        check_infinities()
        check_gradients_of_gains()
        check_larger_batches(library)
        check_larger_batches_by_wgmma(library)
        check_rounding(library)
        check_packed_calls(library)
        check_through_the_public_operator(library)
        check_packed_calls_are_handed_on(library)
        check_errors(library)
        emulated_cuda_sparse.check_all(library)
        emulated_cuda_flynet.check_all(library)
    assert library.emulated_guards() == 0
    print("passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
