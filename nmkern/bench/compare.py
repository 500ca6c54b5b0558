"""Two files of rows: what got slower beyond noise.

A machine is not the same from one day to the next: it may be slower as a whole, and then the ratio to a
rival tells, or its memory may be faster, and then a rival that reads its weights gains and we do not. So
a row got slower where both hold: our time grew, and the ratio to the first rival that both files timed
fell, each by more than a tenth and with intervals that do not overlap. Without a rival our time decides.
"""

from dataclasses import dataclass

from nmkern.bench import noise
from nmkern.bench.rows import Row, interval_of, key_of, label, ours_interval_of

_SAME = ("cpu", "gpu", "threads")


@dataclass(frozen=True)
class Verdict:
    """``change``: our time over that of the old file, relative to ``control`` if there is one."""

    label: str
    control: str | None
    old_seconds: float
    new_seconds: float
    change: float
    beyond_noise: bool
    noisy: bool

    @property
    def slower(self) -> bool:
        return self.beyond_noise and self.change > 1

    @property
    def faster(self) -> bool:
        return self.beyond_noise and self.change < 1


def require_same_machine(old: list[Row], new: dict[str, object]) -> None:
    """ValueError where ``new``, what a row says of this machine, is not the machine of ``old``."""
    differing = [f"{k} {old[0].get(k)!r}, here {new.get(k)!r}" for k in _SAME if old[0].get(k) != new.get(k)]
    if differing:
        raise ValueError(f"expected rows of this machine, got {'; '.join(differing)}")


def compare(old: list[Row], new: list[Row]) -> list[Verdict]:
    """A verdict for each case of ours that both have; ValueError where there is none."""
    before = {key_of(row): row for row in old if row["name"] != "copy"}
    found = [_verdict(before[key_of(row)], row) for row in new if key_of(row) in before]
    if not found:
        raise ValueError("expected a case that both files measured, got none")
    return found


def _verdict(old: Row, new: Row) -> Verdict:
    control = next((name for name in new["ratios"] if name in old["ratios"]), None)
    seconds = [row["seconds"]["ours"]["median"] for row in (old, new)]
    grown = _beyond(seconds[1] / seconds[0], ours_interval_of(old), ours_interval_of(new))
    if control is None:
        change, beyond = seconds[1] / seconds[0], grown != 0
    else:
        change = old["ratios"][control] / new["ratios"][control]
        beyond = grown != 0 and grown == _beyond(change, interval_of(new, control), interval_of(old, control))
    wide = {control, "machine"} if control else {"ours", "machine"}
    noisy = any(wide & set(row.get("noisy", ())) for row in (old, new))
    return Verdict(label(new), control, seconds[0], seconds[1], change, beyond, noisy)


def _beyond(change: float, before: noise.Interval, after: noise.Interval) -> int:
    """1 where what lay in ``before`` and lies in ``after`` grew beyond noise, -1 where it shrank, else 0."""
    if change > 1 + noise.REPRODUCIBLE and after[0] > before[1]:
        return 1
    if change < 1 / (1 + noise.REPRODUCIBLE) and after[1] < before[0]:
        return -1
    return 0


def machine_change(old: list[Row], new: list[Row]) -> float | None:
    """The time of a copy in the new rows over that in the old; None where one has no such row."""
    times = [
        [row["seconds"]["ours"]["median"] / row["extra"]["bytes"] for row in rows if row["name"] == "copy"]
        for rows in (old, new)
    ]
    return times[1][0] / times[0][0] if all(times) else None
