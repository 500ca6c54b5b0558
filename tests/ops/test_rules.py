"""The rules that make primitives operators: derivatives of every order, torch.func, tracing and compiling.

They stand in nmkern.ops.rules and are exercised here through modulated_linear; test_sparse_projection and
test_flynet have the few that differ. On integers every derivative is exact, so results are equal bit for bit.
"""

from functools import partial

import pytest
import torch
from formula import (
    KINDS,
    T,
    arguments,
    exact_matrix,
    generator,
    integers,
    modulated,
    normals,
)
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from nmkern import RandomMatrix, flynet, modulated_linear, sparse_project
from nmkern.backends import packed, primitives, selection
from nmkern.nn import ModulatedLinear

LAYER = ModulatedLinear(4, 6, contexts=3, seed=1)
SPARSE = RandomMatrix(6, 4, seed=1, family="sparse", fan_in=2)

# Derivatives


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_gradcheck_and_gradgradcheck(kind, transposed):
    matrix = RandomMatrix(3, 4, seed=1, family="normal")
    matrix = matrix if not transposed else RandomMatrix(4, 3, seed=1, family="normal").T
    g = generator(3)
    named = arguments(kind, (4,), matrix, partial(normals, generator=g, dtype=torch.float64), g)
    names = [name for name, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    values = [normals((4, 4), g, torch.float64), *(named[name] for name in names)]

    def call(x, *tensors):
        return modulated_linear(x, matrix, **{**named, **dict(zip(names, tensors, strict=True))})

    leaves = [value.requires_grad_() for value in values]
    dy = normals((4, matrix.rows), g, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, [dy], check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_on_integers_are_exact(backend, kind):
    """Every second derivative in float32 equals that of the formula in float64, bit for bit.

    y is linear in W and multilinear in the rest, all of it integers of modulus at most 2; so a second
    derivative of sum(v * y) is a sum of at most 5 * 6 * M * N * K = 4.2e3 terms, each of at most
    2^4 * 15: below 2^24.
    """
    g = generator(9)
    matrix = exact_matrix("uniform", 4, 7)
    named = arguments(kind, (5,), matrix, partial(integers, limit=1, generator=g), g)
    if kind == "mixed":
        named["strength"] = -2.0
    names = [name for name, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    values = [integers((5, 7), 1, g), integers((5, 4), 1, g), *(named[name] for name in names)]
    directions = [integers(value.shape, 1, g) for value in values]
    weights = matrix.materialize(torch.float64)

    def second(operator, dtype):
        leaves = [value.to(dtype).requires_grad_() for value in values]
        x, v, *tensors = leaves
        y = operator(x, **{**named, **dict(zip(names, tensors, strict=True))})
        first = torch.autograd.grad((y * v).sum(), leaves, create_graph=True)
        slope = sum((d.to(dtype) * f).sum() for d, f in zip(directions, first, strict=True))
        return torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True)

    found = second(lambda x, **rest: modulated_linear(x, matrix, **rest), torch.float32)
    want = second(lambda x, **rest: modulated(x, weights, **rest), torch.float64)
    for name, actual, exact in zip(["x", "v", *names], found, want, strict=True):
        assert torch.equal(actual.double(), exact), name


def transforms_of(f):
    """What torch.func makes of f(x, in_gain, out_gain, bias) -> [rows, N]; all polynomials."""
    one = lambda x, gin, gout, b: f(x[None], gin, gout, b)[0]  # noqa: E731 - a row at a time
    loss = lambda *args: (f(*args) ** 2).sum()  # noqa: E731
    return {
        "grad": torch.func.grad(loss, argnums=(0, 1, 2, 3)),
        "vmap over x": torch.func.vmap(one, (0, None, None, None)),
        "vmap over everything": lambda x, gin, gout, b: torch.func.vmap(one)(
            x, gin + x, gout.expand(len(x), -1), b * torch.arange(len(x))[:, None]
        ),
        "vmap over the last dimension": lambda x, *rest: torch.func.vmap(
            lambda row, *r: one(row, *r), (1, None, None, None), out_dims=1
        )(x.T.contiguous(), *rest),
        "vmap of a gain": lambda x, gin, gout, b: torch.func.vmap(f, (None, 0, None, None))(
            x, torch.stack([gin, -gin]), gout, b
        ),
        "vmap of vmap": lambda x, gin, gout, b: torch.func.vmap(
            torch.func.vmap(one, (0, None, None, None)), (None, 0, None, 0)
        )(x, torch.stack([gin, -gin]), gout, torch.stack([b, 2 * b])),
        "vmap of grad": torch.func.vmap(
            torch.func.grad(lambda *args: (one(*args) ** 2).sum(), argnums=(0, 1, 2, 3)),
            (0, None, None, None),
        ),
        "jacrev": torch.func.jacrev(f, argnums=(0, 1, 2, 3)),
        "jacrev of jacrev": torch.func.jacrev(torch.func.jacrev(loss, argnums=1), argnums=(0, 1, 2)),
        "jacrev of jacrev in x": torch.func.jacrev(torch.func.jacrev(loss)),
        "vmap of jacrev of jacrev": torch.func.vmap(
            torch.func.jacrev(torch.func.jacrev(lambda *args: (one(*args) ** 2).sum())),
            (0, None, None, None),
        ),
        "jacrev of grad through x": torch.func.jacrev(torch.func.grad(loss, argnums=0), argnums=(0, 3)),
        "jvp": lambda *args: torch.func.jvp(f, args, tuple(2 * a + 1 for a in args)),
        "jvp of a bias": lambda x, gin, gout, b: torch.func.jvp(lambda b: f(x, gin, gout, b), (b,), (b,)),
        "vmap of jvp": lambda x, gin, gout, b: torch.func.vmap(
            lambda x, dx: torch.func.jvp(lambda x: one(x, gin, gout, b), (x,), (dx,))
        )(x, x + 1),
        "jacfwd": torch.func.jacfwd(f, argnums=(0, 1, 2, 3)),
        "jacfwd of jacfwd": torch.func.jacfwd(torch.func.jacfwd(loss, argnums=1), argnums=(0, 1, 2)),
        "hessian": torch.func.hessian(loss, argnums=(0, 1, 2, 3)),
        "jacrev of jacfwd": torch.func.jacrev(torch.func.jacfwd(loss, argnums=2), argnums=(0, 1, 2)),
    }


@pytest.mark.parametrize("transform", list(transforms_of(None)))
def test_torch_func_on_integers_is_exact(backend_once, transform):
    # A loss is 12 squares of sums of 5 products of at most 15 * 2 * 2 * 2, and a bias: at most 4.4e6.
    g = generator(2)
    matrix = exact_matrix("uniform", 3, 5)
    weights = matrix.materialize(torch.float64)
    values = [integers(shape, 2, g) for shape in ((4, 5), (5,), (3,), (3,))]

    def ours(x, gin, gout, b):
        return modulated_linear(x, matrix, in_gain=gin, out_gain=gout, bias=b)

    def theirs(x, gin, gout, b):
        return modulated(x, weights, in_gain=gin, out_gain=gout, bias=b)

    found = transforms_of(ours)[transform](*values)
    want = transforms_of(theirs)[transform](*(value.double() for value in values))
    for actual, exact in zip(tree_leaves(found), tree_leaves(want), strict=True):
        assert torch.equal(actual.double(), exact)


@pytest.mark.parametrize("transform", list(transforms_of(None)))
def test_compiled_torch_func(transform):
    """The registered operators under levels of functorch: what is not compiled takes another way there."""
    torch._dynamo.reset()
    g = generator(2)
    values = [integers(shape, 2, g) for shape in ((4, 4), (4,), (6,), (6,))]

    def f(x, gin, gout, b):
        return modulated_linear(x, LAYER.matrix, in_gain=gin, out_gain=gout, bias=b)

    function = transforms_of(f)[transform]
    found, want = torch.compile(function, fullgraph=True, backend="aot_eager")(*values), function(*values)
    for actual, expected in zip(tree_leaves(found), tree_leaves(want), strict=True):
        torch.testing.assert_close(actual, expected)


def test_torch_func_of_a_registered_operator(backend_once):
    args = primitives.sparse_args(SPARSE)
    op = primitives.overload(backend_once, "sparse_matmul")
    x = integers((2, 4), 2, generator(1))

    def loss(f):
        return lambda x: (f(x) ** 3).sum()

    twice = lambda f: torch.func.jacrev(torch.func.jacrev(f))  # noqa: E731
    for derivative in (torch.func.grad, twice, torch.func.hessian):
        found = derivative(loss(lambda x: op(x, *args)))(x)
        assert torch.equal(found, derivative(loss(lambda x: sparse_project(x, SPARSE)))(x))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dual_tensors_on_integers_are_exact(backend_once, kind, requires_grad):
    """torch.autograd.forward_ad, where a tensor may need a gradient besides."""
    g = generator(9)
    matrix = exact_matrix("uniform", 4, 7)
    named = arguments(kind, (5,), matrix, partial(integers, limit=1, generator=g), g)
    if kind == "mixed":
        named["strength"] = -2.0
    named["x"] = integers((5, 7), 2, g)
    tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    weights = matrix.materialize(torch.float64)
    tangents = {k: integers(v.shape, 2, g) for k, v in tensors.items()}
    dy = integers((5, 4), 1, g)

    def derivatives(operator, names, dtype):
        """Of y along the tangents of names: itself, and the gradients of both."""
        leaves = {k: v.to(dtype).requires_grad_(requires_grad) for k, v in tensors.items()}
        with forward_ad.dual_level():
            duals = {k: forward_ad.make_dual(leaves[k], tangents[k].to(dtype)) for k in names}
            y, tangent = forward_ad.unpack_dual(operator(**{**named, **leaves, **duals}))
        found = [y, tangent]
        for out in (y, tangent) if requires_grad else ():
            loss = (dy.to(dtype) * out).sum() + sum((0 * leaf).sum() for leaf in leaves.values())
            found += torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        return found

    for names in ([*tensors], *([name] for name in tensors)):
        found = derivatives(partial(modulated_linear, matrix=matrix), names, torch.float32)
        want = derivatives(partial(modulated, weights=weights), names, torch.float64)
        for actual, exact in zip(found, want, strict=True):
            assert torch.equal(actual.double(), exact), names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tangent_has_the_dtype_of_the_result(backend_once, dtype):
    x, *banks = (integers(shape, 2, generator(5)) for shape in ((4, 4), (4,), (6,), (6,)))

    def f(x, gin, gout, b):  # gains in float32
        return modulated_linear(x, LAYER.matrix, in_gain=gin, out_gain=gout, bias=b)

    _, want = torch.func.jvp(f, (x, *banks), (x, *banks))
    x = x.to(dtype)
    _, found = torch.func.jvp(f, (x, *banks), (x, *banks))
    assert found.dtype == dtype
    # Four terms, rounded each, and three sums of them.
    size = torch.finfo(dtype).eps / 2 * 7 * want.abs().max()
    torch.testing.assert_close(found.float(), want, rtol=0, atol=float(size))


def test_vmap_over_contexts_banks_and_their_gradients(backend_once):
    g = generator(5)
    matrix = exact_matrix("uniform", 3, 5)
    x, bank, bias = integers((6, 4, 5), 2, g), integers((T, 5), 2, g), integers((T, 3), 2, g)
    banks = integers((6, T, 5), 2, g)
    context = torch.randint(T, (6, 4), generator=g)
    vmap = torch.func.vmap

    def call(x, bank, c):
        return modulated_linear(x, matrix, in_gain=bank, bias=bias, context=c)

    want = call(x, bank, context)
    assert torch.equal(vmap(call, (0, None, 0))(x, bank, context), want)
    assert torch.equal(
        vmap(call, (None, None, 0))(x[0], bank, context), call(x[:1].expand(6, 4, 5), bank, context)
    )
    assert torch.equal(
        vmap(call, (0, None, None))(x, bank, context[0]), call(x, bank, context[:1].expand(6, 4))
    )
    mapped = vmap(call)(x, banks, context)
    assert torch.equal(mapped, torch.stack([call(*args) for args in zip(x, banks, context, strict=True)]))
    # Per-example gradients: a gradient of the bank for every example.
    grad = torch.func.grad(lambda bank, x, c: (call(x, bank, c) ** 2).sum())
    per_example = vmap(grad, (None, 0, 0))(bank, x, context)
    assert torch.equal(per_example, torch.stack([grad(bank, a, c) for a, c in zip(x, context, strict=True)]))


def test_vmap_of_the_primitives_over_any_dimension(backend_once):
    """Called as they are registered; through the operators the mapped dimension always comes first."""
    g = generator(3)
    dense, sparse = exact_matrix("uniform", 3, 5), RandomMatrix(3, 5, seed=1, family="sparse", fan_in=2)
    x, other = integers((4, 5, 2), 2, g), integers((4, 3, 2), 2, g)
    bank, context = integers((T, 2, 5), 2, g), torch.randint(T, (4, 2), generator=g)
    matmul, gain_grad, sparse_matmul = (
        primitives.overload(backend_once, name)
        for name in ("modulated_matmul", "modulated_matmul_gain_grad", "sparse_matmul")
    )
    calls = (
        lambda x, b, c, o: (matmul(x, b, None, None, c, *primitives.dense_args(dense)),),
        lambda x, b, c, o: gain_grad(x, b, None, o, c, T, True, *primitives.dense_args(dense)),
        lambda x, b, c, o: (sparse_matmul(x, *primitives.sparse_args(sparse)),),
    )
    for call in calls:
        found = torch.func.vmap(call, (2, 1, 1, 2))(x, bank, context, other)
        one_by_one = [call(x[..., i], bank[:, i], context[:, i], other[..., i]) for i in range(2)]
        want = [torch.stack(parts) for parts in zip(*one_by_one, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# Tracing


def opcheck_arguments(primitive, kind, transposed, dtype):
    g = generator(4)
    rows, k, n = 5, 6, 4
    matrix = exact_matrix("normal", n, k) if not transposed else exact_matrix("normal", k, n).T
    gains = {
        "vectors": {"in_gain": (1, k), "out_gain": (1, n), "bias": (1, n)},
        "banks": {"in_gain": (T, k), "out_gain": (T, n), "bias": (T, n)},
        "rows": {"in_gain": (rows, k), "out_gain": (1, n)},
        "plain": {},
    }[kind]
    banks = {name: normals(shape, g).requires_grad_() for name, shape in gains.items()}
    context = torch.randint(T, (rows,), generator=g) if kind == "banks" else None
    x = normals((rows, k), g, dtype).requires_grad_()
    common = x, banks.get("in_gain"), banks.get("out_gain")
    matrix_arguments = primitives.dense_args(matrix)
    if primitive == "modulated_matmul":
        return (*common, banks.get("bias"), context, *matrix_arguments)
    other = normals((rows, n), g, dtype).requires_grad_()
    contexts = {"banks": T, "rows": rows}.get(kind, 1)
    return (*common, other, context, contexts, kind != "rows", *matrix_arguments)


@pytest.mark.parametrize("primitive", ["modulated_matmul", "modulated_matmul_gain_grad"])
@pytest.mark.parametrize(
    ("kind", "transposed", "dtype"),
    [
        ("plain", True, torch.float32),
        ("vectors", False, torch.bfloat16),
        ("banks", True, torch.float32),
        ("rows", False, torch.float32),
    ],
    ids=str,
)
def test_opcheck(backend_once, primitive, kind, transposed, dtype):
    op = primitives.overload(backend_once, primitive)
    torch.library.opcheck(op, opcheck_arguments(primitive, kind, transposed, dtype))


def test_every_registered_operator_is_checked():
    """opcheck runs on the primitives of each backend: here, in test_sparse_projection and test_flynet, and
    for those that only a GPU has in tests/backends.
    """
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("nmkern::")}
    checked = {"modulated_matmul", "modulated_matmul_gain_grad", "sparse_matmul"}
    checked |= {"flynet_logits", "flynet_gain_grad"}
    # Those of the short way are behind no rule: test_eager sees to it that nothing traced reaches them.
    short = {f"nmkern::{name}" for name in packed.SCHEMAS}
    defined = {f"nmkern::{b}_{p}" for p in checked for b in selection.backends_with(p)}
    assert registered == defined | short
    assert all(set(selection.backends_with(p)) == set(selection.BACKENDS) for p in checked)


@pytest.mark.parametrize("way", ["make_fx", "export"])
def test_a_context_may_be_a_constant_of_a_traced_program(way):
    """Its values are not looked at there, which both refuse."""
    matrix, gain, context = RandomMatrix(3, 4, seed=1), torch.ones(2, 4), torch.tensor([0, 1])

    class Layer(torch.nn.Module):
        def forward(self, x):
            return modulated_linear(x, matrix, in_gain=gain, context=context)

    x = torch.ones(2, 4)
    program = make_fx(Layer())(x) if way == "make_fx" else torch.export.export(Layer(), (x,)).module()
    assert torch.equal(program(x), Layer()(x))


def test_a_context_may_be_a_fake_tensor():
    matrix, values = RandomMatrix(3, 4, seed=1), (torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 1]))
    with FakeTensorMode() as mode:
        x, gain, context = map(mode.from_tensor, values)
        assert modulated_linear(x, matrix, in_gain=gain, context=context).shape == (2, 3)


def test_the_first_call_of_a_process_may_be_compiled(run_python):
    """The choice of a backend, and loading its library, are no part of the graph."""
    printed = run_python(
        "import torch, nmkern\n"
        "f = torch.compile(nmkern.modulated_linear, fullgraph=True, backend='aot_eager')\n"
        "print(list(f(torch.ones(4, 13), nmkern.RandomMatrix(9, 13, seed=1)).shape))"
    )
    assert printed == "[4, 9]\n"


def check_compiled(kind, backend):
    torch._dynamo.reset()
    g = generator(6)
    matrix = exact_matrix("uniform", 9, 13)
    compiled = torch.compile(modulated_linear, fullgraph=True, backend=backend, dynamic=True)
    for rows in (4, 7, 19):
        x, dy = integers((rows, 13), 1, g), integers((rows, 9), 1, g)
        named = arguments(kind, (rows,), matrix, partial(integers, limit=1, generator=g), g)
        leaves = {
            k: v.requires_grad_() for k, v in named.items() if torch.is_tensor(v) and v.is_floating_point()
        }
        x.requires_grad_()
        results = []
        for function in (modulated_linear, compiled):
            y = function(x, matrix, **named)
            results.append([y, *torch.autograd.grad(y, [x, *leaves.values()], dy)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["plain", "vectors", "banks", "rows"])
def test_compile_without_graph_breaks(backend_once, kind):
    check_compiled(kind, "aot_eager")


WITH_NUMBERS = {
    "strength": lambda x, s: modulated_linear(x, LAYER.matrix, strength=s / 3),
    "a whole strength": lambda x, s: modulated_linear(x, LAYER.matrix, strength=s),
    "scale": lambda x, s: modulated_linear(x, RandomMatrix(6, 4, seed=3, scale=0.1)) * s,
    "transposed": lambda x, s: modulated_linear(x, RandomMatrix(4, 6, seed=3).T) * s,
    "sliced": lambda x, s: modulated_linear(x, LAYER.matrix[1:4]) * s,
    "context of a layer": lambda x, s: LAYER(x, context=s),
    "context of a bank": lambda x, s: modulated_linear(x, LAYER.matrix, in_gain=x[:, :4], context=s),
}


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_numbers_and_matrices_in_a_compiled_function(name):
    """Also numbers that vary, which Dynamo makes symbols."""
    torch._dynamo.reset()
    function = WITH_NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = normals((3, 4), generator(1))
    for number in (0, 1, 2):
        assert torch.equal(compiled(x, number), function(x, number))


BACKWARD = {
    "dense": lambda x, v: modulated_linear(x, LAYER.matrix, strength=v.sum()),
    "sparse": lambda x, v: sparse_project(x, SPARSE) * v,
    "flynet": lambda x, v: flynet(x, SPARSE, RandomMatrix(3, 6, seed=1), gain=v),
}


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("need_x", [False, True])
def test_compiled_autograd(backend_once, name, need_x):
    torch._dynamo.reset()
    g = generator(2)
    x, v = normals((3, 4), g).requires_grad_(need_x), normals((6,), g).requires_grad_()
    leaves = [x, v] if need_x else [v]
    want = torch.autograd.grad(BACKWARD[name](x, v).square().sum(), leaves)
    loss = BACKWARD[name](x, v).square().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, want, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gain", [None, torch.ones(4)], ids=["bare", "gain"])
def test_a_scalar_strength_in_a_program_of_aot_inductor(tmp_path, gain):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("strength", torch.tensor(0.3))

        def forward(self, x):
            return modulated_linear(x, LAYER.matrix, in_gain=gain, strength=self.strength)

    x = normals((3, 4), generator(1))
    program = torch.export.export(Layer(), (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    assert torch.equal(torch._inductor.aoti_load_package(path)(x), Layer()(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vectors", "banks"])
def test_compile_with_inductor(backend_once, kind):
    check_compiled(kind, "inductor")


def test_a_new_batch_size_does_not_compile_again(backend_once):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    matrix = exact_matrix("uniform", 9, 13, seed=2**64 - 1)
    gain = torch.ones(13)
    modulated_linear(torch.ones(4, 13), matrix)  # the choice of a backend is made once
    compiled = torch.compile(modulated_linear, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for rows in (4, 7, 19, 64):
        x = torch.ones(rows, 13)
        assert torch.equal(compiled(x, matrix, in_gain=gain), modulated_linear(x, matrix, in_gain=gain))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4
