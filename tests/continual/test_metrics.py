"""The metrics on matrices whose values are plain to see, and the network's size on a small network."""

import pytest
import torch

from nmkern.continual import metrics
from nmkern.models import FlyNet

KEPT = [[0.9, None, None], [0.9, 0.7, None], [0.9, 0.7, 0.8]]
LOST = [[0.9, None, None], [0.8, 0.7, None], [0.5, 0.75, 0.8]]


def test_a_matrix_without_forgetting():
    assert metrics.average_accuracy(KEPT) == pytest.approx(0.8)
    assert metrics.worst_task(KEPT) == (1, 0.7)
    assert metrics.forgetting(KEPT) == 0.0
    assert metrics.backward_transfer(KEPT) == 0.0


def test_a_matrix_with_forgetting():
    assert metrics.after_training(LOST) == [0.9, 0.7, 0.8]
    assert metrics.at_end(LOST) == [0.5, 0.75, 0.8]
    assert metrics.worst_task(LOST) == (0, 0.5)
    assert metrics.forgetting(LOST) == pytest.approx(0.4)
    assert metrics.backward_transfer(LOST) == pytest.approx((-0.4 + 0.05) / 2)


def test_rows_of_a_run_that_was_cut_short():
    assert metrics.average_accuracy(LOST[:2]) == pytest.approx(0.75)
    assert metrics.forgetting(LOST[:1]) == 0.0
    assert metrics.backward_transfer(LOST[:1]) == 0.0


def test_an_unseen_task_is_refused():
    with pytest.raises(ValueError, match="matrix: expected an accuracy at row 1, column 0, got None"):
        metrics.at_end([[0.9, None], [None, 0.9]])


def test_bit_identical_compares_columns():
    assert metrics.bit_identical([["a", None], ["a", "b"]])
    assert not metrics.bit_identical([["a", None], ["c", "b"]])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_network_size_before_and_after_finishing():
    model = FlyNet(16, 10, width_multiple=4, fan_in=3, contexts=5)
    hidden = 64
    size = metrics.network_size(model)
    assert size.parameters_per_task == hidden + 1
    assert size.held_bytes == 5 * (hidden + 1) * 4
    assert size.encoder_dense_bytes == model.encoder.matrix.materialize().nbytes
    assert size.decoder_bytes == model.decoder.matrix.materialize().nbytes
    assert size.stored_bytes == size.held_bytes + size.encoder_dense_bytes + size.decoder_bytes
    csr = model.encoder.matrix.materialize().to_sparse_csr()
    parts = (csr.values(), csr.col_indices(), csr.crow_indices())
    assert [part.dtype for part in parts] == [torch.float32, torch.int64, torch.int64]
    assert size.encoder_csr_bytes == sum(part.nbytes for part in parts)
    model.finish_context(2)
    assert metrics.network_size(model) == size
