"""What the commands show while they work: bars; and what ``nmkern train`` shows at the end."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nmkern.bench.plan import Row
from nmkern.continual.report import Results
from nmkern.continual.tasks import Task
from nmkern.continual.training import TaskDone, train_sequence
from nmkern.models import FlyNet


def train_with_bar(model: FlyNet, tasks: Sequence[Task], results: Results, save: Callable[[], None]) -> None:
    """Train, add each finished task to ``results`` and call ``save``; the bar goes to stderr."""
    settings = results.settings
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, {task.fields[state]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with progress:
        bar = progress.add_task("", total=len(tasks) * settings.epochs, state="no task finished")
        progress.update(bar, description=_current(tasks, 0))
        for event in train_sequence(
            model,
            tasks,
            epochs=settings.epochs,
            seed=settings.seed,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            device=settings.device,
        ):
            if isinstance(event, TaskDone):
                results.add(event)
                save()
                average = results.metrics()["average_accuracy"]
                progress.update(
                    bar,
                    description=_current(tasks, min(event.task + 1, len(tasks) - 1)),
                    state=f"accuracy so far {100 * average:.2f} %",
                )
            else:
                progress.advance(bar)


def rows_with_bar(rows: Iterable[Row], total: int) -> Iterator[Row]:
    """``rows`` as they are measured, under a bar on stderr that names the current one."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,  # no thread of its own beside what is timed
    )
    with progress:
        bar = progress.add_task("", total=total)
        for row in rows:
            progress.update(bar, description=row.label, refresh=True)
            yield row
            progress.advance(bar)


def _current(tasks: Sequence[Task], index: int) -> str:
    return f"task {index + 1}/{len(tasks)} ({tasks[index].label})"


def print_summary(results: Results, directory: Path) -> None:
    """The table of a complete run, and where its files are; to stdout."""
    values, size = results.metrics(), results.size
    same = "yes" if values["logits_bit_identical"] else "no"
    worst = results.labels[values["worst_task"]]
    weights = size.encoder_dense_bytes + size.decoder_bytes
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "average accuracy": f"{100 * values['average_accuracy']:.2f} %",
        f"worst task ({worst})": f"{100 * values['worst_accuracy']:.2f} %",
        "forgetting": f"{100 * values['forgetting']:.2f} points",
        "logits bit-identical": same,
        "seconds per task": f"{values['seconds_per_task']:.2f}",
        "trained parameters per task": f"{size.parameters_per_task:,}",
        "bytes held: contexts + weights": f"{size.held_bytes:,} + 0",
        "bytes with stored weights": f"{size.held_bytes:,} + {weights:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(f"results, contexts and pictures are in {directory}", soft_wrap=True, highlight=False)
