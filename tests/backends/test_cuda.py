"""The cuda backend's choices without a GPU: its library and PyTorch's answers about devices are replaced.

What the kernels compute is tested in tests/ptx, as compiled, and in test_triton_gpu.py on a GPU.
"""

import json

import pytest
import torch

from nmkern import RandomMatrix, environment, explain, modulated_linear, use_backend
from nmkern.backends import cuda, packed, selection, triton
from nmkern.cli import main

DENSE = RandomMatrix(6, 4, seed=1)
SPARSE = RandomMatrix(6, 4, seed=1, family="sparse", fan_in=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Library:
    """Answers as the library does; ``rows`` by device, whether they have wgmma, or the runtime's error."""

    def __init__(self, rows, wide=False, error=None):
        self.rows, self.wide, self.error, self.forced = rows, wide, error, -1

    def nmkern_cuda_kernels(self, index, rows, wide):
        rows._obj.value = self.rows[index] if self.forced < 0 else self.forced * bool(self.rows[index])
        wide._obj.value = self.wide
        return self.error

    def nmkern_cuda_set_small_rows(self, rows):
        self.forced = rows

    def nmkern_cuda_set_fixed_point(self, allowed):
        self.fixed_point = allowed

    def nmkern_cuda_set_overlap(self, allowed):
        self.overlap = allowed

    def nmkern_cuda_sparse_fits(self, index, batch, rows, cols, fan_in, transposed, fits):
        self.asked = (index, batch, rows, cols, fan_in, transposed)
        fits._obj.value = cols <= 1000
        return self.error

    def nmkern_cuda_archs(self):
        return b"80,89,90a"


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this a machine with GPUs: rows that the kernel serves, and what they are."""
    for name in ("NMKERN_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    environment.read.cache_clear()
    monkeypatch.setattr(selection, "_choices", {})
    monkeypatch.setitem(selection.everyday, "cuda", {})
    monkeypatch.setattr(triton, "_installed", lambda: True)

    def make(*rows, wide=False, capability=(9, 0), error=None):
        library = Library(rows, wide, error)
        monkeypatch.setattr(cuda, "_load", lambda: (library, None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(rows))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(rows))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
        return library

    yield make
    environment.read.cache_clear()


def test_it_comes_before_triton(machine):
    machine(16)
    for dtype in DTYPES:
        assert selection.select("uniform", dtype, "cuda") == explain(DENSE, dtype, "cuda").backend == "cuda"
        for family in ("sparse", "flynet"):
            assert selection.select(family, dtype, "cuda") == "cuda"
    assert explain(DENSE, torch.float64, "cuda").backend == "reference"


def test_explain_tells_which_sparse_matrices_go_on_to_triton(machine):
    library = machine(16, 16)
    served = explain(SPARSE.T, torch.bfloat16, "cuda:1", batch=500)
    assert (served.backend, served.kernel) == ("cuda", "cuda")
    assert library.asked == (1, 500, 6, 4, 2, True)
    large = RandomMatrix(6, 5000, seed=1, family="sparse", fan_in=2)
    beyond = explain(large, torch.float32, "cuda")
    assert (beyond.backend, beyond.kernel) == ("triton", "triton")
    assert beyond.refused["cuda"] == (
        "its kernels have no room on this GPU for 6 x 5000 of fan-in 2 at batch 1"
    )
    library.error = b"the driver is too old"
    with pytest.raises(RuntimeError, match="cuda backend: CUDA's runtime answers: the driver is too old"):
        cuda.hands_on_sparse(SPARSE, 1)


def test_explain_tells_which_batches_go_on_to_triton(machine):
    machine(16, 64)
    first = "runs on CPU tensors, not on cuda"
    served = explain(DENSE, torch.bfloat16, "cuda")
    assert str(served).startswith("cuda (mma.sync up to 16 rows; beyond, triton) serves this call\n")
    assert served.refused == {"cpu": first, "triton": "cuda comes first", "reference": "cuda comes first"}
    for batch, device, backend in ((16, "cuda", "cuda"), (17, "cuda", "triton"), (17, "cuda:1", "cuda")):
        assert explain(DENSE, torch.bfloat16, device, batch).backend == backend
    beyond = explain(DENSE, torch.bfloat16, "cuda:1", batch=65)
    assert (beyond.backend, beyond.kernel) == ("triton", "triton")
    assert beyond.refused == {
        "cpu": first,
        "cuda": "its kernel serves up to 64 rows on this GPU, not 65",
        "reference": "cuda comes first",
    }


def test_forced_it_still_hands_larger_batches_on(machine):
    machine(16)
    with use_backend("cuda"):
        assert explain(DENSE, torch.float16, "cuda", batch=1).backend == "cuda"
        assert explain(DENSE, torch.float16, "cuda", batch=100).refused == {
            "cpu": "cuda is forced",
            "cuda": "its kernel serves up to 16 rows on this GPU, not 100",
            "reference": "cuda is forced",
        }
        with pytest.raises(RuntimeError, match=r"cuda: computes float32.*; triton: cuda is forced"):
            explain(SPARSE, torch.float64, "cuda")
        with pytest.raises(RuntimeError, match="cuda: runs on CUDA tensors, not on cpu"):
            modulated_linear(torch.ones(2, 4), DENSE)


def test_with_wgmma_every_batch_is_its_own(machine, monkeypatch):
    machine(16, wide=True)
    monkeypatch.setattr(triton, "_installed", lambda: False)  # nobody asks for it
    served = explain(DENSE, torch.bfloat16, "cuda")
    assert str(served).startswith("cuda (mma.sync up to 16 rows; beyond, wgmma) serves this call\n")
    for batch, kernel in ((16, "cuda (mma.sync)"), (17, "cuda (wgmma)"), (10**6, "cuda (wgmma)")):
        found = explain(DENSE, torch.bfloat16, "cuda", batch)
        assert (found.backend, found.kernel) == ("cuda", kernel)


@pytest.mark.parametrize("wide", [False, True])
def test_everyday_calls_take_the_short_way(machine, wide):
    """See nmkern.ops.eager: the backend's own, but for what it does not compute."""
    machine(16, wide=wide)
    known = selection.everyday["cuda"]
    for dtype in (*DTYPES, torch.float64):
        for family in ("uniform", "sparse"):
            selection.select(family, dtype, "cuda")
    assert known == dict.fromkeys(DTYPES, packed.everyday("cuda"))
    with use_backend("triton"):
        assert known == {}
        selection.select("uniform", torch.float32, "cuda")
        assert known == {torch.float32: triton.everyday()}
    assert known == {}


def test_the_rows_can_be_set(machine):
    library = machine(16, 0)
    for rows in (70, 0):
        cuda.set_small_rows(rows)
        assert [cuda.kernels(index).small_rows for index in (0, 1)] == [rows, 0]
    cuda.set_small_rows(None)
    assert (cuda.kernels(), library.forced) == ((16, False), -1)
    with pytest.raises(ValueError, match="rows: expected at least 0, got -1"):
        cuda.set_small_rows(-1)


def test_overlap_and_integers_can_be_switched_off(machine):
    library = machine(16)
    for allowed in (False, True):
        cuda.set_overlap(allowed)
        cuda.set_fixed_point(allowed)
        assert library.overlap is allowed and library.fixed_point is allowed


@pytest.mark.parametrize(
    ("dtype", "device", "text"),
    [
        (torch.float64, "cuda", "computes float32, bfloat16 and float16, not float64"),
        (torch.float32, "cpu", "runs on CUDA tensors, not on cpu"),
        (torch.float32, "meta", "runs on CUDA tensors, not on meta"),
    ],
)
def test_refusals_of_what_it_does_not_compute(machine, dtype, device, text):
    machine(16)
    assert cuda.refusal("uniform", dtype, device) == text


@pytest.mark.parametrize(
    ("gpus", "text"),
    [
        ({"rows": ()}, "there is no GPU that PyTorch finds"),
        ({"rows": (0,), "capability": (7, 5)}, "needs a GPU of compute capability 8.0, GPU X has 7.5"),
        (
            {"rows": (0, 0), "capability": (12, 0)},
            "its library was built for compute capabilities 80,89,90a, GPU X has 12.0; "
            "to get it, reinstall nmkern with NMKERN_CUDA_ARCHS=120",
        ),
        (
            {"rows": (0,), "error": b"the driver is too old"},
            "CUDA's runtime answers: the driver is too old",
        ),
    ],
)
def test_refusals_of_gpus(machine, gpus, text):
    machine(*gpus.pop("rows"), **gpus)
    assert cuda.refusal("uniform", torch.float32, "cuda") == text
    assert explain(DENSE, device="cuda").backend == "triton"


def test_one_gpu_that_serves_is_enough(machine):
    machine(0, 16, capability=(7, 5))
    assert cuda.refusal("uniform", torch.float32, "cuda") is None
    assert explain(DENSE, device="cuda:0", batch=1).backend == "triton"
    assert explain(DENSE, device="cuda:1", batch=1).backend == "cuda"


def test_without_triton_there_are_no_kernels_for_the_rest(machine, monkeypatch):
    machine(16)
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert cuda.refusal("uniform", torch.float32, "cuda") == (
        "needs triton for larger batches: triton is not installed"
    )
    for wide in (False, True):  # on Hopper too, larger inputs than a block has room for go on
        machine(16, wide=wide)
        for family in ("sparse", "flynet"):
            assert cuda.refusal(family, torch.float32, "cuda") == (
                "needs triton for what has no room: triton is not installed"
            )


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not looked for the library yet: a place for it and for its record."""
    monkeypatch.setattr(cuda, "LIBRARY_PATH", tmp_path / "_cuda.so")
    monkeypatch.setattr(cuda, "BUILD_RECORD", tmp_path / "cuda_build.json")
    for name in ("_load", "build_record"):
        monkeypatch.setattr(cuda, name, getattr(cuda, name).__wrapped__)
    return tmp_path


def test_a_library_that_was_not_built(fresh):
    (fresh / "cuda_build.json").write_text(json.dumps({"built": "no", "detail": "there is no nvcc"}))
    assert cuda.refusal("uniform", torch.float32, "cuda") == (
        "its library was not built: there is no nvcc; to get it, reinstall nmkern with CUDA's nvcc on PATH"
    )
    with pytest.raises(RuntimeError, match=r"^cuda backend: its library was not built: there is no nvcc"):
        cuda.kernels(0)


def test_a_library_that_does_not_load(fresh):
    (fresh / "_cuda.so").write_bytes(b"not a library")
    reason = cuda.refusal("uniform", torch.float32, "cuda")
    assert reason is not None and reason.startswith("its library does not load: ")


def test_info_shows_the_build_and_the_refusal(fresh, capsys):
    (fresh / "cuda_build.json").write_text(json.dumps({"built": "no", "detail": "there is no nvcc"}))
    assert main(["info"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "CUDA library built no detail there is no nvcc" in shown
    assert "cuda refuses: its library was not built: there is no nvcc" in shown
