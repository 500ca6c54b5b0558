"""The stored-weight twin of a model: the same function, contexts and keys, with its weights in memory.

    StoredLinear       y = strength * (W (x * in_gain)) * out_gain + bias, W a buffer [N, K]
    StoredProjection   y = W x, W a buffer [N, K], dense or in CSR form

It is what a model costs without regeneration, for footprints, comparisons and export. The invariant: the
outputs equal the model's up to rounding, and selecting, finishing and adding contexts work as before.
"""

import copy
import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from nmkern.models import FlyNet
from nmkern.nn import ModulatedLinear, SparseProjection
from nmkern.nn.contexts import ContextModule
from nmkern.nn.records import MatrixModule
from nmkern.ops.checks import check_context

Layout = Literal["dense", "csr"]
# What PyTorch warns of at the first CSR tensor, the latter from 2.11 on.
CSR_WARNINGS = "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)"


class StoredLinear(ModulatedLinear):
    """A ``ModulatedLinear`` with its weight as a buffer ``weight [N, K]`` in the dtype of its contexts.

    Made from a layer, whose contexts it copies. ValueError where the layer's matrix is a view.
    """

    weight: Tensor

    def __init__(self, layer: ModulatedLinear) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            layer._has_bias,
            layer.like.device,
            layer.like.dtype,
            contexts=len(layer.contexts),
            seed=layer.matrix.seed,
            family=layer.matrix.family,
            scale=layer.matrix.scale,
            gain=layer.gain,
            strength=layer._has_strength,
            init=layer.init,
        )
        if self.matrix != layer.matrix:
            raise ValueError(f"layer: expected a whole matrix, got the view {layer.matrix}")
        self.load_state_dict(layer.state_dict())
        self.selected = layer.selected
        self.train(layer.training)
        self.register_buffer("weight", self.matrix.materialize(self.like.dtype, self.like.device))

    def forward(self, x: Tensor, context: int | Tensor | None = None) -> Tensor:
        selected = self.selected if context is None else context
        tensors = self.context_tensors(selected)
        if isinstance(selected, Tensor):
            rows = check_context(selected, x)  # as int64: an index of uint8 would be taken for a mask
            tensors = {name: bank[rows] for name, bank in tensors.items()}
        y = F.linear(x * tensors["in_gain"] if "in_gain" in tensors else x, self.weight)
        for name in ("strength", "out_gain"):
            if name in tensors:
                y = y * tensors[name]
        return y + tensors["bias"] if "bias" in tensors else y


class StoredProjection(MatrixModule):
    """A ``SparseProjection`` with its matrix as a buffer ``weight [N, K]`` of ``dtype``, dense or CSR."""

    weight: Tensor

    def __init__(
        self,
        layer: SparseProjection,
        layout: Layout = "dense",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(layer.matrix)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.layout = layout
        weight = self.matrix.materialize(dtype, device).contiguous()
        if layout == "csr":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", CSR_WARNINGS)
                made = weight.to_sparse_csr()
                # Its columns lie in a storage of twice the size.
                parts = (made.crow_indices(), made.col_indices().clone(), made.values())
                weight = torch.sparse_csr_tensor(*parts, weight.shape, check_invariants=True)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "dense":
            return F.linear(x, self.weight)
        rows = x.reshape(-1, self.in_features)
        return (self.weight @ rows.T).T.reshape(*x.shape[:-1], self.out_features)


class StoredFlyNet(ContextModule):
    """A ``FlyNet`` with both matrices stored: the formulation of arXiv:2204.04297's authors."""

    def __init__(self, net: FlyNet, layout: Layout = "dense") -> None:
        super().__init__()
        self.hidden_features = net.hidden_features
        self.decoder = StoredLinear(net.decoder)
        like = self.decoder.like
        self.encoder = StoredProjection(net.encoder, layout, like.dtype, like.device)

    def hidden(self, x: Tensor) -> Tensor:
        m = self.encoder(x)
        return torch.relu(m - m.mean(-1, keepdim=True))

    def forward(self, x: Tensor, context: int | Tensor | None = None) -> Tensor:
        return self.decoder(self.hidden(x), context)


def stored_twin(model: nn.Module, projection: Layout = "dense") -> nn.Module:
    """A copy of ``model`` in which every frozen matrix is a stored buffer; ``model`` is left as it is.

    ``projection``: the form of sparse matrices, ``"dense"`` (as in the authors' code) or ``"csr"``; they get
    the dtype and device of the model's first parameter. ValueError where a module holds a matrix in a way
    that is not known here.
    """
    if projection not in ("dense", "csr"):
        raise ValueError(f"projection: expected dense or csr, got {projection!r}")
    like = next(model.parameters(), torch.empty(0))
    return _Conversion(projection, like)(copy.deepcopy(model))


class _Conversion:
    """Twins by module, so that a module in two places has one twin."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        self.layout, self.like = layout, like
        self.done: dict[int, tuple[nn.Module, nn.Module]] = {}

    def __call__(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.done:  # the module is kept with its twin, or its id could be another's
            self.done[id(module)] = module, self.twin(module)
        return self.done[id(module)][1]

    def twin(self, module: nn.Module) -> nn.Module:
        if isinstance(module, (StoredLinear, StoredProjection)):
            return module
        if isinstance(module, FlyNet):
            return StoredFlyNet(module, self.layout)
        if isinstance(module, ModulatedLinear):
            return StoredLinear(module)
        if isinstance(module, SparseProjection):
            return StoredProjection(module, self.layout, self.like.dtype, self.like.device)
        if isinstance(module, MatrixModule):
            raise ValueError(f"model: no stored form of {type(module).__name__} is known")
        for name, child in module.named_children():
            setattr(module, name, self(child))
        return module
