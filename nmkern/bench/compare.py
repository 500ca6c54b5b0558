"""Two files of rows: what got slower beyond noise.

Times of different days are not comparable, ratios to the same rival are: a row got slower where its ratio
to its first rival that both files timed fell by more than a tenth, and the intervals do not overlap. Rows
without a rival are compared by their times.
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
    """A verdict for each case that both have; ValueError where there is none."""
    before = {key_of(row): row for row in old}
    found = [_verdict(before[key_of(row)], row) for row in new if key_of(row) in before]
    if not found:
        raise ValueError("expected a case that both files measured, got none")
    return found


def _verdict(old: Row, new: Row) -> Verdict:
    control = next((name for name in new["ratios"] if name in old["ratios"]), None)
    seconds = [row["seconds"]["ours"]["median"] for row in (old, new)]
    if control is None:
        change = seconds[1] / seconds[0]
        (old_low, old_high), (new_low, new_high) = ours_interval_of(old), ours_interval_of(new)
        apart = new_low > old_high or new_high < old_low
    else:
        change = old["ratios"][control] / new["ratios"][control]
        (old_low, old_high), (new_low, new_high) = interval_of(old, control), interval_of(new, control)
        apart = new_high < old_low or new_low > old_high
    beyond = apart and max(change, 1 / change) > 1 + noise.REPRODUCIBLE
    wide = {control, "machine"}
    noisy = any(wide & set(row.get("noisy", ())) for row in (old, new))
    return Verdict(label(new), control, seconds[0], seconds[1], change, beyond, noisy)
