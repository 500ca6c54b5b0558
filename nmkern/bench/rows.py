"""Rows of a file as they are shown: the passes of a case merged into one.

A case is measured in several passes with all other cases in between. The invariant: an interval of a merged
row holds those of its passes, so that what changed from pass to pass is not hidden by how steady each was.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from nmkern.bench import noise

KEY = ("name", "m", "k", "n", "dtype", "family", "by")
Row = dict[str, Any]


def key_of(row: Row) -> tuple:
    return tuple(row.get(part) for part in KEY)


def label(row: Row) -> str:
    by = f" by {row['by']}" if row.get("by") else ""
    return "{name} M={m} {k} -> {n} {dtype} {family}".format(**row) + by


def read(path: Path) -> list[Row]:
    """The merged rows of a file. OSError where it cannot be read, ValueError where it holds no rows."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = merged(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected JSON lines of nmkern bench, got {error!r}") from error
    if not rows:
        raise ValueError(f"{path}: expected at least one measured row, got none")
    return rows


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row a case, in the order of first appearance; those that were not measured are left out."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault(key_of(row), []).append(row)
    return [_merge(group) for group in groups.values()]


def interval_of(row: Row, rival: str) -> noise.Interval:
    """Where the ratio to ``rival`` lies; from percentiles where the row is older than intervals."""
    if "intervals" in row:
        low, high = row["intervals"][rival]
        return low, high
    ours, theirs = row["seconds"]["ours"], row["seconds"][rival]
    return theirs["p20"] / ours["p80"], theirs["p80"] / ours["p20"]


def ours_interval_of(row: Row) -> noise.Interval:
    """Where the seconds of our call lie."""
    ours = row["seconds"]["ours"]
    low, high = row.get("ours_interval", (ours["p20"], ours["p80"]))
    return low, high


def not_timed(rows: list[Row]) -> dict[str, str]:
    """Rivals that were asked for and never timed, with the last reason."""
    timed = {name for row in rows for name in row["ratios"]}
    told = {name: reason for row in rows for name, reason in row["not_timed"].items()}
    return {name: reason for name, reason in told.items() if name not in timed}


def _union(intervals: list[noise.Interval]) -> noise.Interval:
    lows, highs = zip(*intervals, strict=True)
    return min(lows), max(highs)


def _merge(group: list[Row]) -> Row:
    last = group[-1]
    seconds = {
        name: {
            figure: median(row["seconds"][name][figure] for row in group if name in row["seconds"])
            for figure in ("median", "p20", "p80")
        }
        for name in last["seconds"]
    }
    ratios, intervals = {}, {}
    for name in last["ratios"]:
        those = [row for row in group if name in row["ratios"]]
        ratios[name] = median(row["ratios"][name] for row in those)
        intervals[name] = _union([interval_of(row, name) for row in those])
    ours_interval = _union([ours_interval_of(row) for row in group])
    noisy = noise.noisy_names(seconds["ours"]["median"], ours_interval, ratios, intervals)
    if any("machine" in row.get("noisy", ()) for row in group):
        noisy.append("machine")
    return {
        **last,
        "seconds": seconds,
        "ratios": ratios,
        "intervals": intervals,
        "ours_interval": ours_interval,
        "noisy": noisy,
        "weights_per_second": last["weights"] / seconds["ours"]["median"],
        "passes": len(group),
    }
