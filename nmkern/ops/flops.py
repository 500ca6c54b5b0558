"""What torch.utils.flop_counter counts for an operator: two operations for each weight that a row meets.

    dense 2 M N K        sparse 2 M ones        flynet both of these

As many as products with stored weights, dense or CSR, have; generating the weights is not counted. Where a
backward pass multiplies again for what it did not keep, that is counted as the product that it is.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from nmkern.backends import primitives

_COUNTER = "torch.utils.flop_counter"


def _matmul(x, in_gain, out_gain, bias, context, *matrix, out_shape=None) -> int:
    rows, cols = matrix[4:6]
    return 2 * x[0] * rows * cols


def _matmul_gain_grad(x, in_gain, out_gain, other, context, contexts, need_product, *matrix, out_shape=None):
    rows, cols = matrix[4:6]
    return 2 * x[0] * rows * cols


def _sparse_matmul(x, *matrix, out_shape=None) -> int:
    rows, cols, population, fan_in = matrix[3:7]
    return 2 * x[0] * _ones(rows, cols, population, fan_in)


def _flynet(x, *matrices) -> int:
    hidden, inputs, population, fan_in = matrices[3:7]
    return 2 * x[0] * (_ones(hidden, inputs, population, fan_in) + hidden * matrices[12])


def _flynet_logits(x, gain, context, *matrices, out_shape=None) -> int:
    return _flynet(x, *matrices)


def _flynet_gain_grad(x, d_logits, context, contexts, *matrices, out_shape=None) -> int:
    return _flynet(x, *matrices)


def _ones(rows: int, cols: int, population: int, fan_in: int) -> int:
    """Ones of a sparse matrix: of a slice of columns as many as are expected there."""
    return rows * fan_in * cols // population


FORMULAS = {
    "modulated_matmul": _matmul,
    "modulated_matmul_gain_grad": _matmul_gain_grad,
    "sparse_matmul": _sparse_matmul,
    "flynet_logits": _flynet_logits,
    "flynet_gain_grad": _flynet_gain_grad,
}


def _register() -> None:
    register: Any = sys.modules[_COUNTER].register_flop_formula
    for primitive, formula in FORMULAS.items():
        for backend in primitives.DEFINED[primitive]:
            register(getattr(torch.ops.nmkern, f"{backend}_{primitive}"))(formula)


class _Importer(importlib.abc.MetaPathFinder):
    """Registers the formulas once the counter's module has been imported; then it is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make the formulas known to torch's counter, now or once it is imported, which takes 0.4 s."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Importer())
