"""A layer beyond a memory that is made small."""

import pytest
import torch

from nmkern.bench import huge
from nmkern.bench.clocks import HostClock
from nmkern.bench.harness import Report
from nmkern.bench.plan import follow

F32 = torch.float32


@pytest.mark.parametrize("memory", [2**20, 2**20 - 4, 24 * 2**30, 137 * 10**9])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_the_size_is_the_smallest_that_does_not_fit(memory, dtype):
    size = huge.size_beyond(memory, dtype)
    assert size % 1024 == 0 and size**2 * dtype.itemsize > memory
    assert size == 1024 or (size - 1024) ** 2 * dtype.itemsize <= memory


def test_the_memory_is_the_machines():
    assert huge.memory_bytes("cpu") > 2**28


def test_predicted_and_measured_time_are_in_the_row():
    report = Report(None, HostClock(), tell=lambda _: None)
    plan = huge.Huge("cpu", [1, 2], 0.0, memory=2**22, smaller=256)
    outcome = follow(plan.rows(report), report, float("inf"))
    assert len(outcome.measured) == len(plan) == 4
    for small, large in (report.rows[:2], report.rows[2:]):
        assert (small["name"], large["name"]) == ("linear", "linear, huge")
        assert large["k"] == large["n"] == 2048 and large["m"] == small["m"]
        assert large["extra"]["stored_bytes"] == 2**24
        predicted = 64 * small["seconds"]["ours"]["median"]
        assert large["extra"]["predicted_seconds"] == pytest.approx(predicted)
        assert large["peak_bytes"] < 2**20  # no weights


def test_what_would_take_too_long_is_not_started(monkeypatch):
    report = Report(None, HostClock(), tell=lambda _: None)
    plan = huge.Huge("cpu", [1], 0.0, memory=2**22, smaller=256)
    monkeypatch.setitem(huge.LIMITS, "cpu", 0.0)
    monkeypatch.setattr(huge, "modulated_linear", lambda *_: pytest.fail("it was started"))
    failed = follow(plan.rows(report), report, float("inf")).failed
    assert "a call would take" in failed["M=1 float32 2048 x 2048"]


@pytest.mark.parametrize(("predicted", "started"), [(1.4, True), (1.6, False)])
def test_on_a_gpu_a_call_is_a_thirteenth_of_the_row(monkeypatch, predicted, started):
    """Nothing of a GPU is needed to refuse, and what starts is stopped at the first thing that is."""
    monkeypatch.setattr(huge, "predict", lambda *_: predicted)
    monkeypatch.setattr(huge.cases, "generator", lambda _: pytest.fail("started", pytrace=False))
    expected = pytest.fail.Exception if started else RuntimeError
    with pytest.raises(expected, match="started" if started else "would take 1.6 s, expected at most 1.5 s"):
        huge.measure(Report(None, HostClock()), 1024, 1, torch.bfloat16, "cuda", 0.0)
