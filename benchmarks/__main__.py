"""``python -m benchmarks cpu [--quick] [--out FILE]`` measures, ``python -m benchmarks gpu --out DIR`` tests
and measures on a GPU, ``python -m benchmarks report`` writes the README's results from the committed rows,
``python -m benchmarks resources [--cuda]`` compiles the Triton kernels, or the CUDA kernels.
"""

import argparse
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="the CPU kernels against stored weights")
    cpu.add_argument("--quick", action="store_true", help="a minute: small sizes, few batches")
    cpu.add_argument("--out", type=Path, help="append the rows to this file as JSON lines")
    gpu = commands.add_parser("gpu", help="tests and rows that need an NVIDIA GPU")
    extent = gpu.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="few sizes and batches, for a first look")
    extent.add_argument("--sanitize", action="store_true", help="compute-sanitizer on the CUDA kernels alone")
    gpu.add_argument(
        "--out",
        type=Path,
        default=Path("runs/gpu"),
        help="folder for tests.txt, rows.jsonl, table.txt (default: %(default)s)",
    )
    gpu.add_argument("--minutes", type=float, default=8, help="for all of it; rows that do not fit are left")
    gpu.add_argument("--commit", help="what rows name as their commit, where the checkout has no history")
    commands.add_parser("report", help="rebuild the README's table and figure from benchmarks/results")
    resources = commands.add_parser("resources", help="what the GPU kernels compile to, without a GPU")
    resources.add_argument("--cuda", action="store_true", help="the CUDA kernels, with nvcc, not Triton's")
    resources.add_argument("--out", type=Path, help="default: the committed table")
    args = parser.parse_args()
    if args.command == "cpu":
        from benchmarks.cpu import run
        from nmkern.bench.clocks import HostClock
        from nmkern.bench.harness import Report

        run(Report(args.out, HostClock()), args.quick)
    elif args.command == "gpu":
        from benchmarks import gpu as on_gpu

        if args.sanitize:
            sys.exit(on_gpu.sanitize(args.out, args.minutes))
        sys.exit(on_gpu.run(args.out, args.quick, args.minutes, args.commit))
    elif args.command == "resources":
        if args.cuda:
            from benchmarks import cuda_resources, cuda_sparse_resources

            out = args.out or RESULTS / "cuda_resources.json"
            cuda_resources.run(out)
            cuda_sparse_resources.run(out.with_name("cuda_sparse_resources.json"))
        else:
            from benchmarks.resources import run as measure

            measure(args.out or RESULTS / "triton_resources.json")
    else:
        from benchmarks.report import rebuild

        rebuild()


if __name__ == "__main__":
    main()
