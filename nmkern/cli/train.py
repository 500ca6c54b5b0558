"""``nmkern train``: learn a sequence of tasks, one context each, and report what was kept.

    options -> Settings -> train_sequence -> results.json, contexts.safetensors, two pictures

The invariant: everything that can be wrong with the options is found before the directory is touched,
and from then on a failure or Ctrl-C loses no finished task.
"""

import argparse
from pathlib import Path

import torch

from nmkern.cli.usage import check_device, positive_int, user_errors

_DESCRIPTION = """\
Train one random network on one task after the other, as in arXiv:2204.04297: each task learns a
vector that multiplies the hidden units and one number that multiplies the decoder's weights, and
nothing else. After each task all tasks so far are tested. Their accuracies should never change.
"""

_EPILOG = """\
written to the directory of --out, after every task:
  results.json              settings, versions, the task x task accuracy matrix, metrics
  contexts.safetensors      all that was learned; `nmkern eval DIR` loads and re-tests it
and at the end:
  accuracy.png              accuracy right after training and at the end; the accuracy matrix
  context_similarity.png    how similar the tasks' contexts were before and after training

examples:
  nmkern train
      36 rotations of scikit-learn's handwritten digits, 10 degrees apart
  nmkern train --tasks permuted --num-tasks 20 --seed 1
      20 fixed permutations of the pixels
  nmkern train --tasks split --family rademacher --out runs/split-signs
      two classes a task, decoder weights of +1 and -1
  nmkern train --data mnist --data-dir ~/data/mnist --device cuda
      the paper's RotationMNIST; the four IDX files, plain or .gz, must be there already
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="learn a sequence of tasks and report what was kept",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    task = parser.add_argument_group("tasks")
    task.add_argument(
        "--tasks", choices=("rotated", "permuted", "split"), default="rotated", help="default: %(default)s"
    )
    task.add_argument(
        "--num-tasks",
        type=positive_int,
        metavar="N",
        help="default: 36 rotated, 10 permuted, or all pairs of classes; more than 36 rotations divide "
        "the circle evenly",
    )
    task.add_argument("--data", choices=("digits", "mnist"), default="digits", help="default: %(default)s")
    task.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where MNIST's files lie; nothing is downloaded"
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--width",
        type=positive_int,
        metavar="N",
        help="hidden units per input pixel (default: 40 on digits, which makes 2,560; 10 on mnist)",
    )
    network.add_argument(
        "--fan-in",
        type=positive_int,
        default=7,
        metavar="N",
        help="pixels that a hidden unit sums (default: %(default)s)",
    )
    network.add_argument(
        "--family",
        choices=("uniform", "normal", "rademacher"),
        default="uniform",
        help="distribution of the decoder's weights (default: %(default)s)",
    )
    network.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the weights, initial contexts, permutations and batches, 0 to 2^64 - 1 "
        "(default: %(default)s)",
    )
    work = parser.add_argument_group("training")
    work.add_argument(
        "--epochs", type=positive_int, metavar="N", help="a task (default: 40 on digits, 3 on mnist)"
    )
    work.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    work.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads (default: 1 on digits, PyTorch's choice on mnist)",
    )
    work.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the results; a run that is there is replaced (default: runs/TASKS)",
    )


def run(args: argparse.Namespace) -> int:
    # All of the train packages are needed here, so that none is missed after an hour of training.
    from nmkern.cli import machine
    from nmkern.cli.progress import print_summary, train_with_bar
    from nmkern.continual import datasets, figures, report
    from nmkern.continual.experiment import (
        DEFAULT_EPOCHS,
        DEFAULT_THREADS,
        DEFAULT_WIDTH,
        Settings,
        build_model,
    )
    from nmkern.continual.metrics import network_size
    from nmkern.continual.tasks import make_tasks

    directory = args.out or Path("runs", args.tasks)
    with user_errors():
        check_device(args.device)
        threads = args.threads or DEFAULT_THREADS[args.data]
        if threads is not None:
            torch.set_num_threads(threads)
        dataset = datasets.load(args.data, args.data_dir)
        tasks = make_tasks(args.tasks, dataset, args.num_tasks, args.seed)
        settings = Settings(
            tasks=args.tasks,
            num_tasks=len(tasks),
            data=args.data,
            data_dir=None if args.data_dir is None else str(args.data_dir.resolve()),
            width=args.width or DEFAULT_WIDTH[args.data],
            fan_in=args.fan_in,
            family=args.family,
            seed=args.seed,
            epochs=args.epochs or DEFAULT_EPOCHS[args.data],
            device=args.device,
            threads=torch.get_num_threads(),
        )
        initial, model = build_model(settings, dataset), build_model(settings, dataset)
        results = report.Results(
            settings,
            [task.label for task in tasks],
            network_size(model),
            machine.provenance(args.device),
        )
        directory.mkdir(parents=True, exist_ok=True)
        for name in (figures.ACCURACY, figures.SIMILARITY):
            (directory / name).unlink(missing_ok=True)  # an earlier run's
        report.save(directory, results, model)
    try:
        train_with_bar(model, tasks, results, lambda: report.save(directory, results, model))
    finally:
        report.save(directory, results, model)
        if results.accuracy:
            figures.save_figures(directory, results, initial, model)
        if not results.complete:
            print(f"{len(results.accuracy)} of {len(tasks)} tasks were finished; they are in {directory}")
    print_summary(results, directory)
    return 0
