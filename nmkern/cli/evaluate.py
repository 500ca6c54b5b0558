"""``nmkern eval``: rebuild a network from its record, re-test every task, compare to the last digit.

    results.json -> tasks, network;  contexts.safetensors -> contexts;  accuracies == recorded

The invariant: exit code 0 means that every accuracy equals the recorded one exactly.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from nmkern.cli.usage import check_device, user_errors

_EPILOG = """\
exit code: 0 where every accuracy equals results.json to the last digit, 1 where one differs,
2 where the run cannot be read or rebuilt

examples:
  nmkern eval runs/rotated
  nmkern eval runs/mnist --device cpu --data-dir ~/data/mnist
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "eval",
        help="load what was learned, re-test every task and compare",
        description="Rebuild the network and the tasks of a run from results.json, load the contexts "
        "and re-test every finished task.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the --out directory of nmkern train")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: that of the run)")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where MNIST's files lie (default: as in the run)"
    )


def run(args: argparse.Namespace) -> int:
    from nmkern.cli import machine
    from nmkern.continual import datasets, report
    from nmkern.continual.experiment import build_model
    from nmkern.continual.tasks import make_tasks
    from nmkern.continual.training import evaluate

    with user_errors():
        recorded = report.read(args.directory)
        settings = recorded.settings
        if args.device is not None:
            settings = replace(settings, device=args.device)
        check_device(settings.device)
        dataset = datasets.load(settings.data, args.data_dir or settings.data_dir)
        tasks = make_tasks(settings.tasks, dataset, settings.num_tasks, settings.seed)
        model = build_model(settings, dataset)
        model.load_state_dict(report.read_contexts(args.directory))
        kernels = machine.kernels(settings.device)
    done = len(recorded.accuracies)
    accuracies, hashes = evaluate(model, tasks[:done], settings.device)
    differing = [j for j in range(done) if accuracies[j] != recorded.accuracies[j]]
    for j in differing:
        print(
            f"task {j} ({tasks[j].label}): recorded accuracy {recorded.accuracies[j]}, now {accuracies[j]}",
            file=sys.stderr,
        )
    average = sum(accuracies) / done
    print(f"{done} tasks re-tested, average accuracy {100 * average:.2f} %")
    print(f"logits bit-identical to the run's: {'yes' if list(hashes) == recorded.hashes else 'no'}")
    for layer, kernel in kernels.items():
        if kernel != recorded.kernels.get(layer):
            print(f"{layer}: the run's kernel was {recorded.kernels.get(layer)}, now it is {kernel}")
    if differing:
        print(
            f"nmkern eval: {len(differing)} of {done} accuracies differ from "
            f"{args.directory / report.RESULTS}",
            file=sys.stderr,
        )
        return 1
    print("every accuracy equals the recorded one to the last digit")
    return 0
