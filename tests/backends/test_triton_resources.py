"""Every Triton kernel compiles for sm_80, sm_90 and AMD, spills nothing and grows no dearer than its table.

The table, of NVIDIA's, is written by ``python -m benchmarks resources``; figures belong to the Triton that it
names.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "benchmarks/results/triton_resources.json").read_text())
PRODUCTS = {name: row for name, row in TABLE.items() if "multiplied_by" in row}
COSTS = {"registers", "shared_bytes", "instructions_per_weight"}
SAME = {"multiplied_by", "copies_of_16_bytes", "stores_to_shared"}
SIGNS = ("rademacher", "forward")  # of which tiles of 128 rows spilled
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else {root!r})
import triton
from benchmarks import resources
found = {{name: resources.measure(variant) for name, variant in resources.variants({arch}).items()}}
print("RESULT" + json.dumps([triton.__version__, found]))
"""


ON_AMD = {
    "uniform forward 16 bfloat16": 4.94,
    "uniform transposed 16 bfloat16": 4.41,
    "uniform forward 128 bfloat16": 7.06,
    "uniform transposed 128 bfloat16": 9.06,
    "uniform forward 16 float32": 5.16,
    "rademacher forward 16 bfloat16": 3.89,
    "rademacher transposed 16 bfloat16": 5.03,
    "normal forward 16 bfloat16": 9.16,
    "normal transposed 16 bfloat16": 9.38,
}
AMD_SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
import torch
torch.version.hip = "6.4"
import triton
from benchmarks import resources
found = {{name: resources.measure(variant) for name, variant in resources.variants("gfx942").items()}}
print("RESULT" + json.dumps([triton.__version__, found]))
"""


@pytest.mark.slow
def test_kernels_compile_for_amd_and_fit_its_shared_memory(run_python):
    """And, by the table's Triton, products take what they took, in the order of AMD's matrix cores."""
    printed = run_python(AMD_SCRIPT.format(root=str(ROOT)), TRITON_INTERPRET="0")
    version, found = json.loads(printed.partition("RESULT")[2])
    assert len(found) > 40
    assert {name: row for name, row in found.items() if row["spilled_bytes"]} == {}
    assert {name: row for name, row in found.items() if row["shared_bytes"] > 64 * 1024} == {}
    if version == TABLE["triton"]:
        for name, expected in ON_AMD.items():
            assert found[f"gfx942 {name}"]["instructions_per_weight"] <= 1.05 * expected, name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_compile_within_the_committed_resources(run_python, arch):
    # A process of its own: this one may have chosen Triton's interpreter.
    printed = run_python(SCRIPT.format(root=str(ROOT), arch=arch.removeprefix("sm_")), TRITON_INTERPRET="0")
    version, found = json.loads(printed.partition("RESULT")[2])
    assert len(found) > 40
    assert {name: row["spilled_bytes"] for name, row in found.items() if row["spilled_bytes"]} == {}
    assert {name: row["hazards"] for name, row in found.items() if row.get("hazards")} == {}
    if version != TABLE["triton"]:
        pytest.skip(f"the table holds figures of Triton {TABLE['triton']}, this is {version}")
    assert found.keys() == {name for name in TABLE if name.startswith(arch)}
    for name, row in found.items():
        assert {k: v for k, v in row.items() if k in SAME} == {k: TABLE[name][k] for k in row if k in SAME}
        worse = {k: (v, TABLE[name][k]) for k, v in row.items() if k in COSTS and v > 1.05 * TABLE[name][k]}
        assert worse == {}, f"{name}: found, in the table: {worse}"


def rows_of(*words):
    """Name and row of the products whose names have all the words."""
    return {name: row for name, row in PRODUCTS.items() if set(words) <= set(name.split())}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_small_batch_loop_of_uniform_takes_at_most_eight_instructions_a_weight(arch):
    """The target of the static analysis, on the committed figures: both dtypes and ways, gains."""
    rows = rows_of(arch, "uniform", "16")
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["instructions_per_weight"] <= 8, name


@pytest.mark.parametrize("family", ["rademacher", "uniform", "normal"])
@pytest.mark.parametrize(("arch", "operation"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_weights_stay_in_registers_and_x_is_copied_meanwhile(arch, operation, family):
    """Of prepared x, that is; of another, few rows go through shared memory by stores."""
    for name, row in rows_of(arch, family).items():
        assert row["multiplied_by"] == operation, name
        prepared = "16 bfloat16" not in name or "gained" in name
        assert (row["stores_to_shared"] == 0) == prepared, name
    large = rows_of(arch, family, "128")
    assert len(large) == {"uniform": 8, "normal": 6, "rademacher": 4}[family]
    for name, row in large.items():
        assert row["copies_of_16_bytes"] > 0, name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_large_tile_costs_a_row_less_than_a_small_one(arch):
    """Instructions a multiplication: why large batches have tiles of their own."""
    for family in ("rademacher", "uniform", "normal"):
        for way in ("forward", "transposed"):
            cost = {
                rows: TABLE[f"{arch} {family} {way} {rows} bfloat16"]["instructions_per_weight"] / tile
                for rows, tile in ((16, 16), (64, 64), (128, 64 if (family, way) == SIGNS else 128))
            }
            assert cost[16] > cost[64] >= cost[128], (family, way)
