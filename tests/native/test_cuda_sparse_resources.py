"""The CUDA kernels of the sparse projection and FlyNet spill nothing and grow no dearer than the table.

The table is written by ``python -m benchmarks resources --cuda``; figures belong to the nvcc that it names.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")  # its wheel has the disassembler

from benchmarks import cuda_sparse_resources
from nmkern.backends import cuda

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "benchmarks/results/cuda_sparse_resources.json").read_text())
needs_library = pytest.mark.skipif(
    not cuda.LIBRARY_PATH.exists(), reason="nmkern/_cuda.so was not built: there is no nvcc"
)


@needs_library
@pytest.mark.parametrize("arch", cuda_sparse_resources.ARCHS)
def test_kernels_are_within_the_committed_resources(arch):
    found = cuda_sparse_resources.measure(arch)
    assert len(found) == 13
    assert {name: row["spilled_bytes"] for name, row in found.items() if row["spilled_bytes"]} == {}
    if (version := cuda_sparse_resources.compiler()) != TABLE["nvcc"]:
        pytest.skip(f"the table holds figures of nvcc {TABLE['nvcc']}, this is {version}")
    assert found.keys() == {name for name in TABLE if name.startswith(f"sm_{arch} ")}
    for name, row in found.items():
        worse = {k: (v, TABLE[name][k]) for k, v in row.items() if v > 1.05 * TABLE[name][k]}
        assert worse == {}, f"{name}: found, in the table: {worse}"


@pytest.mark.parametrize("arch", ["80", "89", "90a"])
def test_gathering_is_bound_by_the_loads_themselves(arch):
    """A load of 16 bytes serves 4 elements; the tile, its offsets and a block's sums fit where they must."""
    for kernel, instructions, loads in (
        ("forward, tile of 32 rows", 2.0, 0.32),  # of them 1 / 16 for what was drawn
        ("flynet logits", 2.4, 0.25),
        ("flynet gain_grad", 2.4, 0.25),
    ):
        row = TABLE[f"sm_{arch} {kernel}"]
        assert row["instructions_per_element"] <= instructions, kernel
        assert row["loads_per_element"] <= loads, kernel
    assert TABLE["sm_89 flynet logits"]["shared_bytes"] <= 99 << 10
    assert TABLE["sm_80 forward, tile of 32 rows"]["shared_bytes"] <= 163 << 10
