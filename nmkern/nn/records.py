"""What a checkpoint says of a frozen matrix: a small record in place of the weights.

Every module with a random matrix derives from ``MatrixModule`` and saves a record, JSON in a uint8
tensor, which every checkpoint format can hold. The invariant: a checkpoint whose matrix is not the
model's is refused before a tensor is changed.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nmkern.matrix import RandomMatrix

RECORD_KEY = "_extra_state"  # torch's key for what get_extra_state returns


class MatrixModule(nn.Module):
    """A module with one frozen random matrix, ``matrix``, of which checkpoints hold a record."""

    def __init__(self, matrix: RandomMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def record(self) -> dict[str, Any]:
        """What the checkpoint holds of this module beside its tensors."""
        return {"matrix": self.matrix.to_dict()}

    def apply_record(self, record: dict[str, Any]) -> None:
        """Prepare for the tensors of a checkpoint whose record has been checked."""

    def check_form(self, record: dict[str, Any]) -> None:
        """TypeError or KeyError where the record is not one that ``record`` could have made."""
        if not isinstance(record["matrix"], dict):
            raise TypeError(f"matrix: {record['matrix']!r}")

    def check_record(self, name: str, record: dict[str, Any]) -> None:
        """RuntimeError where the record is not of this module's matrix. Changes nothing."""
        ours, theirs = self.matrix.to_dict(), record["matrix"]
        differing = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        if differing:
            told = ", ".join(
                f"{key} {theirs.get(key)!r} (this model: {ours.get(key)!r})" for key in sorted(differing)
            )
            raise RuntimeError(f"{name}: the checkpoint was made with another matrix: {told}")

    def check_keys(self, name: str, record: dict[str, Any], keys: list[str]) -> None:
        """RuntimeError where the record claims more than the checkpoint's tensors ``keys`` hold."""

    def expected_shapes(self, record: dict[str, Any]) -> dict[str, torch.Size]:
        """Tensors that this module will have once the record is applied and has not yet."""
        return {}

    def read_record(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
        """The checked record of this module in a checkpoint; None where there is none."""
        if prefix + RECORD_KEY not in state_dict:
            return None
        name = prefix.rstrip(".") or type(self).__name__
        try:
            record = json.loads(bytes(state_dict[prefix + RECORD_KEY].tolist()))
            self.check_form(record)
            self.check_record(name, record)
            self.check_keys(
                name, record, [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RuntimeError(f"{name}: the checkpoint's record cannot be read: {error!r}") from error
        return record

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(json.dumps(self.record()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is left to do: ``_load_from_state_dict`` has checked and applied the record."""

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        record = self.read_record(state_dict, prefix)
        if record is not None:
            self.apply_record(record)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Raise what loading would raise (RuntimeError), before anything is changed."""
    expected = {key: getattr(value, "shape", None) for key, value in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, MatrixModule):
            prefix = f"{path}." if path else ""
            record = module.read_record(state_dict, prefix)
            if record is not None:
                shapes = module.expected_shapes(record)
                expected.update({prefix + name: shape for name, shape in shapes.items()})
    problems = []
    if strict:
        problems += [f"missing {key}" for key in expected.keys() - state_dict.keys()]
        problems += [f"unexpected {key}" for key in state_dict.keys() - expected.keys()]
    for key in expected.keys() & state_dict.keys():
        shape = getattr(state_dict[key], "shape", None)
        if not key.endswith(RECORD_KEY) and shape != expected[key]:
            problems.append(f"{key} has shape {shape}, expected {expected[key]}")
    if problems:
        raise RuntimeError(
            f"state_dict: it does not fit this {type(model).__name__}: " + "; ".join(sorted(problems))
        )


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
):
    """``model.load_state_dict`` for any module tree, but all or nothing.

    RuntimeError, and no tensor changed, where a matrix of the checkpoint is not the model's (stream
    version, seed, family, shape, scale), where keys are missing, or where a shape disagrees. A model
    with fewer contexts than the checkpoint grows.
    """
    check_state_dict(model, state_dict, strict)
    return model.load_state_dict(state_dict, strict, assign)
