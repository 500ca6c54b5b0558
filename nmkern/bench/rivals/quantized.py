"""Rivals that keep the weights in 4 bits: PyTorch itself, and on a GPU bitsandbytes, torchao, Marlin.

    w = scale * (level - 8) + zero        PyTorch's levels, 0 to 15; a scale and a zero a group, bfloat16

PyTorch's grid has our 16 levels, so it is given our weights, whose one factor it rounds. The others round
our weights to a grid of their own; each is checked against the matrix that it really multiplies by.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from nmkern.bench.rivals.base import Operands, Product, RefusedError, in_turn

_GROUP = 128  # weights that share a scale


def _check_shape(operands: Operands) -> None:
    if operands.matrix.cols % _GROUP:
        raise RefusedError(f"needs inputs in multiples of {_GROUP}, not {operands.matrix.cols}")


def _linear(weight: torch.Tensor) -> nn.Linear:
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, dtype=weight.dtype, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return layer


def int4(operands: Operands) -> Product:
    aten, device = torch.ops.aten, operands.device
    operands.require(device=("cpu", "cuda"), dtype=(torch.bfloat16,))
    _check_shape(operands)
    n, factor = operands.matrix.rows, operands.matrix.factor
    if n % 16:
        raise RefusedError(f"needs outputs in multiples of 16, not {n}")
    stored = operands.stored()
    levels = (stored[0].contiguous() / factor).round().add(15).div(2)  # of codes, odd integers
    if device == "cpu":
        packed = aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
        multiply = aten._weight_int4pack_mm_for_cpu
    else:
        pairs = levels.to(torch.uint8)
        packed = aten._convert_weight_to_int4pack(pairs[:, ::2] << 4 | pairs[:, 1::2], 8)
        multiply = aten._weight_int4pack_mm
    groups = operands.matrix.cols // _GROUP
    scale_and_zero = stored[0].new_tensor([2 * factor, factor]).expand(groups, n, 2).contiguous()
    weights = in_turn([packed, *(packed.clone() for _ in stored[1:])])
    return Product(lambda x: multiply(x, next(weights), _GROUP, scale_and_zero), operands.inputs)


def bitsandbytes(operands: Operands) -> Product:
    import bitsandbytes as library

    operands.require(device=("cuda",), dtype=(torch.bfloat16, torch.float16, torch.float32))
    _check_shape(operands)
    packed = [
        library.functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
        for weight in operands.stored()
    ]
    weights = in_turn(packed)

    def function(x: torch.Tensor) -> torch.Tensor:
        weight, state = next(weights)
        return library.matmul_4bit(x, weight.t(), quant_state=state)

    return Product(function, operands.inputs)


def torchao(operands: Operands) -> Product:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    operands.require(device=("cuda",), dtype=(torch.bfloat16,))
    _check_shape(operands)
    layers = []
    for weight in operands.stored():
        model = nn.Sequential(_linear(weight))
        config = Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")
        quantize_(model, config)
        layers.append(model[0])
    turn = in_turn(layers)

    def function(x: torch.Tensor) -> torch.Tensor:
        layer = next(turn)
        return F.linear(x, layer.weight)

    return Product(function, operands.inputs)


def marlin(operands: Operands) -> Product:
    import marlin as library

    operands.require(device=("cuda",), dtype=(torch.float16,))
    n, k = operands.matrix.shape
    if n % 256 or k % _GROUP:
        raise RefusedError(f"needs outputs in multiples of 256 and inputs of {_GROUP}, not {n} and {k}")
    layers = []
    for weight in operands.stored():
        groups = weight.view(n, k // _GROUP, _GROUP)
        scales = groups.abs().amax(2) / 7  # symmetric: -8..7 times the scale
        levels = (groups / scales[..., None]).round().clamp(-8, 7)
        layer = library.Layer(k, n, groupsize=_GROUP).to(weight.device)
        layer.pack(_linear((levels * scales[..., None]).view(n, k)), scales)
        layers.append(layer)
    turn = in_turn(layers)
    return Product(lambda x: next(turn)(x), operands.inputs)
