"""Footprints against sizes that are known: exact where the sizes say so, bounds for peaks."""

import copy
import io
import json
import re
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from nmkern.memory import footprint, process, task_curve
from nmkern.memory import tasks as tasks_module
from nmkern.memory.measuring import CSR, OURS, STORED, bytes_of
from nmkern.memory.meters import AllocatorMeter, ResidentMeter
from nmkern.memory.sources import BUILT_IN, Source
from nmkern.nn import ModulatedLinear, SparseProjection

K, H, N, M = 256, 512, 64, 32


def linear(kind, *sizes):
    """A layer whose parameters move no random state."""
    layer = kind(*sizes, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.fill_(0.1)
    return layer


def model():
    return nn.Sequential(
        SparseProjection(K, H, 4, seed=1),
        nn.ReLU(),
        ModulatedLinear(H, N, seed=2, gain="both"),
        linear(nn.Linear, N, 8),
    )


def x():
    return torch.ones(M, K)


def test_a_process_of_its_own_first_uses_the_device_that_it_measures_on(monkeypatch):
    """What a device's library keeps on the host is no part of a model's resident size."""
    jobs, warmed = [], []

    def run(command, **_):
        folder = Path(re.search(r"child\('(.*)'\)", command[-1])[1])
        jobs.append(json.loads((folder / "job.json").read_text())["device"])
        (folder / "answer.json").write_text("{}")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(process.subprocess, "run", run)
    process._run((model(), (torch.ones(M, K, device="meta"),)), variant=OURS, optimizer="adam")
    process._run(Source("flynet", device="cuda:1"), counts=[1])
    assert jobs == ["meta", "cuda:1"]
    monkeypatch.setattr(
        process, "measure", lambda layers, inputs, _: warmed.extend([*layers.parameters(), *inputs])
    )
    with torch.random.fork_rng(devices=[]):
        process._load_what_is_loaded_once("meta")
    assert warmed and all(tensor.device.type == "meta" for tensor in warmed)


CONTEXT = 4 * (H + N + N)  # gains and bias
HEAD = 4 * (8 * N + 8)


@pytest.fixture(scope="module")
def measured():
    return footprint(model(), x(), isolated=False)


def test_parameters_buffers_and_state_are_exact(measured):
    assert list(measured.footprints) == [OURS, STORED, CSR]
    csr = 4 * H * 4 + 8 * H * 4 + 8 * (H + 1)  # values, columns, row starts: int64 indices
    for variant, weights in ((OURS, 0), (STORED, 4 * (H * K + H * N)), (CSR, csr + 4 * H * N)):
        found = measured[variant]
        assert found.parameters == CONTEXT + HEAD
        assert found.buffers == weights
        tensors = 5  # gains, bias; weight and bias of the head: each with a step count beside two moments
        assert found.optimizer == 2 * (CONTEXT + HEAD) + 4 * tensors
        assert found.held == found.parameters + found.buffers + found.optimizer


def test_layers_add_up_to_the_total(measured):
    for found in measured.footprints.values():
        assert [layer.name for layer in found.layers] == ["0", "2", "3"]
        for name in ("parameters", "buffers", "optimizer"):
            assert sum(getattr(layer, name) for layer in found.layers) == getattr(found, name)
        rest = found.checkpoint - sum(layer.checkpoint for layer in found.layers)
        assert 0 < rest < 8192  # names and headers
        assert all(layer.forward > 0 for layer in found.layers)
    first = measured[STORED].layers[0]
    assert (first.kind, first.buffers, first.parameters) == ("StoredProjection", 4 * H * K, 0)


def test_the_checkpoint_is_the_file_that_torch_writes(measured):
    file = io.BytesIO()
    torch.save(model().state_dict(), file)
    # The archive holds its own name, which pads tensors to other places.
    assert abs(measured[OURS].checkpoint - len(file.getvalue())) < 2048


def test_peaks_are_within_what_the_sizes_allow(measured):
    activations = 4 * M * (H + H + N + 8)  # projection, ReLU, layer, head
    for found in measured.footprints.values():
        assert 4 * M * (H + N + 8) <= found.forward.allocated <= 6 * activations
        gradients = CONTEXT + HEAD
        assert gradients <= found.backward.allocated <= 8 * activations + gradients
        assert gradients <= found.step.allocated <= 4 * gradients + 4096
        assert found.forward.resident is None and found.resident is None
    # Weights are never allocated in ours.
    assert measured[OURS].forward.allocated < 4 * H * K


def test_the_model_and_its_inputs_stay_as_they_are():
    given, inputs = model(), x()
    before = copy.deepcopy(given.state_dict())
    footprint(given, (inputs,), isolated=False, optimizer="sgd")
    assert all(torch.equal(given.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in given.parameters()) and torch.equal(inputs, x())


def test_a_model_that_trains_nothing_has_a_forward_pass_alone():
    found = footprint(SparseProjection(64, 128, 3), torch.ones(2, 64), isolated=False)[STORED]
    assert (found.parameters, found.buffers, found.optimizer) == (0, 4 * 64 * 128, 0)
    assert found.backward is None and found.step is None and found.forward.allocated >= 4 * 2 * 128


def test_the_papers_network_holds_its_contexts_alone():
    model, inputs = Source("flynet").build()
    found = footprint(model, inputs, isolated=False)
    assert (found[OURS].buffers, found[STORED].buffers) == (0, 4 * 7840 * (784 + 10))
    assert found[OURS].parameters == found[STORED].parameters == 4 * 7841
    hidden = 4 * 128 * 7840
    assert found[OURS].forward.allocated < hidden < found[STORED].forward.allocated


@pytest.mark.slow
def test_each_variant_in_a_process_of_its_own():
    size = 2048
    found = footprint(ModulatedLinear(size, size, seed=1), torch.ones(8, size))
    stored = 4 * size * size
    assert found[STORED].buffers - found[OURS].buffers == stored
    assert found[STORED].checkpoint - found[OURS].checkpoint >= stored
    assert found[STORED].resident - found[OURS].resident == pytest.approx(stored, rel=0.3)
    assert found[OURS].forward.allocated < stored / 8 and found[OURS].forward.resident < stored / 2
    record = found.to_dict()
    assert record["footprints"]["nmkern"]["layers"][0]["kind"] == "ModulatedLinear"


def test_meters_see_what_is_taken():
    kept = []
    usage = AllocatorMeter("cpu").measure(lambda: kept.append(torch.ones(2**18) + torch.ones(2**18)))
    assert usage.held == 2**20 and 2 * 2**20 <= usage.peak <= 3 * 2**20 + 4096
    meter = ResidentMeter()
    if meter.available:
        grown = meter.growth(lambda: torch.ones(2**24))
        assert 60 << 20 <= grown < 80 << 20
        assert meter.growth(lambda: None) < 4 << 20


def test_the_curve_counts_contexts_and_networks():
    given = ModulatedLinear(K, N, seed=1)
    curve = task_curve(given, [1, 2, 5])
    context, weights = 4 * (K + N), 4 * K * N
    assert curve["nmkern"]["held"] == [context, 2 * context, 5 * context]
    assert curve["stored"]["held"] == [weights + t * context for t in (1, 2, 5)]
    assert curve["separate"]["held"] == [t * (weights + context) for t in (1, 2, 5)]
    for way, series in curve.items():
        if way != "tasks":
            assert all(
                0 < c - h < 8192 * 5 for c, h in zip(series["checkpoint"], series["held"], strict=True)
            )
    assert given.num_contexts == 1


def test_what_would_take_too_much_is_left_out_of_the_curve(monkeypatch):
    monkeypatch.setattr(tasks_module, "LIMIT", 3 * 4 * K * N)
    curve = task_curve(ModulatedLinear(K, N, seed=1), [1, 2, 4])
    assert [value is None for value in curve["separate"]["held"]] == [False, False, True]
    assert None not in curve["stored"]["held"] + curve["nmkern"]["held"]


def test_bytes_of_shared_tensors_count_once():
    tensor = torch.ones(100)
    assert bytes_of([tensor, tensor[:10], tensor.view(10, 10), None]) == 400


class OfMain(nn.Linear):
    __module__ = "__main__"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, torch.ones(2)), {}, TypeError, "model: expected a torch.nn.Module, got int"),
        ((linear(nn.Linear, 2, 2), None), {}, TypeError, "inputs: expected a tensor or several"),
        ((linear(nn.Linear, 2, 2), []), {}, TypeError, "inputs: expected a tensor or several"),
        (
            (linear(nn.Linear, 2, 2), torch.ones(2)),
            {"optimizer": "sofia"},
            ValueError,
            "one of adam, rmsprop, sgd",
        ),
        ((linear(OfMain, 2, 2), torch.ones(2)), {}, ValueError, "OfMain is defined in __main__"),
        (
            (linear(nn.LSTM, 2, 2), torch.ones(3, 2)),
            {"isolated": False},
            TypeError,
            "returns a tensor, got tuple",
        ),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    if arguments[1] is None:
        arguments = (arguments[0], ())
    with pytest.raises(error, match=message):
        footprint(*arguments, **options)


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"ended with 1.*(shape|size)"):
        footprint(linear(nn.Linear, 4, 2), torch.ones(3, 5))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_take_their_inputs(name):
    built, (inputs,) = Source(name, batch=2).build()
    assert inputs.shape == (2, 784) and built(inputs).shape == (2, 10)


def test_the_papers_network_has_the_papers_sizes():
    built, _ = Source("flynet").build()
    assert built.encoder.matrix.shape == (7840, 784) and built.decoder.matrix.shape == (10, 7840)
    assert sum(p.numel() for p in built.parameters()) == 7841
