"""Every CUDA kernel compiles for sm_80, sm_89 and sm_90a, spills nothing and grows no dearer than the tables.

They are written by ``python -m benchmarks resources --cuda``; figures belong to the nvcc that it names.
"""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")  # its wheel has the disassembler

from benchmarks import cuda_resources, cuda_sparse_resources, machine_code
from nmkern.backends import cuda

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
TABLE = json.loads((RESULTS / "cuda_resources.json").read_text())
SPARSE = json.loads((RESULTS / "cuda_sparse_resources.json").read_text())


@pytest.mark.skipif(not cuda.LIBRARY_PATH.exists(), reason="nmkern/_cuda.so was not built: there is no nvcc")
@pytest.mark.parametrize("arch", cuda_resources.ARCHS)
@pytest.mark.parametrize(("resources", "table"), [(cuda_resources, TABLE), (cuda_sparse_resources, SPARSE)])
def test_kernels_are_within_the_committed_resources(resources, table, arch):
    found = resources.measure(arch)
    dense = 128 if arch == "90a" else 80
    assert len(found) == (dense if resources is cuda_resources else 13)
    assert {name: row["spilled_bytes"] for name, row in found.items() if row["spilled_bytes"]} == {}
    assert all(row.get("loads_at_once", 8) >= 8 for row in found.values())
    if (version := cuda_resources.compiler()) != table["nvcc"]:
        pytest.skip(f"the table holds figures of nvcc {table['nvcc']}, this is {version}")
    assert found.keys() == {name for name in table if name.startswith(f"sm_{arch} ")}
    for name, row in found.items():
        worse = {k: (v, table[name][k]) for k, v in row.items() if v > 1.05 * table[name][k]}
        assert worse == {}, f"{name}: found, in the table: {worse}"


@pytest.mark.skipif(not cuda.LIBRARY_PATH.exists(), reason="nmkern/_cuda.so was not built: there is no nvcc")
def test_kernels_wait_for_those_before_them():
    """They are launched early on Hopper. normal's table is the program's; FlyNet looks it up as it goes."""
    for name, _, _, code in cuda_resources.kernels("90a"):
        assert cuda_resources.overtakes(code, "FamilyE259" in name, "flynet" in name) == [], name
    for arch in ("80", "89"):
        assert not any("ACQBULK" in kernel.code for kernel in cuda_resources.kernels(arch))


@pytest.mark.skipif(not cuda.LIBRARY_PATH.exists(), reason="nmkern/_cuda.so was not built: there is no nvcc")
@pytest.mark.parametrize("arch", cuda_resources.ARCHS)
def test_sums_and_outputs_are_stored_in_fours(arch):
    """nvcc makes four stores of one where it is not said how: each writes a quarter of a sector."""
    products = [kernel for kernel in cuda_resources.kernels(arch) if "skinny_kernel" in kernel.name]
    products += [kernel for kernel in cuda_resources.kernels("90a") if "wide_kernel" in kernel.name]
    assert len(products) == 54 + 48
    for kernel in products:
        stores = re.findall(r"\bSTG\S*", kernel.code)
        assert stores and all(re.match(r"STG\.E\.(64|128)\b", store) for store in stores), kernel.name


def test_what_does_not_wait_is_found():
    load, store, add = "LDG.E R1, desc[UR4][R2.64]", "STG.E desc[UR4][R2.64], R1", "RED.E.ADD [R2], R1"
    wait, table, branch = ("ACQBULK", "PREEXIT"), "LDG.E.U16.CONSTANT R4, desc[UR6][R2.64]", "BRA `(.L_x_1)"

    def found(*instructions, **tables):
        lines = [one if one.startswith(".L") else f"        /*0000*/  {one} ;" for one in instructions]
        return cuda_resources.overtakes("\n".join(lines), **tables)

    harmless = ("LDS.128 R4, [R2]", "REDUX.MAX UR4, R2", "LDC R1, c[0x0][0x28]", "BAR.SYNC.DEFER_BLOCKING")
    assert found(*harmless, *wait, load, store, "EXIT") == []
    assert found(load, f"@!P0 {store}", add, *wait) == [load, store, add]
    assert found(table, *wait) == found(*wait, table) == [table]
    assert found(table, *wait, table=True) == found(*wait, table, table_later=True) == []
    assert found(load, table, *wait, table=True) == [load]
    assert found(load) == ["it does not wait"]
    for missing in (("@P0 ACQBULK", "PREEXIT"), ("ACQBULK",), ("PREEXIT",), (*wait, "ACQBULK")):
        assert found(*missing, load) == list(missing)
    assert found("PREEXIT", "ACQBULK") == ["PREEXIT"]
    assert found("@P0 EXIT", *wait, load) == ["EXIT"]
    assert found(f"@P0 {branch}", *wait, ".L_x_1:", load) == [branch]
    assert found(".L_x_1:", f"@P0 {branch}", *wait, load) == []


@pytest.mark.parametrize(("family", "most"), [("rademacher", 1.6), ("uniform", 2.6), ("normal", 4.3)])
@pytest.mark.parametrize("way", ["forward", "transposed"])
@pytest.mark.parametrize("operand", ["bfloat16", "float16"])
def test_the_loop_for_16_rows_meets_its_target(family, most, way, operand):
    """Instructions a weight on sm_90a, on the committed figures."""
    assert TABLE[f"sm_90a {family} {way} 16 rows, {operand}"]["instructions_per_weight"] <= most


@pytest.mark.parametrize(
    ("family", "forward", "transposed"), [("rademacher", 0.75, 1.05), ("uniform", 1.25, 1.4)]
)
@pytest.mark.parametrize("tiles", range(1, 5))
@pytest.mark.parametrize("arch", cuda_resources.ARCHS)
def test_integers_take_less_than_floats(family, forward, transposed, tiles, arch):
    """Of a row or two it is half: one tile of columns has room for them."""
    for way, most in (("forward", forward), ("transposed", transposed)):
        row = TABLE[f"sm_{arch} {family} {way} {tiles} tiles, integers"]
        assert row["instructions_per_weight"] <= (most if tiles > 1 else 0.85 * most)


@pytest.mark.parametrize("name", [name for name in TABLE if name.endswith("wgmma")])
def test_wgmma_takes_generated_weights_from_registers(name):
    """All of a loop's, of two k16 steps and two tiles at least, beside the instructions that generate."""
    row = TABLE[name]
    assert row["wgmma_from_registers"] % 8 == 0 < row["wgmma_from_registers"]
    assert row["waits_for_all"] == row["hazards"] == 0


@pytest.mark.parametrize("name", [name for name in TABLE if "finish" in name and "index" not in name])
def test_the_second_stage_has_eight_loads_in_flight(name):
    """Of rows, or of splits: a turn takes eight times as long where the compiler lets them wait in line."""
    assert TABLE[name]["loads_at_once"] >= 8


def test_every_large_batch_kernel_is_in_the_table():
    assert sum(name.endswith("wgmma") for name in TABLE) == 48


def test_loads_that_wait_for_each_other_are_found():
    load, add = "LDG.E R1, desc[UR4][R2.64] ;\n", "FADD R0, R0, R1 ;\n"
    assert cuda_resources._loads_at_once(8 * load + 8 * add) == 8
    assert cuda_resources._loads_at_once(8 * load + "@P0 BRA `(.L_x_1) ;\n" + 8 * (load + add)) == 1
    assert cuda_resources._loads_at_once(9 * load + ".L_x_1:\n" + 7 * (load + add)) == 9


def test_a_write_into_what_wgmma_reads_is_found():
    first, second = (f"HGMMA.64x64x16.F32.BF16 R{d}, R{a}, gdesc[UR4], R{d}" for d, a in ((24, 80), (56, 84)))
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    loop = [first, f"{second}, gsb0", wait, "IMAD.WIDE.U32 R88, R2, R3, R4", f"{first}, gsb0", wait]
    assert machine_code.hazards(loop) == []
    for hazard in ("HADD2.BF16_V2 R83, R1, -143, -143", "LDS.128 R78, [R2]", "@P0 FADD R1, R2, R40"):
        assert set(machine_code.hazards([first, hazard, *loop[1:]])) == {hazard}
    harmless = ("HADD2.BF16_V2 R1, R83, -143, -143", "STS.128 [R2], R80", "MOV R88, R84")
    harmless += ("LDGSTS.E.BYPASS.128 [R82], desc[UR12][R18.64], P1",)
    assert machine_code.hazards([first, *harmless, *loop[1:]]) == []
    assert machine_code.hazards([one for one in loop if one != wait]) == []  # nothing touches them
    late = [*loop[:2], "SHF.R.U32.HI R84, RZ, 0x3, R9", *loop[2:]]
    assert set(machine_code.hazards(late)) == {"SHF.R.U32.HI R84, RZ, 0x3, R9"}


@pytest.mark.parametrize("arch", ["80", "89", "90a"])
def test_gathering_is_bound_by_the_loads_themselves(arch):
    """A load of 16 bytes serves 4 elements; the tile, its offsets and a block's sums fit where they must."""
    for kernel, instructions, loads in (
        ("forward, tile of 32 rows", 2.0, 0.32),  # of them 1 / 16 for what was drawn
        ("flynet logits", 2.4, 0.25),
        ("flynet gain_grad", 2.4, 0.25),
    ):
        row = SPARSE[f"sm_{arch} {kernel}"]
        assert row["instructions_per_element"] <= instructions, kernel
        assert row["loads_per_element"] <= loads, kernel
    assert SPARSE["sm_89 flynet logits"]["shared_bytes"] <= 99 << 10
    assert SPARSE["sm_80 forward, tile of 32 rows"]["shared_bytes"] <= 163 << 10
