"""``python -m benchmarks gpu [--out DIR] [--quick | --sanitize]``: all that needs a GPU, in one command.

    CUDA device? -> native libraries, built in place if need be -> the GPU tests -> the GPU's rows -> a table

Runs from a checkout, installed or not. DIR gets tests.txt (what pytest said), rows.jsonl (appended row
by row) and table.txt (written anew after each). Every row checks its own result before it is timed, so rows
are measured even where a GPU test did not pass; each of them, and the table, then says so. The exit status is
0 only if every GPU test ran and passed and every row that was tried went well. Rows that no longer fit into
the time are listed.
With --sanitize, CUDA's compute-sanitizer watches the cases of the CUDA kernels instead, and that is all.
"""

import contextlib
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]
# By its path, as nothing may import the package before its libraries are built.
digest = runpy.run_path(str(ROOT / "nmkern/bench/sources.py"))["digest"]
MINUTES = 8.0
_TESTS_SHARE = 0.6  # of the time, at most: the rest is for the rows
_EACH = 150.0  # seconds of a test; that which compiles most takes some 60
# What is imported, by the rows and by the tests; all else does without.
ROWS_IMPORT = ("numpy", "psutil", "scipy", "triton")
TESTS_IMPORT = ("hypothesis", "pytest", "setuptools")
# Where tests that need a GPU are. First those that compile for longest: the others run meanwhile.
TESTS = ("tests/native", "tests/backends")
_MOST_WORKERS = 24
_GRACE = 30.0  # seconds that pytest has to write down what it knows


def require_device() -> None:
    """RuntimeError where PyTorch finds no CUDA device."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            "gpu: expected a CUDA device, PyTorch finds none "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}): run this where there is an "
            "NVIDIA GPU, or `python -m benchmarks cpu` here"
        )


def require_modules(needed: Sequence[str], wanted: Sequence[str] = ()) -> None:
    """RuntimeError where one of ``needed`` is not installed; it, or else a line, names all that is missing.

    First of all: what is imported only after minutes of tests would be found missing then.
    """
    missing = [name for name in (*needed, *wanted) if importlib.util.find_spec(name) is None]
    if set(missing) & set(needed):
        raise RuntimeError(f"gpu: expected {', '.join(missing)} to be installed (pip install '.[test]')")
    if missing:
        print(f"without {', '.join(missing)} there are no tests", flush=True)


def libraries() -> dict[str, str | None]:
    """The hash of the sources that each native library was built from; None: no library, or no record."""
    found = {}
    for name in ("native", "cuda"):
        try:
            record = json.loads((ROOT / f"nmkern/{name}_build.json").read_text())
        except FileNotFoundError:
            record = {}
        found[name] = record.get("sources") if (ROOT / f"nmkern/_{name}.so").exists() else None
    return found


def build() -> dict[str, object]:
    """The native libraries, beside their package, where they are missing or of other sources.

    That for GPUs with nvcc, and for this GPU alone. What rows say of it: the hash of the checkout's sources,
    and of those of each library.
    """
    sources = digest(ROOT)
    wanted = ["native", *(["cuda"] if shutil.which("nvcc") else [])]
    if any(libraries()[name] != sources for name in wanted):
        print("building the native libraries", flush=True)
        capability = torch.cuda.get_device_capability()
        arch = "90a" if capability == (9, 0) else "".join(map(str, capability))
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "2"],
            cwd=ROOT,
            env={"NMKERN_CUDA_ARCHS": arch, **os.environ},
            capture_output=True,
            text=True,
        )
        if not_built := [name for name in wanted if libraries()[name] != sources]:  # rows do without
            print(f"{not_built} was not built; going on:\n{done.stdout}{done.stderr}", flush=True)
    found = libraries()
    for name, built_from in found.items():
        if (ROOT / f"nmkern/_{name}.so").exists() and built_from != sources:
            print(f"_{name}.so is of other sources ({built_from}) than these ({sources})", flush=True)
    return {"sources": sources, "libraries": found}


def gpu_tests() -> tuple[str, ...]:
    """The tests that must pass: those that need a GPU, but for what nvcc would have to be here for."""
    there = {"cuda_library": (ROOT / "nmkern/_cuda.so").exists(), "nvcc": shutil.which("nvcc") is not None}
    if missing := [name for name, found in there.items() if not found]:
        print(f"without {' and '.join(missing)}: what needs it is neither tested nor measured", flush=True)
    return ("-m", " and not ".join(["gpu", *missing]), *TESTS)


def ended(command: Sequence[str], seconds: float, **how: Any) -> int | None:
    """The exit status of a command; None where it took more than ``seconds``, and was interrupted.

    Nothing that it started outlives it: a program that hangs would hold the GPU while rows are measured.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background: a child inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, start_new_session=True, **how)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def workers_here() -> int:
    """One for each logical core, where xdist's auto counts physical ones; each takes half a GB of the GPU."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def tests_refused(out: Path, seconds: float, tests: Sequence[str], each: float) -> str | None:
    """Run ``tests`` with pytest, output to ``out``/tests.txt; why they do not count as passed, or None.

    A test that is skipped does not count: on this machine nothing is missing that could excuse it. One that
    takes more than ``each`` seconds is ended where there is pytest-timeout, and tells where it is anyway.
    """
    results = out / "tests.xml"
    results.unlink(missing_ok=True)
    workers = ("-n", str(workers_here()), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    ours = {k: v for k, v in os.environ.items() if not k.startswith("NMKERN_") and k != "TRITON_INTERPRET"}
    # A process of PyTorch 2.11 that ends soon after its first compilation may wait 300 s for compiling ones.
    ours.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    ours["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # addopts asks for xdist, which may not be there.
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-rfEs", "--strict-markers", "--durations=15"]
    # Where a test hangs is told first: a worker that pytest-timeout ends says no more than the test's name.
    limit = ["-o", f"faulthandler_timeout={0.8 * each:.0f}"]
    if importlib.util.find_spec("pytest_timeout"):
        limit += [f"--timeout={each:.0f}", "--timeout-method=thread"]
    command = [*pytest, *workers, *limit, f"--junitxml={results.resolve()}", *tests]
    with (out / "tests.txt").open("w") as file:
        status = ended(command, seconds, cwd=ROOT, env=ours, stdout=file, stderr=subprocess.STDOUT)
    why = f"they took more than {seconds:.0f} s" if status is None else f"pytest ended with {status}"
    if not results.exists():
        return why
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    told = ", ".join(f"{count} {key}" for key, count in counts.items())
    print(f"GPU tests: {told}", flush=True)
    if counts["tests"] == 0 and status is not None:
        return "none was collected"
    if status != 0 or counts["failures"] or counts["errors"]:
        return f"{why}: {told}"
    return f"{counts['skipped']} were skipped" if counts["skipped"] else None


def sanitize(out: Path, minutes: float) -> int:
    """The CUDA kernels under compute-sanitizer; the exit status. RuntimeError without what it takes."""
    require_device()
    require_modules(TESTS_IMPORT)
    if missing := [name for name in ("nvcc", "compute-sanitizer") if shutil.which(name) is None]:
        raise RuntimeError(f"gpu --sanitize: expected {' and '.join(missing)} on PATH")
    out.mkdir(parents=True, exist_ok=True)
    # What the tools say goes to files of the tests' folders as they go, and is there whatever ends them. One
    # may take minutes for its test, and all of the time if it must.
    told = out / "sanitizer"
    tests = (f"--basetemp={told.resolve()}", "-m", "sanitizer", *TESTS)
    refused = tests_refused(out, 60 * minutes, tests, 60 * minutes)
    print(f"compute-sanitizer: {refused or 'nothing was found'}. See {out / 'tests.txt'} and {told}")
    return int(refused is not None)


def run(out: Path, quick: bool, minutes: float = MINUTES, commit: str | None = None) -> int:
    """The whole command; its exit status. RuntimeError where there is no CUDA device.

    ``quick``: few sizes and batches; ``minutes``: for all of it; ``commit``: where there is no history.
    """
    start = time.monotonic()
    require_device()
    require_modules(ROWS_IMPORT, TESTS_IMPORT)
    out.mkdir(parents=True, exist_ok=True)
    built = build()
    refused = tests_refused(out, _TESTS_SHARE * 60 * minutes, gpu_tests(), _EACH)
    if refused:
        print(f"GPU tests did not pass: {refused}. See {out / 'tests.txt'}", flush=True)
    # Only now: what imports the package must find the library that has just been built.
    from benchmarks import gpu_rows
    from nmkern.bench.clocks import CudaClock
    from nmkern.bench.harness import Report
    from nmkern.bench.plan import Outcome, Row, follow

    report = Report(out / "rows.jsonl", CudaClock(), commit, also={"tests": refused or "passed", **built})
    extent = gpu_rows.QUICK if quick else gpu_rows.Extent()
    outcome = Outcome()

    def tabled() -> Iterator[Row]:
        """The rows, with the table written after each: whoever ends this process does not tell it."""
        for row in gpu_rows.rows(report, extent):
            yield row
            (out / "table.txt").write_text(gpu_rows.table(report.rows, outcome) + "\n")

    try:
        deadline = start + 60 * minutes
        follow(tabled(), report, deadline, settle=torch.cuda.synchronize, outcome=outcome)
    finally:
        text = gpu_rows.table(report.rows, outcome)
        (out / "table.txt").write_text(text + "\n")
        print(text, flush=True)
    return 1 if refused or outcome.failed or not outcome.measured else 0
