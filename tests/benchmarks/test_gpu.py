"""The command for a machine with a GPU, without one: refusal, the plan, failures, the clock's order.

Every row's function runs here for real, small and on the CPU. What a CUDA device alone can do (streams,
graphs, events) is replaced by a record of the calls, and only that.
"""

import contextlib
import json
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

# Benchmarks are no part of the package. This folder has no __init__.py, or it would be taken for theirs.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import gpu, gpu_rows
from benchmarks.__main__ import main
from nmkern.backends import selection
from nmkern.bench.clocks import CudaClock, Eager, HostClock
from nmkern.bench.harness import Case, Report
from nmkern.bench.plan import Row, follow
from nmkern.bench.rivals import check

SMALL = gpu_rows.Extent(
    **{"device": "cpu", "sizes": (256, 512), "first": (1, 5), "rest": (2,), "few": (1,), "huge": 1024},
    **{"huge_batches": (1,), "copied": 2**12, "seconds": 0.0, "calls": 2},
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_nothing_is_started(tmp_path, monkeypatch):
    out = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--out", str(out)])
    with pytest.raises(RuntimeError, match="expected a CUDA device, PyTorch finds none"):
        main()
    assert not out.exists()


@pytest.mark.slow
def test_every_row_of_the_plan_can_be_measured(tmp_path):
    """On the CPU: operands, gates and rows are the same there; sizes and clock are not."""
    report = Report(tmp_path / "rows.jsonl", HostClock(), commit="abc")
    rows = list(gpu_rows.rows(report, SMALL))
    assert len({row.label for row in rows}) == len(rows)
    outcome = follow(rows, report, deadline=float("inf"))
    assert outcome.failed == {} and outcome.left == {}
    assert outcome.measured == [row.label for row in rows]
    found = read(tmp_path / "rows.jsonl")
    assert len(found) == len(rows)
    assert all(row["commit"] == "abc" and row["seconds"]["ours"]["median"] > 0 for row in found)
    (huge,) = (row for row in found if row["name"] == "linear, huge")
    (of_512,) = (
        row
        for row in found
        if (row["name"], row["m"], row["k"], row["family"]) == ("linear", 1, 512, "uniform")
    )
    assert huge["extra"]["predicted_seconds"] == pytest.approx(4 * of_512["seconds"]["ours"]["median"])
    table = gpu_rows.table(found, outcome)
    assert all(row["name"] in table for row in found)
    assert "of the predicted time" in table and "GB/s" in table


def test_the_whole_plan_is_what_the_targets_ask_for():
    labels = [row.label for row in gpu_rows.rows(Report(None, HostClock()), gpu_rows.Extent())]
    for size in (8192, 16384):
        for m in (1, 2, 4, 8, 16, 32, 64, 256, 1024, 2048, 4096, 8192):
            for way in ("linear", "linear, transposed"):
                assert f"{way} M={m} {size}x{size} bfloat16 uniform" in labels
    assert {"copy", "huge M=1", "huge M=16", "huge M=64", "projection", "flynet, trained"} <= set(labels)
    assert gpu_rows.target(16, "uniform", torch.bfloat16) == 4
    assert gpu_rows.target(64, "uniform", torch.bfloat16) is None


def test_what_is_expected_of_rows_is_what_they_take():
    """From above, but not far: a row that was expected to take 23 s and takes 3 is left at the end."""
    expected = {
        row.label: row.expected for row in gpu_rows.rows(Report(None, HostClock()), gpu_rows.Extent())
    }
    weights = {8192: 1, 16384: 4}
    for size, first in weights.items():
        assert expected[f"linear M=1 {size}x{size} bfloat16 uniform"] == pytest.approx(3.1 + first)
        assert expected[f"linear M=16 {size}x{size} bfloat16 uniform"] == pytest.approx(3.1)
    assert expected["copy"] == pytest.approx(3.1)


@pytest.mark.parametrize("wide", [False, True])
def test_both_backends_are_measured_around_the_border_and_with_sparse_matrices(monkeypatch, wide):
    """Each row runs with its backend forced, and of cuda each kernel for any number of rows."""
    ways, before = [], selection.forced_backend()
    monkeypatch.setattr(gpu_rows.cuda, "refusal", lambda *_: None)
    monkeypatch.setattr(gpu_rows.cuda, "kernels", lambda: gpu_rows.cuda.Kernels(16, wide))
    monkeypatch.setattr(gpu_rows.cuda, "set_small_rows", ways.append)
    monkeypatch.setattr(gpu_rows.cuda, "set_overlap", ways.append)
    monkeypatch.setattr(gpu_rows.cuda, "set_fixed_point", ways.append)
    report, seen = Report(None, HostClock()), []

    def see(what):
        seen.append((what, report.by))
        assert report.by.split()[0] == selection.forced_backend()

    monkeypatch.setattr(gpu_rows.cases, "product", lambda *args, **_: see(args[2]))
    monkeypatch.setattr(gpu_rows.cases, "projection", lambda *_: see("projection"))
    monkeypatch.setattr(gpu_rows.cases, "flynet_step", lambda *_: see("flynet"))
    plan = gpu_rows.rows(report, gpu_rows.Extent())
    forced = [row for row in plan if " by " in row.label]
    labels = [row.label for row in forced]
    assert "linear, transposed M=32 8192x8192 bfloat16 uniform by cuda (mma.sync)" in labels
    assert ("linear M=8 8192x8192 bfloat16 uniform by cuda (wgmma)" in labels) == wide
    monkeypatch.setattr(gpu_rows.cases, "Layer", lambda *_, **__: None)
    for row in forced:
        row.measure()
    border = [m for m in (8, 16, 32, 64) for _ in range(2)]
    wanted = [(m, "triton") for m in (*border, 2048, 2048)]
    for way in ("mma.sync", *["wgmma"] * wide):
        wanted += [(m, f"cuda ({way})") for m in border]
    wanted += [(m, "cuda (floats)") for m in (1, 1, 8, 8)]
    wanted += wide * [(m, "cuda (serial)") for m in (1, 1, 16, 16)]
    for name in ("triton", *wide * ["cuda (serial)"]):
        wanted += [(what, name) for what in ("projection", "projection", "flynet")]
    assert seen == wanted
    assert ways == 8 * [2**20, None] + wide * 8 * [0, None] + (4 + wide * 7) * [False, True]
    assert selection.forced_backend() == before and report.by is None


class Ticks:
    """A clock that rows move."""

    def __init__(self):
        self.time = 0.0

    def take(self, seconds):
        self.time += seconds


def test_rows_that_no_longer_fit_are_listed_and_shorter_ones_still_measured(tmp_path):
    ticks, report = Ticks(), Report(tmp_path / "rows.jsonl", HostClock())
    rows = [Row(f"row {i}", cost, lambda cost=cost: ticks.take(cost)) for i, cost in enumerate((4, 4, 4, 1))]
    outcome = follow(rows, report, deadline=10, now=lambda: ticks.time)
    assert outcome.measured == ["row 0", "row 1", "row 3"]
    assert outcome.left == {"row 2": "out of time"}
    assert [(row["name"], row["not_measured"]) for row in read(report.path)] == [("row 2", "out of time")]
    assert "not measured: row 2: out of time" in gpu_rows.table(report.rows, outcome)


def test_a_failing_row_is_recorded_and_the_others_are_measured(tmp_path):
    report = Report(tmp_path / "rows.jsonl", HostClock())
    ours = torch.ones(3)

    def wrong():
        error = check(ours, 2 * ours, 1e-6)
        report.measure(Case("wrong", 1, 1, 1, "float32", "none", 1), ours.clone, {}, error, 0.0)

    right = Case("right", 1, 3, 3, "float32", "none", 9)
    rows = [
        Row("wrong", 1, wrong),
        Row("right", 1, lambda: report.measure(right, ours.clone, {"stored": ours.clone}, 0.0, 0.0)),
    ]
    outcome = follow(rows, report, deadline=float("inf"))
    assert outcome.measured == ["right"] and list(outcome.failed) == ["wrong"]
    failed, measured = read(report.path)
    assert "not timed" in failed["failed"] and measured["ratios"].keys() == {"stored"}
    table = gpu_rows.table(report.rows, outcome)
    assert "failed: wrong: AssertionError" in table and "stored" in table


def test_after_the_loss_of_the_device_no_row_is_tried(tmp_path):
    report, tried = Report(tmp_path / "rows.jsonl", HostClock()), []

    def lost():
        if tried:
            raise RuntimeError("an illegal memory access")

    rows = [Row(label, 1, lambda label=label: tried.append(label)) for label in ("first", "second")]
    outcome = follow(rows, report, deadline=float("inf"), settle=lost)
    assert tried == ["first"]
    assert outcome.failed == {"first": "RuntimeError: an illegal memory access"}
    assert outcome.left == {"second": "the device was lost"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the whole command with rows of the test's own, on a GPU that is none."""
    monkeypatch.setattr(gpu, "require_device", lambda: None)
    monkeypatch.setattr(gpu, "build", lambda: {"sources": "ab"})
    monkeypatch.setattr("nmkern.bench.clocks.CudaClock", HostClock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(rows, refused=None):
        monkeypatch.setattr(gpu, "tests_refused", lambda *_: refused)
        monkeypatch.setattr(gpu_rows, "rows", rows)
        return gpu.run(tmp_path, quick=True)

    return run


def identity(report, _):
    ones = torch.ones(3)
    case = Case("identity", 1, 3, 3, "float32", "none", 9)
    yield Row("identity", 0, lambda: report.measure(case, ones.clone, {}, check(ones, ones, 0.0), 0.0))


@pytest.mark.parametrize("refused", [None, "1 were skipped"])
def test_rows_are_measured_whatever_the_tests_said_and_tell_it(run, tmp_path, capsys, refused):
    assert run(identity, refused) == (refused is not None)
    (row,) = read(tmp_path / "rows.jsonl")
    assert row["seconds"] and row["tests"] == (refused or "passed") and row["sources"] == "ab"
    assert (tmp_path / "table.txt").read_text().startswith(f"GPU tests: {refused or 'passed'}\n")
    assert ("did not pass" in capsys.readouterr().out) == (refused is not None)


def test_the_table_is_there_after_each_row(run, tmp_path):
    seen = []

    def rows(report, extent):
        yield from identity(report, extent)
        yield Row("look", 0, lambda: seen.append((tmp_path / "table.txt").read_text()))

    assert run(rows) == 0
    assert "identity" in seen[0]


@pytest.mark.parametrize("start", [lambda out: gpu.run(out, quick=True), lambda out: gpu.sanitize(out, 3)])
def test_what_is_not_installed_is_told_at_once_and_together(tmp_path, monkeypatch, start):
    monkeypatch.setattr(gpu, "require_device", lambda: None)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"^gpu: expected .*hypothesis, pytest, setuptools to be"):
        start(tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_without_what_only_tests_import_rows_are_measured(run, monkeypatch, capsys):
    there = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else there(name)
    )
    assert run(identity, "pytest ended with 4") == 1
    assert "without hypothesis there are no tests" in capsys.readouterr().out


def others(paths):
    """The modules that files import and that are neither Python's nor ours."""
    ours = {"benchmarks", "nmkern", "torch", *(path.stem for path in (gpu.ROOT / "tests").rglob("*.py"))}
    ours |= {path.name for path in (gpu.ROOT / "tests").iterdir()}
    pattern = re.compile(r"^ *(?:import (?=\w)|from (?=\w[\w.]* import))(\w+)", re.MULTILINE)
    found = {name for path in paths for name in pattern.findall(path.read_text())}
    return found - sys.stdlib_module_names - ours


def test_what_is_imported_is_asked_for(run_python):
    known = sorted(others((gpu.ROOT / "nmkern").rglob("*.py")))
    script = f"""
import sys
sys.path.insert(0, {str(gpu.ROOT)!r})
from benchmarks import gpu_rows
from nmkern.bench import clocks, harness, plan
print(*(name for name in {known} if name in sys.modules))
"""
    assert {"psutil", "scipy"} <= set(run_python(script).split()) <= set(gpu.ROWS_IMPORT)
    tests = [path for folder in gpu.TESTS for path in (gpu.ROOT / folder).glob("test_*.py")]
    found = others([*tests, *(gpu.ROOT / "tests").glob("*.py")])
    assert {"pytest", "setuptools"} <= found <= {*gpu.ROWS_IMPORT, *gpu.TESTS_IMPORT}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose setup.py writes down how it was called, and builds what it is told to."""
    for folder in ("nmkern", "csrc/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cuda/x.cu").write_text("1")
    (tmp_path / "setup.py").write_text(SETUP.format(file=gpu.ROOT / "nmkern/bench/sources.py"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.delenv("NMKERN_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("MAKES", "native cuda")
    return tmp_path


SETUP = """
import json, os, runpy, sys
from pathlib import Path
with open("calls", "a") as file:
    file.write(" ".join([os.environ["NMKERN_CUDA_ARCHS"], *sys.argv[1:]]) + "\\n")
for name in os.environ["MAKES"].split():
    Path("nmkern/_" + name + ".so").touch()
    sources = runpy.run_path("{file}")["digest"](Path())
    Path("nmkern/" + name + "_build.json").write_text(json.dumps(dict(sources=sources)))
"""


def test_libraries_are_built_where_they_are_missing_or_of_other_sources(checkout):
    def calls():
        return (checkout / "calls").read_text().splitlines() if (checkout / "calls").exists() else []

    built = gpu.build()
    assert built["libraries"] == {"native": built["sources"], "cuda": built["sources"]}
    assert calls() == ["90a --quiet build_ext --inplace --parallel 2"]
    assert gpu.build() == built and len(calls()) == 1
    (checkout / "csrc/cuda/x.cu").write_text("2")
    again = gpu.build()
    assert len(calls()) == 2 and again["libraries"]["cuda"] == again["sources"] != built["sources"]
    (checkout / "nmkern/cuda_build.json").unlink()  # as before there were hashes
    assert gpu.build() == again and len(calls()) == 3
    (checkout / "nmkern/_native.so").unlink()
    assert gpu.build() == again and len(calls()) == 4


@pytest.mark.parametrize(("capability", "arch"), [((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100")])
def test_libraries_are_built_for_this_gpu_alone(checkout, monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    gpu.build()
    (checkout / "nmkern/_cuda.so").unlink()
    monkeypatch.setenv("NMKERN_CUDA_ARCHS", "80")
    gpu.build()
    assert [line.split()[0] for line in (checkout / "calls").read_text().splitlines()] == [arch, "80"]


def test_a_library_that_stays_of_other_sources_is_told_in_text_and_rows(checkout, monkeypatch, capsys):
    first = gpu.build()
    (checkout / "csrc/cuda/x.cu").write_text("2")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)  # and so nothing that could build it
    monkeypatch.setenv("MAKES", "native")
    built = gpu.build()
    assert built["libraries"] == {"native": built["sources"], "cuda": first["sources"]}
    assert "_cuda.so is of other sources" in capsys.readouterr().out


def test_the_hash_of_the_sources_is_that_of_names_contents_and_flags(tmp_path):
    seen = set()
    for name, text in (("csrc/a.h", ""), ("csrc/a.h", "b"), ("csrc/ab.h", "b"), ("setup.py", "-O3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.add(gpu.digest(tmp_path))
    (tmp_path / "README.md").write_text("no source")
    assert len(seen) == 4 and gpu.digest(tmp_path) in seen


@pytest.mark.parametrize(
    ("library", "nvcc", "tests"),
    [
        (True, True, "gpu"),
        (True, False, "gpu and not nvcc"),
        (False, True, "gpu and not cuda_library"),
        (False, False, "gpu and not cuda_library and not nvcc"),
    ],
)
def test_what_cannot_be_here_is_not_asked_for(tmp_path, monkeypatch, capsys, library, nvcc, tests):
    (tmp_path / "nmkern").mkdir()
    if library:
        (tmp_path / "nmkern/_cuda.so").touch()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/nvcc" if nvcc else None)
    assert gpu.gpu_tests() == ("-m", tests, "tests/native", "tests/backends")
    assert ("neither tested nor measured" in capsys.readouterr().out) == (tests != "gpu")


def test_no_test_that_needs_a_gpu_is_where_it_is_not_looked_for():
    needs = re.compile(r"mark\.(gpu|cuda_library|nvcc|sanitizer)\b")
    tests = gpu.ROOT / "tests"
    found = {path for path in tests.rglob("*.py") if needs.search(path.read_text())}
    found.remove(Path(__file__).resolve())  # whose tests write such tests
    assert len(found) > 2
    assert {path.parent.relative_to(gpu.ROOT).as_posix() for path in found} <= set(gpu.TESTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ("def test_a(): pass", None),
        ("def test_a(): assert False", "pytest ended with 1"),
        ("import os\ndef test_a(): assert os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '1'", None),
        ("import pytest\ndef test_a(): pytest.skip('no backend')\ndef test_b(): pass", "1 were skipped"),
        ("def other(): pass", "none was collected"),
        ("import nothing_of_that_name", "pytest ended with"),
    ],
)
def test_only_gpu_tests_that_ran_and_passed_count(tmp_path, body, refused):
    (tmp_path / "test_x.py").write_text(body)
    tests = ("--rootdir", str(tmp_path), str(tmp_path / "test_x.py"))
    found = gpu.tests_refused(tmp_path, 60, tests, 60)
    assert found is None if refused is None else found.startswith(refused)
    assert (tmp_path / "tests.txt").read_text() != ""


HANGS = """
import pathlib, subprocess, time
def test_fails(): assert 1 + 1 == 3
def test_hangs():
    child = subprocess.Popen(["sleep", "300"])
    pathlib.Path({pid!r}).write_text(str(child.pid))
    time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("xdist", [True, False])
def test_gpu_tests_that_take_too_long_are_ended_and_tell_what_they_found(tmp_path, monkeypatch, xdist):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: xdist and name == "xdist")
    pid = tmp_path / "pid"
    (tmp_path / "test_x.py").write_text(HANGS.format(pid=str(pid)))
    tests = ("--rootdir", str(tmp_path), str(tmp_path / "test_x.py"))
    found = gpu.tests_refused(tmp_path, 20, tests, 3)
    assert found.startswith("they took more than 20 s") and "1 failures" in found
    told = (tmp_path / "tests.txt").read_text()
    assert "assert (1 + 1) == 3" in told and "slowest 15 durations" in told
    assert "in test_hangs" in told  # where it was
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid.read_text()}").exists():
        assert time.monotonic() < deadline, "what the test started is still there"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("pytest_timeout"), reason="there is no pytest-timeout")
def test_a_gpu_test_that_hangs_is_ended_and_the_others_go_on(tmp_path):
    (tmp_path / "test_x.py").write_text(HANGS.format(pid=str(tmp_path / "pid")) + "\ndef test_b(): pass")
    tests = ("--rootdir", str(tmp_path), str(tmp_path / "test_x.py"))
    found = gpu.tests_refused(tmp_path, 60, tests, 3)
    assert found.startswith("pytest ended with 1: 3 tests")
    assert "in test_hangs" in (tmp_path / "tests.txt").read_text()


WATCHED = """
import pytest, time
@pytest.mark.sanitizer
def test_a(tmp_path):
    (tmp_path / "tool.txt").write_text("so far")
    time.sleep(300)
"""


@pytest.mark.slow
def test_what_a_tool_said_so_far_is_there_when_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "require_device", lambda: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    (tmp_path / "test_x.py").write_text(WATCHED)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = sanitizer")
    monkeypatch.setattr(gpu, "TESTS", ("--rootdir", str(tmp_path), str(tmp_path / "test_x.py")))
    assert gpu.sanitize(tmp_path / "out", 0.25) == 1
    (told,) = (tmp_path / "out/sanitizer").rglob("test_a0/tool.txt")
    assert told.read_text() == "so far"


@pytest.mark.slow
def test_tests_that_ignore_the_interrupt_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(300)"
    start = time.monotonic()
    assert gpu.ended([sys.executable, "-c", deaf], 2) is None
    assert time.monotonic() - start < 60


def test_a_background_shell_that_ignores_interrupts_does_not_make_tests_deaf(run_python):
    """There a child inherits that the signal is ignored, and Python then does not raise for it."""
    script = """
import signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.SIG_IGN)
from benchmarks import gpu
child = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
print(gpu.ended([sys.executable, "-c", child], 60))
"""
    assert run_python(script.format(root=str(gpu.ROOT))) == "0\n"


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (16, 16), (192, 24)])
def test_every_logical_core_has_a_worker(tmp_path, monkeypatch, cores, workers):
    commands = []
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(gpu, "ended", lambda command, *_, **__: commands.append(command))
    gpu.tests_refused(tmp_path, 60, ("tests",), 150)
    (command,) = commands
    assert command[command.index("-n") + 1] == str(workers)


@pytest.mark.parametrize("there", [True, False])
def test_a_test_has_a_time_of_its_own(tmp_path, monkeypatch, there):
    commands = []
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: there and name == "pytest_timeout")
    monkeypatch.setattr(gpu, "ended", lambda command, *_, **__: commands.append(command))
    gpu.tests_refused(tmp_path, 60, ("tests",), 150)
    (command,) = commands
    assert ("--timeout=150" in command and "--timeout-method=thread" in command) == there
    assert "faulthandler_timeout=120" in command


@pytest.mark.parametrize("refused", [None, "1 were skipped"])
def test_the_sanitizer_runs_its_own_tests_and_nothing_else(tmp_path, monkeypatch, capsys, refused):
    asked = []
    monkeypatch.setattr(gpu, "require_device", lambda: None)
    monkeypatch.setattr(gpu, "tests_refused", lambda *args: asked.append(args) or refused)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "gpu", "--sanitize", "--out", str(tmp_path), "--minutes", "3"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (refused is not None)
    tests = (f"--basetemp={tmp_path / 'sanitizer'}", "-m", "sanitizer", "tests/native", "tests/backends")
    assert asked == [(tmp_path, 180, tests, 180)]
    assert (refused or "nothing was found") in capsys.readouterr().out
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="expected nvcc and compute-sanitizer on PATH"):
        gpu.sanitize(tmp_path, 3)


@pytest.mark.parametrize("extent", [[], ["--sanitize"]])
def test_the_results_have_a_place_of_their_own(monkeypatch, extent):
    asked = []
    for name in ("run", "sanitize"):
        monkeypatch.setattr(gpu, name, lambda out, *_: asked.append(out))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", *extent])
    with pytest.raises(SystemExit):
        main()
    assert asked == [Path("runs/gpu")]


class Recorded:
    """Stands for torch.cuda: events tell the number of device operations before them."""

    def __init__(self):
        self.queue, self.capturing = [], None
        self.Event = lambda enable_timing: Recorded.Mark(self.queue)
        self.Stream = self.current_stream = lambda: self
        self.CUDAGraph = lambda: Recorded.Graph(self)
        self.synchronize = self.wait_stream = lambda *_: None

    def stream(self, _):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = graph.held
        yield
        self.capturing = None

    def run(self, name):
        (self.queue if self.capturing is None else self.capturing).append(name)

    class Mark:
        def __init__(self, queue):
            self.queue = queue

        def record(self):
            self.place = len(self.queue)

        def elapsed_time(self, other):
            return 1e3 * sum(
                {"ours": 1, "stored": 3, "eager": 5}[n] for n in self.queue[self.place : other.place]
            )

    class Graph:
        def __init__(self, device):
            self.device, self.held = device, []

        def replay(self):
            self.device.queue += self.held


def test_the_cuda_clock_times_each_call_alone_and_in_turn(monkeypatch):
    device = Recorded()
    monkeypatch.setattr(torch, "cuda", device)
    clock = object.__new__(CudaClock)
    clock._filler = type("Filler", (), {"max": lambda _: device.run("filler")})()
    variants = {name: lambda name=name: device.run(name) for name in ("ours", "stored")}
    variants["eager"] = Eager(lambda: device.run("eager"))
    timings = clock.time(variants, seconds=0.0, calls=4, least=3)
    assert [np.median(timing) for timing in timings.values()] == [1, 3, 5]  # of one call; no filler in it
    a_round = ["filler", *4 * ["ours"], "filler", *4 * ["stored"], "filler", "eager"]
    assert device.queue[-3 * len(a_round) :] == 3 * a_round
