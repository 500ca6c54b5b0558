"""Where ``nmkern memory`` gets its model from: a built-in one by name, or a function by module:function.

A function takes no argument and returns the model, or (model, inputs). Inputs that it does not return are
random, of the shape that --input gives, or else of ``[batch, features]``, where the features are the
``in_features`` of the model's first layer that has them.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmkern.models import FlyNet
from nmkern.nn import ModulatedLinear, SparseProjection

BATCH = 128


def flynet() -> nn.Module:
    return FlyNet(784, 10)


def flynet_wide() -> nn.Module:
    return FlyNet(784, 10, width_multiple=40)


def mlp() -> nn.Module:
    return nn.Sequential(
        ModulatedLinear(784, 4096, seed=1),
        nn.ReLU(),
        ModulatedLinear(4096, 4096, seed=2),
        nn.ReLU(),
        ModulatedLinear(4096, 10, seed=3),
    )


def mixture() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(2048, 10)
    return nn.Sequential(
        SparseProjection(784, 3920, 7, seed=1),
        nn.ReLU(),
        ModulatedLinear(3920, 2048, seed=2, family="normal"),
        nn.ReLU(),
        ModulatedLinear(2048, 2048, seed=3, family="rademacher", gain="both", strength=True),
        nn.ReLU(),
        head,
    )


BUILT_IN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "flynet": (flynet, "the paper's network: 784 inputs, 7,840 hidden units, 10 classes"),
    "flynet-wide": (flynet_wide, "the same with 40 hidden units an input: 31,360"),
    "mlp": (mlp, "784 - 4096 - 4096 - 10, uniform weights, gains on inputs, biases"),
    "mixture": (mixture, "sparse projection, normal, rademacher with both gains, a trained linear layer"),
}


@dataclass(frozen=True)
class Source:
    """A model and its inputs, built where they are measured."""

    name: str
    batch: int = BATCH
    shape: tuple[int, ...] | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """ValueError, TypeError or ImportError where the name, what it names, or its inputs are wrong."""
        made = self._function()()
        model, inputs = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{self.name}: expected a function that returns a module, got {type(model).__name__}"
            )
        dtype = getattr(torch, self.dtype)
        model = model.to(self.device, dtype)
        if inputs is None:
            shape = self.shape or (self.batch, self._features(model))
            inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        return model, tuple(each.to(self.device) for each in given)

    def _function(self) -> Callable[[], object]:
        if self.name in BUILT_IN:
            return BUILT_IN[self.name][0]
        module, colon, name = self.name.partition(":")
        if not (module and colon and name):
            raise ValueError(f"MODEL: expected {', '.join(BUILT_IN)} or module:function, got {self.name!r}")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"MODEL: {self.name!r} cannot be imported: {error}") from error

    def _features(self, model: nn.Module) -> int:
        for module in model.modules():
            if isinstance(features := getattr(module, "in_features", None), int):
                return features
        raise ValueError(
            f"{self.name}: no layer has in_features; give a shape with --input, or return inputs"
        )
