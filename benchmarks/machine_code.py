"""What compiled kernels consist of: the CUDA tools of Triton's wheel, a disassembly's loops, and tables.

``hazards`` tells what a compiler did to the registers of a wgmma that may still be at work.
"""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

WGMMA = re.compile(r"HGMMA\.64x(?P<n>\d+)x16\.F32(\.BF16)? R(?P<d>\d+), R(?P<a>\d+), gdesc")


def _tools() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("triton is not installed: its wheel has the tools")
    return Path(spec.origin).parent / "backends/nvidia/bin"


def run_tool(tool: str, *arguments: str, cwd: str | None = None) -> str:
    """What one of the CUDA tools in Triton's wheel prints."""
    command = [_tools() / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


# How a disassembly writes a label, an instruction, and a branch.
_NVIDIA = (r"\s*(\.L_\w+):", r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", r".*BRA.*`\((\.L_\w+)\)")
_AMD = (r"(\.LBB\w+):", r"\s+([a-z]\w+ ?[^;]*)", r"s_c?branch\w* +(\.LBB\w+)")


def loops(code: str, *, amd: bool = False) -> list[list[str]]:
    """The loops of a disassembled kernel: the instructions from a label to each branch back to it."""
    label, instruction, branch = _AMD if amd else _NVIDIA
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found = []
    for line in code.splitlines():
        if match := re.match(label, line):
            labels[match[1]] = len(instructions)
        elif match := re.match(instruction, line):
            instructions.append(match[1])
            back = re.match(branch, match[1])
            if back and back[1] in labels:
                found.append(instructions[labels[back[1]] :])
    return found


def hazards(loop: list[str]) -> list[str]:
    """Instructions of a loop that touch a wgmma's sums, or write its A, while it may still be at work.

    Groups end with the wgmma that counts up gsb0; a wait leaves the newest of them at work.
    """
    at_work: list[list[tuple[range, range]]] = [[]]
    found = []
    for one in (*loop, *loop):
        if match := WGMMA.match(one):
            tile = int(match["n"]) // 2
            sums, a = int(match["d"]), int(match["a"])
            at_work[-1].append((range(sums, sums + tile), range(a, a + 4)))
        if "HGMMA" in one:
            at_work += [[]] if "gsb0" in one else []
        elif match := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", one):
            closed, last = at_work[:-1], at_work[-1]
            most = int(match[1], 16)
            at_work = [*closed[len(closed) - most :], last] if most < len(closed) else at_work
        else:
            written, touched = _registers(one)
            for sums, a in (pair for group in at_work for pair in group):
                if touched & set(sums) or written & set(a):
                    found.append(one)
    return found


def _registers(instruction: str) -> tuple[set[int], set[int]]:
    """The registers that an instruction writes, and all that it touches."""
    name, *operands = re.sub(r"^@\S+ ", "", instruction).replace(",", " ").split()
    wide = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    named = [(at, int(r)) for at, one in enumerate(operands) for r in re.findall(r"\bR(\d+)", one)]
    # Wide are what a load writes or a store reads, and the sum that a wide product is added to.
    last = len(operands) - 1
    wide_operands = {last} if name.startswith("ST") else {0, last} if ".WIDE" in name else {0}
    if name.startswith("LDGSTS"):  # from memory to memory
        wide_operands = set()
    used = {at: range(r, r + (wide if at in wide_operands else 1)) for at, r in named}
    written = set() if name.startswith(("ST", "LDGSTS")) else set(used.get(0, ()))
    return written, {r for registers in used.values() for r in registers}


def write_table(out: Path, compiler: dict[str, str], rows: dict[str, Any]) -> None:
    """A line for the compiler's version, then one a kernel."""
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in {**compiler, **rows}.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, row in rows.items():
        print(f"{name:45} {row}")
