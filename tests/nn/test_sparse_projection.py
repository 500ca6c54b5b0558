"""SparseProjection: the fly's projection as a module without parameters."""

import copy
import pickle

import pytest
import torch
from formula import generator, integers
from torch import nn

from nmkern import RandomMatrix
from nmkern.nn import SparseProjection


def test_equals_the_dense_binary_matrix(backend):
    layer = SparseProjection(40, 90, 7, seed=3, scale=0.5)
    assert layer.matrix == RandomMatrix(90, 40, seed=3, family="sparse", fan_in=7, scale=0.5)
    weights = layer.matrix.materialize()
    assert (weights.sum(1) == 3.5).all()  # seven distinct inputs each
    x = integers((2, 5, 40), 8, generator(1)).requires_grad_()
    y = layer(x)
    assert torch.equal(y, x @ weights.T)
    dy = integers(y.shape, 8, generator(2))
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ weights)


def test_it_has_no_parameters_and_saves_a_record_only():
    layer = SparseProjection(784, 7840, 7)
    assert list(layer.parameters()) == [] and list(layer.buffers()) == []
    state = layer.state_dict()
    assert list(state) == ["_extra_state"]
    assert state["_extra_state"].nbytes < 500
    layer.load_state_dict(state)


def test_copies_are_equal():
    layer = SparseProjection(20, 30, 4, seed=8)
    x = integers((3, 20), 8, generator(1))
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        SparseProjection(20, 30, 4, seed=8),
    ):
        assert torch.equal(other(x), layer(x))


def test_in_a_stack_with_dtypes():
    stack = nn.Sequential(SparseProjection(20, 30, 4), nn.ReLU()).to(torch.bfloat16)
    assert stack(torch.ones(2, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_it_prints_what_it_is():
    text = "SparseProjection(in_features=20, out_features=30, fan_in=4, seed=8)"
    assert repr(SparseProjection(20, 30, 4, seed=8)) == text
    assert repr(SparseProjection(20, 30, 4, seed=8, scale=0.5)) == f"{text[:-1]}, scale=0.5)"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((20, 30, 21), ValueError, "fan_in: expected 1 <= fan_in <= 20 columns, got 21"),
        ((20, 30, 0), ValueError, "fan_in: expected 1 <= fan_in <= 20 columns, got 0"),
        ((20, 30, 2.0), TypeError, "fan_in: expected an int, got 2.0"),
        ((20, 30, None), ValueError, "fan_in: the sparse family needs one, got None"),
        ((0, 30, 1), ValueError, "in_features: expected at least 1, got 0"),
        ((20, 3.0, 1), TypeError, "out_features: expected an int, got 3.0"),
        ((20, 2**32, 1), ValueError, "rows: expected 1 <= rows"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error) as raised:
        SparseProjection(*arguments)
    assert str(raised.value).startswith(text)
