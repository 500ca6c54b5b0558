"""ModulatedLinear: torch.nn.Linear with a frozen random weight that is never stored.

    y = strength * W (x * in_gain) * out_gain + bias

W comes from the stream; the gains, bias and strength are the contexts' and the only parameters.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from nmkern.matrix import RandomMatrix, as_size
from nmkern.nn.contexts import ContextLayer
from nmkern.ops.modulated_linear import modulated_linear

_GAINS = {"in": ("in_gain",), "out": ("out_gain",), "both": ("in_gain", "out_gain")}
_INITS = ("ones", "xavier_normal")
# Initial contexts are rows of other matrices of the same seed; these keep their streams apart.
_INIT_STREAM = {"in_gain": 1 << 56, "out_gain": 2 << 56, "strength": 3 << 56}


def _default_scale(in_features: int) -> float:
    """The standard deviation of torch.nn.Linear's weights, which are uniform to ``1 / sqrt(in_features)``."""
    return 1 / math.sqrt(3 * in_features)


class ModulatedLinear(ContextLayer):
    """A drop-in for torch.nn.Linear that trains small contexts and holds no weights.

    Args:
        in_features, out_features: sizes K and N.
        bias: whether each context has a bias ``[N]``, zero at first.
        device, dtype: of the contexts' tensors.
        contexts: how many contexts to begin with; ``add_context()`` adds one.
        seed: of the weights, in [0, 2^64). Layers of one seed and family share their weights where
            they overlap, so give the layers of a stack seeds of their own.
        family: ``"uniform"``, ``"normal"`` or ``"rademacher"``.
        scale: standard deviation of the weights; default ``1 / sqrt(3 K)``, that of torch.nn.Linear.
        gain: what a context modulates: ``"in"`` (a vector ``[K]`` on the inputs), ``"out"`` (``[N]``
            on the outputs), or ``"both"``.
        strength: whether each context has a scalar ``[1]`` that multiplies the weights.
        init: of gains and strength: ``"ones"`` (the plain random layer), or ``"xavier_normal"`` as in
            arXiv:2204.04297 (gains with std ``sqrt(2 / (features + 1))``, strength with std 1), drawn
            from the stream: the same on every machine, and no random state is touched.

    Shapes: ``[..., K] -> [..., N]``. Which context serves is selected with ``select_context``,
    ``use_context``, or the ``context`` argument of the call. Raises TypeError and ValueError as
    ``RandomMatrix`` does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        contexts: int = 1,
        seed: int = 0,
        family: str = "uniform",
        scale: float | None = None,
        gain: Literal["in", "out", "both"] = "in",
        strength: bool = False,
        init: Literal["ones", "xavier_normal"] = "ones",
    ) -> None:
        if family == "sparse":
            raise ValueError("family: expected a dense family, got 'sparse' (see SparseProjection)")
        if gain not in _GAINS:
            raise ValueError(f"gain: expected one of {', '.join(_GAINS)}, got {gain!r}")
        if init not in _INITS:
            raise ValueError(f"init: expected one of {', '.join(_INITS)}, got {init!r}")
        in_features, out_features = as_size("in_features", in_features), as_size("out_features", out_features)
        contexts = as_size("contexts", contexts)
        if scale is None:
            scale = _default_scale(in_features)
        matrix = RandomMatrix(out_features, in_features, seed=seed, family=family, scale=scale)
        super().__init__(matrix)
        self.in_features = in_features
        self.out_features = out_features
        self.gain = gain
        self.init = init
        self._has_bias = bias
        self._has_strength = strength
        self.grow(contexts, torch.empty(0, device=device, dtype=dtype))

    def new_context(self, index: int, like: Tensor) -> dict[str, Tensor]:
        tensors = {}
        for name in _GAINS[self.gain]:
            features = self.in_features if name == "in_gain" else self.out_features
            tensors[name] = self._initial(name, index, features, like)
        if self._has_strength:
            tensors["strength"] = self._initial("strength", index, 1, like)
        if self._has_bias:
            tensors["bias"] = like.new_zeros(self.out_features)
        return tensors

    def _initial(self, name: str, index: int, features: int, like: Tensor) -> Tensor:
        # Made where it stays: on the meta device that takes no time and no memory.
        if self.init == "ones" or like.is_meta:
            return like.new_ones(features)
        seed = self.matrix.seed ^ _INIT_STREAM[name]
        scale = math.sqrt(2 / (features + 1))
        rows = RandomMatrix(index + 1, features, seed=seed, family="normal", scale=scale)
        return rows[index:].materialize()[0].to(like)

    def forward(self, x: Tensor, context: int | Tensor | None = None) -> Tensor:
        selected = self.selected if context is None else context
        tensors = self.context_tensors(selected)
        if self._has_strength:
            tensors["strength"] = tensors["strength"].squeeze(-1)  # [1] for FSDP, which shards no scalar
        rows = None if isinstance(selected, int) else selected
        return modulated_linear(x, self.matrix, context=rows, **tensors)

    def extra_repr(self) -> str:
        scale = self.matrix.scale
        chosen = "" if scale == _default_scale(self.in_features) else f", scale={scale}"
        chosen += "" if self.init == "ones" else f", init={self.init!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._has_bias}, contexts={len(self.contexts)}, seed={self.matrix.seed}, "
            f"family={self.matrix.family!r}, gain={self.gain!r}, strength={self._has_strength}{chosen}"
        )
