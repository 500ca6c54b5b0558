"""``nmkern memory`` as a user types it. Processes start where a test needs them; slow ones are marked."""

import json

import pytest
import torch
from torch import nn

from cli.test_cli import run
from nmkern.memory import measuring, process, tasks
from nmkern.nn import ModulatedLinear

THIS = f"{__name__}:"


def small():
    return ModulatedLinear(32, 16, seed=1)


def with_inputs():
    return nn.Linear(4, 2, device="meta").to_empty(device="cpu"), (torch.ones(3, 4),)


def no_features():
    return nn.ReLU()


def no_model():
    return 3


@pytest.fixture
def here(monkeypatch):
    """Measures in this process: what the command does with figures does not need another."""

    def measure(source, variant, optimizer):
        model, inputs = source.build()
        return measuring.measure(measuring.twin_of(model, variant), inputs, optimizer)

    monkeypatch.setattr(process, "measure_apart", measure)
    monkeypatch.setattr(
        process, "curve_apart", lambda source, counts: tasks.task_curve(source.build()[0], counts)
    )


def test_a_function_of_the_users(tmp_path, capsys, here):
    assert run("memory", THIS + "small", "--batch", 8, "--tasks", 1, 3, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "memory.json").read_text())
    assert record["input"] == "8x32" and record["optimizer"] == "adam"
    assert record["footprints"]["stored"]["buffers"] == 4 * 32 * 16
    assert record["tasks"]["tasks"] == [1, 3]
    assert record["tasks"]["nmkern"]["held"] == [4 * 48, 3 * 4 * 48]
    assert record["commit"] and record["versions"]["torch"] and record["cpu"]
    shown = capsys.readouterr().out
    text = (tmp_path / "table.txt").read_text()
    for told in ("parameters", "checkpoint on disk", "backward, peak", "by layer", "separate networks"):
        assert told in shown and told in text
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_model_without_contexts_and_with_inputs_of_its_own(tmp_path, here):
    assert run("memory", THIS + "with_inputs", "--optimizer", "sgd", "--out", tmp_path) == 0
    record = json.loads((tmp_path / "memory.json").read_text())
    assert record["input"] == "3x4" and record["tasks"] is None
    assert record["footprints"]["nmkern"]["parameters"] == 4 * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "MODEL: expected flynet, flynet-wide, mlp, mixture or module:function, got 'nothing'"),
        (["no.such.module:make"], "cannot be imported: No module named"),
        ([THIS + "absent"], "cannot be imported"),
        ([THIS + "no_model"], "expected a function that returns a module, got int"),
        ([THIS + "no_features"], "no layer has in_features; give a shape with --input"),
        (["flynet", "--input", "8xa"], "argument --input: expected sizes as in 128x784, got '8xa'"),
        (["flynet", "--batch", "0"], "argument --batch: expected an integer of at least 1"),
        (["flynet", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert run("memory", *options, "--out", out) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_inputs_that_do_not_fit_are_told_in_one_line(tmp_path, capsys, here):
    assert run("memory", THIS + "small", "--input", "8x31", "--out", tmp_path) == 2
    assert "31" in capsys.readouterr().err.splitlines()[-1]
