"""One experiment: its settings, and the network that they stand for.

    Settings -> FlyNet with one context per task

``nmkern train`` makes the settings from its options, ``nmkern eval`` from a results.json; both get
the tasks from ``datasets`` and ``tasks`` with them. The invariant: the settings alone determine the
tasks and the initial network, on every machine.
"""

from dataclasses import dataclass

from nmkern.continual.datasets import Dataset
from nmkern.continual.training import BATCH_SIZE, LEARNING_RATE
from nmkern.models import FlyNet

DEFAULT_WIDTH = {"digits": 40, "mnist": 10}
# On digits 20 epochs leave the decoder half trained: 96.2 % over 36 rotated tasks, 40 give 96.9 %.
DEFAULT_EPOCHS = {"digits": 40, "mnist": 3}
# A step on digits is 0.7 ms of one thread: a second gains nothing, and waiting for it costs minutes where
# other programs share the cores. None leaves the choice to PyTorch.
DEFAULT_THREADS = {"digits": 1, "mnist": None}


@dataclass(frozen=True)
class Settings:
    """Every choice that a run's numbers depend on.

    ``width`` is hidden units per input, ``family`` that of the decoder's weights, ``num_tasks`` the
    number of tasks of kind ``tasks``; ``data_dir`` is where the files of ``data`` lie, if it has any.
    """

    tasks: str
    num_tasks: int
    data: str
    data_dir: str | None
    width: int
    fan_in: int
    family: str
    seed: int
    epochs: int
    device: str
    threads: int
    batch_size: int = BATCH_SIZE
    learning_rate: float = LEARNING_RATE


def build_model(settings: Settings, dataset: Dataset) -> FlyNet:
    """The network of ``settings`` before any training. Raises as FlyNet does."""
    return FlyNet(
        dataset.num_pixels,
        dataset.num_classes,
        width_multiple=settings.width,
        fan_in=settings.fan_in,
        contexts=settings.num_tasks,
        seed=settings.seed,
        family=settings.family,
        device=settings.device,
    )
