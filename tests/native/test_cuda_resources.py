"""Every CUDA kernel compiles for sm_80, sm_89 and sm_90a, spills nothing and grows no dearer than the table.

The table is written by ``python -m benchmarks resources --cuda``; figures belong to the nvcc that it names.
"""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton")  # its wheel has the disassembler

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "benchmarks/results/cuda_resources.json").read_text())
SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
from benchmarks import cuda_resources
print("RESULT" + json.dumps([cuda_resources.compiler(), cuda_resources.measure({arch!r})]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("arch", ["80", "89", "90a"])
def test_kernels_compile_within_the_committed_resources(run_python, arch):
    printed = run_python(SCRIPT.format(root=str(ROOT), arch=arch), TRITON_INTERPRET="0")
    version, found = json.loads(printed.partition("RESULT")[2])
    assert len(found) == 44
    assert {name: row["spilled_bytes"] for name, row in found.items() if row["spilled_bytes"]} == {}
    if version != TABLE["nvcc"]:
        pytest.skip(f"the table holds figures of nvcc {TABLE['nvcc']}, this is {version}")
    assert found.keys() == {name for name in TABLE if name.startswith(f"sm_{arch} ")}
    for name, row in found.items():
        worse = {k: (v, TABLE[name][k]) for k, v in row.items() if v > 1.05 * TABLE[name][k]}
        assert worse == {}, f"{name}: found, in the table: {worse}"


@pytest.mark.parametrize(("family", "most"), [("rademacher", 1.6), ("uniform", 2.6), ("normal", 4.3)])
@pytest.mark.parametrize("way", ["forward", "transposed"])
def test_the_loop_for_16_rows_meets_its_target(family, most, way):
    """Instructions a weight on sm_90a, on the committed figures."""
    assert TABLE[f"sm_90a {family} {way} 16 rows, 1 part"]["instructions_per_weight"] <= most
