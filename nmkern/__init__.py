"""nmkern: layers whose frozen random weights are regenerated inside of the kernels that use them."""

from nmkern import memory, models, nn
from nmkern.backends.selection import explain, use_backend
from nmkern.matrix import RandomMatrix
from nmkern.ops import flops
from nmkern.ops.flynet import flynet
from nmkern.ops.modulated_linear import modulated_linear
from nmkern.ops.sparse_projection import sparse_project

flops.register()

__version__ = "0.1.0"

__all__ = [
    "RandomMatrix",
    "explain",
    "flynet",
    "memory",
    "models",
    "modulated_linear",
    "nn",
    "sparse_project",
    "use_backend",
]
