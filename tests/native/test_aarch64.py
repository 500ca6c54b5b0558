"""The C++ on 64-bit ARM: compiled with setup.py's flags by a cross compiler, and run by an emulator.

On Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user.
"""

import platform
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"there is no {COMPILER}"),
]
emulated = pytest.mark.skipif(EMULATOR is None, reason="there is no qemu-aarch64")


def compile_(source, target, *flags):
    subprocess.run([COMPILER, *flags, "-Wall", "-Werror", "-c", source, "-o", target], check=True)


def run(folder, objects, *arguments):
    program = folder / "program"
    subprocess.run([COMPILER, "-static", *objects, "-o", program], check=True)
    done = subprocess.run([EMULATOR, program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Every source of the library as setup.py compiles it on such a machine."""
    folder = tmp_path_factory.mktemp("aarch64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setattr(platform, "machine", lambda: "aarch64")
        build = runpy.run_path(str(ROOT / "setup.py"))
        include = build["find_torch"]() / "include"
        sources = {str(path.relative_to(ROOT / "csrc")): path for path in (ROOT / "csrc").rglob("*.cpp")}
        flags = {name: [*build["FLAGS"], *build["isa_flags"](name, only_here=False)] for name in sources}

    def compile_one(name):
        target = folder / Path(name).with_suffix(".o").as_posix().replace("/", "_")
        compile_(sources[name], target, *flags[name], "-fPIC", f"-isystem{include}")
        return target

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, sources))


def test_every_source_compiles(objects):
    assert len(objects) > 8


@emulated
def test_the_header_reproduces_every_vector(tmp_path):
    compile_(HERE / "stream_vectors.cpp", tmp_path / "stream_vectors.o", "-std=c++20", "-O1")
    lines = [
        line
        for line in (HERE.parent / "vectors.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert run(tmp_path, [tmp_path / "stream_vectors.o"], HERE.parent / "vectors.txt") == (
        0,
        f"{len(lines)}\n",
    )


@emulated
def test_the_kernels_give_what_the_header_does(objects, tmp_path):
    """Those of x86 are empty tables."""
    compile_(HERE / "kernels.cpp", tmp_path / "kernels.o", "-std=c++20", "-O1")
    free_of_torch = [path for path in objects if path.stem != "bindings" and "cuda" not in path.stem]
    assert run(tmp_path, [tmp_path / "kernels.o", *free_of_torch]) == (0, "neon\nportable\n")
