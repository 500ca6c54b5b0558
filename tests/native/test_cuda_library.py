"""nmkern/_cuda.so: built by setup.py where there is nvcc, and a recorded reason where there is not.

Nothing here needs a GPU or its driver, and neither does loading the library.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools.errors import OptionError

from nmkern.backends import cuda
from nmkern.bench.sources import digest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NO_NVCC = "there is no nvcc, CUDA's compiler, in CUDA_HOME or on PATH"


@pytest.fixture
def build(monkeypatch, tmp_path):
    """A function that runs setup.py's build of the library into a folder: its record and the library."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **given: kept.update(given))
    for name in ("NMKERN_CUDA", "NMKERN_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    kept = {}

    def run(**options):
        runpy.run_path("setup.py")
        extensions = [ext for ext in kept["ext_modules"] if ext.name == "nmkern._cuda"]
        distribution = setuptools.Distribution({"ext_modules": extensions, "cmdclass": kept["cmdclass"]})
        command = distribution.get_command_obj("build_ext")
        command.build_lib, command.build_temp = str(tmp_path), str(tmp_path / "temp")
        for name, value in options.items():
            setattr(command, name, value)
        command.ensure_finalized()
        command.run()
        return json.loads((tmp_path / "nmkern/cuda_build.json").read_text()), tmp_path / "nmkern/_cuda.so"

    return run


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """Neither on PATH nor in CUDA_HOME."""
    folders = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(f for f in folders if not Path(f, "nvcc").exists()))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))


def test_without_nvcc_the_build_goes_on_and_says_why(build, no_nvcc):
    record, library = build()
    assert record == {"built": "no", "detail": NO_NVCC}
    assert not library.exists()


def test_without_nvcc_a_build_that_is_asked_for_fails(build, no_nvcc, monkeypatch):
    with pytest.raises(RuntimeError, match=NO_NVCC):
        build(cuda="on")
    monkeypatch.setenv("NMKERN_CUDA", "on")
    with pytest.raises(RuntimeError, match=NO_NVCC):
        build()


@pytest.mark.parametrize("ask", ["option", "variable", "sanitize"])
def test_it_can_be_switched_off(build, monkeypatch, ask):
    if ask == "variable":
        monkeypatch.setenv("NMKERN_CUDA", "off")
    record, library = build(**{"option": {"cuda": "off"}, "sanitize": {"sanitize": True}}.get(ask, {}))
    assert record == {"built": "no", "detail": "it was switched off (NMKERN_CUDA, --cuda or --sanitize)"}
    assert not library.exists()


def test_what_the_switches_do_not_take_is_refused(build, monkeypatch):
    with pytest.raises(OptionError, match="NMKERN_CUDA, --cuda: expected auto, on or off, got 'yes'"):
        build(cuda="yes")
    monkeypatch.setenv("NMKERN_CUDA_ARCHS", "8.0")
    with pytest.raises(OptionError, match=r"expected names such as 80,89,90a, got '8\.0'"):
        build()


def test_a_compiler_that_fails_is_told_with_its_words(build, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'no such GPU' >&2\nexit 7\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    record, library = build()
    assert record == {"built": "no", "detail": "nvcc ended with 7: no such GPU"}
    assert not library.exists()


def test_a_library_that_was_built_names_its_sources(build):
    record, _ = build(_build_cuda=lambda ext, target: "by hand")
    assert record == {"built": "yes", "detail": "by hand", "sources": digest(ROOT)}


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_code_runs_on_gpus_of_its_major_version():
    source = """
        #include "csrc/cuda/device.h"
        using nmkern::cuda::serves, nmkern::cuda::kernels_for;
        constexpr std::string_view usual = "80,89,90a";
        static_assert(serves(usual, 8, 0) && serves(usual, 8, 6) && serves(usual, 9, 0));
        static_assert(!serves(usual, 7, 5) && !serves(usual, 10, 0) && !serves(usual, 12, 0));
        static_assert(!serves("89", 8, 6) && serves("89", 8, 9));
        static_assert(!serves("90a", 9, 1) && serves("90", 9, 1));
        static_assert(serves("100f,120", 10, 3) && serves("100f,120", 12, 1) && !serves("", 8, 0));
        static_assert(kernels_for(usual, 9, 0).small_rows == 16 && kernels_for(usual, 9, 0).wide);
        static_assert(kernels_for(usual, 8, 6).small_rows == 64 && !kernels_for(usual, 8, 6).wide);
        static_assert(kernels_for("90", 9, 0).small_rows == 16 && !kernels_for("90", 9, 0).wide);
        static_assert(kernels_for(usual, 7, 5).small_rows == 0 && !kernels_for(usual, 7, 5).wide);
    """
    command = ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-x", "c++", f"-I{ROOT}", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


SCRIPT = """
import ctypes, torch
from nmkern.backends import primitives
def registered():
    return torch._C._dispatch_has_kernel_for_dispatch_key("nmkern::cuda_modulated_matmul", "CUDA")
before = registered()
torch.ops.load_library({path!r})
library = ctypes.CDLL({path!r})
library.nmkern_cuda_archs.restype = library.nmkern_cuda_kernels.restype = ctypes.c_char_p
rows, wide = ctypes.c_int64(-1), ctypes.c_int(-1)
error = library.nmkern_cuda_kernels(0, ctypes.byref(rows), ctypes.byref(wide))
print(before, registered(), library.nmkern_cuda_archs().decode(), rows.value, bool(error))
"""


@pytest.mark.skipif(not cuda.LIBRARY_PATH.exists(), reason="nmkern/_cuda.so was not built: there is no nvcc")
def test_the_library_needs_no_cuda_and_keeps_its_own_to_itself(run_python):
    library, detail = cuda.LIBRARY_PATH, cuda.build_record()["detail"]
    match = re.fullmatch(r"nvcc \S+ for (\S+), \S+, headers of torch \S+", detail)
    assert match is not None, detail
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    found = {name.split(".")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", needed)}
    system = {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert found <= {"libtorch_cpu", "libstdc++", "libgcc_s"} | system
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-2:] for line in symbols.splitlines()]
    assert [name for _, name in names if re.match(r"_*(cuda|cu[A-Z])", name)] == []
    undefined = [name for kind, name in names if kind == "U"]
    shims = re.compile(r"(aoti_)?torch_\w+|\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_\S+")
    assert [name for name in undefined if not shims.fullmatch(name)] == []
    ours = {name for _, name in names if name.startswith("nmkern")}
    dense = {
        f"nmkern_cuda_{name}" for name in ("kernels", "set_small_rows", "set_overlap", "set_fixed_point")
    }
    assert ours == {"nmkern_cuda_archs", *dense, "nmkern_cuda_sparse_fits"}
    before, after, archs, rows, error = run_python(SCRIPT.format(path=str(library))).split()
    assert (before, after, archs) == ("False", "True", match[1])
    assert (error == "True") == (rows == "0") == (not torch.cuda.is_available())
