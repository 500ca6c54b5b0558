"""Measured rows as a table: for the terminal, and for table.txt."""

import io
from collections import Counter
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nmkern.bench import noise
from nmkern.bench.compare import Verdict, machine_change
from nmkern.bench.plan import Outcome
from nmkern.bench.rows import Row, not_timed

WIDE = 120


def tables(rows: list[Row], wide: bool = True) -> list[Table | str]:
    """The machine, a table for each layer and way with a line for each M, and what the marks mean.

    ``wide``: with percentiles and peaks, some 100 columns; without, they fit into 80.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["name"] != "copy":
            groups.setdefault("{name}, {dtype}, {family}, {k} -> {n}".format(**row), []).append(row)
    return [heading(rows[0]), *(_table(title, some, wide) for title, some in groups.items()), _caption(rows)]


def _table(title: str, rows: list[Row], wide: bool) -> Table:
    """Our time, rate and peak, and how many times our time each rival takes."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    rivals = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    for name in ("M", "ms", *(("20 - 80 %", "peak KiB") if wide else ()), "Gw/s", *rivals):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, rivals, wide))
    return table


def _cells(row: Row, rivals: list[str], wide: bool) -> list[str]:
    seconds = row["seconds"]["ours"]
    cells = [str(row["m"]), f"{'~' if 'ours' in row['noisy'] else ''}{figure(1e3 * seconds['median'])}"]
    if wide:
        cells += [f"{figure(1e3 * seconds['p20'])} - {figure(1e3 * seconds['p80'])}"]
        cells += [f"{row['peak_bytes'] / 1024:.0f}"]
    cells += [f"{row['weights_per_second'] / 1e9:.3g}"]
    for name in rivals:
        ratio = row["ratios"].get(name)
        if ratio is None:
            cells.append("-")
            continue
        mark = "*" if name in row["own_weights"] else ""
        cells.append(f"{'~' if name in row['noisy'] else ''}{figure(ratio)}x{mark}")
    return cells


def figure(value: float) -> str:
    """Three digits, and never an exponent from a thousand on."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def heading(row: Row) -> str:
    """The machine and versions of a row."""
    where = row.get("gpu") or f"{row['threads']} threads of {row['cpu']}"
    versions = row["versions"]
    return (
        f"{row['kernel']} on {where}, torch {versions['torch']}, nmkern {versions['nmkern']} "
        f"(commit {row['commit']}), {row['date']}"
    )


def _caption(rows: list[Row]) -> str:
    """What the marks mean, who is missing and why, and whether the machine was quiet."""
    lines = [
        "A rival's column is its time over ours: above 1 ours is faster. Medians; checked before timing."
    ]
    if any(row["own_weights"] for row in rows):
        lines.append("* multiplies by random weights of its own, and was checked against those")
    copies = [row for row in rows if row["name"] == "copy"]
    for row in copies:
        rate = row["extra"]["bytes"] / row["seconds"]["ours"]["median"] / 1e9
        lines.append(f"copying memory: {rate:.1f} GB/s read and written")
    lines += [f"{name}: {reason}" for name, reason in not_timed(rows).items()]
    return "\n".join([*lines, noise_line(rows)])


def noise_line(rows: list[Row]) -> str:
    """Whether the figures can be expected again."""
    noisy = [row for row in rows if row["noisy"]]
    load = max(row["load"] for row in rows)
    if not noisy:
        return f"The machine was quiet: all figures are known within {noise.HALF_WIDTH:.0%}."
    return (
        f"The machine was noisy in {len(noisy)} of {len(rows)} rows: figures with ~ are known to no better "
        f"than {noise.HALF_WIDTH:.0%} (others took up to {load:.0%} of the processor)."
    )


def huge_lines(rows: list[Row]) -> list[str]:
    """Predicted and measured time of layers that do not fit."""
    lines = []
    for row in rows:
        if row["name"] == "linear, huge":
            stored, memory = (row["extra"][key] / 2**20 for key in ("stored_bytes", "memory_bytes"))
            predicted, measured = row["extra"]["predicted_seconds"], row["seconds"]["ours"]["median"]
            told = "nothing" if predicted is None else f"{figure(1e3 * predicted)} ms"
            lines.append(
                f"{row['k']} x {row['n']} at M = {row['m']} ({stored:.1f} MiB stored, memory {memory:.1f} "
                f"MiB): predicted {told}, measured {figure(1e3 * measured)} ms"
            )
    return lines


def problems(outcome: Outcome, missing: Mapping[str, str], total: int) -> list[str]:
    """What failed, a line each, and how many rows of all passes were not measured."""
    lines = [f"{name}: {reason}" for name, reason in missing.items()]
    lines += [f"failed: {label}: {' '.join(reason.split())}" for label, reason in outcome.failed.items()]
    reasons = Counter(outcome.left.values())
    lines += [f"not measured: {count} of {total} rows: {reason}" for reason, count in reasons.items()]
    return lines


def comparison(verdicts: list[Verdict], old: list[Row], new: list[Row]) -> Table:
    """What ``--compare`` prints; rows that changed beyond noise come first."""
    table = Table(
        title=f"against rows of commit {old[0]['commit']}, {old[0]['date']}",
        title_justify="left",
        caption=_differences(old, new),
        caption_justify="left",
    )
    for name in ("case", "old ms", "new ms", "relative to", "change", "verdict"):
        table.add_column(name, justify="left" if name in ("case", "relative to", "verdict") else "right")
    for verdict in sorted(verdicts, key=lambda v: (not v.slower, not v.faster)):
        words = "slower" if verdict.slower else "faster" if verdict.faster else "within noise"
        if verdict.noisy and not verdict.beyond_noise:
            words = "cannot tell, too noisy"
        table.add_row(
            verdict.label,
            figure(1e3 * verdict.old_seconds),
            figure(1e3 * verdict.new_seconds),
            verdict.control or "itself",
            f"{100 * (verdict.change - 1):+.1f} %",
            words,
        )
    return table


def _differences(old: list[Row], new: list[Row]) -> str:
    """How a verdict comes about; versions, kernels and the machine's memory where they are not the same."""
    lines = [
        "Slower: our time grew, and its ratio to the rival fell, by more than 10 %, and no intervals overlap."
    ]
    before, after = ({**rows[0]["versions"], "kernel": rows[0]["kernel"]} for rows in (old, new))
    if differing := [f"{k} {before.get(k)} -> {after[k]}" for k in after if before.get(k) != after[k]]:
        lines.append(f"other versions: {', '.join(differing)}")
    copied = machine_change(old, new)
    if copied is not None and not 1 / (1 + noise.REPRODUCIBLE) < copied < 1 + noise.REPRODUCIBLE:
        lines.append(
            f"The machine is not as it was: copying memory takes {100 * (copied - 1):+.0f} % time, "
            "and ratios to what reads stored weights move with it."
        )
    return "\n".join(lines)


def to_text(*parts: Table | str) -> str:
    """The parts as plain text of one width, for a file."""
    file = io.StringIO()
    console = Console(width=WIDE, color_system=None, file=file)
    for part in parts:
        console.print(part, highlight=False, markup=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
