"""The ``nmkern`` command: train a network on a sequence of tasks, re-test it, measure, show the installation.

Each subcommand has a file of its own, which adds its options and runs it. Exit codes: 0 success, 1 a
re-test that differs (``eval``) or a measurement that failed or got slower (``bench``), 2 bad options or
files, 130 interrupted. The invariant: what only one command needs (matplotlib, scikit-learn and the like)
is imported when that command runs.
"""

import argparse
import sys
from collections.abc import Sequence

from nmkern import __version__
from nmkern.cli import bench, evaluate, info, memory, train
from nmkern.cli.usage import UserError

_TRAIN_PACKAGES = ("matplotlib", "psutil", "rich", "safetensors", "sklearn", "scipy")

_EPILOG = """\
examples:
  nmkern train                  learn 36 rotations of handwritten digits, one after the other
  nmkern eval runs/rotated      load what was learned and re-test every task
  nmkern bench --quick          layers against stored weights, on this machine, in a minute
  nmkern memory flynet          every byte of the paper's network, beside stored weights
  nmkern info                   which kernels run on this machine, and why others do not

`nmkern COMMAND --help` explains the options of a command.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nmkern",
        description="Networks whose frozen random weights are regenerated inside of the kernels, "
        "and learn task after task through small contexts, forgetting nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nmkern {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (train, evaluate, bench, memory, info):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of ``argv`` (default: the process's arguments); returns the exit code.

    SystemExit with code 2 comes from argparse where an option is unknown or malformed.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        return _fail(args.command, str(error), 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_PACKAGES:
            raise
        return _fail(args.command, f"{package} is not installed; pip install 'nmkern[train]'", 2)
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 130)


def _fail(command: str, message: str, code: int) -> int:
    one_line = " ".join(message.split())
    print(f"nmkern {command}: error: {one_line}", file=sys.stderr)
    return code
