"""Builds nmkern/_native.so and, with nvcc, nmkern/_cuda.so; everything else is in pyproject.toml.

Both are plain C++ over PyTorch's stable ABI: they are no Python extensions, so a wheel serves every
Python 3 and every PyTorch from 2.10 on. Where one cannot be built (no compiler, no torch) the install
goes on without it, and the reason is written beside it for ``nmkern info``. They are two libraries, so
that the one for CPUs is the same with and without nvcc.

    NMKERN_CUDA, or build_ext --cuda              auto: with nvcc, where there is one; on: or fail; off
    NMKERN_CUDA_ARCHS, or build_ext --cuda-archs  the GPUs to compile for, by nvcc's names: 80,89,90a
"""

import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import OptionError

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
_AVX512_BF16 = [*_AVX512, "-mavx512vbmi", "-mavx512bf16"]
# Instruction sets are chosen at run time, so each file is compiled for its own and nothing for the
# machine at hand. Files without an entry are baseline code.
X86_FLAGS = {
    "cpu/amx.cpp": _AVX512_BF16,  # its tile instructions are assembly
    "cpu/avx512_bf16.cpp": _AVX512_BF16,
    "cpu/avx512.cpp": _AVX512,
    "cpu/avx2.cpp": ["-mavx2", "-mfma"],
}
# GCC moves loads far ahead, as it does for no x86: of uniform's 335 instructions for 4 rows of x 84 saved
# registers; without, there are 209 (GCC 12).
ARM_FLAGS = {"cpu/neon.cpp": ["-fno-schedule-insns"]}
ISA_FLAGS = {"x86_64": X86_FLAGS, "AMD64": X86_FLAGS, "aarch64": ARM_FLAGS, "arm64": ARM_FLAGS}
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",  # the epilogue rounds each step on its own, on every machine
    "-fvisibility=hidden",
    # GCC's own AVX-512 header trips these (GCC bug 105593).
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-ignored-attributes",
    "-Wno-unused-parameter",
]
# For .ci/sanitize; of two flags the later wins. Python compiles with -fwrapv, under which nothing overflows.
# Checks by calls, and without two that AddressSanitizer makes too, halve the compiler's time.
SANITIZE_FLAGS = [
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-fstrict-overflow",
    "--param=asan-instrumentation-with-call-threshold=0",
]
CUDA_ARCHS = "80,89,90a"
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fmad=false",  # each step of an epilogue rounds on its own
    "--compiler-options=-fPIC,-fvisibility=hidden",
]
# The runtime is linked statically and hidden: PyTorch has one of its own in the process, of another
# version maybe, whose functions would else be called in place of these.
NVCC_LINK_FLAGS = ["-shared", "--cudart=static", "--linker-options=--exclude-libs,ALL"]


def find_torch() -> Path:
    """The folder of the torch that the package will run with, without importing it.

    In build isolation it is not on sys.path, but sysconfig still names the site-packages of the
    environment that pip installs into.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")]
    for folder in candidates:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    raise RuntimeError(
        "torch was not found while building: install torch first, into the same environment, "
        "then reinstall nmkern"
    )


def isa_flags(source: str, *, only_here: bool) -> list[str]:
    """The instruction set that a source is compiled for; with only_here, none that this CPU lacks.

    A source without its instruction set is an empty table of kernels.
    """
    flags = ISA_FLAGS.get(platform.machine(), {}).get(source, [])
    needed = {flag.removeprefix("-m") for flag in flags if flag.startswith("-m")}
    # The compiler's avx512bf16 is avx512_bf16 to Linux.
    if only_here and needed:
        here = Path("/proc/cpuinfo").read_text().replace("_", "").split()
        flags = flags if needed <= set(here) else []
    return flags


def version_of(torch: Path) -> str:
    return (torch / "version.py").read_text().split("__version__ = ")[1].split("'")[1]


def run(command: list[str]) -> None:
    """RuntimeError with the end of what the command printed where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        told = (done.stdout + done.stderr).strip()
        print(f"{' '.join(command)}\n{told}", file=sys.stderr)
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {told[-300:]}")


def find_nvcc() -> str:
    """nvcc: that of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    for folder in (home and f"{home}/bin", os.environ.get("PATH")):
        if folder and (found := shutil.which("nvcc", path=folder)):
            return found
    raise RuntimeError("there is no nvcc, CUDA's compiler, in CUDA_HOME or on PATH")


def record_path(library: Path) -> Path:
    """Where it is written how the build of a library went."""
    return library.with_name(library.stem.lstrip("_") + "_build.json")


class BuildNative(build_ext):
    """Compiles each source with its own flags, and records how it went instead of failing."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize", None, "instrument for sanitizers, and for this CPU alone; no CUDA"),
        ("cuda=", None, "the library for GPUs: auto, on or off (default: NMKERN_CUDA, or auto)"),
        ("cuda-archs=", None, f"GPUs to compile for (default: NMKERN_CUDA_ARCHS, or {CUDA_ARCHS})"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False
        self.cuda = os.environ.get("NMKERN_CUDA") or "auto"
        self.cuda_archs = os.environ.get("NMKERN_CUDA_ARCHS") or CUDA_ARCHS

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.cuda not in ("auto", "on", "off"):
            raise OptionError(f"NMKERN_CUDA, --cuda: expected auto, on or off, got {self.cuda!r}")
        if not re.fullmatch(r"\d{2,3}[af]?(,\d{2,3}[af]?)*", self.cuda_archs):
            raise OptionError(
                f"NMKERN_CUDA_ARCHS, --cuda-archs: expected names such as {CUDA_ARCHS}, "
                f"got {self.cuda_archs!r}"
            )
        if self.sanitize:
            self.cuda = "off"

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        cuda = target.stem == "_cuda"
        try:
            detail = (self._build_cuda if cuda else self._build)(ext, target)
            record = {"built": "yes", "detail": detail, "sources": SOURCES}
        except Exception as error:  # any failure leaves a package that works, and says why it is slow
            if cuda and self.cuda == "on":
                raise
            record = {"built": "no", "detail": str(error)}
            print(f"nmkern: {target.name} was not built: {error}", file=sys.stderr)
        record_path(target).write_text(json.dumps(record))

    def _compile(self, torch: Path, source: str, extra: list[str]) -> list[str]:
        return self.compiler.compile(
            [source], output_dir=self.build_temp, include_dirs=[str(torch / "include")], extra_postargs=extra
        )

    def _host_compiler(self) -> str:
        compiler = self.compiler.compiler_so[0]
        if shutil.which(compiler) is None:
            raise RuntimeError(f"there is no C++ compiler: {compiler!r} was not found")
        return Path(compiler).name

    def _build(self, ext: Extension, target: Path) -> str:
        torch, compiler = find_torch(), self._host_compiler()
        extra = SANITIZE_FLAGS if self.sanitize else []

        def compile_one(source: str) -> list[str]:
            isa = isa_flags(Path(source).relative_to("csrc").as_posix(), only_here=self.sanitize)
            return self._compile(torch, source, FLAGS + isa + extra)

        with ThreadPoolExecutor() as pool:
            objects = [one for many in pool.map(compile_one, ext.sources) for one in many]
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=["torch_cpu"],  # already in the process when the library is loaded
            library_dirs=[str(torch / "lib")],
            extra_postargs=extra,
            target_lang="c++",
        )
        return f"{compiler}, headers of torch {version_of(torch)}"

    def _build_cuda(self, ext: Extension, target: Path) -> str:
        if self.cuda == "off":
            raise RuntimeError("it was switched off (NMKERN_CUDA, --cuda or --sanitize)")
        nvcc, torch, compiler = find_nvcc(), find_torch(), self._host_compiler()
        archs = self.cuda_archs.split(",")
        targets = [f"--generate-code=arch=compute_{arch},code=sm_{arch}" for arch in archs]

        def compile_one(source: str) -> list[str]:
            if source.endswith(".cpp"):
                return self._compile(torch, source, FLAGS)
            made = Path(self.build_temp, source).with_suffix(".o")
            made.parent.mkdir(parents=True, exist_ok=True)
            names = f'-DNMKERN_CUDA_ARCHS="{self.cuda_archs}"'
            run([nvcc, *NVCC_FLAGS, *targets, "--threads=0", names, "-c", source, "-o", str(made)])
            return [str(made)]

        with ThreadPoolExecutor() as pool:
            objects = [one for many in pool.map(compile_one, ext.sources) for one in many]
        run(
            [
                nvcc,
                *NVCC_LINK_FLAGS,
                *targets,
                *objects,
                f"-L{torch / 'lib'}",
                "-ltorch_cpu",
                "-o",
                str(target),
            ]
        )
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.findall(r"V(\d+\.\d+\.\d+)", printed)[0]
        return f"nvcc {version} for {self.cuda_archs}, {compiler}, headers of torch {version_of(torch)}"

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            shutil.copy(record_path(built), "nmkern")
            if not built.exists():  # one from an earlier build would be taken for this one's
                Path("nmkern", built.name).unlink(missing_ok=True)


class Wheel(bdist_wheel):
    """A wheel for one platform, but for any Python: nothing in it links against Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def sources(pattern: str, *, cuda: bool) -> list[str]:
    """The files below csrc of one of the two libraries."""
    return sorted(str(path) for path in Path("csrc").rglob(pattern) if (path.parts[1] == "cuda") == cuda)


# So that a library that is older than the sources is known, whatever the times of files say.
SOURCES = runpy.run_path("nmkern/bench/sources.py")["digest"](Path())
HEADERS = sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))

setup(
    ext_modules=[
        Extension(
            "nmkern._native", sources("*.cpp", cuda=False), depends=HEADERS, language="c++", optional=True
        ),
        Extension(
            "nmkern._cuda",
            sources("*.cpp", cuda=True) + sources("*.cu", cuda=True),
            depends=HEADERS,
            language="c++",
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
