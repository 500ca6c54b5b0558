"""The kernels for a matrix unit (AMX) over a simulated one, for CPUs with AVX-512 BF16 that have none."""

import platform
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools
import torch

from nmkern.backends import cpu

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX-512 is x86-64's"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
]


def test_a_simulated_unit_gives_what_the_header_does(tmp_path):
    if reason := cpu.refusal("uniform", torch.float32, "cpu"):
        pytest.skip(reason)
    before = cpu.isa()
    try:
        cpu.set_isa("avx512_bf16")
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        cpu.set_isa(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        build = runpy.run_path(str(HERE.parents[1] / "setup.py"))
    sources = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.stem != "amx"]
    sources += [HERE / "unit_simulated.cpp", HERE / "kernels.cpp"]

    def compile_(source):
        name = "cpu/amx.cpp" if source.stem == "unit_simulated" else f"cpu/{source.name}"
        flags = [*build["FLAGS"], *build["isa_flags"](name, only_here=True), "-O1"]
        made = tmp_path / f"{source.stem}.o"
        subprocess.run(["c++", *flags, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, sources))
    program = tmp_path / "program"
    subprocess.run(["c++", *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split()[0] == "amx"
