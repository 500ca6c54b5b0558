"""``python -m benchmarks cpu [--quick] [--out FILE]`` measures, ``python -m benchmarks report`` writes
the README's results from the committed rows, ``python -m benchmarks resources [--cuda]`` compiles the
Triton kernels, or the CUDA kernels.
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
    resources = commands.add_parser("resources", help="what the GPU kernels compile to, without a GPU")
    resources.add_argument("--cuda", action="store_true", help="the CUDA kernels, with nvcc, not Triton's")
    resources.add_argument("--out", type=Path, help="default: the committed table")
    args = parser.parse_args()
    if args.command == "cpu":
        from benchmarks.cpu import run
        from benchmarks.harness import Report

        run(Report(args.out), args.quick)
    elif args.command == "resources":
        if args.cuda:
            from benchmarks.cuda_resources import run as measure
        else:
            from benchmarks.resources import run as measure
        measure(args.out or RESULTS / f"{'cuda' if args.cuda else 'triton'}_resources.json")
    else:
        from benchmarks.report import rebuild

        rebuild()


if __name__ == "__main__":
    main()
