"""SparseProjection: each output the sum of a few distinct random inputs; no index is stored."""

from torch import Tensor

from nmkern.matrix import RandomMatrix, as_size
from nmkern.nn.records import MatrixModule
from nmkern.ops.sparse_projection import sparse_project


class SparseProjection(MatrixModule):
    """The fly's projection ``[..., in_features] -> [..., out_features]``, without any parameter.

    Args:
        in_features, out_features: sizes.
        fan_in: distinct inputs that each output sums.
        seed: in [0, 2^64).
        scale: what the sum is multiplied by.

    Raises TypeError and ValueError as ``RandomMatrix`` does. Source: arXiv:2204.04297, section 3.
    """

    def __init__(
        self, in_features: int, out_features: int, fan_in: int, *, seed: int = 0, scale: float = 1.0
    ) -> None:
        in_features, out_features = as_size("in_features", in_features), as_size("out_features", out_features)
        matrix = RandomMatrix(
            out_features, in_features, seed=seed, family="sparse", fan_in=fan_in, scale=scale
        )
        super().__init__(matrix)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return sparse_project(x, self.matrix)

    def extra_repr(self) -> str:
        scale = self.matrix.scale
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"fan_in={self.matrix.fan_in}, seed={self.matrix.seed}"
            f"{'' if scale == 1 else f', scale={scale}'}"
        )
