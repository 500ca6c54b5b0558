"""``python -m benchmarks cpu [--quick] [--out FILE]`` measures, ``python -m benchmarks report`` writes
the README's results from the committed rows, ``python -m benchmarks resources`` compiles the Triton kernels.
"""

import argparse
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="the CPU kernels against stored weights")
    cpu.add_argument("--quick", action="store_true", help="a minute: small sizes, few batches")
    cpu.add_argument("--out", type=Path, help="append the rows to this file as JSON lines")
    commands.add_parser("report", help="rebuild the README's table and figure from benchmarks/results")
    resources = commands.add_parser("resources", help="what the Triton kernels compile to, without a GPU")
    resources.add_argument("--out", type=Path, default=RESULTS / "triton_resources.json")
    args = parser.parse_args()
    if args.command == "cpu":
        from benchmarks.clocks import HostClock
        from benchmarks.cpu import run
        from benchmarks.harness import Report

        run(Report(args.out, HostClock()), args.quick)
    elif args.command == "resources":
        from benchmarks.resources import run as measure

        measure(args.out)
    else:
        from benchmarks.report import rebuild

        rebuild()


if __name__ == "__main__":
    main()
