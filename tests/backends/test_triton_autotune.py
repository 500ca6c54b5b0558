"""The choice of tiles by timing: no choice changes a bit, and each is made once and kept.

Timings are numbers that the tests make up; everything else runs, under Triton's interpreter or compiled.
"""

import json
from itertools import product

import numpy as np
import pytest
import torch
from formula import generator, normals

pytest.importorskip("triton")

from nmkern import RandomMatrix, stream
from nmkern.backends import primitives
from nmkern.backends.triton import autotune, configs, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAGS = {family.tag: name for name, family in stream.DENSE_FAMILIES.items()}


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch):
    """tl.dot, in the interpreter, adds up in the order of k: it is NumPy's product there, whose order is
    BLAS's own and changes with the tile. A tensor core's order is fixed too, and tested where there is one.
    """
    if not launch.INTERPRETED:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = np.zeros_like(d.data)
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None] * b.data[k]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def served_by(monkeypatch):
    """A function that makes all calls take one tile."""

    def serve(tile):
        monkeypatch.setattr(configs, "tile_of", lambda *_: tile)
        launch._plan.cache_clear()

    yield serve
    launch._plan.cache_clear()


def everything(matrix, x, gain, other):
    """The product, and the gradient of its gain, of one call."""
    args = primitives.dense_args(matrix)
    y = launch.modulated_matmul(x, gain, None, None, None, *args)
    return y, *launch.modulated_matmul_gain_grad(x, gain, None, other, None, 1, True, *args)


def check_candidates(served_by, tag, transposed, rows, outputs, reduction, dtype, stride=1):
    """Inputs are no integers: their sums differ where the order does."""
    matrix = RandomMatrix(
        *((reduction, outputs) if transposed else (outputs, reduction)), seed=3, family=TAGS[tag]
    )
    matrix = matrix[1:, 3:].T if transposed else matrix[1:, 3:]
    g = generator(rows)
    x, gain = (normals(s, g).to(DEVICE) for s in ((rows, matrix.cols), (1, matrix.cols)))
    x, other = x.to(dtype), normals((rows, matrix.rows), g, dtype).to(DEVICE)
    first, *others = configs.candidates(tag, transposed, rows)
    served_by(first)
    want = everything(matrix, x, gain, other)
    assert len(others) >= 3
    for tile in others[::stride]:
        served_by(tile)
        found = everything(matrix, x, gain, other)
        for one, same in zip(found, want, strict=True):
            assert torch.equal(one, same), tile


@pytest.mark.parametrize("transposed", [False, True])
def test_candidates_give_the_same_bits(served_by, transposed):
    check_candidates(served_by, 0x102, transposed, 3, 140, 550, torch.float32, stride=3)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tag", TAGS, ids=hex)
def test_candidates_of_larger_batches_give_the_same_bits(served_by, tag, transposed):
    """Every third: the interpreter takes seconds for each. On a GPU, all of them (below)."""
    check_candidates(served_by, tag, transposed, 33, 140, 290, torch.float32, stride=3)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_candidates_of_large_batches_give_the_same_bits(served_by, transposed):
    """Tiles of 64 and of 128 rows."""
    check_candidates(served_by, 0x102, transposed, 130, 140, 200, torch.float32, stride=3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no CUDA device")
@pytest.mark.parametrize("rows", [5, 20, 70, 200])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tag", TAGS, ids=hex)
def test_all_candidates_give_the_same_bits_compiled(served_by, tag, transposed, rows):
    check_candidates(served_by, tag, transposed, rows, 1000, 8200, torch.bfloat16)


@pytest.mark.parametrize("tag", TAGS, ids=hex)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_split_does_not_depend_on_the_tile(monkeypatch, tag, transposed):
    for rows, outputs, reduction in ((1, 8192, 8192), (16, 300, 8192), (33, 512, 16384), (200, 784, 100)):
        matrix = (tag, 1, 5, 7, *((reduction, outputs) if transposed else (outputs, reduction)), transposed)
        for parts, gained in product((1, 2), (False, True)):
            monkeypatch.setattr(launch, "operand_of", lambda *_, parts=parts: (torch.float16, parts))
            launch._plan.cache_clear()
            request = (matrix, rows, torch.bfloat16, gained, False, False)
            tiles = configs.candidates(tag, transposed, rows, parts)
            plans = [launch._plan(*request, tile) for tile in tiles]
            assert launch._plan(*request).tile == plans[0].tile
            assert len({(plan.splits, plan.numbers[8], plan.product.constants["BR"]) for plan in plans}) == 1
    launch._plan.cache_clear()


@pytest.mark.parametrize("tag", TAGS, ids=hex)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("amd", [False, True], ids=["nvidia", "amd"])
def test_candidates_hold_whole_patches(monkeypatch, tag, transposed, amd):
    """What the index arithmetic of the kernel asks of a tile."""
    monkeypatch.setattr(configs, "AMD", amd)
    monkeypatch.setattr(configs, "warp_lanes", lambda: 64 if amd else 32)
    lanes = 16 if amd else 8
    for batch in (1, 17, 10**6):
        for parts in (1, 2, 3):
            for tile in configs.candidates(tag, transposed, batch, parts):
                assert tile.outputs % (lanes * tile.warps * (tile.fields if transposed else 4)) == 0
                assert tile.fields <= (8 if tag < 0x103 else 4)


TILES = configs.candidates(0x102, False, 1)


def test_a_choice_is_made_once_and_kept(tmp_path):
    path, timed = tmp_path / "nmkern" / "tiles.json", []

    def seconds(tile):
        timed.append(tile)
        return abs(TILES.index(tile) - 2)

    assert autotune.Choices(path).tile("a", TILES, seconds) == TILES[2]
    assert tuple(timed) == TILES
    assert autotune.Choices(path).tile("a", TILES, seconds) == TILES[2]
    assert tuple(timed) == TILES  # not again
    assert autotune.Choices(path).tile("a", TILES[:2], seconds) == TILES[1]  # what is kept is no candidate


def test_processes_add_to_one_file(tmp_path):
    path = tmp_path / "tiles.json"
    one, two = autotune.Choices(path), autotune.Choices(path)
    one.tile("a", TILES[:1], lambda _: 0.0)
    two.tile("b", TILES[1:2], lambda _: 0.0)
    assert autotune.Choices(path).known("a", TILES) == TILES[0]
    assert autotune.Choices(path).known("b", TILES) == TILES[1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '{"a": [1, 2, 3, 4, 5, 6, 7]}'])
def test_a_broken_file_costs_a_measurement_only(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    assert autotune.Choices(path).tile("a", TILES, lambda tile: TILES.index(tile)) == TILES[0]
    assert list(json.loads(path.read_text())) == ["a"]


def test_no_file_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    made = autotune.Choices(tmp_path / "file" / "tiles.json")
    assert made.tile("a", TILES, lambda tile: TILES.index(tile)) == made.known("a", TILES) == TILES[0]


def test_a_call_takes_the_fastest_tile_and_no_other_bits(tmp_path, monkeypatch):
    matrix = RandomMatrix(30, 300, seed=1, family="uniform")
    x = normals((3, 300), generator(1)).to(DEVICE)
    args, timed, capturing = primitives.dense_args(matrix), [], True

    def seconds_of(call):
        call()
        timed.append(len(timed))
        return -len(timed)  # the last is the fastest

    want = launch.modulated_matmul(x, None, None, None, None, *args)
    made = autotune.Choices(tmp_path / "tiles.json")
    monkeypatch.setattr(autotune, "enabled", lambda _: True)
    monkeypatch.setattr(autotune, "choices", lambda _: made)
    monkeypatch.setattr(autotune, "seconds_of", seconds_of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    tiles = configs.candidates(0x102, False, 3)
    for expected in (0, len(tiles), len(tiles)):
        assert torch.equal(launch.modulated_matmul(x, None, None, None, None, *args), want)
        assert len(timed) == expected  # none while a graph is captured, all of them once
        capturing = False
    (key,) = json.loads(made.path.read_text())
    assert key == "0x102 float32 M4 N32 K512"
    assert made.known(key, [tiles[-1]]) == tiles[-1]


def test_without_the_variable_the_frozen_table_serves(run_python):
    script = """
import torch
from nmkern.backends.triton import autotune
print(autotune.enabled(torch.device("cuda")), autotune.enabled(torch.device("cpu")))
print(autotune.choices("NVIDIA H100 80GB HBM3").path)
"""
    assert run_python(script).startswith("False False")
    told, path = run_python(script, NMKERN_TRITON_AUTOTUNE="1", XDG_CACHE_HOME="/tmp/x").splitlines()
    assert told == "True False"
    assert path.startswith("/tmp/x/nmkern/tiles/NVIDIA_H100_80GB_HBM3-triton-") and path.endswith(".json")
