"""Rivals that make random weights in every call: PyTorch's generator, NumPy's Philox, brainevent, fast_jl.

Their weights are their own. Signs are made as 0 and 1, uniform numbers in [0, 1): y = x (2 U - 1)^T is
2 x U^T - sum(x), which spares them a pass over the weights.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from nmkern.bench.clocks import Apart, Eager
from nmkern.bench.rivals.base import Operands, Product, RefusedError

_SEED = 1


def torch_generator(operands: Operands) -> Product:
    """Seed the generator, fill a kept buffer, multiply."""
    kept = torch.empty(operands.matrix.shape, dtype=operands.x.dtype, device=operands.x.device)
    numbers = torch.Generator(operands.x.device)
    family = operands.matrix.family

    def function(x: Tensor) -> Tensor:
        numbers.manual_seed(_SEED)
        if family == "rademacher":
            return 2 * F.linear(x, kept.bernoulli_(generator=numbers)) - x.sum(1, keepdim=True)
        if family == "normal":
            return F.linear(x, kept.normal_(generator=numbers))
        return F.linear(x, kept.uniform_(-1, 1, generator=numbers))

    return Product(function, operands.inputs, kind=Apart)


def numpy_philox(operands: Operands) -> Product:
    """Seed a Philox generator, fill a kept buffer, multiply with NumPy."""
    operands.require(dtype=(torch.float32,), device=("cpu",), family=("uniform", "normal"))
    kept = np.empty(operands.matrix.shape, np.float32)
    uniform = operands.matrix.family == "uniform"

    def function(x: np.ndarray) -> Tensor:
        numbers = np.random.Generator(np.random.Philox(key=_SEED))
        if uniform:
            numbers.random(dtype=np.float32, out=kept)
            return torch.from_numpy(2 * (x @ kept.T) - x.sum(1, keepdims=True))
        numbers.standard_normal(dtype=np.float32, out=kept)
        return torch.from_numpy(x @ kept.T)

    return Product(function, [x.numpy() for x in operands.inputs], convert=Tensor.numpy, kind=Apart)


def brainevent(operands: Operands) -> Product:
    """brainevent's just-in-time matrix with every element present, under jax.jit."""
    import jax
    from brainevent import JITCNormalR, JITCUniformR

    operands.require(dtype=(torch.float32,), family=("uniform", "normal"))
    if operands.device == "cuda" and jax.default_backend() != "gpu":
        raise RefusedError("its jax finds no GPU")
    shape = operands.matrix.shape
    if operands.matrix.family == "uniform":
        matrix = JITCUniformR((-1.0, 1.0, 1.0, _SEED), shape=shape)
    else:
        matrix = JITCNormalR((0.0, 1.0, 1.0, _SEED), shape=shape)
    if len(operands.x) == 1:
        product = jax.jit(lambda x: (matrix @ x[0])[None])
    else:
        product = jax.jit(lambda x: (matrix @ x.T).T)

    def function(x: "jax.Array") -> Tensor:
        return torch.from_dlpack(product(x).block_until_ready())

    def convert(x: Tensor) -> "jax.Array":
        return jax.dlpack.from_dlpack(x.contiguous())

    return Product(function, [convert(x) for x in operands.inputs], convert, Apart)


def fast_jl(operands: Operands) -> Product:
    """TRAK's projection with random signs, which takes 8, 16 or 32 rows at a time."""
    import fast_jl as library

    operands.require(dtype=(torch.float32, torch.float16), device=("cuda",))
    m, n = len(operands.x), operands.matrix.rows
    if n % 512:
        raise RefusedError(f"needs outputs in multiples of 512, not {n}")
    rows = 8 if m <= 8 else 16 if m <= 16 else 32
    project = getattr(
        library, f"project_{'normal' if operands.matrix.family == 'normal' else 'rademacher'}_{rows}"
    )
    processors = torch.cuda.get_device_properties(operands.x.device).multi_processor_count
    return Product(lambda x: project(x, n, _SEED, processors), operands.inputs, kind=Eager)
