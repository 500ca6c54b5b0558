"""What only the triton backend has: splits, batches in parts, contexts out of range, ops by name.

That it computes the formula is tested with all other backends, in tests/ops. Here, too, kernels run under
Triton's interpreter where there is no CUDA device, and compiled on CUDA tensors where there is one.
"""

import os

import pytest
import torch
from formula import T, exact_matrix, generator, integers, stored_weights

pytest.importorskip("triton")

from nmkern.backends import primitives, triton
from nmkern.backends.triton import configs, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"


def matmul(x, matrix, in_gain=None, out_gain=None, bias=None, context=None):
    return launch.modulated_matmul(x, in_gain, out_gain, bias, context, *primitives.dense_args(matrix))


def gain_grad(x, other, matrix, contexts, context=None, in_gain=None, out_gain=None):
    args = primitives.dense_args(matrix)
    return launch.modulated_matmul_gain_grad(x, in_gain, out_gain, other, context, contexts, True, *args)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_split_sum_is_the_sum(monkeypatch, transposed):
    """As many splits as there are, and none: with exact sums the same bits, gains and bias included."""
    g = generator(1)
    matrix = exact_matrix("uniform", *((700, 40) if transposed else (40, 700)))
    matrix = matrix.T if transposed else matrix
    x, out_gain, bias = (integers(s, 3, g).to(DEVICE) for s in ((5, 700), (1, 40), (5, 40)))
    want = (x.double().cpu() @ stored_weights(matrix).T * out_gain.cpu() + bias.cpu()).float()
    splits = []
    for programs in (1, 8, 264):
        monkeypatch.setattr(launch, "_PROGRAMS", programs)
        monkeypatch.setattr(launch, "_LEAST_STEPS", 2)
        launch._plan.cache_clear()
        assert torch.equal(matmul(x, matrix, None, out_gain, bias).cpu(), want)
        splits.append(
            launch._plan(primitives.dense_args(matrix)[:-1], 5, x.dtype, False, False, False).splits
        )
    launch._plan.cache_clear()
    assert splits[0] == 1 < splits[1] < splits[2]


@pytest.mark.parametrize("kind", ["one", "each", "context"])
def test_a_batch_in_parts(monkeypatch, kind):
    """Partial sums that do not fit the scratch: gain gradients are added up over the parts."""
    g = generator(2)
    matrix = exact_matrix("rademacher", 9, 33)
    x, other = integers((300, 33), 2, g), integers((300, 9), 2, g)
    context = torch.randint(T, (300,), generator=g) if kind == "context" else None
    contexts = {"one": 1, "each": 300, "context": T}[kind]
    bank, out = integers((contexts, 33), 2, g), integers((contexts, 9), 2, g)
    monkeypatch.setattr(launch, "SCRATCH", 4 * 9 * 128)
    launch._plan.cache_clear()
    assert len(launch.parts(300, 36)) == 3
    device = [v if v is None else v.to(DEVICE) for v in (x, other, context, bank, out)]
    product, grad = gain_grad(device[0], device[1], matrix, contexts, *device[2:])
    launch._plan.cache_clear()
    row = context if kind == "context" else torch.arange(300) % contexts
    z = (x.double() * bank[row]) @ stored_weights(matrix).T
    assert torch.equal(product.double().cpu(), z * out[row])
    want = torch.zeros(contexts, 9, dtype=torch.float64).index_add_(0, row, other * z)
    assert torch.equal(grad.double().cpu(), want)


def test_an_empty_batch():
    matrix = exact_matrix("normal", 7, 12)
    x = torch.empty(0, 12, device=DEVICE)
    assert matmul(x, matrix).shape == (0, 7)
    for contexts in (1, T):
        product, grad = gain_grad(x, torch.empty(0, 7, device=DEVICE), matrix, contexts)
        assert product.shape == (0, 7) and torch.equal(grad.cpu(), torch.zeros(contexts, 7))


def test_a_context_out_of_range_reads_the_nearest_row():
    """Python checks contexts that lie on the CPU. On a GPU it cannot look, so the kernel stays inside."""
    g = generator(3)
    matrix = exact_matrix("uniform", 7, 12)
    x, bank = integers((4, 12), 2, g).to(DEVICE), integers((T, 12), 2, g).to(DEVICE)
    wrong = torch.tensor([0, -5, T, 2**40], device=DEVICE)
    right = torch.tensor([0, 0, T - 1, T - 1], device=DEVICE)
    assert torch.equal(matmul(x, matrix, bank, context=wrong), matmul(x, matrix, bank, context=right))
    other = integers((4, 7), 2, g).to(DEVICE)
    found, want = (gain_grad(x, other, matrix, T, c)[1] for c in (wrong, right))
    assert torch.equal(found, want)


def test_a_plan_does_not_depend_on_values():
    """What is cached per call: the matrix, the size of the batch and the dtype, nothing of a tensor."""
    args = primitives.dense_args(exact_matrix("uniform", 4096, 4096))[:-1]
    small = launch._plan(args, 1, torch.bfloat16, False, False, False)
    assert small is launch._plan(args, 1, torch.bfloat16, False, False, False)
    assert small.splits == 16  # 16 blocks of 256 outputs: 256 programs on 132 multiprocessors
    large = launch._plan(args, 4096, torch.bfloat16, False, False, False)
    assert (large.splits, large.grid) == (1, (64 * 16,))


@pytest.mark.parametrize("tag", configs.REDUCTION)
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_hold_whole_patches(tag, transposed):
    """What the index arithmetic of the kernel asks of a tile, for every batch."""
    for batch in (1, 16, 17, 33, 64, 65, 10**6):
        for parts in (1, 2, 3):
            tile = configs.tile_of(tag, transposed, batch, parts)
            held = tile.fields if transposed else 4
            assert tile.outputs % (8 * tile.warps * held) == 0
            assert tile.fields <= (8 if tag < 0x103 else 4)


@pytest.mark.parametrize("primitive", ["modulated_matmul", "modulated_matmul_gain_grad"])
def test_opcheck(primitive):
    g = generator(4)
    matrix = exact_matrix("uniform", 4, 6)
    x, bank = integers((5, 6), 2, g).requires_grad_(), integers((T, 6), 2, g).requires_grad_()
    context = torch.randint(T, (5,), generator=g)
    values = [x, bank, None, None, context]
    if primitive == "modulated_matmul_gain_grad":
        values = [x, bank, None, integers((5, 4), 2, g).requires_grad_(), context, T, True]
    values = [v.to(DEVICE) if torch.is_tensor(v) else v for v in values]
    torch.library.opcheck(primitives.overload("triton", primitive), (*values, *primitives.dense_args(matrix)))


def test_the_interpreter_runs_because_the_environment_says_so():
    if INTERPRETED:
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert triton.kernel() == "triton (interpreted)"
    assert launch.INTERPRETED == INTERPRETED
