"""Which backend serves a call can be asked, forced and read off an error; every answer is reached here."""

import importlib.metadata
import os
import shutil
from pathlib import Path

import pytest
import torch

from nmkern import RandomMatrix, environment, explain, modulated_linear, sparse_project, use_backend
from nmkern.backends import cpu, cuda, reference, selection, triton

DENSE = RandomMatrix(6, 4, seed=1)
SPARSE = RandomMatrix(6, 4, seed=1, family="sparse", fan_in=2)
NO_TRITON = "runs on CUDA tensors; on the CPU only under TRITON_INTERPRET=1"
NO_CUDA = "runs on CUDA tensors, not on cpu"
NO_CPU = cpu.refusal("uniform", torch.float32, "cpu")  # why the cpu backend cannot run; None where it can
needs_cpu = pytest.mark.skipif(NO_CPU is not None, reason=f"cpu: {NO_CPU}")


@pytest.fixture(autouse=True)
def free_choice(monkeypatch):
    """These tests choose for themselves, whatever the environment of the run forces."""
    monkeypatch.delenv("NMKERN_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(selection, "_choices", {})
    environment.read.cache_clear()
    yield
    environment.read.cache_clear()


def compiler():
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def installed():
    try:
        importlib.metadata.version("nmkern")
    except importlib.metadata.PackageNotFoundError:
        return cpu.BUILD_RECORD.exists()
    return True


def test_an_installed_package_has_the_cpu_backend_where_there_is_a_compiler():
    """So that a suite cannot pass by skipping all of its kernels."""
    if not installed():
        pytest.skip("nmkern runs from its sources; it was not installed")
    if compiler() is None:
        pytest.skip("no C++ compiler on PATH")
    assert NO_CPU is None, NO_CPU


# What a CPU has by Linux's account, and the instruction set that must then be there. (Each name stands
# for processors that have all of it: AVX-512 kernels may want more than its foundation.)
_BF16 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512vbmi", "avx512_bf16"}
FLAGS = {
    "amx": {*_BF16, "amx_tile", "amx_bf16"},
    "avx512_bf16": _BF16,
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512vbmi", "avx512_vbmi2"},
    "avx2_subnormal": {"avx2", "fma", "f16c", "bmi2"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "neon": {"asimd"},
    "portable": set(),
}


@needs_cpu
@pytest.mark.parametrize("isa", cpu.ISAS)
def test_an_instruction_set_that_this_cpu_has_is_not_refused(isa):
    info = Path("/proc/cpuinfo")
    if FLAGS[isa] and not info.exists():
        pytest.skip("the system does not tell what its CPU has")
    has = set(info.read_text().split()) if FLAGS[isa] else set()
    if not has >= FLAGS[isa]:
        pytest.skip(f"this CPU has no {', '.join(sorted(FLAGS[isa] - has))}")
    before = cpu.isa()
    try:
        cpu.set_isa(isa)
        assert cpu.isa() == isa
        assert cpu.kernel() == f"cpu ({isa})"
        assert cpu.kernel() in str(explain(DENSE))
    finally:
        cpu.set_isa(before)


@needs_cpu
def test_an_instruction_set_that_does_not_exist():
    before = cpu.isa()
    with pytest.raises(
        RuntimeError, match=rf"^isa: this CPU or this build has no 'avx9', it has '{before}'$"
    ):
        cpu.set_isa("avx9")
    assert cpu.isa() == before


# explain


@pytest.mark.parametrize("matrix", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_explain_names_the_backend_its_kernel_and_the_refusals(matrix):
    answer = explain(matrix)
    if NO_CPU is None:
        assert answer.backend == "cpu"
        assert answer.kernel == f"cpu ({cpu.isa()})"
        assert answer.refused == dict.fromkeys(("cuda", "triton", "reference"), "cpu comes first")
        assert str(answer) == (
            f"cpu ({cpu.isa()}) serves this call\ncuda does not: cpu comes first\n"
            "triton does not: cpu comes first\nreference does not: cpu comes first"
        )
    else:
        assert answer.backend == "reference"
        assert answer.refused == {"cpu": NO_CPU, "cuda": NO_CUDA, "triton": NO_TRITON}
        assert str(answer) == (
            f"reference (PyTorch) serves this call\ncpu does not: {NO_CPU}\n"
            f"cuda does not: {NO_CUDA}\ntriton does not: {NO_TRITON}"
        )


def test_explain_of_what_only_the_reference_computes():
    answer = explain(DENSE, torch.float64)
    assert (answer.backend, answer.kernel) == ("reference", "reference (PyTorch)")
    assert answer.refused == {
        "cpu": "computes float32, bfloat16 and float16, not float64",
        "cuda": NO_CUDA,
        "triton": NO_TRITON,
    }


def test_explain_on_another_device(monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: (None, "its library was not built"))
    for device in ("cuda", torch.device("cuda", 1)):  # asked without touching a device
        answer = explain(DENSE, torch.bfloat16, device)
        assert (answer.backend, answer.kernel) == ("triton", "triton")
        assert answer.refused == {
            "cpu": "runs on CPU tensors, not on cuda",
            "cuda": "its library was not built",
            "reference": "triton comes first",
        }
        assert explain(SPARSE, torch.bfloat16, device).backend == "triton"


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_explain_where_no_backend_can(dtype):
    with pytest.raises(RuntimeError) as raised:
        explain(DENSE, dtype)
    name = str(dtype).removeprefix("torch.")
    assert str(raised.value) == (
        "no backend can serve this call: "
        f"cpu: computes float32, bfloat16 and float16, not {name}; cuda: {NO_CUDA}; triton: {NO_TRITON}; "
        f"reference: computes float64, float32, bfloat16 and float16, not {name}"
    )


def test_the_backend_that_explain_names_is_the_one_that_runs():
    """What explain says and what a call does come from the same place."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for matrix in (DENSE, SPARSE):
            backend = explain(matrix, dtype).backend
            assert selection.select(matrix.family, dtype, "cpu") == backend
            operator = sparse_project if matrix is SPARSE else modulated_linear
            with torch.profiler.profile() as profile:
                operator(torch.ones(2, 4, dtype=dtype), matrix)
            ran = {event.key for event in profile.key_averages() if event.key.startswith("nmkern::")}
            served = {"cpu": {"cpu", "packed"}}.get(backend, {backend})  # packed: of the device's own backend
            assert ran and {name.split("::")[1].split("_")[0] for name in ran} <= served


# use_backend


def forced():
    return selection.forced_backend()


def test_use_backend_nests_and_restores():
    assert forced() is None
    with use_backend("reference"):
        assert forced() == explain(DENSE).backend == "reference"
        assert explain(DENSE).refused == dict.fromkeys(("cpu", "cuda", "triton"), "reference is forced")
        with use_backend("cpu"):
            assert forced() == "cpu"
            if NO_CPU is None:
                assert explain(DENSE).refused == dict.fromkeys(
                    ("cuda", "triton", "reference"), "cpu is forced"
                )
        assert forced() == selection.select("uniform", torch.float32, "cpu") == "reference"
    assert forced() is None


def test_use_backend_restores_after_an_exception():
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert forced() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert forced() is None


def test_use_backend_forgets_choices_made_before():
    first = selection.select("uniform", torch.float32, "cpu")
    with use_backend("reference"):
        assert selection.select("uniform", torch.float32, "cpu") == "reference"
    assert selection.select("uniform", torch.float32, "cpu") == first


@pytest.mark.parametrize("name", ["gpu", "", "CPU"])
def test_use_backend_refuses_unknown_names(name):
    message = rf"^backend: expected one of cpu, cuda, triton, reference, got '{name}'$"
    with pytest.raises(ValueError, match=message), use_backend(name):
        pass
    assert forced() is None


def test_a_forced_backend_that_cannot_serve_raises_with_every_reason():
    text = (
        "no backend can serve this call: cpu: computes float32, bfloat16 and float16, not float64; "
        "cuda: cpu is forced; triton: cpu is forced; reference: cpu is forced"
    )
    with use_backend("cpu"):
        for ask in (
            lambda: explain(DENSE, torch.float64),
            lambda: selection.select("uniform", torch.float64, "cpu"),
            lambda: modulated_linear(torch.ones(2, 4).double(), DENSE),
            lambda: sparse_project(torch.ones(2, 4).double(), SPARSE),
        ):
            with pytest.raises(RuntimeError) as raised:
                ask()
            assert str(raised.value) == text


# Refusals of the cpu backend, each with its reason


@pytest.mark.parametrize(
    ("dtype", "device", "text"),
    [
        (torch.float64, "cpu", "computes float32, bfloat16 and float16, not float64"),
        (torch.int8, "cpu", "computes float32, bfloat16 and float16, not int8"),
        (torch.float32, "cuda", "runs on CPU tensors, not on cuda"),
        (torch.float32, "meta", "runs on CPU tensors, not on meta"),
    ],
)
def test_refusals_of_the_cpu_backend(dtype, device, text):
    assert cpu.refusal("uniform", dtype, device) == text


def test_the_reference_refuses_what_it_cannot_sum():
    assert reference.refusal("uniform", torch.float64, "anything") is None
    assert reference.refusal("uniform", torch.int64, "cpu").endswith("not int64")


@pytest.mark.parametrize(
    ("family", "dtype", "device", "text"),
    [
        ("uniform", torch.float64, "cuda", "computes float32, bfloat16 and float16, not float64"),
        ("uniform", torch.float32, "cpu", NO_TRITON),
        ("uniform", torch.float32, "meta", "runs on CUDA tensors, not on meta"),
        ("sparse", torch.float32, "cuda", None),
        ("flynet", torch.float16, "cuda", None),
        ("normal", torch.float16, "cuda", None),
    ],
)
def test_refusals_of_the_triton_backend(family, dtype, device, text):
    assert triton.refusal(family, dtype, device) == text


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: (None, "its library was not built"))
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert triton.refusal("uniform", torch.float32, "cuda") == "triton is not installed"
    assert explain(DENSE, device="cuda").backend == "reference"


def test_the_interpreter_serves_where_it_is_asked_for_and_forced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.refusal("uniform", torch.float32, "cpu") is None
    assert explain(DENSE).backend == ("cpu" if NO_CPU is None else "triton")
    with use_backend("triton"):
        assert explain(DENSE).kernel == "triton (interpreted)"


def fresh(monkeypatch, **attributes):
    """The cpu backend as in a process that has not looked for its library yet."""
    for name, value in attributes.items():
        monkeypatch.setattr(cpu, name, value)
    monkeypatch.setattr(cpu, "_load", uncached(cpu._load))
    monkeypatch.setattr(cpu, "build_record", uncached(cpu.build_record))


def uncached(function):
    return getattr(function, "__wrapped__", function)


def test_a_library_that_was_not_built(monkeypatch, tmp_path):
    fresh(monkeypatch, LIBRARY_PATH=tmp_path / "none.so", BUILD_RECORD=tmp_path / "none.json")
    reason = "the native library was not built: the package was not installed (run pip install .)"
    assert cpu.refusal("uniform", torch.float32, "cpu") == reason
    assert explain(DENSE).refused == {"cpu": reason, "cuda": NO_CUDA, "triton": NO_TRITON}
    for ask in (cpu.isa, lambda: cpu.set_isa("portable")):
        with pytest.raises(RuntimeError, match=r"^cpu backend: the native library was not built: "):
            ask()
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: the native library was not built"):
        modulated_linear(torch.ones(2, 4), DENSE)
    assert modulated_linear(torch.ones(2, 4), DENSE).shape == (2, 6)  # the reference serves


def test_a_build_that_failed_tells_why(monkeypatch, tmp_path):
    record = tmp_path / "native_build.json"
    record.write_text('{"built": "no", "detail": "no C++ compiler was found"}')
    fresh(monkeypatch, LIBRARY_PATH=tmp_path / "none.so", BUILD_RECORD=record)
    reason = "the native library was not built: no C++ compiler was found"
    assert cpu.refusal("uniform", torch.float32, "cpu") == reason


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    library = tmp_path / "broken.so"
    library.write_bytes(b"not a library")
    fresh(monkeypatch, LIBRARY_PATH=library)
    reason = cpu.refusal("uniform", torch.float32, "cpu")
    assert reason is not None and reason.startswith("the native library does not load: ")
    assert "broken.so" in reason


# Environment variables: read by a process of its own


def test_environment_variables(run_python):
    script = "import nmkern; print(nmkern.explain(nmkern.RandomMatrix(2, 2, seed=0)))"
    told = run_python(script, NMKERN_BACKEND="reference")
    assert told == (
        "reference (PyTorch) serves this call\n"
        "cpu does not: reference is forced\ncuda does not: reference is forced\n"
        "triton does not: reference is forced\n"
    )
    told = run_python(script, check=False, NMKERN_BACKEND="fastest")
    assert told.endswith(
        "ValueError: NMKERN_BACKEND: expected one of cpu, cuda, triton, reference, got 'fastest'\n"
    )


def test_use_backend_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("NMKERN_BACKEND", "reference")
    environment.read.cache_clear()
    assert forced() == "reference"
    with use_backend("cpu"):
        assert forced() == "cpu"
    assert forced() == "reference"
    monkeypatch.setenv("NMKERN_BACKEND", "")
    environment.read.cache_clear()
    assert forced() is None


def test_explain_and_calls_agree_when_the_environment_changes(monkeypatch):
    selection.select("uniform", torch.float32, "cpu")  # a choice made before
    monkeypatch.setenv("NMKERN_BACKEND", "reference")
    assert explain(DENSE).backend == selection.select("uniform", torch.float32, "cpu")


@needs_cpu
def test_the_instruction_set_from_the_environment(run_python):
    script = (
        "import nmkern; from nmkern.backends import cpu\n"
        "print(nmkern.explain(nmkern.RandomMatrix(2, 2, seed=0)).kernel, cpu.isa())"
    )
    assert run_python(script, NMKERN_CPU_ISA="portable") == "cpu (portable) portable\n"
    told = run_python(script, check=False, NMKERN_CPU_ISA="sse")
    names = ", ".join(cpu.ISAS)
    assert told.endswith(f"ValueError: NMKERN_CPU_ISA: expected one of {names}, got 'sse'\n")
