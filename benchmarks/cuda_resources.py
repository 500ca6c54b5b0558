"""``python -m benchmarks resources --cuda [--out FILE]``: what the CUDA kernels compile to, without a GPU.

Compiles csrc/cuda with nvcc for each architecture, disassembles it with the tools of Triton's wheel, and
records registers, spilled bytes, shared memory and machine instructions per weight and thread of the main
loop. The committed table is what tests/native/test_cuda_resources.py holds kernels to.
"""

import functools
import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.resources import loops, run_tool, write_table

ARCHS = ("80", "89", "90a")
CSRC = Path(__file__).parents[1] / "csrc"
# -fmad=false: each step of an epilogue rounds on its own.
FLAGS = ("-std=c++20", "-O3", "-fmad=false", "--resource-usage", "-cubin")
_FAMILIES = {"257": "rademacher", "258": "uniform", "259": "normal"}
_PRODUCT = re.compile(r"skinny_kernelILNS_6FamilyE(\d+)ELb([01])ELi(\d+)ELi(\d+)E")
# A lane holds 8 weights of an mma.sync m16n8k16.
_WEIGHTS = 8


def compiler() -> str:
    """nvcc's version."""
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V(\d+\.\d+\.\d+)", printed)[0]


def measure(arch: str) -> dict[str, dict[str, float]]:
    """The rows of every kernel of an architecture."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "skinny.cubin")
        target = f"arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", *FLAGS, "-gencode", target, "-o", cubin, CSRC / "cuda/skinny.cu"]
        spills = _spilled(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
        usage = run_tool("cuobjdump", "-res-usage", str(cubin))
        code = run_tool("nvdisasm", "-c", str(cubin))
    shared = _shared()
    registers = {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    bodies = re.split(r"\.section\s+\.text\.(\S+?),", code)[1:]
    for name, body in zip(bodies[::2], bodies[1::2], strict=True):
        row: dict[str, float] = {"registers": registers[name], "spilled_bytes": spills[name]}
        label = f"sm_{arch} finish" + ", gradient" * ("finish_gradient" in name)
        if match := _PRODUCT.search(name):
            family, transposed, tiles, parts = match.groups()
            way = "transposed" if transposed == "1" else "forward"
            label = f"sm_{arch} {_FAMILIES[family]} {way} {8 * int(tiles)} rows, {parts} part"
            label += "s" * (parts != "1")
            row["shared_bytes"] = shared[match.groups()]
            row["instructions_per_weight"] = round(_per_weight(body, int(tiles) * int(parts)), 3)
        rows[label] = row
    return dict(sorted(rows.items()))


@functools.cache
def _shared() -> dict[tuple[str, ...], int]:
    """Shared memory of each product: asked for at the launch, so that a disassembly does not show it."""
    kernels = [
        (family, way, tiles, parts)
        for family in _FAMILIES
        for way in "01"
        for tiles, parts in (
            ("1", "1"),
            ("2", "1"),
            ("4", "1"),
            ("8", "1"),
            ("1", "3"),
            ("2", "3"),
            ("4", "3"),
        )
    ]
    prints = "".join(
        f'std::printf("%d\\n", Config<nmkern::Family({family}), {way}, {tiles}, {parts}>::kSharedBytes);\n'
        for family, way, tiles, parts in kernels
    )
    source = f"#include <cstdio>\nusing namespace nmkern::cuda;\nint main() {{\n{prints}}}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "shared")
        header = CSRC / "cuda/skinny_kernel.h"
        command = ["c++", "-std=c++20", "-w", "-include", header, "-x", "c++", "-", "-o", program]
        subprocess.run(command, input=source, text=True, check=True)
        sizes = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(kernels, map(int, sizes), strict=True))


def _spilled(log: str) -> dict[str, int]:
    """Bytes of stack and of spills of each kernel, from what ptxas prints."""
    found = {}
    pattern = r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)"
    for name, *counts in re.findall(pattern, log):
        found[name] = sum(map(int, counts))
    return found


def _per_weight(body: str, multiplies: int) -> float:
    """Instructions of the loop that multiplies over the weights a thread makes there, each used so often."""
    counts = [
        (len(loop), sum(instruction.startswith("HMMA") for instruction in loop)) for loop in loops(body)
    ]
    length, hmma = min(count for count in counts if count[1])
    return length / (_WEIGHTS * hmma / multiplies)


def run(out: Path) -> None:
    rows = {name: row for arch in ARCHS for name, row in measure(arch).items()}
    write_table(out, {"nvcc": compiler()}, rows)
