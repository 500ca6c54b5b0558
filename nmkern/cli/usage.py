"""Checks of what the user typed, shared by the commands.

The invariant: an error of the user's ends in ``UserError``, which ``main`` turns into one line and
exit code 2; any other exception is a defect and keeps its traceback.
"""

import argparse
import contextlib
from collections.abc import Iterator

import torch


class UserError(Exception):
    """A mistake in options, files or environment, told in one line."""


@contextlib.contextmanager
def user_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn what bad options, files and devices raise into ``UserError``: for set-up, not for work.

    ``more``: what else an option can raise.
    """
    told: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError, *more)
    try:
        yield
    except told as error:
        raise UserError(str(error)) from error


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def check_device(name: str) -> None:
    """Raise ValueError for a name that is not cpu, cuda or cuda:N, RuntimeError for a missing GPU."""
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdecimal()) or name == "cuda:"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= found:
            raise RuntimeError(f"--device: expected one of {found} GPUs that PyTorch finds, got {name!r}")
