"""Bytes against the number of tasks, for three ways to keep them.

    separate   a network of its own for each task, with stored weights, nothing shared
    stored     one stored random network, and a context for each task
    nmkern     one regenerated random network, and a context for each task

Counted are the bytes of all parameters and buffers, and those that torch.save writes of all of it.
"""

import copy
from typing import IO, Any, cast

import torch
from torch import nn

from nmkern.memory.measuring import bytes_of
from nmkern.memory.twin import stored_twin
from nmkern.nn import add_context, num_contexts

COUNTS = (1, 2, 4, 8, 16, 32)
WAYS = ("separate", "stored", "nmkern")
LIMIT = 2**32  # bytes that separate networks may take while they are counted


def task_curve(model: nn.Module, counts: "tuple[int, ...] | list[int]" = COUNTS) -> dict[str, Any]:
    """Bytes at each count of tasks, measured on as many contexts, or networks, as there are tasks.

    ``model`` has one context, and stays as it is. Returns ``{"tasks": counts, way: {"held": [...],
    "checkpoint": [...]}}``; None where separate networks would take more than 4 GiB. ValueError where the
    model has no context layers, or more than one context.
    """
    if num_contexts(model) != 1:
        raise ValueError(f"model: expected one context, got {num_contexts(model)}")
    twin = stored_twin(model)
    shared = {"stored": copy.deepcopy(twin), "nmkern": copy.deepcopy(model)}
    networks = nn.ModuleList()
    found: dict[str, Any] = {"tasks": list(counts)}
    for way in WAYS:
        found[way] = {"held": [], "checkpoint": []}
    for count in sorted(counts):
        for way, network in shared.items():
            while num_contexts(network) < count:
                add_context(network)
            _count(found[way], network)
        if count * held_bytes(twin) > LIMIT:
            found["separate"]["held"].append(None)
            found["separate"]["checkpoint"].append(None)
            continue
        networks.extend(copy.deepcopy(twin) for _ in range(count - len(networks)))
        _count(found["separate"], networks)
    return found


def _count(series: dict[str, list[int]], network: nn.Module) -> None:
    series["held"].append(held_bytes(network))
    sink = _Sink()
    torch.save(network.state_dict(), cast(IO[bytes], sink))
    series["checkpoint"].append(sink.size)


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return bytes_of([*model.parameters(), *model.buffers()])


class _Sink:
    """A file that only counts: the checkpoint of 32 networks would take gigabytes."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
