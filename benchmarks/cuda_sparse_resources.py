"""The sparse projection's and FlyNet's part of ``python -m benchmarks resources --cuda``.

Records registers, spilled bytes, the shared memory that 784 -> 7,840 at fan-in 7 and batch 128 takes, and,
of the loop that gathers, machine instructions and 16-byte loads of shared memory for each element that is
added. The committed table is what tests/native/test_cuda_resources.py holds kernels to.
"""

import re
import subprocess
import tempfile
from pathlib import Path

from benchmarks.cuda_resources import ARCHS, CSRC, compiler, kernels
from benchmarks.machine_code import loops, write_table

# By parts of the mangled names, which have the length of each name before it.
_NAMES = {
    r"\d{2}forward_kernelINS0_4TileILi(\d+)": "forward, tile of {} rows",
    r"\d{2}draw_kernelINS0_4TileILi(\d+)": "draws for tiles of {} rows",
    r"\d{2}prepare_kernel": "transposed, index",
    r"\d{2}column_kernel": "transposed, sums",
    r"\d{2}finish_gain_grad_kernel": "flynet gain_grad, finish",
    r"\d{2}finish_logits_kernel": "flynet logits, finish",
    r"\d{2}gain_grad_kernel": "flynet gain_grad",
    r"\d{2}logits_kernel": "flynet logits",
    r"\d{2}draw_kernelE": "flynet draws",
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
    for name, registers, stack, body in kernels(arch):
        if (label := _label(name)) is None:
            continue  # cuda_resources'
        row: dict[str, float] = {"registers": registers, "spilled_bytes": stack}
        if label in shared:
            row["shared_bytes"] = shared[label]
            row |= _per_element(body)
        rows[f"sm_{arch} {label}"] = row
    return dict(sorted(rows.items()))


def _label(name: str) -> str | None:
    for pattern, label in _NAMES.items():
        if match := re.search(pattern, name):
            return label.format(*match.groups())
    return None


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
