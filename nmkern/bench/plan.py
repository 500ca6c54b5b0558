"""Rows in order of importance, measured until the time is used up; nothing is lost on a failure.

A row that fails is recorded with its error, one that would not fit into the time that is left with that,
and the next one begins. The invariant: every row of a plan ends in exactly one of measured, failed, left.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nmkern.bench.harness import Report


@dataclass(frozen=True)
class Row:
    """``expected``: seconds that it takes with all preparation, an estimate from above."""

    label: str
    expected: float
    measure: Callable[[], object]


@dataclass
class Outcome:
    measured: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def follow(
    rows: Iterable[Row],
    report: Report,
    deadline: float,
    now: Callable[[], float] = time.monotonic,
    settle: Callable[[], object] = lambda: None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Measure ``rows`` until ``deadline``. ``settle`` waits for the device, and raises where it is lost.

    ``outcome`` is filled as rows end, so that it is known even if this is interrupted.
    """
    outcome = Outcome() if outcome is None else outcome
    lost = False
    for row in rows:
        if lost or now() + row.expected > deadline:
            reason = "the device was lost" if lost else "out of time"
            outcome.left[row.label] = reason
            report.write({"name": row.label, "not_measured": reason})
            continue
        try:
            row.measure()
            settle()
            outcome.measured.append(row.label)
        except Exception as error:  # whatever it is, the other rows are worth having
            outcome.failed[row.label] = f"{type(error).__name__}: {error}"
            report.write({"name": row.label, "failed": outcome.failed[row.label]})
            report.tell(f"{row.label}: failed: {outcome.failed[row.label]}")
            try:
                settle()
            except Exception:  # an illegal access, say, ends every later call of this process too
                lost = True
    return outcome
