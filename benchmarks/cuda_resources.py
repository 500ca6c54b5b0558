"""``python -m benchmarks resources --cuda [--out FILE]``: what the CUDA kernels compile to, without a GPU.

Disassembles nmkern/_cuda.so, as setup.py has built it, with the tools of Triton's wheel, and records
registers, spilled bytes, shared memory and machine instructions per weight and thread of the main loop; of
those, the ones of the integer unit, which has half as many lanes as are issued to. The committed table is
what tests/native/test_cuda_resources.py holds kernels to.
"""

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine_code import WGMMA, hazards, loops, run_tool, write_table
from nmkern.backends import cuda

ARCHS = ("80", "89", "90a")
CSRC = Path(__file__).parents[1] / "csrc"
_FAMILIES = {"257": "rademacher", "258": "uniform", "259": "normal"}
_OPERANDS = {"1": "bfloat16", "2": "float16"}
_PRODUCT = re.compile(
    r"(skinny|wide)_kernelI(?:NS\d?_\d+ConfigI)?LNS_6FamilyE(\d+)ELb([01])ELi(\d+)ELNS_5DtypeE(\d)ELi(\d)E"
)
_FIXED = re.compile(r"fixed_kernelINS\d?_\d+FixedConfigILNS_6FamilyE(\d+)ELb([01])ELi(\d)E")
_GRADIENT = re.compile(r"(gradient|gather)_kernelILNS\d?_8GradientE(\d)E")
# Logic, shifts, byte permutes, additions, comparisons; a multiply-add (IMAD) is another unit's.
_INTEGER = re.compile(r"(LOP3|SHF|PRMT|V?IADD3?|ISETP|SEL|LEA|MOV|SGXT|BMSK|VIMNMX|PLOP3)\b")
_BANKS = ("of one row", "of each row", "by context")
# That a lane holds of an mma.sync m16n8k16, of a wgmma m64nNk16 too, and of an m16n8k32.
_WEIGHTS = {"HMMA": 8, "HGMMA": 8, "IMMA": 16}


class Kernel(NamedTuple):
    """A kernel: mangled name, registers a thread, bytes of stack (spills: nothing else lives there), code."""

    name: str
    registers: int
    stack: int
    code: str


def compiler() -> str:
    """The version of the nvcc that built the library."""
    return re.findall(r"nvcc (\S+)", cuda.build_record()["detail"])[0]


@functools.cache
def kernels(arch: str) -> tuple[Kernel, ...]:
    """The library's kernels for an architecture. RuntimeError where it was not built from these sources."""
    library = cuda.LIBRARY_PATH
    sources = [*CSRC.glob("*.h"), *(CSRC / "cuda").iterdir()]
    if not library.exists() or library.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        raise RuntimeError(
            f"{library}: expected it built from the sources as they are: python setup.py build_ext --inplace"
        )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        run_tool("cuobjdump", "-xelf", "all", str(library), cwd=folder)
        # CUDA 12.8's cuobjdump, Triton 3.6's, names the code of sm_90a sm_90.
        names = (f"*.sm_{arch}.cubin", f"*.sm_{arch.rstrip('af')}.cubin")
        cubins = next(filter(None, (sorted(Path(folder).glob(name)) for name in names)), [])
        for cubin in cubins:
            usage = run_tool("cuobjdump", "-res-usage", str(cubin))
            used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
            counts = {name: (int(registers), int(stack)) for name, registers, stack in used}
            bodies = re.split(r"\.section\s+\.text\.(\S+?),", run_tool("nvdisasm", "-c", str(cubin)))[1:]
            for name, body in zip(bodies[::2], bodies[1::2], strict=True):
                found.append(Kernel(name, *counts[name], body))
    return tuple(found)


def measure(arch: str) -> dict[str, dict[str, float]]:
    """The rows of every kernel of dense products of an architecture."""
    rows: dict[str, dict[str, float]] = {}
    for name, registers, stack, body in kernels(arch):
        row: dict[str, float] = {"registers": registers, "spilled_bytes": stack}
        if arch != "90a" and "_wide_cu_" in name:
            continue  # Hopper's alone: elsewhere there is nothing in it
        if match := _PRODUCT.search(name):
            kernel, family, transposed, tiles, operand, parts = match.groups()
            way = "transposed" if transposed == "1" else "forward"
            operands = f"{parts} " * (parts != "1") + _OPERANDS[operand]
            label = f"{_FAMILIES[family]} {way} {8 * int(tiles)} rows, {operands}"
            row["shared_bytes"] = _shared()[match.groups()]
            if kernel == "wide":
                label += ", wgmma"
                loop = _main_loop(body)
                row["wgmma_from_registers"] = _from_registers(loop)
                # ptxas waits for all where it cannot let wgmma run beside other instructions.
                row["waits_for_all"] = sum("gsb0, 0x0" in one for one in loop if "DEPBAR" in one)
                row["hazards"] = len(hazards(loop))
            multiplies = int(parts) * (int(tiles) if kernel == "skinny" else 1)
            row |= _per_weight(_main_loop(body), multiplies)
        elif match := _FIXED.search(name):
            family, transposed, tiles = match.groups()
            way = "transposed" if transposed == "1" else "forward"
            label = f"{_FAMILIES[family]} {way} {tiles} tiles, integers"
            row["shared_bytes"] = _shared()[match.groups()]
            row |= _per_weight(_main_loop(body), int(tiles))
        elif match := re.search(r"\d(finish_kernelILi(\d)E|index_kernel)", name):
            label = "finish, index of contexts" if match[2] is None else "finish"
            label += ", 8 rows a thread" * (match[2] == "8")
            if match[2]:
                row["loads_at_once"] = _loads_at_once(body)
        elif match := _GRADIENT.search(name):
            label = f"finish, {match[1]} {_BANKS[int(match[2])]}"
            row["loads_at_once"] = _loads_at_once(body)
        elif match := re.search(r"pack_(copy|row)_kernel", name):
            label = "pack, as it is" if match[1] == "copy" else "pack, float16"
        else:
            continue  # cuda_sparse_resources'
        rows[f"sm_{arch} {label}"] = row
    return dict(sorted(rows.items()))


def _loads_at_once(body: str) -> int:
    """The fewest loads of a column of rows or splits that come before the first of them is used.

    Of basic blocks without a branch that have eight loads or more: those of the loops' turns.
    """
    blocks = re.split(r"^\.L_x_\d+:|^.*\bBRA\b.*$", body, flags=re.MULTILINE)
    turns = [re.findall(r"\b(LDG|FADD)\b", block) for block in blocks]
    return min(
        [*turn, "FADD"].index("FADD", turn.index("LDG")) - turn.index("LDG")
        for turn in turns
        if turn.count("LDG") >= 8
    )


def _main_loop(body: str) -> list[str]:
    """The shortest loop that multiplies."""
    return min((loop for loop in loops(body) if any("MMA." in i for i in loop)), key=len)


def _from_registers(loop: list[str]) -> int:
    """How many wgmma of a loop take A from registers; 0 where any does not."""
    found = [one for one in loop if "HGMMA" in one]
    return len(found) if all(WGMMA.match(one) for one in found) else 0


def overtakes(code: str, table: bool = False, table_later: bool = False) -> list[str]:
    """What a kernel that is launched early does wrong: instructions, or what it lacks.

    It has to wait for the kernels before it, once and in any case, and only then let the next one begin.
    Before, it may not touch the device's memory; after, not read it through the cache of what is constant
    (.CONSTANT), which __ldg does. ``table``, ``table_later``: but for the program's own table, before and
    after the wait.
    """
    every = _instructions(code)
    if every.count("ACQBULK") != 1 or every.count("PREEXIT") != 1:
        return [one for one in every if "ACQBULK" in one or "PREEXIT" in one] or ["it does not wait"]
    at = every.index("ACQBULK")
    before, after = ([re.sub(_PREDICATE, "", one) for one in part] for part in (every[:at], every[at:]))
    past = set(re.findall(r"^\s*(\.L_\w+):", code.partition("ACQBULK")[2], flags=re.MULTILINE))
    found = [one for one in before if _MEMORY.match(one) and not (table and "LDG" in one and _CACHED in one)]
    found += [one for one in before if one.startswith(("EXIT", "RET", "CALL", "BRX", "JMX", "PREEXIT"))]
    found += [one for one in before if "BRA" in one and _target(one) in past]
    return found + [one for one in after if _CACHED in one and not table_later]


_PREDICATE = re.compile(r"^@!?U?P\d+\s+")
_CACHED = ".CONSTANT"
_MEMORY = re.compile(r"(LDG|STG|LDGSTS|LD|ST|ATOM|ATOMG|RED|REDG|UBLK\w+|UTMA\w+)(\.|$| )")


def _instructions(code: str) -> list[str]:
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", code, flags=re.MULTILINE)


def _target(branch: str) -> str:
    return re.sub(r".*`\((\.L_\w+)\).*", r"\1", branch)


@functools.cache
def _shared() -> dict[tuple[str, ...], int]:
    """Shared memory of each product: asked for at the launch, so that a disassembly does not show it."""
    as_it_is = [(operand, "1") for operand in _OPERANDS]
    tiles = {
        ("skinny", "Config"): {("1", "2", "4", "8"): as_it_is, ("1", "2", "4"): [("2", "2")]},
        ("wide", "WideConfig"): {("4", "8", "16"): as_it_is, ("4", "8"): [("2", "2")]},
    }
    kernels: dict[tuple[str, ...], str] = {
        (kernel, family, way, n, operand, parts): (
            f"{config}<nmkern::Family({family}), {way}, {n}, nmkern::Dtype({operand}), {parts}>"
        )
        for (kernel, config), sizes in tiles.items()
        for family in _FAMILIES
        for way in "01"
        for rows, forms in sizes.items()
        for n in rows
        for operand, parts in forms
    }
    kernels |= {
        (family, way, tiles): f"FixedConfig<nmkern::Family({family}), {way}, {tiles}>"
        for family in ("257", "258")
        for way in "01"
        for tiles in "1234"
    }
    prints = "".join(f'std::printf("%d\\n", {config}::kSharedBytes);\n' for config in kernels.values())
    source = f"#include <cstdio>\nusing namespace nmkern::cuda;\nint main() {{\n{prints}}}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "shared")
        headers = [f"-include{CSRC}/cuda/{name}_config.h" for name in ("fixed", "wide")]
        command = ["c++", "-std=c++20", "-w", *headers, "-x", "c++", "-", "-o", program]
        subprocess.run(command, input=source, text=True, check=True)
        sizes = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(kernels, map(int, sizes), strict=True))


def _per_weight(loop: list[str], multiplies: int) -> dict[str, float]:
    """Instructions of the main loop over the weights a thread makes there, each used so often."""
    weights = sum(_WEIGHTS.get(one.partition(".")[0], 0) for one in loop) / multiplies
    names = [re.sub(_PREDICATE, "", one) for one in loop]
    integer = sum(_INTEGER.match(name) is not None for name in names)
    return {
        "instructions_per_weight": round(len(loop) / weights, 3),
        "integer_per_weight": round(integer / weights, 3),
    }


def run(out: Path) -> None:
    rows = {name: row for arch in ARCHS for name, row in measure(arch).items()}
    write_table(out, {"nvcc": compiler()}, rows)
