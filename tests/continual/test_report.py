"""Files are whole or absent, damaged ones are refused, and the similarity is a cosine."""

import json

import numpy as np
import pytest
import torch

from nmkern.continual import report
from nmkern.continual.figures import context_similarity
from nmkern.models import FlyNet


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    report.write_atomically(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "seconds": 3}']
)
def test_a_results_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / report.RESULTS).write_text(text)
    with pytest.raises(ValueError, match=r"results.json: expected a results.json of nmkern train"):
        report.read(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results.json: no such file"):
        report.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"contexts.safetensors: no such file"):
        report.read_contexts(tmp_path)
    (tmp_path / report.CONTEXTS).write_text(json.dumps({}))
    with pytest.raises(ValueError, match="expected a safetensors file, got a damaged one"):
        report.read_contexts(tmp_path)


def test_similarity_is_the_cosine_and_zero_for_a_zero_strength():
    model = FlyNet(16, 10, width_multiple=4, contexts=3)
    with torch.no_grad():
        model.decoder.context(0).strength.fill_(-2.0)
        model.decoder.context(1).strength.fill_(0.5)
        model.decoder.context(2).strength.fill_(0.0)
    a, b = (model.decoder.context(i).in_gain.detach().double().numpy() for i in range(2))
    cosine = -(a @ b) / np.sqrt((a @ a) * (b @ b))
    expected = [[1, cosine, 0], [cosine, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(context_similarity(model, 3), expected, atol=1e-6)
