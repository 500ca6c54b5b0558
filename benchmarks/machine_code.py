"""What compiled kernels consist of: the CUDA tools of Triton's wheel, the loops of a disassembly, tables."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any


def _tools() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("triton is not installed: its wheel has the tools")
    return Path(spec.origin).parent / "backends/nvidia/bin"


def run_tool(tool: str, *arguments: str, cwd: str | None = None) -> str:
    """What one of the CUDA tools in Triton's wheel prints."""
    command = [_tools() / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def loops(code: str) -> list[list[str]]:
    """The loops of a disassembled kernel: the instructions from a label to each branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found = []
    for line in code.splitlines():
        if match := re.match(r"^\s*(\.L_\w+):", line):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            instructions.append(match[1])
            back = re.search(r"BRA.*`\((\.L_\w+)\)", match[1])
            if back and back[1] in labels:
                found.append(instructions[labels[back[1]] :])
    return found


def write_table(out: Path, compiler: dict[str, str], rows: dict[str, Any]) -> None:
    """A line for the compiler's version, then one a kernel."""
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in {**compiler, **rows}.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for name, row in rows.items():
        print(f"{name:45} {row}")
