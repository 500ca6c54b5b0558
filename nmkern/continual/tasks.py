"""Sequences of tasks that are made of one data set.

    rotated     every image turned by a multiple of 10 degrees
    permuted    every image's pixels in another order, the same for all images of a task
    split       two classes a task; labels keep their values

A task sits between the data set, which it shares with all others, and training. The invariant: a task
holds a rule, not images. They are made when asked for, the same ones each time, so 36 tasks of MNIST
need the memory of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nmkern.continual.datasets import Dataset, Images

Transform = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Task:
    """One task: ``transform`` changes pixels [n, height * width] in [0, 1], ``classes`` selects images."""

    label: str
    dataset: Dataset
    transform: Transform | None = None
    classes: tuple[int, ...] | None = None

    def train(self) -> tuple[Tensor, Tensor]:
        """Normalised images [n, height * width] float32 and labels [n] int64 to train on."""
        return self._make(self.dataset.train)

    def test(self) -> tuple[Tensor, Tensor]:
        """The same to test on."""
        return self._make(self.dataset.test)

    def _make(self, images: Images) -> tuple[Tensor, Tensor]:
        pixels, labels = images.pixels, images.labels
        if self.classes is not None:
            chosen = np.isin(labels, self.classes)
            pixels, labels = pixels[chosen], labels[chosen]
        x = pixels.reshape(len(pixels), -1).astype(np.float32)
        x /= self.dataset.white
        if self.transform is not None:
            x = self.transform(x)
        x = (x - np.float32(self.dataset.mean)) / np.float32(self.dataset.std)
        return torch.from_numpy(x), torch.from_numpy(labels.copy())


def make_tasks(family: str, dataset: Dataset, num_tasks: int | None = None, seed: int = 0) -> list[Task]:
    """``num_tasks`` tasks of ``family``: ``"rotated"``, ``"permuted"`` or ``"split"``.

    Args:
        num_tasks: at least 1; default 36 for rotated, 10 for permuted, all pairs of classes for split.
        seed: of the permutations, in [0, 2^64); other families ignore it.

    Raises ValueError for an unknown family, and for more split tasks than there are pairs of classes.
    """
    if family not in FAMILIES:
        raise ValueError(f"tasks: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if num_tasks is not None and num_tasks < 1:
        raise ValueError(f"num_tasks: expected at least 1, got {num_tasks}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2^64, got {seed}")
    return FAMILIES[family](dataset, num_tasks, seed)


def _rotated(dataset: Dataset, num_tasks: int | None, seed: int) -> list[Task]:
    count = 36 if num_tasks is None else num_tasks
    step = 10 if count <= 36 else 360 / count
    angles = [index * step for index in range(count)]
    return [Task(f"{angle:g}°", dataset, _rotation(dataset.shape, angle)) for angle in angles]


def _rotation(shape: tuple[int, int], angle: float) -> Transform:
    """scipy.ndimage.rotate with linear interpolation, as the linear map of pixels that it is.

    Rotating the unit images once gives that map, four entries a pixel at most; applying it takes a
    tenth of the time that rotating every image takes.
    """
    from scipy.ndimage import rotate
    from scipy.sparse import csr_array

    pixels = shape[0] * shape[1]
    units = np.eye(pixels).reshape(pixels, *shape)
    turned = rotate(units, angle, axes=(1, 2), reshape=False, order=1).reshape(pixels, pixels)
    operator = csr_array(turned.T.astype(np.float32))
    return lambda x: np.ascontiguousarray((operator @ x.T).T)


def _permuted(dataset: Dataset, num_tasks: int | None, seed: int) -> list[Task]:
    count = 10 if num_tasks is None else num_tasks
    tasks = [Task("0", dataset)]
    for index in range(1, count):
        order = np.random.default_rng((seed, index)).permutation(dataset.num_pixels)
        tasks.append(Task(str(index), dataset, _permutation(order)))
    return tasks


def _permutation(order: NDArray[np.int64]) -> Transform:
    return lambda x: x[:, order]


def _split(dataset: Dataset, num_tasks: int | None, seed: int) -> list[Task]:
    pairs = dataset.num_classes // 2
    count = pairs if num_tasks is None else num_tasks
    if count > pairs:
        raise ValueError(
            f"num_tasks: expected at most {pairs} split tasks, two of the {dataset.num_classes} classes "
            f"of {dataset.name} each, got {count}"
        )
    return [Task(f"{c}, {c + 1}", dataset, classes=(c, c + 1)) for c in range(0, 2 * count, 2)]


FAMILIES: dict[str, Callable[[Dataset, int | None, int], list[Task]]] = {
    "rotated": _rotated,
    "permuted": _permuted,
    "split": _split,
}
