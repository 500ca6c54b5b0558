"""Training on one task after the other, and testing on all tasks seen so far.

    for task i:  RMSprop on context i, cross-entropy;  context i is finished
                 row i of the accuracy matrix = accuracy on the tests of tasks 0..i

It drives any model with contexts (nmkern.models.FlyNet) over the tasks of ``tasks``; ``metrics`` and
``report`` take what it yields. The invariant: a finished task's test logits never change again, and
their SHA-256 at every later test tells whether that held. No global random state is read or moved.

Source: arXiv:2204.04297, section 4; settings as in the authors' notebook.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that PyTorch's users know

from nmkern.continual.tasks import Task
from nmkern.nn import context_parameters, finish_context, num_contexts

BATCH_SIZE = 128
LEARNING_RATE = 1e-2
_TEST_ROWS = 1024  # rows of a test batch: bounds the hidden layer to 32 MiB on MNIST


@dataclass(frozen=True)
class EpochDone:
    """Task ``task`` has been trained for ``epoch + 1`` epochs; ``loss`` is the last one's mean."""

    task: int
    epoch: int
    loss: float


@dataclass(frozen=True)
class TaskDone:
    """Task ``task`` is finished: accuracies and logit hashes of tasks 0..task, seconds of training."""

    task: int
    accuracies: tuple[float, ...]
    hashes: tuple[str, ...]
    seconds: float


def train_sequence(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    epochs: int,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    device: torch.device | str = "cpu",
) -> Iterator[EpochDone | TaskDone]:
    """Train context i of ``model`` on task i, for every i in turn; yields after each epoch and task.

    ``seed`` (with the task's index) sets the order of the batches. Raises ValueError where the model
    has fewer contexts than there are tasks, where one of them is finished, or for sizes below 1.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if num_contexts(model) < len(tasks):
        raise ValueError(
            f"model: expected a context for each of {len(tasks)} tasks, got {num_contexts(model)}"
        )
    finished = [index for index in range(len(tasks)) if not context_parameters(model, index)]
    if finished:
        raise ValueError(f"model: expected contexts that can be trained, got finished ones: {finished}")

    def run() -> Iterator[EpochDone | TaskDone]:
        for index, task in enumerate(tasks):
            features, labels = (part.to(device) for part in task.train())
            start = time.perf_counter()
            optimizer = torch.optim.RMSprop(context_parameters(model, index), lr=learning_rate)
            order = shuffle_generator(seed, index)
            for epoch in range(epochs):
                batches = torch.randperm(len(labels), generator=order).to(device).split(batch_size)
                loss = _train_epoch(model, index, optimizer, features, labels, batches)
                yield EpochDone(index, epoch, loss)
            seconds = time.perf_counter() - start
            finish_context(model, index)
            accuracies, hashes = evaluate(model, tasks[: index + 1], device)
            yield TaskDone(index, accuracies, hashes, seconds)

    return run()


def _train_epoch(
    model: nn.Module,
    index: int,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
) -> float:
    total = torch.zeros((), device=features.device)
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(features[batch], context=index), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return total.item() / len(batches)


def shuffle_generator(seed: int, task: int) -> torch.Generator:
    """The random source of a task's batches. (torch.Generator keeps 32 bits of a seed: mixed first.)"""
    state = np.random.SeedSequence((seed, task)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


@torch.no_grad()
def evaluate(
    model: nn.Module, tasks: Sequence[Task], device: torch.device | str = "cpu"
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The test accuracy, and the SHA-256 of the test logits, of each task i in context i."""
    accuracies, hashes = [], []
    for index, task in enumerate(tasks):
        features, labels = task.test()
        digest = hashlib.sha256()
        correct = 0
        for x, y in zip(features.split(_TEST_ROWS), labels.split(_TEST_ROWS), strict=True):
            logits = model(x.to(device), context=index).cpu()
            digest.update(logits.numpy().tobytes())
            correct += int((logits.argmax(-1) == y).sum())
        accuracies.append(correct / len(labels))
        hashes.append(digest.hexdigest())
    return tuple(accuracies), tuple(hashes)
