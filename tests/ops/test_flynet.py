"""flynet: the paper's network as one operator, held to its formula written with stored matrices.

The mean over a power of two of hidden units is exact for integers, so results are compared bit for bit.
"""

from functools import partial
from itertools import product

import pytest
import torch
from formula import UNIT, T, generator, integers, normals, poisoned, signs, stored_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from nmkern import RandomMatrix, flynet, memory, modulated_linear, stream
from nmkern.backends import primitives
from nmkern.models import FlyNet
from nmkern.ops.flynet import OPERATORS, flynet_hidden

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrices(inputs, hidden, classes, fan_in=3, family="uniform", scale=None, corner=(0, 0, 0, 0)):
    """Encoder and decoder, cut out of larger matrices at ``corner``; with factors of one unless scaled."""
    a, b, c, d = corner
    rms = stream.DENSE_FAMILIES[family].rms
    encoder = RandomMatrix(
        hidden + a, inputs + b, seed=7, family="sparse", fan_in=fan_in, scale=1.0 if scale is None else scale
    )
    decoder = RandomMatrix(
        classes + c, hidden + d, seed=2**63 + 9, family=family, scale=rms if scale is None else scale
    )
    return encoder[a:, b:], decoder[c:, d:]


def plain(x, encoder, decoder, gain, context=None, strength=None, *, drawn_only=False):
    """The network of the paper in the dtype of its arguments, from stored matrices.

    With ``drawn_only`` an input that a unit does not draw is no part of its sum, where a product with a
    stored zero would make NaN of a NaN or an infinity.
    """
    p, w = (stored_weights(matrix).to(x.dtype) for matrix in (encoder, decoder))
    m = torch.where(p != 0, x[..., None, :] * p, 0.0).sum(-1) if drawn_only else x @ p.T
    r = torch.relu(m - m.mean(-1, keepdim=True))
    if context is not None and gain.ndim == 2:
        gain = gain[context]
    y = (r * gain) @ w.T
    if strength is None:
        return y
    if context is not None and strength.ndim == 1:
        strength = strength[context]
    return y * strength[..., None]


def arguments(kind, batch, hidden, make, g):
    context = torch.randint(T, (batch,), generator=g)
    return {
        "vector": lambda: {"gain": make((hidden,))},
        "vector and strength": lambda: {"gain": make((hidden,)), "strength": make(())},
        "bank": lambda: {"gain": make((T, hidden)), "strength": make((T,)), "context": context},
        "one of a bank": lambda: {"gain": make((T, hidden)), "strength": make((T,)), "context": 1},
        "rows": lambda: {"gain": make((batch, hidden)), "strength": make((batch,))},
    }[kind]()


KINDS = ("vector", "vector and strength", "bank", "one of a bank", "rows")


def doubled(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


# Exact sums
#
# Inputs and d_logits are integers of modulus at most 1, gains and strengths signs, factors one, fan_in F,
# H hidden units, H a power of two. Then m is an integer of modulus at most F, its mean a multiple of 1/H,
# and in units of 1/H: r is at most 2 F H, a logit at most H * 2 F H * c with c the largest code, the
# gradient of a gain at most M * 2 F H * C * c over M rows and C classes. With F = 3, codes up to 15, H = 128,
# C = 11, M = 70 that is 1.5e6 and 8.9e6, below 2^24 = 1.67e7: float32 is exact in whatever order.


@given(
    batch=st.sampled_from([0, 1, 2, 15, 16, 17, 33, 70]),
    inputs=st.integers(3, 40),
    hidden=st.sampled_from([1, 2, 16, 32, 64, 128]),
    classes=st.integers(1, 11),
    corner=st.one_of(st.just((0, 0, 0, 0)), st.tuples(*[st.integers(0, 9)] * 4)),
    family=st.sampled_from(["uniform", "rademacher"]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 8),
)
@settings(max_examples=60)
def test_integers_give_exact_logits_and_gradients(
    backend, threads, passed_over, batch, inputs, hidden, classes, corner, family, kind, dtype, count
):
    if passed_over(15):
        return
    threads(count, backend)
    g = generator(batch + inputs)
    encoder, decoder = matrices(inputs, hidden, classes, 3, family, corner=corner)
    x, d_logits = integers((batch, inputs), 1, g), integers((batch, classes), 1, g)
    named = arguments(kind, batch, hidden, lambda shape: signs(shape, g), g)
    named.pop("strength", None)
    exact_gain = named["gain"].double().requires_grad_()
    want = plain(x.double(), encoder, decoder, **{**named, "gain": exact_gain})
    want_grad = torch.autograd.grad(want, exact_gain, d_logits.double())[0]
    named["gain"].requires_grad_()
    y = flynet(poisoned(x.to(dtype)), encoder, decoder, **named)
    assert y.dtype == dtype
    assert torch.equal(y, want.to(dtype))
    grad = torch.autograd.grad(y, named["gain"], poisoned(d_logits.to(dtype)))[0]
    assert torch.equal(grad.double(), want_grad)


@pytest.mark.parametrize("count", [1, 3])
def test_many_hidden_units_and_classes_at_far_corners(backend, threads, few, count):
    """Decoders larger than what is decoded at a time, cut out of matrices of 2^33 rows and columns.

    A network with signs for weights and one input a unit: a logit is at most H * 2 H units of 1/H, so
    2^25 / H sums; with H = 2048 the bound is 8.4e6.
    """
    if not few([count], 2, start=count // 2):
        return
    threads(count, backend)
    g = generator(count)
    hidden, classes = (256, 70) if backend == "triton" else (2048, 300)
    inputs = 30
    encoder = RandomMatrix(2**31 + hidden, 64, seed=1, family="sparse", fan_in=1)[2**31 :, 20 : 20 + inputs]
    decoder = RandomMatrix(2**34 - 1, 2**33 + hidden, seed=2, family="rademacher")[-classes:, -hidden:]
    x = integers((18, inputs), 1, g)
    gain = signs((hidden,), g).requires_grad_()
    want = plain(x.double(), encoder, decoder, gain.double())
    y = flynet(x, encoder, decoder, gain=gain)
    assert torch.equal(y.double(), want)
    d_logits = integers((18, classes), 1, g)
    grads = [torch.autograd.grad(out, gain, d.to(out.dtype))[0] for out in (y, want) for d in (d_logits,)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "hidden", "classes", "fan_in"), [(784, 1000, 10, 7), (50, 77, 3, 50)])
def test_rounding_of_random_inputs(backend, few, kind, inputs, hidden, classes, fan_in):
    """Against float64, normwise, with the number of roundings on the longest path times 2^-24.

    m is a sum of fan_in (and a product), the mean a sum over the inputs or the units, weighted; the logits
    a sum over the units with four products. Their magnitude is the formula's with absolute values.
    """
    if not few([kind], 3, start=KINDS.index(kind) + fan_in):
        return
    encoder, decoder = matrices(inputs, hidden, classes, fan_in, "normal", scale=0.3)
    g = generator(4)
    x, d_logits = normals((19, inputs), g), normals((19, classes), g)
    named = arguments(kind, 19, hidden, lambda shape: normals(shape, g), g)
    leaves = [named[name].requires_grad_() for name in ("gain", "strength") if name in named]
    y = flynet(x, encoder, decoder, **named)
    grads = torch.autograd.grad(y, leaves, d_logits)
    exact = {name: doubled(value) for name, value in named.items()}
    exact_leaves = [exact[name].detach().requires_grad_() for name in ("gain", "strength") if name in exact]
    exact.update(zip([name for name in ("gain", "strength") if name in exact], exact_leaves, strict=True))
    want = plain(x.double(), encoder, decoder, **exact)
    want_grads = torch.autograd.grad(want, exact_leaves, d_logits.double())
    p, w = stored_weights(encoder).abs(), stored_weights(decoder).abs()
    m = x.double().abs() @ p.T
    r = m + m.mean(-1, keepdim=True)
    gain = exact["gain"].detach().abs()
    per_row = gain[named["context"]] if "context" in named else gain
    strength = exact["strength"].detach().abs() if "strength" in exact else torch.tensor(1.0)
    if "context" in named:
        strength = strength[named["context"]]
    ru = (2 * fan_in + inputs + hidden + classes + 19 + 16) * UNIT[torch.float32]
    magnitude = ((r * per_row) @ w.T) * strength[..., None]
    assert ((y.double() - want.detach()).abs() <= ru / (1 - ru) * magnitude).all()
    # Gradients: r (d_logits w) strength, summed over rows, and for strength over units; all of it is bounded
    # by the magnitudes' product with the largest d_logits.
    back = (d_logits.double().abs() @ w) * strength[..., None]
    d_gain = (r * back).sum(0)
    assert ((grads[0].double() - want_grads[0]).abs() <= ru / (1 - ru) * d_gain).all()
    if len(grads) == 2:
        d_strength = (magnitude / strength[..., None] * d_logits.double().abs()).sum()
        assert ((grads[1].double() - want_grads[1]).abs() <= ru / (1 - ru) * d_strength).all()


def test_where_x_needs_a_gradient_the_network_is_composed(backend):
    """The same values, and gradients to x too."""
    g = generator(6)
    encoder, decoder = matrices(20, 64, 5)
    x, gain = integers((9, 20), 1, g), signs((64,), g)
    d_logits = integers((9, 5), 1, g)
    fused = flynet(x, encoder, decoder, gain=gain)
    leaf = x.clone().requires_grad_()
    composed = flynet(leaf, encoder, decoder, gain=gain)
    assert torch.equal(composed, fused)
    exact = x.double().requires_grad_()
    want = torch.autograd.grad(plain(exact, encoder, decoder, gain.double()), exact, d_logits.double())[0]
    assert torch.equal(torch.autograd.grad(composed, leaf, d_logits)[0].double(), want)
    with torch.no_grad():
        assert torch.equal(flynet(leaf, encoder, decoder, gain=gain), fused)


def test_hidden_is_the_representation_that_contexts_share(backend):
    encoder, _ = matrices(20, 64, 5)
    x = integers((2, 3, 20), 4, generator(1))
    m = x.double() @ stored_weights(encoder).T
    assert torch.equal(flynet_hidden(x, encoder).double(), torch.relu(m - m.mean(-1, keepdim=True)))


@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 3, 20), (2, 0, 20)])
def test_leading_dimensions_and_layouts(backend, few, shape):
    encoder, decoder = matrices(20, 64, 5)
    g = generator(2)
    x, gain = integers(shape, 1, g), signs((64,), g)
    want = plain(x.double(), encoder, decoder, gain.double())
    strided = torch.full((*shape[:-1], 41), float("nan"))[..., 1::2]
    strided.copy_(x)
    for value in few((x, strided, x.transpose(0, -1).contiguous().transpose(0, -1)), 3, start=len(shape)):
        y = flynet(value, encoder, decoder, gain=gain)
        assert y.shape == (*shape[:-1], 5)
        assert torch.equal(y.double(), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [1, 5, 33])
def test_nan_and_infinity_reach_their_own_row_only(backend, few, batch, value):
    """As the formula has it: the mean carries them to every unit of their row, and to no other row."""
    if not few([batch], 2, start=batch // 5 + (value == float("inf"))):
        return
    encoder, decoder = matrices(20, 64, 5)
    g = generator(batch)
    x, gain, d_logits = integers((batch, 20), 1, g), signs((64,), g), integers((batch, 5), 1, g)
    clean = flynet(x, encoder, decoder, gain=gain)
    row = torch.arange(batch) == batch // 2
    x[row, 7] = value
    exact = gain.double().requires_grad_()
    want = plain(x.double(), encoder, decoder, exact, drawn_only=True)
    assert want[row].isnan().all()
    y = flynet(x, encoder, decoder, gain=gain.requires_grad_())
    assert y[row].isnan().all()
    assert torch.equal(y[~row], clean[~row])
    grad = torch.autograd.grad(y, gain, d_logits)[0]
    assert torch.equal(grad.isnan(), torch.autograd.grad(want, exact, d_logits.double())[0].isnan())


def test_an_input_that_no_unit_draws_has_no_effect(backend):
    encoder, decoder = matrices(40, 4, 5, fan_in=2)
    drawn = stored_weights(encoder).bool().any(0)
    assert not drawn.all()
    x = integers((3, 40), 1, generator(1))
    gain = torch.ones(4)
    clean = flynet(x, encoder, decoder, gain=gain)
    assert clean.any()
    x[:, ~drawn] = float("nan")
    assert torch.equal(flynet(x, encoder, decoder, gain=gain), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_and_threads_give_the_same_bits(backend, threads, few, dtype):
    if not few([dtype], 3, start=DTYPES.index(dtype)):
        return
    encoder, decoder = matrices(100, 500, 10, 7, "normal", scale=0.1)
    g = generator(3)
    x, d_logits = normals((40, 100), g, dtype), normals((40, 10), g, dtype)
    gain = normals((T, 500), g).requires_grad_()
    context = torch.randint(T, (40,), generator=g)
    results = []
    for count in few((1, 1, 2, 5), 2):
        threads(count, backend)
        y = flynet(x, encoder, decoder, gain=gain, context=context)
        results.append((y, torch.autograd.grad(y, gain, d_logits)[0]))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])


# Derivatives and tracing


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_and_gradgradcheck(kind):
    encoder, decoder = matrices(6, 9, 3, 2, "normal", scale=0.5)
    g = generator(3)
    x = normals((4, 6), g, torch.float64)
    named = arguments(kind, 4, 9, lambda shape: normals(shape, g, torch.float64), g)
    names = [name for name in ("gain", "strength") if name in named]
    leaves = [named[name].requires_grad_() for name in names]

    def call(*values):
        return flynet(x, encoder, decoder, **{**named, **dict(zip(names, values, strict=True))})

    dy = normals((4, 3), g, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, [dy], check_fwd_over_rev=True)


def transforms_of(f):
    """What torch.func makes of f(x, gain) -> [rows, classes]."""
    func = torch.func
    one = lambda x, gain: f(x[None], gain)[0]  # noqa: E731 - a row at a time
    loss = lambda x, gain: (f(x, gain) ** 2).sum()  # noqa: E731
    row_loss = lambda x, gain: (one(x, gain) ** 2).sum()  # noqa: E731
    return {
        "grad": func.grad(loss, argnums=1),
        "grad to x": func.grad(loss, argnums=(0, 1)),
        "vmap over x": func.vmap(one, (0, None)),
        "vmap over gains": lambda x, gain: func.vmap(f, (None, 0))(x, torch.stack([gain, -gain])),
        "vmap over both": lambda x, gain: func.vmap(one)(x, torch.stack([gain] * len(x))),
        "vmap of grad": func.vmap(func.grad(row_loss, argnums=1), (0, None)),
        "jacrev": func.jacrev(f, argnums=1),
        "jacrev of jacrev": func.jacrev(func.jacrev(row_loss, argnums=1), argnums=1),
        "jacrev of grad": func.jacrev(func.grad(loss, argnums=1), argnums=1),
        "jvp": lambda x, gain: func.jvp(f, (x, gain), (x.flip(0), gain.flip(0))),
        "jacfwd": func.jacfwd(f, argnums=(0, 1)),
        "hessian": func.hessian(row_loss, argnums=1),
    }


@pytest.mark.parametrize("transform", list(transforms_of(None)))
def test_torch_func_on_integers_is_exact(backend_once, transform):
    # H = 8, F = 2, 3 classes: r is at most 32 units of 1/8, a logit 8 * 32 * 15 units; its square 1.5e7 in
    # units of 1/64, summed only inside of a gradient, whose terms are smaller by H.
    encoder, decoder = matrices(6, 8, 3, 2)
    g = generator(1)
    x, gain = integers((4, 6), 1, g), signs((8,), g)
    x = x[0] if transform in ("jacrev of jacrev", "hessian") else x

    def ours(x, gain):
        return flynet(x, encoder, decoder, gain=gain)

    def theirs(x, gain):
        return plain(x, encoder, decoder, gain)

    found = transforms_of(ours)[transform](x, gain)
    want = transforms_of(theirs)[transform](x.double(), gain.double())
    found, want = (value if isinstance(value, tuple) else (value,) for value in (found, want))
    for actual, exact in zip(found, want, strict=True):
        assert torch.equal(actual.double(), exact)


# Where flynet cannot see that x needs a gradient: its operators have one too


@pytest.mark.parametrize("contexts", [1, T, 4])
def test_gradients_of_the_primitives_to_everything(contexts):
    encoder, decoder = matrices(6, 9, 3, 2, "normal", scale=0.5)
    g = generator(3)
    named = partial(normals, generator=g, dtype=torch.float64)
    x, gain, d_logits = (named(shape).requires_grad_() for shape in ((4, 6), (contexts, 9), (4, 3)))
    context = torch.randint(T, (4,), generator=g) if contexts == T else None
    operators, args = OPERATORS["reference"], primitives.flynet_args(encoder, decoder)

    def logits(x, gain):
        return operators.logits(x, gain, context, *args)

    def gain_grad(x, d_logits):
        return operators.gain_grad(x, d_logits, context, contexts, *args)

    def composed(x, gain):
        r = flynet_hidden(x, encoder)
        return modulated_linear(r, decoder, in_gain=gain, context=context)

    for function, values in ((logits, (x, gain)), (gain_grad, (x, d_logits))):
        direction = named(function(*values).shape).requires_grad_()
        assert torch.autograd.gradcheck(function, values, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, values, [direction], check_fwd_over_rev=True)
    (found,), (want,) = (torch.autograd.grad(f(x, gain), x, d_logits) for f in (logits, composed))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def traces_of(f, x):
    """f as programs that were made where x needed no gradient."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x)

    return {
        "vmap": torch.func.vmap(f),
        "export": torch.export.export(Module(), (x,)).module(),
        "make_fx": make_fx(f)(x),
    }


@pytest.mark.parametrize(
    ("program", "kind"),
    [("vmap", "vector"), *product(("export", "make_fx"), ("vector and strength", "bank", "rows"))],
)
def test_programs_have_a_gradient_to_x(backend_once, program, kind):
    """And that one has gradients: exact, as in test_integers_give_exact_logits_and_gradients.

    A gradient to x is a sum of at most H terms of C codes less their mean, with H = 32 and C = 3 below
    32 * 2 * 45 in units of 1/H, thus 9.2e4 units; its gradient to d_logits is a logit of the direction,
    below H * 2 F * 15 with F = 3, as many units.
    """
    encoder, decoder = matrices(6, 32, 3, 2)
    g = generator(5)
    x, direction = integers((4, 6), 1, g), integers((4, 6), 1, g)
    named = arguments(kind, 4, 32, lambda shape: signs(shape, g), g)
    function = traces_of(lambda x: flynet(x, encoder, decoder, **named), x)[program]

    def second(f, dtype):
        leaf = x.to(dtype).requires_grad_()
        v = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        y = f(leaf)
        (dx,) = torch.autograd.grad(y, leaf, v, create_graph=True)
        return y, dx, *torch.autograd.grad((dx * direction).sum(), v)

    exact = {name: doubled(value) for name, value in named.items()}
    found = second(function, torch.float32)
    want = second(lambda x: plain(x, encoder, decoder, **exact), torch.float64)
    for actual, expected in zip(found, want, strict=True):
        assert torch.equal(actual.double(), expected)


def test_an_exported_network_trains_what_comes_before_it():
    """Against its twin with stored matrices."""
    net = FlyNet(8, 4, width_multiple=16, fan_in=3)
    x = normals((3, 8), generator(1))
    program, twin = torch.export.export(net, (x,)).module(), memory.stored_twin(net)
    x.requires_grad_()
    (found,), (want,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (program, twin))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("primitive", ["flynet_logits", "flynet_gain_grad"])
@pytest.mark.parametrize("contexts", [1, T])
@pytest.mark.parametrize("need_x", [False, True])
def test_opcheck(backend_once, primitive, contexts, need_x):
    encoder, decoder = matrices(6, 9, 4, 2, "normal")
    g = generator(2)
    context = torch.randint(T, (5,), generator=g) if contexts > 1 else None
    x = normals((5, 6), g).requires_grad_(need_x)
    matrix_arguments = primitives.flynet_args(encoder, decoder)
    if primitive == "flynet_logits":
        values = (x, normals((contexts, 9), g).requires_grad_(), context, *matrix_arguments)
    else:
        values = (x, normals((5, 4), g).requires_grad_(), context, contexts, *matrix_arguments)
    torch.library.opcheck(primitives.overload(backend_once, primitive), values)


@pytest.mark.parametrize("kind", ["vector and strength", "bank"])
def test_compile_without_graph_breaks(backend_once, kind):
    torch._dynamo.reset()
    encoder, decoder = matrices(20, 64, 5)
    compiled = torch.compile(flynet, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 9, 30):
        g = generator(batch)
        x, d_logits = integers((batch, 20), 1, g), integers((batch, 5), 1, g)
        named = arguments(kind, batch, 64, lambda shape, g=g: signs(shape, g), g)
        leaves = [named["gain"].requires_grad_(), named["strength"].requires_grad_()]
        results = []
        for function in (flynet, compiled):
            y = function(x, encoder, decoder, **named)
            results.append((y, *torch.autograd.grad(y, leaves, d_logits)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Manners


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_gives_the_dtype_of_a_linear_layer(backend_once, dtype):
    encoder, decoder = matrices(20, 64, 5)
    x = integers((4, 20), 1, generator(1), dtype)
    gain = torch.ones(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = functional.linear(x, torch.ones(5, 20, dtype=dtype))
        y = flynet(x, encoder, decoder, gain=gain)
    assert y.dtype == want.dtype
    assert torch.equal(y, flynet(x.bfloat16(), encoder, decoder, gain=gain))


ENCODER, DECODER = matrices(20, 64, 5)
X = torch.ones(4, 20)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.ones(4, 19)}, ValueError, "x: expected shape [..., 20]"),
        ({"x": X.int()}, TypeError, "x: expected float32, "),
        ({"encoder": DECODER}, ValueError, "encoder: expected a sparse family, got 'uniform'"),
        ({"encoder": None}, TypeError, "encoder: expected a RandomMatrix, got NoneType"),
        ({"decoder": None}, TypeError, "decoder: expected a RandomMatrix, got NoneType"),
        ({"decoder": RandomMatrix(5, 64, seed=0, family="sparse", fan_in=2)}, ValueError, "decoder: "),
        ({"decoder": DECODER[:, 1:]}, ValueError, "decoder: expected 64 columns, the encoder's rows, got 63"),
        ({"gain": None}, TypeError, "gain: expected a tensor, got NoneType"),
        ({"gain": torch.ones(63)}, ValueError, "gain: expected [..., 64], got shape [63]"),
        ({"gain": torch.ones(64).double()}, TypeError, "gain: expected float32 for x of float32"),
        ({"gain": torch.ones(2, 64), "context": 2}, ValueError, "context: expected 0 <= context < 2"),
        (
            {"gain": torch.ones(2, 64), "context": torch.tensor([0, 1, 2, 0])},
            ValueError,
            "context: expected 0",
        ),
        ({"gain": torch.ones(2, 64)}, ValueError, "gain: expected a vector, or one per row"),
        ({"strength": float("nan")}, ValueError, "strength: expected a finite number"),
        ({"strength": torch.ones(3)}, ValueError, "strength: "),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_arguments_are_named(change, error, text):
    named = {"x": X, "encoder": ENCODER, "decoder": DECODER, "gain": torch.ones(64), **change}
    with pytest.raises(error) as raised:
        flynet(named.pop("x"), named.pop("encoder"), named.pop("decoder"), **named)
    assert type(raised.value) is error
    assert str(raised.value).startswith(text)
