"""What the whole suite shares: the backends it runs on, hypothesis' settings, and the rule on random state.

A test that takes the ``backend`` fixture runs once on the reference, once on every instruction set of the
cpu backend and once on Triton's interpreter, unchanged; with ``--ptx`` on PTX, as Triton compiled it in place
of the interpreter, and as nvcc compiled the cuda backend. Where one cannot run, the test is skipped with the
backend's own reason.
"""

import contextlib
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from native import emulated_library

import nmkern
from nmkern.backends import cpu, triton

# Without a GPU the Triton kernels run under Triton's interpreter. Triton reads this when it is imported,
# which nothing above does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Derandomised: a failure on one machine is a failure on all. The backend fixture is the same for all
# examples of a test, so that its scope is no hazard.
settings.register_profile(
    "nmkern",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
    ],
)
settings.load_profile("nmkern")


def pytest_addoption(parser):
    parser.addoption(
        "--ptx", type=int, help="run what Triton and nvcc compile for this GPU (80, 90), on the CPU"
    )


def pytest_configure(config):
    if arch := config.getoption("ptx"):
        os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
        from ptx import driver

        driver.install(arch)
        from nmkern.backends.triton import launch

        triton._interpreted = lambda: True  # kernels take CPU tensors
        launch.major_of = lambda device: arch // 10


torch.set_num_threads(1)  # workers of xdist share the cores; tests of threads set their own count

BACKENDS = ("reference", *(f"cpu-{isa}" for isa in cpu.ISAS), "triton")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        compiled = ("cuda",) if metafunc.config.getoption("ptx") else ()
        metafunc.parametrize("backend", [*BACKENDS, *compiled], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that passes on the cuda backend has been served by its library."""
    if "callspec" not in vars(item) or item.callspec.params.get("backend") != "cuda":
        return (yield)
    library = emulated_library.load(item.config.getoption("ptx"))
    before = library.emulated_calls()
    result = yield
    assert library.emulated_calls() > before, "no call reached the library for CUDA"
    return result


@pytest.fixture
def backend(request):
    """Forces a backend and, for cpu, an instruction set; the name of the backend."""
    with _forced(request) as name:
        yield name


@pytest.fixture(params=("reference", "cpu"))
def backend_once(request):
    """As ``backend``, with the cpu's own choice of instruction set: for what kernels do not influence."""
    with _forced(request) as name:
        yield name


@contextlib.contextmanager
def _forced(request):
    name, _, isa = request.param.partition("-")
    if name == "cuda":
        if (reason := emulated_library.refusal()) is not None:
            pytest.skip(f"cuda: {reason}")
        emulated_library.load(request.config.getoption("ptx"))
        with emulated_library.serving():
            yield name
        return
    if name == "triton" and (reason := triton.refusal("uniform", torch.float32, "cpu")):
        pytest.skip(f"triton: {reason}")
    if name != "cpu":
        with nmkern.use_backend(name):
            yield name
        return
    reason = cpu.refusal("uniform", torch.float32, "cpu")
    if reason is not None:
        pytest.skip(f"cpu: {reason}")
    before = cpu.isa()
    try:
        cpu.set_isa(isa or before)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        with nmkern.use_backend(name):
            yield name
    finally:
        cpu.set_isa(before)


@pytest.fixture
def gain_rounding(backend, request):
    """What a product of in_gain and an x of 16 bits is rounded by, of itself.

    Kernels for GPUs hold it as one float16, of a row that is scaled: see pack.cu. (What the cuda backend
    multiplies as integers, of at most eight rows, it holds as more.)
    """
    compiled = backend == "cuda" or (backend == "triton" and request.config.getoption("ptx"))
    return 2.0**-11 if compiled else 0.0


@pytest.fixture
def few(backend):
    """A function that thins out the cases of a test for Triton's interpreter: ``few(cases, one_in)``.

    A call takes 0.1 s there, most of it Python, where other backends take microseconds. What is left
    still has every kind of argument, by ``start``. PTX of nvcc takes milliseconds for a small call, and is
    given all cases, but where they are large: one in ``cuda``.
    """

    def thin(cases, one_in, start=0, cuda=1):
        cases, one_in = list(cases), {"triton": one_in, "cuda": cuda}.get(backend, 1)
        return cases[start % one_in :: one_in]

    return thin


@pytest.fixture
def passed_over(backend):
    """As ``few``, for examples that hypothesis draws: whether to leave one out, all but one in ``one_in``."""
    drawn = itertools.count()
    return lambda one_in: backend == "triton" and next(drawn) % one_in > 0


@pytest.fixture
def threads():
    """A function that sets PyTorch's thread count for a backend; the count before comes back.

    The reference has no threads of its own: there PyTorch's are tested by PyTorch, and only cost time.
    """
    before = torch.get_num_threads()

    def set_count(count: int, backend: str) -> None:
        torch.set_num_threads(1 if backend == "reference" else count)

    yield set_count
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def global_random_state():
    """No test, and nothing that a test calls, moves the global random state of anyone."""
    before = _random_state()
    yield
    assert _random_state() == before, "the test moved a global random state"


def _random_state() -> tuple:
    _, keys, *position = np.random.get_state()  # noqa: NPY002 - it is the legacy state that is guarded
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()


@pytest.fixture
def run_python():
    """A function that runs a script in a process of its own and returns what it printed."""

    def run(script: str, *, check: bool = True, **environment: str) -> str:
        plain = {k: v for k, v in os.environ.items() if not k.startswith("NMKERN_")}
        # The child imports the same nmkern, wherever this one came from.
        path = str(Path(nmkern.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**plain, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"the script ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    return run
