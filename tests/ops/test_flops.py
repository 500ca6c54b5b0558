"""flops: torch's counter counts our operators as it counts products with stored weights."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from nmkern import RandomMatrix, memory, sparse_project
from nmkern.backends import primitives
from nmkern.models import FlyNet
from nmkern.nn import ModulatedLinear, SparseProjection


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_every_operator_has_a_formula():
    for primitive, backends in primitives.DEFINED.items():
        for backend in backends:
            assert getattr(torch.ops.nmkern, f"{backend}_{primitive}") in flop_registry


@pytest.mark.parametrize("gain", ["in", "out", "both"])
def test_a_layer_counts_as_its_stored_twin(backend_once, gain):
    layer = ModulatedLinear(7, 5, seed=1, gain=gain)
    twin = memory.stored_twin(layer)
    x = torch.ones(2, 3, 7, requires_grad=True)
    assert counted(lambda: layer(x)) == counted(lambda: twin(x)) == 2 * 6 * 5 * 7
    step, stored = (counted(lambda m=m: m(x).sum().backward()) for m in (layer, twin))
    # The gradient of out_gain takes the product once more, which the twin has kept.
    assert stored == 2 * 2 * 6 * 5 * 7
    assert step == stored + (2 * 6 * 5 * 7 if gain != "in" else 0)


def test_a_tangent_costs_one_product(backend_once):
    """And none of the zeros that PyTorch passes for arguments without one."""
    layer = ModulatedLinear(7, 5, seed=1, gain="both")
    x = torch.ones(3, 7)
    assert counted(lambda: torch.func.jvp(layer, (x,), (x,))) == 2 * counted(lambda: layer(x))


def test_a_projection_counts_its_ones(backend_once):
    layer = SparseProjection(20, 50, 3, seed=1)
    x = torch.ones(4, 20, requires_grad=True)
    assert counted(lambda: layer(x)) == 2 * 4 * 50 * 3
    assert counted(lambda: layer(x).sum().backward()) == 2 * 2 * 4 * 50 * 3
    half = layer.matrix[:, :10]
    assert counted(lambda: sparse_project(x[:, :10], half)) == 2 * 4 * 50 * 3 // 2
    assert counted(lambda: sparse_project(torch.ones(4, 50), layer.matrix.T)) == 2 * 4 * 50 * 3


def test_flynet_counts_both_of_its_products(backend_once):
    net = FlyNet(20, 6, fan_in=3)
    x = torch.ones(4, 20)
    each = 2 * 4 * 200 * (3 + 6)
    assert counted(lambda: net(x)) == each
    assert counted(lambda: net(x).sum().backward()) == 2 * each


@pytest.mark.parametrize("first", ["nmkern", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(run_python, first):
    printed = run_python(
        f"import {first}\n"
        "import sys, torch, nmkern\n"
        "print(any(type(finder).__module__.startswith('nmkern') for finder in sys.meta_path))\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "print(any(type(finder).__module__.startswith('nmkern') for finder in sys.meta_path))\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    nmkern.modulated_linear(torch.ones(1, 4), nmkern.RandomMatrix(6, 4, seed=1))\n"
        "print(counter.get_total_flops())\n"
    )
    assert printed.split() == [str(first == "nmkern"), "False", "48"]


def test_a_matrix_of_any_view_counts_what_it_multiplies(backend_once):
    matrix = RandomMatrix(40, 30, seed=7)[5:11, 3:7]
    for view in (matrix, matrix.T):
        layer = ModulatedLinear(view.cols, view.rows)
        layer.matrix = view
        assert counted(lambda layer=layer, view=view: layer(torch.ones(2, view.cols))) == 2 * 2 * 6 * 4
