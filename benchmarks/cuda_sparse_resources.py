"""The sparse projection's and FlyNet's part of ``python -m benchmarks resources --cuda``.

Records registers, spilled bytes, the shared memory that 784 -> 7,840 at fan-in 7 and batch 128 takes, and,
of the loop that gathers, machine instructions and 16-byte loads of shared memory for each element that is
added. The committed table is what tests/native/test_cuda_sparse_resources.py holds kernels to.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.cuda_resources import ARCHS, CSRC, FLAGS, _spilled, compiler
from benchmarks.resources import loops, run_tool, write_table

_NAMES = {
    "sparse": {
        r"forward_kernelINS0_4TileILi(\d+)": "forward, tile of {} rows",
        r"draw_kernelINS0_4TileILi(\d+)": "draws for tiles of {} rows",
        "prepare_kernel": "transposed, index",
        "column_kernel": "transposed, sums",
    },
    "flynet": {
        "finish_gain_grad_kernel": "flynet gain_grad, finish",
        "finish_logits_kernel": "flynet logits, finish",
        "gain_grad_kernel": "flynet gain_grad",
        "logits_kernel": "flynet logits",
        "draw_kernel": "flynet draws",
    },
}
_PLANS = """
#include <cstdio>
#include "{csrc}/cuda/flynet_plan.h"
using namespace nmkern::cuda;
int main() {{
  Sparse call{{}};
  call.rows = 7840, call.cols = call.population = 784, call.fan_in = 7, call.batch = 128;
  std::printf("%lld %lld %lld ", (long long)plan_of<Tile<8>>(call, true).shared_bytes,
              (long long)plan_of<Tile<16>>(call, true).shared_bytes,
              (long long)plan_of<Tile<32>>(call, true).shared_bytes);
  std::printf("%d %lld\\n", kColumnBytes, (long long)fly_shared_bytes(784));
}}
"""


def measure(arch: str) -> dict[str, dict[str, float]]:
    """The rows of every kernel of an architecture."""
    shared = _shared()
    rows = {}
    for source, names in _NAMES.items():
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernels.cubin")
            target = f"arch=compute_{arch},code=sm_{arch}"
            command = ["nvcc", *FLAGS, "-gencode", target, "-o", cubin, CSRC / f"cuda/{source}.cu"]
            spills = _spilled(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
            usage = run_tool("cuobjdump", "-res-usage", str(cubin))
            code = run_tool("nvdisasm", "-c", str(cubin))
        registers = {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
        bodies = re.split(r"\.section\s+\.text\.(\S+?),", code)[1:]
        for name, body in zip(bodies[::2], bodies[1::2], strict=True):
            label = _label(name, names)
            row: dict[str, float] = {"registers": registers[name], "spilled_bytes": spills[name]}
            if label in shared:
                row["shared_bytes"] = shared[label]
                row |= _per_element(body)
            rows[f"sm_{arch} {label}"] = row
    return dict(sorted(rows.items()))


def _label(name: str, names: dict[str, str]) -> str:
    for pattern, label in names.items():
        if match := re.search(pattern, name):
            return label.format(*match.groups())
    raise ValueError(f"{name}: expected one of {', '.join(names)}")


def _shared() -> dict[str, int]:
    """Shared memory is asked for at the launch, so that a disassembly does not show it."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "shared")
        command = ["c++", "-std=c++20", "-w", "-x", "c++", "-", "-o", program]
        subprocess.run(command, input=_PLANS.format(csrc=CSRC.resolve()), text=True, check=True)
        sizes = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    kernels = [
        *(f"forward, tile of {rows} rows" for rows in (8, 16, 32)),
        "transposed, sums",
        "flynet logits",
    ]
    found = dict(zip(kernels, map(int, sizes), strict=True))
    return {**found, "flynet gain_grad": found["flynet logits"]}


def _per_element(body: str) -> dict[str, float]:
    """Of the loop that gathers: an element is one addition, and all else that it adds is addresses."""
    counts = []
    for loop in loops(body):
        names = [re.sub(r"^@!?U?P\d+\s+", "", instruction) for instruction in loop]
        added = sum(name.startswith("FADD") for name in names)
        loads = sum(name.startswith("LDS.128") for name in names)
        if added >= 32 and loads and not any(name.startswith(("FMUL", "BAR")) for name in names):
            counts.append((len(loop) / added, loads / added))
    instructions, loads = min(counts)
    return {"instructions_per_element": round(instructions, 3), "loads_per_element": round(loads, 3)}


def run(out: Path) -> None:
    rows = {name: row for arch in ARCHS for name, row in measure(arch).items()}
    write_table(out, {"nvcc": compiler()}, rows)
