"""footprint: every byte that a model costs, of its own and of its stored-weight twin.

    parameters, buffers    bytes of the tensors that the model holds
    checkpoint             bytes of a file that torch.save writes of its state_dict
    optimizer              bytes of the optimizer's state after a step
    forward, backward,     the most that is allocated in that phase of a training step beyond what was held
    step                   before the step: activations, gradients, temporaries

Each model is measured in a process of its own. The invariant: all figures are measured; none is computed
from a shape.
"""

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmkern.memory.meters import AllocatorMeter, ResidentMeter
from nmkern.memory.twin import stored_twin
from nmkern.nn import SparseProjection
from nmkern.nn.records import MatrixModule

OPTIMIZERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}
PHASES = ("forward", "backward", "step")
OURS, STORED, CSR = "nmkern", "stored", "stored, CSR"
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Phase:
    """Bytes at most: ``allocated`` in the second step by PyTorch's allocator, ``resident`` in the first.

    ``resident`` is by how much the process grew at most; None where the system does not tell.
    """

    allocated: int
    resident: int | None


@dataclass(frozen=True)
class Layer:
    """One layer: bytes as in ``Footprint``.

    ``forward``: allocated at most in a call of this layer alone; None where the model does not call it, as
    FlyNet, whose one operator does the work of both of its layers.
    """

    name: str
    kind: str
    parameters: int
    buffers: int
    checkpoint: int
    optimizer: int
    forward: int | None


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model; backward and step are None where nothing of it is trained.

    ``resident``: by how much holding the model and its inputs made the process grow, where it was measured.
    """

    parameters: int
    buffers: int
    checkpoint: int
    optimizer: int
    forward: Phase
    backward: Phase | None
    step: Phase | None
    layers: list[Layer]
    resident: int | None = None

    @property
    def held(self) -> int:
        """Parameters, buffers and optimizer state: what stays between steps."""
        return self.parameters + self.buffers + self.optimizer

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Footprint":
        phases = {name: record[name] and Phase(**record[name]) for name in PHASES}
        return cls(**{**record, **phases, "layers": [Layer(**layer) for layer in record["layers"]]})


@dataclass(frozen=True)
class Comparison:
    """Footprints by variant: ``"nmkern"``, ``"stored"``, and, with sparse layers, ``"stored, CSR"``."""

    footprints: dict[str, Footprint]
    device: str
    optimizer: str

    def __getitem__(self, variant: str) -> Footprint:
        return self.footprints[variant]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return asdict(self)


def footprint(
    model: nn.Module, inputs: Tensor | Sequence[Tensor], *, optimizer: str = "adam", isolated: bool = True
) -> Comparison:
    """Measure a training step of ``model`` and of its stored-weight twin.

    Args:
        model: any module tree; its frozen matrices are what the twin stores.
        inputs: what the model is called with; the loss is the mean square of the tensor that it returns.
        optimizer: ``"adam"``, ``"rmsprop"`` or ``"sgd"``, over the parameters that require a gradient.
        isolated: whether each variant runs in a process of its own. Without, resident sizes are not told.

    ``model`` and ``inputs`` stay as they are. Raises TypeError and ValueError where an argument is not as
    expected (a model that a new process cannot load, as one of a class of ``__main__``, is one), and
    RuntimeError where a process fails, with its message.
    """
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not given or not all(isinstance(each, Tensor) for each in given):
        raise TypeError("inputs: expected a tensor or several, got something else")
    check_optimizer(optimizer)
    found = {}
    for variant in variants_of(model):
        if isolated:
            from nmkern.memory.process import measure_apart

            found[variant] = measure_apart((model, given), variant, optimizer)
        else:
            found[variant] = measure(twin_of(model, variant), given, optimizer)
    return Comparison(found, given[0].device.type, optimizer)


def variants_of(model: nn.Module) -> list[str]:
    """What a model is compared in."""
    sparse = any(isinstance(module, SparseProjection) for module in model.modules())
    return [OURS, STORED, *([CSR] if sparse else [])]


def check_optimizer(name: str) -> None:
    """ValueError where there is no optimizer of that name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")


def twin_of(model: nn.Module, variant: str) -> nn.Module:
    """The model that a variant is measured with: always a copy."""
    if variant == OURS:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    return stored_twin(model, "csr" if variant == CSR else "dense")


def measure(
    model: nn.Module, inputs: tuple[Tensor, ...], optimizer: str, resident: ResidentMeter | None = None
) -> Footprint:
    """The footprint of one model, measured in this process; two training steps change it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rule = OPTIMIZERS[optimizer](trained, lr=_LEARNING_RATE) if trained else None
    step = _Step(model, inputs, rule)
    grown = {name: resident.growth(phase) if resident else phase() for name, phase in step.phases()}
    meter = AllocatorMeter(inputs[0].device)
    held, allocated = 0, {}
    for name, phase in step.phases():
        usage = meter.measure(phase)
        allocated[name] = held + usage.peak
        held += usage.held
    step.forget()
    peaks = _layer_peaks(model, inputs, meter)
    phases = {name: Phase(allocated[name], grown[name]) if name in allocated else None for name in PHASES}
    state = {} if rule is None else rule.state
    forward = phases["forward"]
    assert forward is not None
    return Footprint(
        parameters=bytes_of(model.parameters()),
        buffers=bytes_of(model.buffers()),
        checkpoint=checkpoint_bytes(model),
        optimizer=_state_bytes(state, model),
        forward=forward,
        backward=phases["backward"],
        step=phases["step"],
        layers=[_layer(name, module, state, peaks.get(name)) for name, module in layers_of(model)],
    )


class _Step:
    """A training step in phases, which leave to each other what is alive between them."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], rule: torch.optim.Optimizer | None):
        self.model, self.inputs, self.rule = model, inputs, rule
        self.loss: Tensor | None = None

    def phases(self) -> Iterator[tuple[str, Any]]:
        self.forget()
        yield "forward", self.forward
        if self.rule is not None:
            yield "backward", self.backward
            yield "step", self.rule.step

    def forward(self) -> None:
        y = self.model(*self.inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"model: expected one that returns a tensor, got {type(y).__name__}")
        self.loss = y.float().square().mean()

    def backward(self) -> None:
        assert self.loss is not None
        self.loss.backward()
        self.loss = None

    def forget(self) -> None:
        self.loss = None
        self.model.zero_grad(set_to_none=True)


def layers_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules with a frozen matrix, or with tensors of their own."""
    own = [*model.parameters(recurse=False), *model.buffers(recurse=False)]
    if isinstance(model, MatrixModule) or own:
        yield prefix or "(model)", model
        return
    for name, child in model.named_children():
        yield from layers_of(child, f"{prefix}.{name}" if prefix else name)


def _layer(name: str, module: nn.Module, state: Any, forward: int | None) -> Layer:
    return Layer(
        name,
        type(module).__name__,
        parameters=bytes_of(module.parameters()),
        buffers=bytes_of(module.buffers()),
        checkpoint=bytes_of(module.state_dict().values()),
        optimizer=_state_bytes(state, module),
        forward=forward,
    )


def _layer_peaks(model: nn.Module, inputs: tuple[Tensor, ...], meter: AllocatorMeter) -> dict[str, int]:
    """What a call of each layer allocates at most, in one forward pass; the largest of several calls."""
    peaks: dict[str, int] = {}
    handles = []
    for name, module in layers_of(model):

        def after(*_: Any, name: str = name) -> None:
            peaks[name] = max(peaks.get(name, 0), meter.stop().peak)

        handles.append(module.register_forward_pre_hook(lambda *_: meter.start()))
        handles.append(module.register_forward_hook(after))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


def bytes_of(tensors: Any) -> int:
    """Bytes of the distinct storages of tensors; what is no tensor is passed over."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            compressed = tensor.layout == torch.sparse_csr
            parts = (
                (tensor.crow_indices(), tensor.col_indices(), tensor.values()) if compressed else (tensor,)
            )
            for part in parts:
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _state_bytes(state: Any, module: nn.Module) -> int:
    """Bytes of an optimizer's state of a module's parameters."""
    tensors = [value for p in module.parameters() if p in state for value in state[p].values()]
    return bytes_of(tensors)


def checkpoint_bytes(model: nn.Module) -> int:
    """The size of the file that ``torch.save`` writes of the model's state_dict."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")
        torch.save(model.state_dict(), path)
        return path.stat().st_size
