"""The record of a run: results.json and contexts.safetensors in a directory.

    results.json           settings, versions, accuracy matrix, logit hashes, metrics; "complete"
    contexts.safetensors   the network's state_dict: contexts, and records of its frozen matrices

``nmkern train`` saves after every task, ``nmkern eval`` reads it back. The invariant: each file is
written beside its name and then moved there, so a reader, or a run that is cut short, always has a
whole file.
"""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from nmkern.continual import metrics
from nmkern.continual.experiment import Settings
from nmkern.continual.training import TaskDone
from nmkern.models import FlyNet

FORMAT = 1
RESULTS = "results.json"
CONTEXTS = "contexts.safetensors"


@dataclass
class Results:
    """What is known of a run so far; the lists grow by a row, or an entry, per finished task.

    ``provenance`` holds what ran it: versions, platform and kernels, in JSON's types.
    """

    settings: Settings
    labels: list[str]
    size: metrics.NetworkSize
    provenance: dict[str, Any]
    accuracy: list[list[float | None]] = field(default_factory=list)
    hashes: list[list[str | None]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, done: TaskDone) -> None:
        unseen = [None] * (len(self.labels) - len(done.accuracies))
        self.accuracy.append([*done.accuracies, *unseen])
        self.hashes.append([*done.hashes, *unseen])
        self.seconds.append(done.seconds)

    @property
    def complete(self) -> bool:
        return len(self.accuracy) == len(self.labels)

    def metrics(self) -> dict[str, Any]:
        """The metrics of the tasks finished so far; those of accuracy are absent before the first."""
        size = {**asdict(self.size), "stored_bytes": self.size.stored_bytes}
        if not self.accuracy:
            return size
        worst, worst_accuracy = metrics.worst_task(self.accuracy)
        return {
            "average_accuracy": metrics.average_accuracy(self.accuracy),
            "worst_task": worst,
            "worst_accuracy": worst_accuracy,
            "forgetting": metrics.forgetting(self.accuracy),
            "backward_transfer": metrics.backward_transfer(self.accuracy),
            "logits_bit_identical": metrics.bit_identical(self.hashes),
            "seconds_per_task": sum(self.seconds) / len(self.seconds),
            **size,
        }

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types; the matrices are square, null for rows and cells not yet known."""
        tasks = len(self.labels)
        missing = [[None] * tasks for _ in range(tasks - len(self.accuracy))]
        return {
            "format": FORMAT,
            "complete": self.complete,
            "settings": asdict(self.settings),
            **self.provenance,
            "tasks": self.labels,
            "metrics": self.metrics(),
            "accuracy": [*self.accuracy, *missing],
            "seconds": self.seconds,
            "logits_sha256": [*self.hashes, *missing],
        }


@dataclass(frozen=True)
class Recorded:
    """What ``nmkern eval`` needs of a results.json: the last row of each matrix, of finished tasks."""

    settings: Settings
    kernels: dict[str, str]
    accuracies: list[float]
    hashes: list[str]


def save(directory: Path, results: Results, model: FlyNet) -> None:
    """Write both files. Raises OSError where the directory cannot be written."""
    write_atomically(directory / CONTEXTS, lambda path: path.write_bytes(serialise(model.state_dict())))
    text = json.dumps(results.to_dict(), ensure_ascii=False, indent=1) + "\n"
    write_atomically(directory / RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a file beside ``path``, then put it there in one step."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def read(directory: Path) -> Recorded:
    """The record in ``directory``. FileNotFoundError where there is none, ValueError where it is unusable."""
    path = directory / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the directory of a run of nmkern train")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, got {record['format']!r}")
        done = len(record["seconds"])
        last = max(done - 1, 0)
        recorded = Recorded(
            Settings(**record["settings"]),
            record["kernels"],
            record["accuracy"][last][:done],
            record["logits_sha256"][last][:done],
        )
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: expected a results.json of nmkern train, got {error!r}") from error
    if not recorded.accuracies:
        raise ValueError(f"{path}: expected a run with at least one finished task, got none")
    return recorded


def read_contexts(directory: Path) -> dict[str, Tensor]:
    """The state_dict in ``directory``. FileNotFoundError, or ValueError where the file is damaged."""
    path = directory / CONTEXTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the contexts that nmkern train saved")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got a damaged one ({error})") from error
