"""``nmkern bench``: what layers of given sizes cost on this machine, beside what others offer.

    options -> Sweep -> plan (gate, timing, a row at once on disk) -> table, pictures, comparison

The invariant: everything that can be wrong with the options is found before anything is measured, and what
was measured before an interruption is reported.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nmkern.cli.usage import check_device, positive_int, user_errors

if TYPE_CHECKING:
    from nmkern.bench.huge import Huge
    from nmkern.bench.plan import Outcome
    from nmkern.bench.rows import Row
    from nmkern.bench.sweep import Sweep

_WAYS = ("forward", "backward", "training")
_DTYPES = ("float32", "bfloat16", "float16")
_FAMILIES = ("uniform", "normal", "rademacher", "sparse")
SECONDS, QUICK = (0.4, 3), (0.12, 2)  # of a case in a pass, and passes at least
_SPREAD = 20  # a row takes a second or two: small sweeps get more passes, so that a run sees slow changes
_AXES = ("m", "k", "n", "dtype", "family", "way")
_ROWS = "rows.jsonl"
_QUICK_SECONDS = 45  # for all rows; the rest of the minute is for loading, table and pictures

_DESCRIPTION = """\
Time products with regenerated weights against the same products with stored weights, and against others
that make random weights, on this machine. Each result is checked before it is timed. Variants are called in
turn, every case is measured in several passes, and a ratio that the same command might not give again
within 10 % is marked as noisy.
"""

_EPILOG = """\
written to the directory of --out:
  rows.jsonl     every measured row, with commit, machine and versions
  table.txt      the table that is printed at the end
  time.png, rate.png, speedup.png

exit code: 0, or 1 where a result was wrong, a case failed, or --compare found something slower

examples:
  nmkern bench --quick
      a minute: small layers, few batches
  nmkern bench --m 1 8 64 --k 4096 --n 11008 --dtype bfloat16 --family uniform rademacher
      your own layer sizes
  nmkern bench --family sparse --m 128 --k 784 --n 7840
      the fly's projection
  nmkern bench --compare runs/bench/rows.jsonl --out runs/now
      measure the same cases again; what got slower?
  nmkern bench --huge
      a layer whose stored weights exceed this machine's memory
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "bench",
        help="time layers of your sizes against stored weights and others",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    cases = parser.add_argument_group("cases: all combinations of")
    numbers: dict[str, Any] = {"type": positive_int, "nargs": "+"}
    cases.add_argument("--m", **numbers, help="rows of the batch (default: 1 4 16 64 256)")
    cases.add_argument("--k", **numbers, help="inputs of the layer (default: 1024 4096 8192)")
    cases.add_argument("--n", **numbers, help="outputs of the layer (default: as many as inputs)")
    cases.add_argument("--dtype", nargs="+", choices=_DTYPES, help="default: float32 bfloat16")
    cases.add_argument("--family", nargs="+", choices=_FAMILIES, help="default: uniform")
    cases.add_argument("--way", nargs="+", choices=_WAYS, help="default: forward backward")
    cases.add_argument(
        "--fan-in", type=positive_int, default=7, metavar="N", help="of the sparse family (default: 7)"
    )
    cases.add_argument(
        "--against",
        nargs="+",
        metavar="RIVAL",
        help="rivals by name (default: all that exist for a family; `--against list` tells them)",
    )
    work = parser.add_argument_group("measuring")
    work.add_argument("--quick", action="store_true", help="less than a minute: smaller defaults")
    work.add_argument("--huge", action="store_true", help="a layer that does not fit, and nothing else")
    work.add_argument("--compare", type=Path, metavar="OLD.jsonl", help="rows to compare with")
    work.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    work.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's)")
    work.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/bench"), help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    from nmkern.bench import compare, figures, rows
    from nmkern.bench.clocks import CudaClock, HostClock
    from nmkern.bench.harness import Report
    from nmkern.bench.plan import Outcome, follow
    from nmkern.cli.progress import rows_with_bar

    if args.against == ["list"]:
        return _list_rivals()
    cuda = args.device.startswith("cuda")
    with user_errors():
        check_device(args.device)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if ":" in args.device:  # PyTorch sets no device without an index
            torch.cuda.set_device(args.device)
        clock = CudaClock() if cuda else HostClock()
        old = None
        if args.compare is not None:
            old = rows.read(args.compare)
            compare.require_same_machine(old, clock.machine())
        work = _work(args, old)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in (_ROWS, figures.TIME, figures.RATE, figures.SPEEDUP):
            (args.out / name).unlink(missing_ok=True)  # an earlier run's
    report, outcome = Report(args.out / _ROWS, clock, tell=lambda text: None), Outcome()
    for name, reason in work.missing().items():
        report.write({"name": name, "not_measured": reason})
    deadline = time.monotonic() + _QUICK_SECONDS if args.quick else float("inf")
    settle = torch.cuda.synchronize if cuda else lambda: None
    try:
        plan = rows_with_bar(work.rows(report), len(work))
        follow(plan, report, deadline, settle=settle, outcome=outcome)
    finally:
        found = rows.merged(report.rows)
        slower = _show(args.out, found, old, outcome, work)
    return 1 if slower or outcome.failed or not found else 0


def _show(
    directory: Path, found: "list[Row]", old: "list[Row] | None", outcome: "Outcome", work: "Sweep | Huge"
) -> bool:
    """Print and write all that was measured; whether something got slower than in the old rows."""
    from rich.console import Console

    from nmkern.bench import compare, figures, rows, table

    console = Console()
    if not console.is_terminal:
        console = Console(width=table.WIDE)
    end: list[Any] = [*table.huge_lines(found), *table.problems(outcome, work.missing(), len(work))]
    verdicts = []
    if old is not None and {rows.key_of(row) for row in old} & {rows.key_of(row) for row in found}:
        verdicts = compare.compare(old, found)
        end.append(table.comparison(verdicts, old, found))
    start = [table.tables(found, wide) if found else [] for wide in (True, console.width >= table.WIDE)]
    (directory / "table.txt").write_text(table.to_text(*start[0], *end), encoding="utf-8")
    figures.save_figures(directory, found)
    for part in (*start[1], *end):
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
    console.print(f"rows, table and pictures are in {directory}", soft_wrap=True, highlight=False)
    return any(verdict.slower for verdict in verdicts)


def _list_rivals() -> int:
    from nmkern.bench import rivals

    for name, rival in rivals.RIVALS.items():
        reason = rival.missing("cuda" if torch.cuda.is_available() else "cpu")
        print(f"{name:<14}{rival.what} ({', '.join(rival.families)}){f'; {reason}' if reason else ''}")
    reason = rivals.vera_missing()
    print(f"{rivals.VERA:<14}PEFT's VeRA layer, as a case of its own{f'; {reason}' if reason else ''}")
    return 0


def _work(args: argparse.Namespace, old: "list[Row] | None") -> "Sweep | Huge":
    """What the options ask for; the cases of the old rows where no option names any. Raises ValueError."""
    from nmkern.bench import rivals, rows
    from nmkern.bench.huge import Huge
    from nmkern.bench.sweep import Sweep, cells_of, grid

    known = [*rivals.RIVALS, rivals.VERA]
    for name in args.against or ():
        if name not in known:
            raise ValueError(f"--against: expected some of {', '.join(known)}, got {name!r}")
    seconds, passes = QUICK if args.quick else SECONDS
    device = args.device.partition(":")[0]
    if args.huge:
        return Huge(device, args.m or [1, 4, 16], seconds)
    if old is not None and all(getattr(args, axis) is None for axis in _AXES):
        cells = cells_of(old)
    else:
        cells = grid(
            args.m or ([1, 8, 64] if args.quick else [1, 4, 16, 64, 256]),
            args.k or ([512, 2048] if args.quick else [1024, 4096, 8192]),
            args.n,
            args.dtype or (["float32"] if args.quick else ["float32", "bfloat16"]),
            args.family or ["uniform"],
            args.way or ["forward", "backward"],
        )
        if not cells:
            raise ValueError("--way: the sparse family has no training step of its own, got 'training' alone")
    if old is not None and not {cell.key for cell in cells} & {rows.key_of(row) for row in old}:
        raise ValueError(f"{args.compare}: expected a case that these options measure too, got none")
    families = sorted({cell.family for cell in cells})
    for name in args.against or ():
        if name != rivals.VERA and not {*rivals.RIVALS[name].families} & {*families}:
            raise ValueError(f"--against: {name} is no rival of the family {', '.join(families)}")
    if not args.quick:
        passes = max(passes, min(10, _SPREAD // len(cells)))
    return Sweep(
        cells,
        args.against,
        device,
        seconds,
        passes,
        args.fan_in,
        calls=4 if device == "cuda" else 1,
        copied=2**26 if args.quick else 2**28,
    )
