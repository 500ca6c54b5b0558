"""``nmkern memory``: what a model costs in bytes, beside the same model with stored weights.

    MODEL -> Source -> a process for each variant -> tables, memory.json, memory.png

The invariant: options, the model and its inputs are tried here before a process is started.
"""

import argparse
import json
from pathlib import Path

from nmkern.cli.usage import check_device, positive_int, user_errors

_DTYPES = ("float32", "bfloat16", "float16")
_OPTIMIZERS = ("adam", "rmsprop", "sgd")

_DESCRIPTION = """\
Measure parameters, buffers, checkpoint, optimizer state, and what a training step allocates in its forward
pass, its backward pass and the optimizer's step: of the model, and of its twin with stored weights. Each
is measured in a process of its own. Then count the bytes of 1, 2, 4, ... tasks, kept in three ways.
"""

_EPILOG = """\
models:
{models}
  module:function   a function of yours that returns a model, or (model, inputs); where it returns no
                    inputs they are random, of the shape of --input, or else [batch, in_features] of the
                    model's first layer that has in_features

written to the directory of --out: memory.json, table.txt, memory.png

examples:
  nmkern memory flynet
  nmkern memory mlp --batch 32 --dtype bfloat16
  nmkern memory mypackage.nets:make --input 64x3x32x32 --optimizer sgd
"""


def _shape(text: str) -> tuple[int, ...]:
    """An argparse type: sizes joined by x."""
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes as in 128x784, got {text!r}")
    return sizes


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from nmkern.memory.sources import BATCH, BUILT_IN

    models = "\n".join(f"  {name:<18}{told}" for name, (_, told) in BUILT_IN.items())
    parser = commands.add_parser(
        "memory",
        help="every byte that a model costs, beside its twin with stored weights",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(models=models),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a name, or module:function (see below)")
    parser.add_argument(
        "--batch",
        type=positive_int,
        default=BATCH,
        metavar="N",
        help="rows of the input (default: %(default)s)",
    )
    parser.add_argument("--input", type=_shape, metavar="AxBxC", help="the whole shape of the input")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--optimizer", choices=_OPTIMIZERS, default="adam", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--tasks",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="numbers of tasks to count bytes for (default: 1 2 4 8 16 32)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/memory-MODEL")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from nmkern.bench.harness import provenance
    from nmkern.bench.table import to_text
    from nmkern.machine import cpu_model
    from nmkern.memory import process, table, tasks
    from nmkern.memory.measuring import Comparison, variants_of
    from nmkern.memory.sources import Source
    from nmkern.nn.contexts import ContextLayer

    directory = args.out or Path("runs", f"memory-{args.model.replace(':', '.')}")
    with user_errors(TypeError):
        check_device(args.device)
        source = Source(args.model, args.batch, args.input, args.device, args.dtype)
        model, inputs = source.build()
        variants = variants_of(model)
        contexts = [len(m.contexts) for m in model.modules() if isinstance(m, ContextLayer)]
        directory.mkdir(parents=True, exist_ok=True)
        shape = "x".join(map(str, inputs[0].shape))
        title = f"{args.model}, input {shape}, {args.dtype}, {args.optimizer}, {args.device}"
        del model, inputs
        console = Console()
        with Console(stderr=True).status("measuring") as status:
            found = {}
            for variant in variants:
                status.update(f"measuring {variant}")
                found[variant] = process.measure_apart(source, variant, args.optimizer)
            curve = None
            if contexts and set(contexts) == {1}:
                status.update("counting the bytes of many tasks")
                curve = process.curve_apart(source, sorted(set(args.tasks or tasks.COUNTS)))
    comparison = Comparison(found, args.device, args.optimizer)
    tables = [table.total_table(comparison, title), table.layer_table(comparison)]
    tables += [table.curve_table(curve)] if curve else []
    record = {
        "model": args.model,
        "input": shape,
        "dtype": args.dtype,
        **comparison.to_dict(),
        "tasks": curve,
        **provenance(),
        "cpu": cpu_model(),
    }
    (directory / "memory.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (directory / "table.txt").write_text(to_text(*tables), encoding="utf-8")
    table.save_figure(directory / "memory.png", comparison, curve, title)
    for each in tables:
        console.print(each)
    console.print(f"figures, tables and a picture are in {directory}", soft_wrap=True, highlight=False)
    return 0
