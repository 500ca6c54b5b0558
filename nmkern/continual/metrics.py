"""What an accuracy matrix and a network say of continual learning.

    accuracy[i][j] = accuracy on task j after training task i; None for tasks not yet seen (j > i)
    forgetting = max over j of accuracy[j][j] - accuracy[T-1][j]
    backward transfer = mean over j < T-1 of accuracy[T-1][j] - accuracy[j][j]

The functions take the T rows of finished tasks, T >= 1. Backward transfer as in Lopez-Paz and Ranzato,
"Gradient episodic memory", 2017. The invariant: these are differences of recorded numbers, so that a
forgetting of zero means equal to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nmkern.models import FlyNet
from nmkern.nn import num_contexts

Matrix = Sequence[Sequence[float | None]]


def _cell(matrix: Matrix, row: int, column: int) -> float:
    value = matrix[row][column]
    if value is None:
        raise ValueError(f"matrix: expected an accuracy at row {row}, column {column}, got None")
    return value


def after_training(matrix: Matrix) -> list[float]:
    """Each task's accuracy right after its own training: the diagonal."""
    return [_cell(matrix, j, j) for j in range(len(matrix))]


def at_end(matrix: Matrix) -> list[float]:
    """Each task's accuracy after the last task: the last row."""
    return [_cell(matrix, len(matrix) - 1, j) for j in range(len(matrix))]


def average_accuracy(matrix: Matrix) -> float:
    return sum(at_end(matrix)) / len(matrix)


def worst_task(matrix: Matrix) -> tuple[int, float]:
    """Index and accuracy of the task with the lowest accuracy at the end."""
    final = at_end(matrix)
    index = min(range(len(final)), key=final.__getitem__)
    return index, final[index]


def forgetting(matrix: Matrix) -> float:
    """The largest loss of accuracy of any task; 0.0 where none was lost."""
    return max(before - after for before, after in zip(after_training(matrix), at_end(matrix), strict=True))


def backward_transfer(matrix: Matrix) -> float:
    """The mean change of earlier tasks' accuracies; 0.0 for a single task."""
    pairs = list(zip(after_training(matrix), at_end(matrix), strict=True))[:-1]
    return sum(after - before for before, after in pairs) / len(pairs) if pairs else 0.0


def bit_identical(hashes: Sequence[Sequence[str | None]]) -> bool:
    """Whether each task's logits had the same hash at every test. Laid out as the accuracy matrix."""
    columns = zip(*hashes, strict=True)
    return all(len({value for value in column if value is not None}) <= 1 for column in columns)


@dataclass(frozen=True)
class NetworkSize:
    """What a FlyNet holds, and what the same network would hold with its weights stored (float32).

    ``encoder_dense_bytes`` is the encoder as a dense matrix, as the authors store it;
    ``encoder_csr_bytes`` the same as torch.sparse_csr: int64 indices, float32 values.
    """

    parameters_per_task: int
    held_bytes: int
    encoder_dense_bytes: int
    encoder_csr_bytes: int
    decoder_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Contexts, dense encoder and decoder."""
        return self.held_bytes + self.encoder_dense_bytes + self.decoder_bytes


def network_size(model: FlyNet) -> NetworkSize:
    encoder, decoder = model.encoder.matrix, model.decoder.matrix
    assert encoder.fan_in is not None
    ones = encoder.rows * encoder.fan_in
    tensors = [*model.parameters(), *model.buffers()]
    return NetworkSize(
        parameters_per_task=sum(t.numel() for t in tensors) // num_contexts(model),
        held_bytes=sum(t.nbytes for t in tensors),
        encoder_dense_bytes=encoder.stored_bytes(),
        encoder_csr_bytes=ones * (8 + 4) + (encoder.rows + 1) * 8,
        decoder_bytes=decoder.stored_bytes(),
    )
