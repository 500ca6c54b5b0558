"""The commands as a user types them: files, exit codes and messages."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from continual.test_tasks import write_mnist
from safetensors.torch import load_file, save_file

from nmkern import __version__, environment, stream
from nmkern.backends.selection import BACKENDS
from nmkern.cli import main, progress
from nmkern.continual.training import TaskDone

SMALL = ["--num-tasks", "3", "--epochs", "1", "--width", "2"]


def run(*arguments):
    """The exit code of the command, also where argparse ends it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a small run."""
    out = tmp_path_factory.mktemp("runs") / "new" / "small"
    assert run("train", *SMALL, "--seed", 3, "--out", out) == 0
    return out


@pytest.fixture
def copied(trained, tmp_path):
    """The same files in a directory that may be changed."""
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def read(directory):
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def test_results_say_what_ran_and_what_came_out(trained):
    results = read(trained)
    assert results["complete"] is True
    settings = results["settings"]
    assert (settings["tasks"], settings["num_tasks"], settings["data"]) == ("rotated", 3, "digits")
    assert (settings["width"], settings["fan_in"], settings["epochs"], settings["seed"]) == (2, 7, 1, 3)
    assert (settings["family"], settings["device"]) == ("uniform", "cpu")
    assert (settings["batch_size"], settings["learning_rate"]) == (128, 0.01)
    assert results["tasks"] == ["0°", "10°", "20°"]
    versions = results["versions"]
    assert (versions["nmkern"], versions["stream"]) == (__version__, stream.VERSION)
    assert (versions["torch"], versions["numpy"]) == (torch.__version__, np.__version__)
    assert results["platform"]["cpu"] and results["platform"]["system"]
    assert set(results["kernels"]) == {"encoder", "decoder"}
    for name in ("accuracy", "logits_sha256"):
        matrix = results[name]
        assert [len(row) for row in matrix] == [3, 3, 3]
        for i, row in enumerate(matrix):
            assert [cell is None for cell in row] == [j > i for j in range(3)]
        for column in zip(*matrix, strict=True):
            assert len({cell for cell in column if cell is not None}) == 1
    assert len(results["seconds"]) == 3
    metrics = results["metrics"]
    assert metrics["average_accuracy"] == pytest.approx(sum(results["accuracy"][-1]) / 3)
    assert metrics["worst_accuracy"] == min(results["accuracy"][-1])
    assert (metrics["forgetting"], metrics["backward_transfer"]) == (0.0, 0.0)
    assert metrics["logits_bit_identical"] is True
    assert metrics["parameters_per_task"] == 129
    assert metrics["held_bytes"] == 3 * 129 * 4
    assert metrics["stored_bytes"] == 3 * 129 * 4 + 128 * 64 * 4 + 128 * 10 * 4
    assert metrics["encoder_csr_bytes"] == 128 * 7 * 12 + 129 * 8


def test_train_writes_four_files_and_leaves_no_other(trained):
    names = ["accuracy.png", "context_similarity.png", "contexts.safetensors", "results.json"]
    assert sorted(path.name for path in trained.iterdir()) == names
    for name in names[:2]:
        assert (trained / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_train_ends_with_a_table_and_the_place(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", *SMALL, "--tasks", "split", "--family", "rademacher", "--out", out) == 0
    shown = capsys.readouterr().out
    for text in ("average accuracy", "worst task", "forgetting", "0.00 points", "bit-identical"):
        assert text in shown
    for text in ("seconds per task", "parameters per task", "bytes held", "bytes with stored weights"):
        assert text in shown
    assert str(out) in shown
    assert read(out)["tasks"] == ["0, 1", "2, 3", "4, 5"]


def test_eval_reproduces_every_digit(trained, capsys):
    assert run("eval", trained) == 0
    shown = capsys.readouterr().out
    assert "3 tasks re-tested" in shown
    assert "logits bit-identical to the run's: yes" in shown
    assert "every accuracy equals the recorded one" in shown


def test_eval_fails_where_a_context_was_altered(copied, capsys):
    path = copied / "contexts.safetensors"
    tensors = load_file(path)
    tensors["decoder.contexts.1.in_gain"].neg_()
    save_file(tensors, path)
    assert run("eval", copied) == 1
    shown = capsys.readouterr()
    assert "task 1 (10°): recorded accuracy" in shown.err
    assert "1 of 3 accuracies differ" in shown.err
    assert "logits bit-identical to the run's: no" in shown.out


def test_eval_tells_of_another_kernel(copied, capsys):
    results = read(copied)
    results["kernels"]["decoder"] = "abacus"
    (copied / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert run("eval", copied) == 0
    assert "decoder: the run's kernel was abacus, now it is" in capsys.readouterr().out


def test_eval_refuses_contexts_of_another_network(copied, capsys):
    results = read(copied)
    results["settings"]["seed"] = 4
    (copied / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert run("eval", copied) == 2
    assert "the checkpoint was made with another matrix: seed 3" in capsys.readouterr().err


def test_eval_of_no_run(tmp_path, capsys):
    assert run("eval", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("nmkern eval: error: ") and "results.json: no such file" in error
    assert error.count("\n") == 1


def test_mnist_files_serve_training_and_eval(tmp_path):
    data, moved, out = tmp_path / "data", tmp_path / "moved", tmp_path / "out"
    data.mkdir()
    write_mnist(data)
    mnist = ["--data", "mnist", "--data-dir", data, "--threads", 1]
    assert run("train", *SMALL, "--tasks", "permuted", *mnist, "--out", out) == 0
    assert read(out)["settings"]["data_dir"] == str(data)
    assert read(out)["settings"]["threads"] == 1
    assert run("eval", out) == 0
    data.rename(moved)
    assert run("eval", out) == 2
    assert run("eval", out, "--data-dir", moved, "--device", "cpu") == 0


def test_interrupting_keeps_the_finished_tasks(tmp_path, capsys, monkeypatch):
    train_sequence = progress.train_sequence

    def interrupted(*args, **kwargs):
        for event in train_sequence(*args, **kwargs):
            if isinstance(event, TaskDone) and event.task == 2:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(progress, "train_sequence", interrupted)
    assert run("train", *SMALL, "--out", tmp_path) == 130
    assert f"2 of 3 tasks were finished; they are in {tmp_path}" in capsys.readouterr().out
    results = read(tmp_path)
    assert results["complete"] is False
    assert results["accuracy"][2] == [None] * 3 and None not in results["accuracy"][1][:2]
    assert (tmp_path / "accuracy.png").is_file()
    assert run("eval", tmp_path) == 0
    assert "2 tasks re-tested" in capsys.readouterr().out


def test_interrupting_before_the_first_task(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "train_sequence", interrupted)
    (tmp_path / "accuracy.png").write_text("of an earlier run")
    assert run("train", *SMALL, "--out", tmp_path) == 130
    assert not (tmp_path / "accuracy.png").exists()
    results = read(tmp_path)
    assert results["complete"] is False and results["seconds"] == []
    assert run("eval", tmp_path) == 2
    assert "at least one finished task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "split", "--num-tasks", "6"], "num_tasks: expected at most 5 split tasks"),
        (["--fan-in", "65"], "fan_in: expected 1 <= fan_in <= 64 columns, got 65"),
        (["--seed", "-1"], "seed: expected 0 <= seed < 2^64, got -1"),
        (["--epochs", "0"], "argument --epochs: expected an integer of at least 1, got '0'"),
        (["--width", "wide"], "argument --width: expected an integer of at least 1, got 'wide'"),
        (["--family", "sparse"], "argument --family: invalid choice: 'sparse'"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "GPUs that PyTorch finds, got 'cuda:99'"),
        (["--data", "mnist"], "data_dir: mnist needs the directory"),
        (["--data", "mnist", "--data-dir", "/nowhere"], "train-images-idx3-ubyte (or .gz); nmkern never"),
    ],
)
def test_bad_options_end_with_one_line_and_code_2(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert run("train", *options, "--out", out) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_an_output_directory_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("train", *SMALL, "--out", tmp_path / "file") == 2
    assert "nmkern train: error: " in capsys.readouterr().err


def test_a_missing_package_is_told_with_its_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "nmkern.cli.progress")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run("train", *SMALL, "--out", tmp_path / "out") == 2
    assert "rich is not installed; pip install 'nmkern[train]'" in capsys.readouterr().err


def test_info_names_every_backend_and_variable(capsys, monkeypatch):
    monkeypatch.delenv("NMKERN_BACKEND", raising=False)
    assert run("info") == 0
    shown = capsys.readouterr().out
    for name, backend in BACKENDS.items():
        reason = backend.refusal("uniform", torch.float32, "cpu")
        line = f"refuses: {reason}" if reason else backend.kernel()
        assert any(text.split(maxsplit=1) == [name, line] for text in shown.splitlines())
    for variable in environment.VARIABLES:
        assert variable in shown
    assert "unset" in shown


def test_info_shows_what_a_variable_is_set_to(run_python):
    told = run_python("from nmkern.cli import main; main(['info'])", check=False, NMKERN_BACKEND="reference")
    assert "NMKERN_BACKEND reference" in " ".join(told.split())


def test_help_shows_examples_and_no_command_is_an_error(capsys):
    for command in ("train", "eval", "info"):
        assert run(command, "--help") == 0
        assert f"nmkern {command}" in capsys.readouterr().out.partition("examples:")[2]
    assert run() == 2


def test_python_m_runs_the_same_command():
    shown = subprocess.run(
        [sys.executable, "-m", "nmkern", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"nmkern {__version__}\n"


@pytest.mark.slow
def test_the_default_run_learns_36_rotations_and_forgets_none(tmp_path):
    assert run("train", "--out", tmp_path) == 0
    metrics = read(tmp_path)["metrics"]
    assert len(read(tmp_path)["tasks"]) == 36
    assert metrics["average_accuracy"] >= 0.965
    assert metrics["forgetting"] == 0.0
    assert metrics["logits_bit_identical"] is True
