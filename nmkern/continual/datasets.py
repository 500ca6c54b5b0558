"""Data sets of labelled images, as they are before any task changes them.

    pixels in [0, 1] -> (pixels - mean) / std

``digits`` comes with scikit-learn; ``mnist`` is read from files in MNIST's IDX format that the user
already has. Tasks are made of them in ``tasks``. The invariant: images are kept once, in the small
integers that they come in, and nothing is ever downloaded.
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = ("digits", "mnist")
_MNIST_NORMALISATION = (0.1307, 0.3081)  # mean and std as the authors' notebook gives them
_IDX_UBYTE = 0x08  # the type byte of an IDX header: unsigned bytes


@dataclass(frozen=True, eq=False)
class Images:
    """``pixels`` [n, height, width] from 0 to the data set's ``white``, ``labels`` [n] int64."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images to train on and to test on; ``mean`` and ``std`` are of training pixels in [0, 1]."""

    name: str
    train: Images
    test: Images
    white: int
    mean: float
    std: float

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of an image."""
        _, height, width = self.train.pixels.shape
        return height, width

    @property
    def num_pixels(self) -> int:
        return math.prod(self.shape)

    @property
    def num_classes(self) -> int:
        return int(self.train.labels.max()) + 1


def load(name: str, data_dir: Path | str | None = None) -> Dataset:
    """The data set ``name`` of ``NAMES``; ``data_dir`` is where MNIST's files lie."""
    if name == "digits":
        return digits()
    if name != "mnist":
        raise ValueError(f"data: expected one of {', '.join(NAMES)}, got {name!r}")
    if data_dir is None:
        raise ValueError("data_dir: mnist needs the directory of its four IDX files, got none")
    return mnist(data_dir)


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fixed stratified fifth is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        bunch.images.astype(np.uint8),
        bunch.target.astype(np.int64),
        test_size=0.2,
        random_state=0,
        stratify=bunch.target,
    )
    white = 16
    return Dataset(
        "digits",
        Images(train_pixels, train_labels),
        Images(test_pixels, test_labels),
        white,
        float(train_pixels.mean() / white),
        float(train_pixels.std() / white),
    )


def mnist(data_dir: Path | str) -> Dataset:
    """A data set in MNIST's four IDX files, each plain or gzipped (``.gz``), in ``data_dir``.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged.
    """
    directory = Path(data_dir)
    train = _read_images(directory, "train")
    test = _read_images(directory, "t10k")
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise ValueError(
            f"data_dir: expected test images of {train.pixels.shape[1:]} pixels as in training, "
            f"got {test.pixels.shape[1:]}"
        )
    return Dataset("mnist", train, test, 255, *_MNIST_NORMALISATION)


def _read_images(directory: Path, part: str) -> Images:
    pixels = read_idx(_find(directory, f"{part}-images-idx3-ubyte"), 3)
    path = _find(directory, f"{part}-labels-idx1-ubyte")
    labels = read_idx(path, 1)
    if len(labels) != len(pixels):
        raise ValueError(f"{path}: expected {len(pixels)} labels, one per image, got {len(labels)}")
    return Images(pixels, labels.astype(np.int64))


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"data_dir: no file {directory / name} (or .gz); nmkern never downloads data")


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an IDX file: two zeros, type, number of dimensions, sizes, data.

    ValueError where the header is not of ``dimensions`` dimensions of bytes, where a size is zero, or
    where the file is shorter or longer than its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzip file, got a damaged one ({error})") from error
    magic = bytes([0, 0, _IDX_UBYTE, dimensions])
    if data[:4] != magic:
        raise ValueError(f"{path}: expected an IDX file that begins with {magic.hex()}, got {data[:4].hex()}")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ValueError(f"{path}: expected a header of {start} bytes, got a file of {len(data)}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    expected = start + math.prod(shape)
    if 0 in shape or len(data) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for sizes {shape}, none zero, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
