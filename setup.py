"""Builds the native library nmkern/_native.so; everything else about the package is in pyproject.toml.

The library is plain C++ over PyTorch's stable ABI: it is no Python extension, so a wheel serves every
Python 3 and every PyTorch from 2.10 on. Where it cannot be built (no compiler, no torch) the install
goes on without it, and the reason is written beside it for ``nmkern info``.
"""

import importlib.util
import json
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# Instruction sets are chosen at run time, so each file is compiled for its own and nothing for the
# machine at hand. Files without an entry are baseline code.
ISA_FLAGS = {
    "cpu/avx512_bf16.cpp": [*_AVX512, "-mavx512vbmi", "-mavx512bf16"],
    "cpu/avx512.cpp": _AVX512,
    "cpu/avx2.cpp": ["-mavx2", "-mfma"],
}
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
RECORD = "native_build.json"


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
    flags = ISA_FLAGS.get(source, []) if platform.machine() in ("x86_64", "AMD64") else []
    # The compiler's avx512bf16 is avx512_bf16 to Linux.
    if only_here and flags:
        here = Path("/proc/cpuinfo").read_text().replace("_", "").split()
        flags = flags if {flag.removeprefix("-m") for flag in flags} <= set(here) else []
    return flags


class BuildNative(build_ext):
    """Compiles each source with its own flags, and records how it went instead of failing."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize", None, "instrument for sanitizers, and for this CPU alone"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            record = {"built": "yes", "detail": self._build(ext, target)}
        except Exception as error:  # any failure leaves a package that works, and says why it is slow
            record = {"built": "no", "detail": str(error)}
            print(f"nmkern: the native library was not built: {error}", file=sys.stderr)
        target.with_name(RECORD).write_text(json.dumps(record))

    def _build(self, ext: Extension, target: Path) -> str:
        torch = find_torch()
        compiler = self.compiler.compiler_so[0]
        if shutil.which(compiler) is None:
            raise RuntimeError(f"there is no C++ compiler: {compiler!r} was not found")

        extra = SANITIZE_FLAGS if self.sanitize else []

        def compile_one(source: str) -> list[str]:
            isa = isa_flags(Path(source).relative_to("csrc").as_posix(), only_here=self.sanitize)
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[str(torch / "include")],
                extra_postargs=FLAGS + isa + extra,
            )

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
        version = (torch / "version.py").read_text().split("__version__ = ")[1].split("'")[1]
        return f"{Path(compiler).name}, headers of torch {version}"

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name)).with_name(RECORD)
            shutil.copy(built, Path("nmkern", RECORD))


class Wheel(bdist_wheel):
    """A wheel for one platform, but for any Python: nothing in it links against Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "nmkern._native",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
