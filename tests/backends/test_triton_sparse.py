"""What only Triton's sparse and FlyNet kernels have: draws in memory, chunks of draws, segments of the batch.

That they compute their formulas is tested with all other backends, in tests/ops.
"""

import pytest
import torch
from formula import T, generator, integers, stored_weights

pytest.importorskip("triton")

from nmkern import RandomMatrix, stream
from nmkern.backends import primitives
from nmkern.backends.triton import flynet, launch, sparse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("held", "fan_in"), [(16, 16), (16, 17), (4, 30), (2048, 30)])
def test_draws_are_the_streams_in_registers_and_in_memory(monkeypatch, held, fan_in):
    """All 30 columns of a row drawn, so that most candidates are taken."""
    monkeypatch.setattr(sparse, "HELD", held)
    seed, first = 2**63 + 5, 2**32 - 40
    columns = sparse.draw(torch.empty(0, device=DEVICE), seed - 2**64, first, 37, 0, 30, 30, fan_in)
    want = [stream.sparse_columns(seed, first + row, 30, fan_in).tolist() for row in range(37)]
    assert (columns.cpu().long() + 2**31).T.tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_draws(monkeypatch, dtype):
    """Sums over several chunks, in the result itself or, where that is narrow, in scratch for parts."""
    matrix = RandomMatrix(45, 20, seed=3, family="sparse", fan_in=4)[:, 2:]
    weights = stored_weights(matrix)
    g = generator(1)
    x, dy = (integers((140, size), 3, g, dtype).to(DEVICE) for size in matrix.shape[::-1])
    monkeypatch.setattr(sparse, "DRAWS", 4 * 20)
    monkeypatch.setattr(launch, "SCRATCH", 4 * 20 * 128)
    y = sparse.sparse_matmul(x, *primitives.sparse_args(matrix))
    dx = sparse.sparse_matmul(dy, *primitives.sparse_args(matrix.T))
    assert torch.equal(y.cpu(), (x.cpu().double() @ weights.T).to(dtype))
    assert torch.equal(dx.cpu(), (dy.cpu().double() @ weights).to(dtype))


def network(hidden, classes):
    encoder = RandomMatrix(hidden, 20, seed=7, family="sparse", fan_in=3)
    decoder = RandomMatrix(classes, hidden, seed=8, scale=stream.UNIFORM.rms)
    return encoder, decoder


def exact(x, encoder, decoder):
    m = x.double() @ stored_weights(encoder).T
    return torch.relu(m - m.mean(1, keepdim=True)), stored_weights(decoder)


def test_splits_and_segments_of_a_sweep_are_the_sum(monkeypatch):
    """With exact sums, the same bits however many programs share the units and the batch."""
    g = generator(2)
    encoder, decoder = network(256, 5)
    x, d_logits, gain = integers((70, 20), 1, g), integers((70, 5), 1, g), integers((1, 256), 1, g)
    r, w = exact(x, encoder, decoder)
    args = primitives.flynet_args(encoder, decoder)
    on = [value.to(DEVICE) for value in (x, gain, d_logits)]
    for programs in (1, 264):
        monkeypatch.setattr(flynet, "_PROGRAMS", programs)
        logits = flynet.flynet_logits(on[0], on[1], None, *args)
        assert torch.equal(logits.cpu().double(), (r * gain) @ w.T)
        grad = flynet.flynet_gain_grad(on[0], on[2], None, 1, *args)
        assert torch.equal(grad.cpu().double(), (r * (d_logits.double() @ w)).sum(0, keepdim=True))


def test_contexts_without_rows_and_out_of_range():
    """A context that no row has gets zeros; one out of range is read as the nearest, never out of bounds."""
    g = generator(3)
    encoder, decoder = network(64, 3)
    x, d_logits, bank = integers((6, 20), 1, g), integers((6, 3), 1, g), integers((T, 64), 1, g)
    wrong = torch.tensor([-5, T - 1, 2**40, 0, T, 0])
    right = wrong.clamp(0, T - 1)
    assert T > 2
    r, w = exact(x, encoder, decoder)
    args = primitives.flynet_args(encoder, decoder)
    on = [value.to(DEVICE) for value in (x, bank, wrong, d_logits)]
    logits = flynet.flynet_logits(*on[:3], *args)
    assert torch.equal(logits.cpu().double(), (r * bank[right]) @ w.T)
    grad = flynet.flynet_gain_grad(on[0], on[3], on[2], T, *args)
    want = torch.zeros(T, 64, dtype=torch.float64).index_add_(0, right, r * (d_logits.double() @ w))
    assert torch.equal(grad.cpu().double(), want)


@pytest.mark.parametrize("primitive", ["sparse_matmul", "flynet_logits", "flynet_gain_grad"])
def test_opcheck(primitive):
    g = generator(4)
    encoder, decoder = network(9, 4)
    context = torch.randint(T, (5,), generator=g)
    x, gain = integers((5, 20), 1, g), integers((T, 9), 1, g).requires_grad_()
    values = {
        "sparse_matmul": (x.clone().requires_grad_(), *primitives.sparse_args(encoder)),
        "flynet_logits": (x, gain, context, *primitives.flynet_args(encoder, decoder)),
        "flynet_gain_grad": (
            *(x, integers((5, 4), 1, g).requires_grad_(), context, T),
            *primitives.flynet_args(encoder, decoder),
        ),
    }[primitive]
    values = [
        value.detach().to(DEVICE).requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
        for value in values
    ]
    torch.library.opcheck(primitives.overload("triton", primitive), tuple(values))


def test_empty_batches():
    encoder, decoder = network(9, 4)
    args = primitives.flynet_args(encoder, decoder)
    x = torch.empty(0, 20, device=DEVICE)
    assert sparse.sparse_matmul(x, *primitives.sparse_args(encoder)).shape == (0, 9)
    assert flynet.flynet_logits(x, torch.ones(1, 9, device=DEVICE), None, *args).shape == (0, 4)
    for contexts in (1, T):
        grad = flynet.flynet_gain_grad(x, torch.empty(0, 4, device=DEVICE), None, contexts, *args)
        assert torch.equal(grad.cpu(), torch.zeros(contexts, 9))
