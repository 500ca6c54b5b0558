"""What a model costs in bytes, beside the same model with stored weights.

    footprint(model, inputs)    parameters, buffers, checkpoint, optimizer state, peaks of a training step
    stored_twin(model)          the same model with every frozen matrix as a stored tensor
    task_curve(model)           bytes against the number of tasks

``nmkern memory MODEL`` is the command.
"""

from nmkern.memory.measuring import Comparison, Footprint, footprint
from nmkern.memory.tasks import task_curve
from nmkern.memory.twin import StoredLinear, StoredProjection, stored_twin

__all__ = [
    "Comparison",
    "Footprint",
    "StoredLinear",
    "StoredProjection",
    "footprint",
    "stored_twin",
    "task_curve",
]
