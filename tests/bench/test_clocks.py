"""The host's clock takes variants in turn, others with threads of their own apart; a meter on a fake GPU."""

import types

import pytest
import torch

from nmkern.bench import clocks
from nmkern.memory.meters import AllocatorMeter


@pytest.fixture
def slept(monkeypatch):
    found = []
    monkeypatch.setattr(clocks, "_PAUSE", 0.0)
    monkeypatch.setattr(clocks.time, "sleep", found.append)
    return found


def test_variants_are_called_in_turn_and_others_apart(slept):
    order = []
    variants = {name: lambda name=name: order.append(name) for name in ("ours", "stored")}
    variants["numpy"] = clocks.Apart(lambda: order.append("numpy"))
    samples = clocks.HostClock().time(variants, seconds=0.0, calls=2)
    assert {name: len(found) for name, found in samples.items()} == dict.fromkeys(variants, 3)
    together = ["ours", "ours", "stored", "stored"]
    assert order == [*4 * together, *4 * ["numpy", "numpy"]]  # the first time is not timed
    assert list(samples) == list(variants) and len(slept) == 2  # before numpy and after it
    assert all((found >= 0).all() for found in samples.values())


def test_freed_memory_stays_with_the_process():
    resource = pytest.importorskip("resource", reason="page faults are counted on Unix")
    clocks.HostClock()
    if not clocks.keep_freed_memory():
        pytest.skip("no glibc: mallopt is its function")

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def allocate():  # 4 MiB, and 16 MiB that would take the heap's top with them
        torch.ones(2**20)
        torch.ones(2**22)

    # The heap may still grow among the first ten.
    for _ in range(2):
        before = faults()
        for _ in range(10):
            allocate()
    assert faults() - before < 1000  # with glibc's defaults 8192


def test_nothing_waits_where_nothing_is_apart(slept):
    clocks.HostClock().time({"ours": lambda: None}, seconds=0.0)
    assert slept == []


def test_seconds_are_those_of_one_call(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: float(next(ticks)))
    samples = clocks.HostClock().time({"ours": lambda: None, "stored": lambda: None}, 1000.0, calls=4)
    assert all((found == 0.25).all() and len(found) >= 7 for found in samples.values())


def test_the_cuda_meter_reads_the_allocators_counters(monkeypatch):
    state = types.SimpleNamespace(held=100, peak=100)

    def allocate(count):
        state.held += count
        state.peak = max(state.peak, state.held)

    asked = []
    fake = types.SimpleNamespace(
        synchronize=asked.append,
        reset_peak_memory_stats=lambda device: asked.append(device) or setattr(state, "peak", state.held),
        memory_allocated=lambda device: asked.append(device) or state.held,
        max_memory_allocated=lambda device: asked.append(device) or state.peak,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    usage = AllocatorMeter("cuda").measure(lambda: (allocate(50), allocate(-30), allocate(5)))
    assert (usage.peak, usage.held) == (50, 25)
    assert set(asked) == {torch.device("cuda")}
    asked.clear()
    assert AllocatorMeter("cuda:1").measure(lambda: allocate(-25)).peak == 0
    assert set(asked) == {torch.device("cuda:1")}
