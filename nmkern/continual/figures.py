"""The two pictures of a run.

    accuracy.png             each task right after its training and at the end; the accuracy matrix
    context_similarity.png   cosine similarity of the tasks' context * strength, before and after

Drawn from a ``report.Results`` and the network with matplotlib's objects. The invariant: no global
state of matplotlib (pyplot, rcParams, backend) is touched.

The similarity matrices are those of arXiv:2401.02437.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch.nn.functional import normalize

from nmkern.continual import metrics
from nmkern.continual.report import Results, write_atomically
from nmkern.models import FlyNet

ACCURACY = "accuracy.png"
SIMILARITY = "context_similarity.png"

_AXIS = {"rotated": "rotation angle", "permuted": "permutation", "split": "classes"}
_BLUE, _ORANGE, _GREY = "#1f5a92", "#d9822b", "#666666"
_MOST_TICKS = 12


def save_figures(directory: Path, results: Results, initial: FlyNet, trained: FlyNet) -> None:
    """Write both pictures of the tasks finished so far: at least one."""
    figures = {
        ACCURACY: accuracy_figure(results),
        SIMILARITY: similarity_figure(results, initial, trained),
    }
    for name, figure in figures.items():
        write_atomically(directory / name, FigureCanvasAgg(figure).print_png)


def accuracy_figure(results: Results) -> Figure:
    """Accuracies in per cent: points by task on the left, the matrix on the right."""
    done = len(results.accuracy)
    first = 100 * np.array(metrics.after_training(results.accuracy))
    final = 100 * np.array(metrics.at_end(results.accuracy))
    matrix = 100 * np.array(results.accuracy, dtype=float)[:, :done]  # None becomes nan
    low = min(first.min(), final.min())

    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    points, heat = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(_headline(results), x=0.01, ha="left", fontsize=13)

    tasks = np.arange(done)
    points.plot(
        tasks,
        first,
        "o",
        color=_ORANGE,
        markersize=9,
        markerfacecolor="none",
        markeredgewidth=1.4,
        label="right after its own training",
    )
    points.plot(
        tasks,
        final,
        "o-",
        color=_BLUE,
        markersize=4,
        linewidth=0.8,
        label=f"at the end, after {done} tasks",
    )
    points.axhline(final.mean(), color=_GREY, linewidth=0.8, linestyle="--")
    points.annotate(
        f"average\n{final.mean():.1f} %",
        (1, final.mean()),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=_GREY,
    )
    points.set_ylim(low - max(1.0, 0.6 * (100 - low)), 100.0)
    points.set_ylabel("test accuracy (%)")
    points.yaxis.set_major_locator(MaxNLocator(6))
    points.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    points.set_axisbelow(True)
    points.spines[["top", "right"]].set_visible(False)
    points.legend(loc="lower left", frameon=False)
    _label_tasks(points, results)

    image = heat.imshow(matrix, cmap="viridis", interpolation="nearest")
    heat.set_title("accuracy (%) on each task after each task", fontsize=10)
    _label_tasks(heat, results, both=True)
    heat.set_ylabel(f"tasks learned up to ({_AXIS[results.settings.tasks]})")
    _colorbar(figure, heat, image)
    return figure


def similarity_figure(results: Results, initial: FlyNet, trained: FlyNet) -> Figure:
    """Two heat maps on one scale from -1 to 1."""
    figure = Figure(figsize=(10.5, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2)
    figure.suptitle(
        "cosine similarity of the tasks' contexts (context times strength)", x=0.01, ha="left", fontsize=13
    )
    for ax, model, when in zip(axes, (initial, trained), ("before", "after"), strict=True):
        values = context_similarity(model, len(results.accuracy))
        image = ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(f"{when} training", fontsize=10)
        _label_tasks(ax, results, both=True)
    _colorbar(figure, list(axes), image)
    return figure


def context_similarity(model: FlyNet, tasks: int) -> NDArray[np.float64]:
    """Cosine similarity [tasks, tasks] of the first ``tasks`` contexts times their strengths."""
    vectors = []
    for index in range(tasks):
        tensors = model.decoder.context_tensors(index)
        vectors.append((tensors["in_gain"] * tensors["strength"]).detach().cpu())
    # normalize leaves a zero vector (an initial strength can be 0) zero: similar to none, not nan.
    unit = normalize(torch.stack(vectors).double(), dim=1)
    return (unit @ unit.T).numpy()


def _headline(results: Results) -> str:
    done = len(results.accuracy)
    count = "1 task" if done == 1 else f"{done} tasks learned one after the other"
    lost = metrics.forgetting(results.accuracy)
    told = "none forgotten" if lost == 0 else f"up to {100 * lost:.1f} points forgotten"
    partial = "" if results.complete else f" (of {len(results.labels)}: the run was cut short)"
    return f"{count}{partial}: {100 * metrics.average_accuracy(results.accuracy):.1f} % on average, {told}"


def _label_tasks(ax: Axes, results: Results, both: bool = False) -> None:
    labels = results.labels[: len(results.accuracy)]
    ticks = range(0, len(labels), -(-len(labels) // _MOST_TICKS))
    ax.set_xlabel(f"task ({_AXIS[results.settings.tasks]})")
    ax.set_xticks(ticks, [labels[tick] for tick in ticks])
    if both:
        ax.set_yticks(ticks, [labels[tick] for tick in ticks])
    ax.tick_params(labelsize=8)


def _colorbar(figure: Figure, where: Axes | list[Axes], image: AxesImage) -> None:
    bar = figure.colorbar(image, ax=where, shrink=0.9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
