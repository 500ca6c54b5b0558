"""Contexts: the learned parameters of modulated layers, one set per task, and how one is selected.

A layer that holds contexts derives from ``ContextLayer``; a model is any module tree with such layers
in it, and the functions of this file act on all of them at once. The invariant: a finished context is no
parameter any more, so no optimizer can reach it. Of the others, training one gives no gradient to another;
but in a batch that mixes contexts, one that no row uses gets a gradient of zero, as the unused rows of
torch.nn.Embedding do: an optimizer that holds it, with momentum or weight decay, may then move it.
"""

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from nmkern.matrix import RandomMatrix, as_int
from nmkern.nn.records import MatrixModule, check_state_dict
from nmkern.ops.checks import check_context

_SELECTION = "an int or an integer tensor"


class Context(nn.Module):
    """The tensors of one context by name: parameters until it is finished, buffers after."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value))
        self._names = tuple(tensors)
        self.finished = False

    def check_plain(self) -> None:
        """ValueError where a tensor is computed from others, which finishing would leave trainable."""
        for name in () if self.finished else self._names:
            if name not in self._parameters:
                raise ValueError(
                    f"context: expected plain parameters to finish, got {name} computed from others (make it "
                    "one: torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
                )

    def finish(self) -> None:
        """Freeze for good: copies the values into buffers, which no optimizer holds."""
        self.check_plain()
        for name, parameter in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, parameter.detach().clone())
        self.finished = True

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the tensors, which stay the same objects."""
        for name, tensor in self.tensors().items():
            tensor.copy_(_sharded_as(tensor, values[name]))

    def extra_repr(self) -> str:
        return "finished" if self.finished else ""

    def forward(self) -> None:
        """Nothing of its own: a call is for the hooks."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the order given."""
        if self._forward_pre_hooks:
            self()  # where pruning and weight_norm compute a tensor anew from what is trained
        # What torch.nn.Module.__getattr__ finds, in a third of its time. A parametrization or a wrapper
        # takes a name out of here and answers for it itself.
        held: Mapping[str, Any] = self._buffers if self.finished else self._parameters
        return {name: held[name] if name in held else getattr(self, name) for name in self._names}


def _sharded_as(tensor: Any, value: Tensor) -> Tensor:
    """``value`` in the parts of ``tensor``, where that is a DTensor, which takes no other."""
    if not hasattr(tensor, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has made all values: each takes its part without asking another.
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


class ContextModule(nn.Module):
    """Base of layers and models with contexts: the functions of this file as methods."""

    def add_context(self) -> int:
        return add_context(self)

    def finish_context(self, index: int) -> None:
        finish_context(self, index)

    def select_context(self, context: int | Tensor) -> None:
        select_context(self, context)

    def use_context(self, context: int | Tensor) -> contextlib.AbstractContextManager[None]:
        return use_context(self, context)

    @property
    def num_contexts(self) -> int:
        return num_contexts(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As torch's, but all or nothing: a mismatch raises RuntimeError and changes no tensor."""
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)


class ContextLayer(MatrixModule, ContextModule):
    """A layer with a frozen random matrix and contexts, of which one, or one per row, is selected."""

    def __init__(self, matrix: RandomMatrix) -> None:
        super().__init__(matrix)
        self.contexts = nn.ModuleList()
        self.selected: int | Tensor = 0

    def context(self, index: int) -> Context:
        return cast(Context, self.contexts[index])

    @property
    def like(self) -> Tensor:
        """An empty tensor like those of context 0: contexts added later get its device and dtype."""
        first = next(iter(self.context(0).tensors().values()))
        return torch.empty(0, device=first.device, dtype=first.dtype)

    def new_context(self, index: int, like: Tensor) -> dict[str, Tensor]:
        """The initial tensors of context ``index``, on the device and in the dtype of ``like``."""
        raise NotImplementedError

    def grow(self, contexts: int, like: Tensor | None = None) -> None:
        """Add contexts until there are ``contexts`` of them; the first needs a ``like``."""
        for index in range(len(self.contexts), contexts):
            self.contexts.append(Context(self.new_context(index, self.like if like is None else like)))

    def reset_parameters(self) -> None:
        """Give every context its initial values again, those of its index, in place.

        What torch.nn.utils.skip_init and sharding from the meta device call after ``to_empty``. Finished
        contexts are left as they are, frozen: after ``to_empty`` only a checkpoint has their values.
        """
        for index in range(len(self.contexts)):
            context = self.context(index)
            if not context.finished:
                context.fill(self.new_context(index, self.like))

    def context_tensors(self, context: int | Tensor) -> dict[str, Tensor]:
        """The tensors of context ``context`` by name; for a tensor of contexts banks of all, stacked."""
        if isinstance(context, int) and context is not True and context is not False:
            # Past ModuleList's own indexing, whose checks cost 3 microseconds. Dynamo formats no int that
            # varies; operator.index makes it a constant of the graph.
            contexts: Any = self._modules["contexts"]
            found = contexts._modules.get(f"{operator.index(context):d}")
            if found is None:
                raise ValueError(f"context: expected 0 <= context < {len(self.contexts)}, got {context}")
            return found.tensors()
        if not isinstance(context, Tensor):
            raise TypeError(f"context: expected {_SELECTION}, got {context!r}")
        banks = [context.tensors() for context in cast(Iterable[Context], self.contexts)]
        return {name: torch.stack([bank[name] for bank in banks]) for name in banks[0]}

    def record(self) -> dict[str, Any]:
        finished = [i for i, context in enumerate(self.contexts) if context.finished]
        return {**super().record(), "contexts": len(self.contexts), "finished": finished}

    def check_form(self, record: dict[str, Any]) -> None:
        super().check_form(record)
        for name, numbers in (("contexts", [record["contexts"]]), ("finished", record["finished"])):
            if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
                raise TypeError(f"{name}: {record[name]!r}")

    def check_record(self, name: str, record: dict[str, Any]) -> None:
        super().check_record(name, record)
        contexts, finished = record["contexts"], record["finished"]
        if contexts < len(self.contexts) or any(not 0 <= index < contexts for index in finished):
            raise RuntimeError(
                f"{name}: the checkpoint has {contexts} contexts (finished: {finished}), "
                f"this model has {len(self.contexts)}"
            )

    def check_keys(self, name: str, record: dict[str, Any], keys: list[str]) -> None:
        held = {key.split(".")[1] for key in keys if key.startswith("contexts.")}
        if record["contexts"] > max(len(self.contexts), len(held)):
            raise RuntimeError(
                f"{name}: the checkpoint's record is of {record['contexts']} contexts, it holds {len(held)}"
            )

    def expected_shapes(self, record: dict[str, Any]) -> dict[str, torch.Size]:
        first = self.contexts[0].state_dict()
        return {
            f"contexts.{index}.{name}": value.shape
            for index in range(len(self.contexts), record["contexts"])
            for name, value in first.items()
        }

    def apply_record(self, record: dict[str, Any]) -> None:
        self.grow(record["contexts"])
        for index in record["finished"]:
            self.context(index).finish()


def context_layers(model: nn.Module) -> list[ContextLayer]:
    """The layers of ``model`` that hold contexts; ValueError where there is none."""
    layers = [module for module in model.modules() if isinstance(module, ContextLayer)]
    if not layers:
        raise ValueError(f"model: expected a module with context layers, got {type(model).__name__}")
    return layers


def num_contexts(model: nn.Module) -> int:
    """The number of contexts of every layer of ``model``; ValueError where they disagree."""
    counts = {len(layer.contexts) for layer in context_layers(model)}
    if len(counts) != 1:
        raise ValueError(f"model: expected equally many contexts in every layer, got {sorted(counts)}")
    return counts.pop()


def _checked(model: nn.Module, index: Any, expected: str = "an int") -> int:
    """The index of a context that every layer of ``model`` has."""
    index, contexts = as_int("context", index, expected), num_contexts(model)
    if not 0 <= index < contexts:
        raise ValueError(f"context: expected 0 <= context < {contexts}, got {index}")
    return index


def add_context(model: nn.Module) -> int:
    """Add a context to every layer of ``model``; returns its index.

    Its parameters are new ones, so hand them to an optimizer: ``context_parameters(model, index)``.
    """
    index = num_contexts(model)
    for layer in context_layers(model):
        layer.grow(index + 1)
    return index


def context_parameters(model: nn.Module, index: int) -> list[nn.Parameter]:
    """The parameters of context ``index`` over all layers; none once it is finished."""
    index = _checked(model, index)
    return [p for layer in context_layers(model) for p in layer.contexts[index].parameters()]


def finish_context(model: nn.Module, index: int) -> None:
    """Freeze context ``index`` in every layer for good.

    Its parameters become buffers with the same bits and state_dict keys. An optimizer that still
    holds the old parameters, with momentum, weight decay or any history, moves nothing. ValueError, and
    nothing changed, where one is not plain but computed, by a parametrization or by pruning.
    """
    index = _checked(model, index)
    contexts = [layer.context(index) for layer in context_layers(model)]
    for context in contexts:
        context.check_plain()
    for context in contexts:
        context.finish()


def select_context(model: nn.Module, context: int | Tensor) -> None:
    """Select what every layer of ``model`` uses in the forward passes to come.

    ``context`` is an index, or an integer tensor with the leading shape of the layers' input: one
    context per row, so that a batch can mix tasks. (Under torch.compile prefer the tensor: every
    index is a graph of its own.) TypeError and ValueError where it is neither, or out of range.

    The selection is state of the model, as train() and eval() are: threads share it, and activation
    checkpointing recomputes with what is selected by then. There pass ``context=`` to the calls.
    """
    if isinstance(context, Tensor):
        check_context(context, context.unsqueeze(-1))
    else:
        context = _checked(model, context, _SELECTION)
    for layer in context_layers(model):
        layer.selected = context


@contextlib.contextmanager
def use_context(model: nn.Module, context: int | Tensor) -> Iterator[None]:
    """``select_context`` for the time of a ``with`` block; what was selected before comes back.

    For all threads, and not for what activation checkpointing recomputes after the block.
    """
    layers = context_layers(model)
    before = [layer.selected for layer in layers]
    select_context(model, context)
    try:
        yield
    finally:
        for layer, selected in zip(layers, before, strict=True):
            layer.selected = selected
