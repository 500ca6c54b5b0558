"""Data sets and task families: what they contain, and that they contain it every time."""

import gzip
import struct

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate

from nmkern.continual import datasets
from nmkern.continual.tasks import make_tasks


@pytest.fixture(scope="module")
def digits():
    return datasets.digits()


def raw(images, white):
    return images.pixels.reshape(len(images.pixels), -1) / white


def test_digits_are_a_fixed_stratified_split(digits):
    assert digits.shape == (8, 8) and digits.num_classes == 10
    assert len(digits.train.labels) == 1437 and len(digits.test.labels) == 360
    assert set(np.bincount(digits.test.labels)) <= {35, 36, 37}
    again = datasets.digits()
    assert np.array_equal(again.test.pixels, digits.test.pixels)


def test_tasks_are_normalised_by_the_training_images(digits):
    features, labels = make_tasks("rotated", digits, 1)[0].train()
    assert features.dtype == torch.float32 and labels.dtype == torch.int64
    assert features.mean().item() == pytest.approx(0, abs=1e-5)
    assert features.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("family", ["rotated", "permuted", "split"])
def test_tasks_are_the_same_every_time(digits, family):
    first, second = (make_tasks(family, digits, 3, seed=5) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.label == b.label
        for x, y in zip((*a.train(), *a.test()), (*b.train(), *b.test()), strict=True):
            assert torch.equal(x, y)


def test_rotated_is_scipys_rotation(digits):
    tasks = make_tasks("rotated", digits, 36)
    assert [task.label for task in tasks] == [f"{angle}°" for angle in range(0, 360, 10)]
    images = digits.test.pixels / digits.white
    for index in (0, 4, 9, 31):
        turned = rotate(images, 10 * index, axes=(1, 2), reshape=False, order=1).reshape(360, 64)
        got = tasks[index].test()[0].numpy() * digits.std + digits.mean
        np.testing.assert_allclose(got, turned, atol=1e-6)


def test_rotations_are_ten_degrees_apart_until_the_circle_is_full(digits):
    assert [task.label for task in make_tasks("rotated", digits, 3)] == ["0°", "10°", "20°"]
    assert [task.label for task in make_tasks("rotated", digits, 48)][:3] == ["0°", "7.5°", "15°"]
    assert len(make_tasks("rotated", digits)) == 36


def test_permuted_moves_pixels_and_keeps_them(digits):
    identity, first, second = (task.test()[0] for task in make_tasks("permuted", digits, 3, seed=1))
    np.testing.assert_allclose(
        identity.numpy() * digits.std + digits.mean, raw(digits.test, digits.white), atol=1e-6
    )
    assert not torch.equal(first, identity) and not torch.equal(first, second)
    assert torch.equal(first.sort(dim=1).values, identity.sort(dim=1).values)
    # A permutation depends on the seed and its index, not on how many tasks there are.
    assert torch.equal(make_tasks("permuted", digits, 2, seed=1)[1].test()[0], first)
    assert not torch.equal(make_tasks("permuted", digits, 2, seed=2)[1].test()[0], first)


def test_split_takes_two_classes_and_keeps_their_labels(digits):
    tasks = make_tasks("split", digits)
    assert len(tasks) == 5
    for index, task in enumerate(tasks):
        for _, labels in (task.train(), task.test()):
            assert set(labels.tolist()) == {2 * index, 2 * index + 1}
    assert sum(len(task.test()[1]) for task in tasks) == 360


@pytest.mark.parametrize(
    ("family", "num_tasks", "seed", "message"),
    [
        ("sorted", 2, 0, "tasks: expected one of rotated, permuted, split, got 'sorted'"),
        ("rotated", 0, 0, "num_tasks: expected at least 1, got 0"),
        ("split", 6, 0, "num_tasks: expected at most 5 split tasks.*got 6"),
        ("permuted", 2, -1, "seed: expected 0 <= seed < 2\\^64, got -1"),
    ],
)
def test_bad_task_arguments(digits, family, num_tasks, seed, message):
    with pytest.raises(ValueError, match=message):
        make_tasks(family, digits, num_tasks, seed)


IMAGES = np.arange(20 * 6 * 5, dtype=np.uint8).reshape(20, 6, 5)
LABELS = (np.arange(20) % 10).astype(np.uint8)


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(directory, compressed=()):
    parts = {
        "train-images-idx3-ubyte": IMAGES,
        "train-labels-idx1-ubyte": LABELS,
        "t10k-images-idx3-ubyte": IMAGES[::-1][:8],
        "t10k-labels-idx1-ubyte": LABELS[::-1][:8],
    }
    for name, array in parts.items():
        if name in compressed:
            (directory / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (directory / name).write_bytes(idx(array))


@pytest.mark.parametrize("compressed", [(), ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")])
def test_mnist_is_read_plain_and_gzipped(tmp_path, compressed):
    write_mnist(tmp_path, compressed)
    data = datasets.load("mnist", tmp_path)
    assert np.array_equal(data.train.pixels, IMAGES) and np.array_equal(data.train.labels, LABELS)
    assert np.array_equal(data.test.pixels, IMAGES[::-1][:8])
    assert (data.shape, data.num_pixels, data.num_classes) == ((6, 5), 30, 10)
    features, _ = make_tasks("permuted", data, 1)[0].train()
    np.testing.assert_allclose(features.numpy(), (IMAGES.reshape(20, 30) / 255 - 0.1307) / 0.3081, atol=1e-5)


def test_a_missing_file_is_named_and_never_downloaded(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte.*never downloads"):
        datasets.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(IMAGES)[:-1], "expected 616 bytes for sizes .20, 6, 5.*got 615"),
        ("train-images-idx3-ubyte", idx(IMAGES) + b"x", "expected 616 bytes.*got 617"),
        ("train-images-idx3-ubyte", idx(IMAGES)[:10], "expected a header of 16 bytes, got a file of 10"),
        ("train-images-idx3-ubyte", b"\x89PNG" + idx(IMAGES), "begins with 00000803, got 89504e47"),
        ("train-images-idx3-ubyte", idx(LABELS), "begins with 00000803, got 00000801"),
        ("train-images-idx3-ubyte", b"", "begins with 00000803, got $"),
        ("train-images-idx3-ubyte", idx(IMAGES[:0]), "none zero"),
        ("train-labels-idx1-ubyte", idx(LABELS[:-1]), "expected 20 labels, one per image, got 19"),
        ("t10k-images-idx3-ubyte", idx(IMAGES[:8, :5]), "expected test images of .6, 5. pixels"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(IMAGES))[:-9], "a damaged one"),
        ("train-images-idx3-ubyte.gz", b"no gzip", "a damaged one"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    write_mnist(tmp_path)
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", tmp_path)


def test_unknown_data_and_missing_directory():
    with pytest.raises(ValueError, match="data: expected one of digits, mnist, got 'cifar'"):
        datasets.load("cifar")
    with pytest.raises(ValueError, match="data_dir: mnist needs the directory"):
        datasets.load("mnist")
