"""Every Triton kernel compiles for sm_80 and sm_90, spills nothing and grows no dearer than the table says.

The table is written by ``python -m benchmarks resources``; figures belong to the Triton that it names.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "benchmarks/results/triton_resources.json").read_text())
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else {root!r})
import triton
from benchmarks import resources
found = {{name: resources.measure(variant) for name, variant in resources.variants().items()}}
print("RESULT" + json.dumps([triton.__version__, found]))
"""


@pytest.mark.slow
def test_kernels_compile_within_the_committed_resources(run_python):
    # A process of its own: this one may have chosen Triton's interpreter.
    printed = run_python(SCRIPT.format(root=str(ROOT)), TRITON_INTERPRET="0")
    version, found = json.loads(printed.partition("RESULT")[2])
    assert len(found) > 40
    assert {name: row["spilled_bytes"] for name, row in found.items() if row["spilled_bytes"]} == {}
    if version != TABLE["triton"]:
        pytest.skip(f"the table holds figures of Triton {TABLE['triton']}, this is {version}")
    assert found.keys() == TABLE.keys() - {"triton"}
    for name, row in found.items():
        worse = {k: (v, TABLE[name][k]) for k, v in row.items() if v > 1.05 * TABLE[name][k]}
        assert worse == {}, f"{name}: found, in the table: {worse}"


def test_the_small_batch_loop_of_uniform_takes_at_most_eight_instructions_a_weight():
    """The target of the static analysis, on the committed figures."""
    rows = {
        name: row
        for name, row in TABLE.items()
        if name.startswith("sm_90 uniform") and name.endswith(" 16 bfloat16")
    }
    assert len(rows) == 2
    for name, row in rows.items():
        assert row["instructions_per_weight"] <= 8, name
