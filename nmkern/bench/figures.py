"""The pictures of a sweep, from its merged rows.

    time.png      seconds of a call against M, ours and every rival's
    rate.png      weights per second against M, beside what copying memory would allow stored weights
    speedup.png   stored weights' time over ours, over M and size

A panel row for each way, dtype and family. The invariant: no global state of matplotlib is touched.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from nmkern.bench.rows import Row

TIME, RATE, SPEEDUP = "time.png", "rate.png", "speedup.png"
_OURS = "#1f5a92"
_COLORS = ("#d9822b", "#3a7d44", "#8c4f9f", "#b03a3a", "#777777", "#2b9c9c", "#b8952f", "#5b4636")
_GREY = "#666666"
_RATE = "weights / second"
_PRODUCTS = ("linear", "projection", "layer")
_MOST_ROWS, _MOST_COLUMNS = 6, 4


def save_figures(directory: Path, rows: list[Row]) -> list[str]:
    """Write the pictures that the rows suffice for; their names."""
    products = [row for row in rows if row["name"].startswith(_PRODUCTS) and "huge" not in row["name"]]
    copies = [row for row in rows if row["name"] == "copy"]
    if not products:
        return []
    figures = {TIME: time_figure(products), RATE: rate_figure(products, copies)}
    if any(row["ratios"] for row in products):
        figures[SPEEDUP] = speedup_figure(products)
    for name, figure in figures.items():
        FigureCanvasAgg(figure).print_png(directory / name)
    return list(figures)


def _group_of(row: Row) -> tuple[str, str, str]:
    return row["name"], row["dtype"], row["family"]


def _groups(rows: list[Row]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys(map(_group_of, rows)))[:_MOST_ROWS]


def _shape(row: Row) -> tuple[int, int]:
    return row["k"], row["n"]


def _shapes(rows: Iterable[Row]) -> list[tuple[int, int]]:
    return sorted(dict.fromkeys(map(_shape, rows)), key=lambda shape: (shape[0] * shape[1], shape))


def _figure(
    rows: int, columns: int, title: str, width: float = 4.2, height: float = 3.2
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(max(5.5, width * columns), height * rows + 0.5), dpi=140, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _against_m(ax: Axes, rows: list[Row], value: Callable[[Row], float | None], **style: Any) -> None:
    points = sorted((row["m"], found) for row in rows if (found := value(row)) is not None)
    if points:
        ax.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.3, **style)


def _finish(ax: Axes, rows: list[Row], unit: str) -> None:
    batches = sorted({row["m"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(EngFormatter(sep="") if unit == _RATE else "{x:g}")
    ax.set_xticks(batches, [f"{m}" for m in batches])
    ax.minorticks_off()
    ax.set_xlabel("M (rows of the batch)", fontsize=9)
    ax.set_ylabel(unit, fontsize=9)
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def _seconds(name: str) -> Callable[[Row], float | None]:
    return lambda row: 1e3 * row["seconds"][name]["median"] if name in row["seconds"] else None


def time_figure(rows: list[Row]) -> Figure:
    """Milliseconds against M; a column for each of the largest sizes of a group."""
    groups = _groups(rows)
    shapes = {
        group: _shapes(row for row in rows if _group_of(row) == group)[-_MOST_COLUMNS:] for group in groups
    }
    figure, axes = _figure(len(groups), max(map(len, shapes.values())), "Time of a call")
    rivals = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    for line, group in zip(axes, groups, strict=True):
        for ax in line[len(shapes[group]) :]:
            ax.set_axis_off()
        for ax, shape in zip(line, shapes[group], strict=False):
            those = [row for row in rows if _group_of(row) == group and _shape(row) == shape]
            _against_m(ax, those, _seconds("ours"), color=_OURS, label="nmkern", zorder=3)
            for index, name in enumerate(rivals):
                _against_m(ax, those, _seconds(name), color=_COLORS[index % len(_COLORS)], label=name)
            ax.set_title(f"{', '.join(group)}\n{shape[0]} -> {shape[1]}", fontsize=9)
            _finish(ax, those, "milliseconds")
    handles = {
        label: handle
        for ax in axes.flat
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(9, len(handles)),
        frameon=False,
        fontsize=8,
    )
    return figure


def rate_figure(rows: list[Row], copies: list[Row]) -> Figure:
    """Weights per second against M; dashed: stored weights read as fast as memory is copied."""
    groups = _groups(rows)
    figure, axes = _figure(len(groups), 1, "Weights per second, and the roofline of stored weights", 6.5)
    for ax, group in zip(axes[:, 0], groups, strict=True):
        those = [row for row in rows if _group_of(row) == group]
        shapes = _shapes(those)[-_MOST_COLUMNS:]
        for index, shape in enumerate(shapes):
            some, strength = [row for row in those if _shape(row) == shape], (index + 1) / len(shapes)
            told = f"{shape[0]} -> {shape[1]}"
            _against_m(
                ax, some, _rate("ours"), color=_OURS, alpha=strength, label=f"nmkern, {told}", zorder=3
            )
            if control := next((name for row in some for name in row["ratios"]), None):
                _against_m(
                    ax, some, _rate(control), color=_COLORS[0], alpha=strength, label=f"{control}, {told}"
                )
        for row in copies[-1:]:
            size = getattr(torch, group[1]).itemsize
            speed = row["extra"]["bytes"] / row["seconds"]["ours"]["median"]
            ax.axhline(speed / size, color=_GREY, linestyle="--", linewidth=1)
            ax.annotate(
                f"{speed / 1e9:.1f} GB/s copied, {size} bytes a weight",
                (1, speed / size),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=7,
                color=_GREY,
            )
        ax.set_title(", ".join(group), fontsize=9)
        _finish(ax, those, _RATE)
        ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _rate(name: str) -> Callable[[Row], float | None]:
    return lambda row: row["weights"] / row["seconds"][name]["median"] if name in row["seconds"] else None


def speedup_figure(rows: list[Row]) -> Figure:
    """The first rival's time over ours as a map; white is equal, blue is faster. ~ marks noisy ratios."""
    groups = [
        group for group in _groups(rows) if any(row["ratios"] for row in rows if _group_of(row) == group)
    ]
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = _figure(lines, columns, "Speed-up: the rival's time over ours", 5.2, 2.6)
    ratios = [next(iter(row["ratios"].values())) for row in rows if row["ratios"]]
    reach = max(1.0, float(np.abs(np.log2(ratios)).max()))
    image = None
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax, group in zip(axes.flat, groups, strict=False):
        those = [row for row in rows if _group_of(row) == group and row["ratios"]]
        control = next(iter(those[0]["ratios"]))
        shapes, batches = _shapes(those), sorted({row["m"] for row in those})
        grid = np.full((len(shapes), len(batches)), np.nan)
        for row in those:
            place = shapes.index(_shape(row)), batches.index(row["m"])
            ratio = row["ratios"].get(control, np.nan)
            grid[place] = np.log2(ratio)
            told = f"{'~' if control in row['noisy'] else ''}{ratio:.2g}"
            dark = abs(grid[place]) > 0.6 * reach
            ax.text(*place[::-1], told, ha="center", va="center", fontsize=8, color="w" if dark else "k")
        image = ax.imshow(grid, cmap="RdBu", norm=TwoSlopeNorm(0, -reach, reach), aspect="auto")
        ax.set_xticks(range(len(batches)), [str(m) for m in batches])
        ax.set_yticks(range(len(shapes)), [f"{k} -> {n}" for k, n in shapes])
        ax.set_xlabel("M (rows of the batch)", fontsize=9)
        ax.set_title(f"{', '.join(group)}, against {control}", fontsize=9)
        ax.tick_params(labelsize=8)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{2**value:.2g}x")
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure
