"""``nmkern bench`` as a user types it. The clock is made up where a test depends on times."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from cli.test_cli import run
from nmkern.bench import clocks, huge

PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["--quick", "--m", 1, 2, "--k", 48, "--n", 32]


@pytest.fixture
def steady(monkeypatch):
    """Every variant takes a fixed time, ours what the returned list holds; and no pictures are drawn."""
    seconds = [1e-3]

    def time(self, variants, budget, calls=1):
        return {
            name: np.full(9, seconds[0] if name == "ours" else 5e-3 + 1e-3 * place)
            for place, name in enumerate(variants)
        }

    monkeypatch.setattr(clocks.HostClock, "time", time)
    monkeypatch.setattr("nmkern.bench.noise.Load.share", lambda self: 0.0)
    monkeypatch.setattr("nmkern.bench.figures.save_figures", lambda directory, rows: [])
    return seconds


def rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_a_sweep_ends_with_rows_a_table_and_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nmkern.cli.bench.QUICK", (0.01, 2))
    found_before, absent = importlib.util.find_spec, ("brainevent", "jax", "peft")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else found_before(name)
    )
    against = ["stored", "generate", "numpy", "brainevent", "vera"]
    options = ["--way", "forward", "backward", "--dtype", "float32", "bfloat16", "--against", *against]
    assert run("bench", *TINY, *options, "--out", tmp_path) == 0
    found = rows(tmp_path)
    cells = {(row["name"], row["m"], row["k"], row["n"]) for row in found if "seconds" in row}
    assert ("linear", 1, 48, 32) in cells and ("linear, transposed", 2, 32, 48) in cells
    products = [row for row in found if row["name"].startswith("linear")]
    assert found[0] == {**found[0], "name": "vera", "not_measured": "missing: peft is not installed"}
    assert len(products) == 2 * 2 * 2 * 2  # M, dtypes, ways, passes
    for row in products:
        assert row["commit"] and row["versions"]["torch"] and row["cpu"] and row["date"]
        assert row["seconds"]["ours"].keys() == {"median", "p20", "p80"}
        assert row["intervals"].keys() == row["ratios"].keys() and row["load"] >= 0
        assert row["peak_bytes"] > 0 and row["relative_error"] <= 2**-8
        assert row["own_weights"] == [name for name in ("generate", "numpy") if name in row["ratios"]]
    shown = capsys.readouterr().out
    text = (tmp_path / "table.txt").read_text()
    for told in ("copying memory", "The machine was"):
        assert told in " ".join(shown.split()) and told in text
    for name, package in (("brainevent", "brainevent"), ("vera", "peft")):
        assert f"{name}: missing: {package} is not installed" in text
    for name in ("time.png", "rate.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_the_sparse_family_and_a_training_step(tmp_path, steady):
    options = ["--family", "sparse", "uniform", "--way", "forward", "training", "--dtype", "float32"]
    assert run("bench", *TINY, *options, "--against", "stored", "dense", "csr", "--out", tmp_path) == 0
    names = {row["name"]: row["ratios"].keys() for row in rows(tmp_path)}
    assert names["projection"] == {"dense", "csr"} and names["layer, trained"] == {"stored"}


def test_compare_finds_what_got_slower_and_nothing_else(tmp_path, capsys, steady):
    old, new = tmp_path / "old", tmp_path / "new"
    options = [*TINY, "--dtype", "float32", "--against", "stored"]
    assert run("bench", *options, "--out", old) == 0
    assert run("bench", "--quick", "--compare", old / "rows.jsonl", "--against", "stored", "--out", new) == 0
    assert "within noise" in capsys.readouterr().out
    measured = [{(row["name"], row["m"], row["k"]) for row in rows(out)} for out in (old, new)]
    assert measured[0] == measured[1]  # without options, the cases of the old rows
    steady[0] = 1.3e-3
    assert run("bench", "--quick", "--compare", old / "rows.jsonl", "--against", "stored", "--out", new) == 1
    assert "+30.0 %" in capsys.readouterr().out


def test_huge_tells_predicted_and_measured_time(tmp_path, capsys, steady, monkeypatch):
    monkeypatch.setattr(huge, "memory_bytes", lambda device: 2**22)
    monkeypatch.setattr(huge, "SMALLER", 256)
    assert run("bench", "--huge", "--m", 1, "--out", tmp_path) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2048 x 2048 at M = 1 (16.0 MiB stored, memory 4.0 MiB): predicted 64 ms, measured 1 ms" in shown


def test_a_wrong_result_ends_with_code_1_and_no_figure(tmp_path, capsys, steady, monkeypatch):
    monkeypatch.setattr("nmkern.bench.cases.modulated_linear", lambda x, matrix: x[:, : matrix.rows])
    assert run("bench", *TINY, "--dtype", "float32", "--against", "stored", "--out", tmp_path) == 1
    assert "not timed" in capsys.readouterr().out
    assert [row["name"] for row in rows(tmp_path) if "seconds" in row] == ["copy"] * 2


def test_interrupting_keeps_what_was_measured(tmp_path, capsys, steady, monkeypatch):
    monkeypatch.setattr(
        "nmkern.bench.cases.product", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert run("bench", *TINY, "--out", tmp_path) == 130
    assert "copying memory" in (tmp_path / "table.txt").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--m", "0"], "argument --m: expected an integer of at least 1, got '0'"),
        (["--family", "cauchy"], "argument --family: invalid choice: 'cauchy'"),
        (["--against", "abacus"], "--against: expected some of stored, compiled"),
        (["--family", "sparse", "--way", "training"], "--way: the sparse family has no training step"),
        (["--against", "csr"], "--against: csr is no rival of the family uniform"),
        (["--device", "cuda:99"], "GPUs that PyTorch finds, got 'cuda:99'"),
        (["--compare", "/nowhere/rows.jsonl"], "No such file or directory"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert run("bench", *options, "--out", out) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize(("name", "chosen"), [("cuda", []), ("cuda:1", [1])])
def test_a_gpu_without_an_index_is_the_current_one(tmp_path, capsys, monkeypatch, name, chosen):
    """PyTorch's own set_device, which takes no name without an index; then the clock would be made."""
    asked = []

    def no_clock():
        raise RuntimeError("the clock comes next")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", asked.append, raising=False)
    monkeypatch.setattr(clocks, "CudaClock", no_clock)
    assert run("bench", "--device", name, "--out", tmp_path / "out") == 2
    assert "the clock comes next" in capsys.readouterr().err
    assert asked == chosen


def test_comparing_with_other_cases_is_refused_before_measuring(tmp_path, capsys, steady):
    options = ["--dtype", "float32", "--against", "stored", "--out", tmp_path]
    assert run("bench", *TINY, *options) == 0
    assert run("bench", "--quick", "--k", 64, "--compare", tmp_path / "rows.jsonl", *options) == 2
    assert "expected a case that these options measure too" in capsys.readouterr().err
    assert len(rows(tmp_path)) > 1  # the old rows are still there


def test_the_rivals_are_listed(capsys):
    assert run("bench", "--against", "list") == 0
    shown = capsys.readouterr().out
    assert "stored " in shown and "marlin" in shown and "vera" in shown
