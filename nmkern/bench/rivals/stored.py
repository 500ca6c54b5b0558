"""Rivals that keep the weights: PyTorch's linear layer, eager and compiled, its CSR product, and
scikit-learn's projections.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from nmkern.bench.clocks import Apart, Eager
from nmkern.bench.rivals.base import Operands, Product, in_turn
from nmkern.memory.twin import CSR_WARNINGS
from nmkern.stream import DENSE_FAMILIES

DENSE = tuple(DENSE_FAMILIES)


def linear(operands: Operands) -> Product:
    weights = in_turn(operands.stored())
    return Product(lambda x: F.linear(x, next(weights)), operands.inputs)


def compiled(operands: Operands) -> Product:
    # Every shape is a graph of its own; beyond eight of one function PyTorch would go on eagerly.
    torch.compiler.reset()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    graph, weights = torch.compile(function, dynamic=False), in_turn(operands.stored())
    return Product(lambda x: graph(x, next(weights)), operands.inputs)


def csr(operands: Operands) -> Product:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", CSR_WARNINGS)
        weights = in_turn([weight.to_sparse_csr() for weight in operands.stored()])
    return Product(lambda x: (next(weights) @ x.T).T, operands.inputs, kind=Eager)


def sklearn(operands: Operands) -> Product:
    """The transform of a fitted projection, whose matrix is replaced by ours."""
    import scipy.sparse
    from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection

    operands.require(dtype=(torch.float32, torch.float64), device=("cpu",))
    weight = operands.stored()[0].numpy()
    if operands.matrix.family == "sparse":
        projection = SparseRandomProjection(n_components=operands.matrix.rows, dense_output=True)
        projection.components_ = scipy.sparse.csr_array(weight)
    else:
        projection = GaussianRandomProjection(n_components=operands.matrix.rows)
        projection.components_ = weight
    projection.n_features_in_ = operands.matrix.cols
    projection.n_components_ = operands.matrix.rows
    return Product(
        lambda x: torch.from_numpy(projection.transform(x)),
        [x.numpy() for x in operands.inputs],
        kind=Apart,
    )
