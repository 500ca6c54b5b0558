"""Everyday calls by the triton backend: what the primitives compute, also through modulated_linear."""

import pytest
import torch
from formula import Expected, exact_matrix, generator, integers

from nmkern import modulated_linear, stream
from nmkern.backends import packed, selection, triton
from nmkern.backends.triton import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
MATRIX = exact_matrix("normal", 50, 21)[2:, 3:].T
N, K = MATRIX.shape
LEADS = ((), (5,), (2, 3), (0,), (2, 0), (40,))


def vectors(g):
    return [integers((size,), 2, g).to(DEVICE) for size in (K, N, N)]


@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_they_are_the_primitives(lead):
    way, (forward, transpose) = triton.everyday(), packed.pack(MATRIX)
    g = generator(1)
    x, other = (integers((*lead, size), 2, g).to(DEVICE) for size in (K, N))
    gains = vectors(g)
    banks = [v[None] for v in gains]
    rows, others = x.reshape(-1, K), other.reshape(-1, N)
    want = launch.modulated_matmul(rows, *banks, None, *forward.arguments)
    assert torch.equal(way.matmul(x, *gains, forward), want.view(*lead, N))
    want = launch.modulated_matmul(rows, None, None, None, None, *forward.arguments)
    assert torch.equal(way.matmul_bare(x, forward), want.view(*lead, N))
    for wanted in (True, False):
        given = (*banks[1::-1], rows, None, 1, wanted)
        product, grad = launch.modulated_matmul_gain_grad(others, *given, *transpose.arguments)
        found = way.gain_grad(other, gains[1], gains[0], x, wanted, transpose)
        assert torch.equal(found[1], grad[0])
        assert torch.equal(found[0], product.view(*lead, K) if wanted else product)


@pytest.mark.parametrize("family", stream.DENSE_FAMILIES)
def test_modulated_linear_takes_them_and_no_operator(monkeypatch, family):
    """Forward and backward; what has to be recorded again is the triton backend's operators'."""
    matrix = exact_matrix(family, 9, 30)
    way = triton.everyday()
    monkeypatch.setitem(selection.everyday[DEVICE], torch.float32, way)
    g = generator(2)
    x, dy = integers((2, 3, 30), 2, g), integers((2, 3, 9), 2, g)
    named = {"in_gain": integers((30,), 2, g), "out_gain": integers((9,), 2, g), "bias": integers((9,), 2, g)}
    want = Expected(x, matrix, named, dy)
    leaves = {name: v.to(DEVICE).requires_grad_() for name, v in {"x": x, **named}.items()}

    def call(again):
        y = modulated_linear(leaves["x"], matrix, **{name: leaves[name] for name in named})
        bare = modulated_linear(leaves["x"], matrix)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(DEVICE), create_graph=again)
        (dx,) = torch.autograd.grad(bare, leaves["x"], dy.to(DEVICE))
        return y, grads, bare, dx

    for again in (False, True):
        with torch.autograd.profiler.profile() as profile:
            y, grads, bare, dx = call(again)
        ran = {event.name for event in profile.function_events if event.name.startswith("nmkern::")}
        assert ran == ({"nmkern::triton_modulated_matmul_gain_grad"} if again else set())
        assert torch.equal(y.detach().cpu(), want.y.float())
        for name, grad in zip(leaves, grads, strict=True):
            assert torch.equal(grad.detach().cpu(), want.grads[name].float()), name
        plain = Expected(x, matrix, {}, dy)
        assert torch.equal(bare.detach().cpu(), plain.y.float())
        assert torch.equal(dx.cpu(), plain.grads["x"].float())


def test_what_does_not_fit_is_refused():
    way, (forward, _) = triton.everyday(), packed.pack(MATRIX)
    x, gain = torch.ones(4, K, device=DEVICE), torch.ones(K, device=DEVICE)
    other = torch.ones(4, N, device=DEVICE)
    for call in (
        lambda: way.matmul_bare(x[:, 1:], forward),
        lambda: way.matmul_bare(x.sum(), forward),
        lambda: way.matmul(x, gain[1:], None, None, forward),
        lambda: way.matmul(x, gain.double(), None, None, forward),
        lambda: way.matmul(x, gain.to("meta"), None, None, forward),
        lambda: way.matmul(x, None, None, gain, forward),
        lambda: way.gain_grad(x, None, None, other[1:], True, forward),
        lambda: way.gain_grad(x, None, None, other[:, 1:], True, forward),
        lambda: way.gain_grad(x, None, None, other.to("meta"), True, forward),
    ):
        with pytest.raises(RuntimeError, match="expected "):
            call()
