"""The programs that run the kernels' cases on a GPU: built once, however many tests and processes ask.

    build/device/<hash of sources, flags and compiler>/{dense,sparse,flynet}_device

Or without one: the same programs, whose kernels nvcc leaves as PTX, with a runtime that executes that (see
tests/ptx).

An nvcc for each file, side by side, and threads within the two large ones: one after the other they take
135 s, longer than all other tests on 16 cores. Threads did not change these two's code, but that of others.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from ptx import emulator

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build/device"
KERNELS = {
    "dense": ("pack", "fixed", "skinny", "wide", "finish", "gradient"),
    "sparse": ("sparse",),
    "flynet": ("flynet",),
}
CASES = {"dense": 527, "sparse": 40, "flynet": 13}
LARGE = ("skinny", "wide")
FLAGS = ["-std=c++20", "-O3", "-fmad=false"]


def arch(capability: tuple[int, int]) -> str:
    """By nvcc's name; Hopper's own instructions have one of theirs."""
    return "90a" if capability == (9, 0) else "".join(map(str, capability))


def program(kernels: str, target: str) -> Path:
    """The program of the "dense", "sparse" or "flynet" kernels for GPUs of the architecture ``target``."""
    return _made(kernels, [*_flags(target, "sm"), "-lineinfo"], [])


def emulated(kernels: str, target: str) -> tuple[int, str]:
    """The exit status of a program that runs on the CPU, and what it printed."""
    path = _made(kernels, _emulated_flags(target), emulator.objects())
    done = subprocess.run([path], env=emulation(path, target), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def emulated_objects(target: str) -> list[Path]:
    """What the library for CUDA is linked from beside its bindings, with a runtime that executes PTX."""
    machine = emulator.objects()
    folder = _made("dense", _emulated_flags(target), machine).parent
    names = ("device", *(name for names in KERNELS.values() for name in names), "runtime")
    return [*machine, *(folder / f"{name}.o" for name in names)]


def _emulated_flags(target: str) -> list[str]:
    return [*_flags(target, "compute"), "-DNMKERN_ONCE", "-Xcompiler=-fPIC"]


def emulation(built: Path, target: str) -> dict[str, str]:
    """The environment of what is linked with that runtime."""
    return {**os.environ, "NMKERN_PTX": str(built.parent), "NMKERN_PTX_ARCH": target[:2]}


def printed(kernels: str, target: str) -> str:
    """What the program of an architecture prints where all is well."""
    twice = 1 + (target == "90a" and kernels == "dense")  # by each of the two kernels
    finishes = 294 * (kernels == "dense")
    return f"{twice * CASES[kernels] + finishes} cases\n"


def _flags(target: str, code: str) -> list[str]:
    flags = [*FLAGS, "-gencode", f"arch=compute_{target},code={code}_{target}"]
    archs = target if code == "sm" else "80,90a"  # PTX is executed as any
    flags += [f'-DNMKERN_CUDA_ARCHS="{archs}"']
    return flags + (["-DNMKERN_WIDE"] if target == "90a" else [])


def _made(kernels: str, flags: list[str], machine: list[Path]) -> Path:
    folder = BUILT / _key(flags)
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: folder / f"{name}_device" for name in KERNELS}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the file, even where this process is killed
        if not all(path.exists() for path in made.values()):
            _build(folder, made, flags, machine)
    return made[kernels]


def watch(program: Path, tool: str, told: Path) -> int:
    """The exit status of a program under a tool of compute-sanitizer, which writes to ``told`` as it goes."""
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", program]
    with told.open("w") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def _said(option: str) -> str:
    return subprocess.run(["nvcc", option], capture_output=True, text=True, check=True).stdout


def _key(flags: list[str]) -> str:
    """Of all that may be included, or have a say."""
    kinds = [folder.glob(kind) for folder in (HERE, emulator.HERE) for kind in ("*.h", "*.cpp")]
    told = hashlib.sha256(repr((flags, _said("--version"))).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *chain(*kinds), Path(__file__)]):
        if path.is_file():
            told.update(path.read_bytes())
    return told.hexdigest()[:16]


def _build(folder: Path, made: dict[str, Path], flags: list[str], machine: list[Path]) -> None:
    """With a ``machine`` that executes PTX, programs are linked with that, and PTX is kept beside them."""
    cuda = ["device", *(name for names in KERNELS.values() for name in names)]
    sources = {name: ROOT / f"csrc/cuda/{name}.cu" for name in cuda}
    sources |= {f"{name}_device": HERE / f"{name}_device.cpp" for name in KERNELS}
    sources |= {"runtime": emulator.HERE / "runtime.cpp"} if machine else {}

    # The first releases of CUDA 12 know no such option.
    threads = ["-split-compile=0"] if "--split-compile " in _said("--help") else []

    def compile_one(name: str) -> None:
        also = threads if name in LARGE and not machine else []
        if machine and name in cuda:
            kept = folder / "kept" / name
            kept.mkdir(parents=True, exist_ok=True)
            also = ["--keep", f"--keep-dir={kept}"]
        subprocess.run(["nvcc", *flags, *also, "-c", sources[name], "-o", folder / f"{name}.o"], check=True)
        if machine and name in cuda:
            (kept / f"{name}.ptx").rename(folder / f"{name}.ptx")
            shutil.rmtree(kept)

    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(compile_one, sources))
    for kernels, path in made.items():
        names = ("device", *KERNELS[kernels], f"{kernels}_device", *(["runtime"] if machine else []))
        objects = [folder / f"{name}.o" for name in names]
        linked = path.with_suffix(".linked")
        link = ["c++", "-pthread", *machine] if machine else ["nvcc", *flags, "-cudart", "static"]
        subprocess.run([*link, *objects, "-o", linked], check=True)
        linked.rename(path)
