"""FlyNet's share of emulated_cuda.py."""

import pytest
import torch
from formula import generator, integers, stored_weights

import nmkern
from native import emulated_library
from native.emulated_library import CUDA
from nmkern import RandomMatrix, stream
from nmkern.backends import primitives, triton

LOGITS = primitives.overload("cuda", "flynet_logits")
GAIN_GRAD = primitives.overload("cuda", "flynet_gain_grad")
UNITS = 128  # a power of two, so that the mean is exact


def network(family="uniform", inputs=40, classes=11, fan_in=3):
    """Views of two matrices whose products with integers are exact."""
    encoder = RandomMatrix(UNITS + 3, inputs + 5, seed=7, family="sparse", fan_in=fan_in)[3:, 5:]
    rms = stream.DENSE_FAMILIES[family].rms
    decoder = RandomMatrix(classes + 2, UNITS + 9, seed=2**63 + 9, family=family, scale=rms)[2:, 9:]
    return encoder, decoder


def expected(x, gain, context, encoder, decoder, d_logits):
    m = x.double() @ stored_weights(encoder).T
    r = torch.relu(m - m.mean(1, keepdim=True))
    exact = gain.double().requires_grad_()
    y = (r * (exact if context is None else exact[context])) @ stored_weights(decoder).T
    return y.detach(), torch.autograd.grad(y, exact, d_logits.double())[0]


def check_the_formula(library):
    """Families, dtypes, one gain, a bank and a row for each row of the batch, tensors of any layout."""
    before = library.emulated_calls()
    kinds = ((1, 5), (3, 20), (7, 7), (1, 33))
    for number, (contexts, rows) in enumerate(kinds):
        family = tuple(stream.DENSE_FAMILIES)[number % 3]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        encoder, decoder = network(family)
        args = primitives.flynet_args(encoder, decoder)
        g = generator(number)
        x, d_logits = integers((rows, 40), 1, g, dtype), integers((rows, 11), 1, g, dtype)
        gain = (2 * torch.randint(2, (contexts, UNITS), generator=g) - 1).float()
        context = torch.randint(3, (rows,), generator=g) if contexts == 3 else None
        want, want_grad = expected(x, gain, context, encoder, decoder, d_logits)
        given = None if context is None else torch.where(context == 2, 2**40, context)
        for like, d in ((x, d_logits), (x.T.contiguous().T, d_logits.repeat_interleave(2, 1)[:, ::2])):
            y = LOGITS.redispatch(CUDA, like, gain.T.contiguous().T, given, *args)
            assert y.dtype == dtype and torch.equal(y, want.to(dtype)), (family, contexts)
            grad = GAIN_GRAD.redispatch(CUDA, like, d, given, contexts, *args)
            assert torch.equal(grad.double(), want_grad), (family, contexts)
    assert library.emulated_calls() == before + 4 * len(kinds)
    assert LOGITS.redispatch(CUDA, x[:0], gain, None, *args).shape == (0, 11)
    none = GAIN_GRAD.redispatch(CUDA, x[:0], d_logits[:0], None, 1, *args)
    assert torch.equal(none, torch.zeros(1, UNITS))


def check_what_has_no_room(library):
    """Is Triton's: the operators that it has, whatever serves there."""
    handed = []

    def taken(*args):
        handed.append(args)
        return args[0].new_full((2, 3), 3.0)

    for primitive in ("flynet_logits", "flynet_gain_grad"):
        primitives.LIBRARY.impl(f"triton_{primitive}", taken, "CPU", allow_override=True)
    args = primitives.flynet_args(*network(inputs=2000))
    g = generator(1)
    x, gain, d_logits = torch.ones(2, 2000), torch.ones(3, UNITS), integers((2, 11), 1, g)
    context = torch.tensor([2, 0])
    before = library.emulated_calls()
    assert torch.equal(LOGITS.redispatch(CUDA, x, gain, context, *args), torch.full((2, 3), 3.0))
    assert torch.equal(GAIN_GRAD.redispatch(CUDA, x, d_logits, None, 2, *args), torch.full((2, 3), 3.0))
    assert library.emulated_calls() == before
    (x0, gain0, context0, *first), (x1, d1, context1, contexts, *second) = handed
    for found, want in ((x0, x), (gain0, gain), (context0, context), (x1, x), (d1, d_logits)):
        assert torch.equal(found, want)
    assert (context1, contexts) == (None, 2)
    assert tuple(first) == tuple(second) == args


def check_through_the_public_operator(library):
    for primitive in ("flynet_logits", "flynet_gain_grad"):
        launcher = triton.launcher(primitive)
        primitives.LIBRARY.impl(f"triton_{primitive}", launcher, "CPU", allow_override=True)
    encoder, decoder = network()
    g = generator(5)
    x, d_logits = integers((9, 40), 1, g), integers((9, 11), 1, g)
    gain = (2 * torch.randint(2, (UNITS,), generator=g) - 1).float()
    want, want_grad = expected(x, gain, None, encoder, decoder, d_logits)
    before = library.emulated_calls()
    with emulated_library.serving():
        leaf = gain.clone().requires_grad_()
        y = nmkern.flynet(x, encoder, decoder, gain=leaf)
        grad = torch.autograd.grad(y, leaf, d_logits)[0]
    assert library.emulated_calls() == before + 2
    assert torch.equal(y.detach().double(), want) and torch.equal(grad.double(), want_grad)


def check_errors(library):
    args = primitives.flynet_args(*network())
    x, gain, d = torch.ones(4, 40), torch.ones(1, UNITS), torch.ones(4, 11)
    for refused, call in (
        ("x: expected shape [4, 40]", lambda: LOGITS.redispatch(CUDA, x[:, 1:], gain, None, *args)),
        ("gain: expected float32 of shape", lambda: LOGITS.redispatch(CUDA, x, gain[:, 1:], None, *args)),
        ("gain: expected 1 or 4 rows", lambda: LOGITS.redispatch(CUDA, x, gain.repeat(3, 1), None, *args)),
        ("d_logits: expected shape", lambda: GAIN_GRAD.redispatch(CUDA, x, d[:, 1:], None, 1, *args)),
        ("contexts: expected 1 or 4", lambda: GAIN_GRAD.redispatch(CUDA, x, d, None, 3, *args)),
    ):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert refused in str(raised.value)
    library.emulated_error(7)
    with pytest.raises(RuntimeError, match="cuda backend: launching a kernel: error 7"):
        LOGITS.redispatch(CUDA, x, gain, None, *args)
    assert library.emulated_guards() == 0


def check_all(library):
    check_the_formula(library)
    check_what_has_no_room(library)
    check_through_the_public_operator(library)
    check_errors(library)
