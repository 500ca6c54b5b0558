"""Continual learning: one random network, one context per task, nothing forgotten."""

from nmkern.continual.datasets import Dataset, digits, mnist
from nmkern.continual.tasks import Task, make_tasks
from nmkern.continual.training import EpochDone, TaskDone, evaluate, train_sequence

__all__ = [
    "Dataset",
    "EpochDone",
    "Task",
    "TaskDone",
    "digits",
    "evaluate",
    "make_tasks",
    "mnist",
    "train_sequence",
]
