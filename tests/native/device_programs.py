"""The programs that run the kernels' cases on a GPU: built once, however many tests and processes ask.

    build/device/<hash of sources, flags and compiler>/{dense,sparse,flynet}_device

An nvcc for each file, side by side, and threads within the two large ones: one after the other they take
135 s, longer than all other tests on 16 cores. Threads did not change these two's code, but that of others.
"""

import fcntl
import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build/device"
KERNELS = {"dense": ("pack", "skinny", "wide", "finish"), "sparse": ("sparse",), "flynet": ("flynet",)}
LARGE = ("skinny", "wide")
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-lineinfo"]


def arch(capability: tuple[int, int]) -> str:
    """By nvcc's name; Hopper's own instructions have one of theirs."""
    return "90a" if capability == (9, 0) else "".join(map(str, capability))


def program(kernels: str, target: str) -> Path:
    """The program of the "dense", "sparse" or "flynet" kernels for GPUs of the architecture ``target``."""
    flags = [*FLAGS, "-gencode", f"arch=compute_{target},code=sm_{target}", f'-DNMKERN_CUDA_ARCHS="{target}"']
    flags += ["-DNMKERN_WIDE"] if target == "90a" else []
    folder = BUILT / _key(flags)
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: folder / f"{name}_device" for name in KERNELS}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed with the file, even where this process is killed
        if not all(path.exists() for path in made.values()):
            _build(folder, made, flags)
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
    files = [*(ROOT / "csrc").rglob("*"), *HERE.glob("*.h"), *HERE.glob("*.cpp"), Path(__file__)]
    told = hashlib.sha256(repr((flags, _said("--version"))).encode())
    for path in sorted(path for path in files if path.is_file()):
        told.update(path.read_bytes())
    return told.hexdigest()[:16]


def _build(folder: Path, made: dict[str, Path], flags: list[str]) -> None:
    cuda = ["device", *(name for names in KERNELS.values() for name in names)]
    sources = {name: ROOT / f"csrc/cuda/{name}.cu" for name in cuda}
    sources |= {f"{name}_device": HERE / f"{name}_device.cpp" for name in KERNELS}

    # The first releases of CUDA 12 know no such option.
    threads = ["-split-compile=0"] if "--split-compile " in _said("--help") else []

    def compile_one(name: str) -> None:
        split = threads if name in LARGE else []
        subprocess.run(["nvcc", *flags, *split, "-c", sources[name], "-o", folder / f"{name}.o"], check=True)

    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(compile_one, sources))
    for kernels, path in made.items():
        objects = [folder / f"{name}.o" for name in ("device", *KERNELS[kernels], f"{kernels}_device")]
        linked = path.with_suffix(".linked")
        subprocess.run(["nvcc", *flags, "-cudart", "static", *objects, "-o", linked], check=True)
        linked.rename(path)
