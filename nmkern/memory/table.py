"""Footprints and task curves as tables and one picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from nmkern.memory.measuring import PHASES, Comparison, Footprint, Phase
from nmkern.memory.tasks import WAYS

_COLORS = {"nmkern": "#1f5a92", "stored": "#d9822b", "stored, CSR": "#e8bd8a", "separate": "#777777"}
_HELD = ("parameters", "buffers", "checkpoint", "optimizer")
_CALLED = {
    "checkpoint": "checkpoint on disk",
    "optimizer": "optimizer's state",
    **{phase: f"{phase}, peak" for phase in PHASES},
}
_TOLD = {
    "separate": "separate networks",
    "stored": "stored random network + contexts",
    "nmkern": "nmkern: contexts alone",
}


def bytes_text(count: int | None) -> str:
    """A count of bytes in binary units; a dash where there is none."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"


def quantities(footprint: Footprint) -> dict[str, int | None]:
    """Every figure of a footprint by its name in tables."""
    found: dict[str, int | None] = {_CALLED.get(name, name): getattr(footprint, name) for name in _HELD}
    for name in PHASES:
        phase: Phase | None = getattr(footprint, name)
        found[_CALLED[name]] = None if phase is None else phase.allocated
    return found


def _resident(footprint: Footprint) -> dict[str, int | None]:
    found = {"model and inputs, resident": footprint.resident}
    for name in PHASES:
        phase: Phase | None = getattr(footprint, name)
        found[f"{name}, resident"] = None if phase is None else phase.resident
    return found


def total_table(comparison: Comparison, title: str) -> Table:
    """A line for each quantity, a column for each variant."""
    table = Table(
        title=title,
        title_justify="left",
        caption="Peaks: allocated at most in that phase beyond what was held before the step (second step); "
        "resident: by how much the process grew (first step). Each column is a process of its own.",
        caption_justify="left",
    )
    table.add_column("bytes")
    for variant in comparison.footprints:
        table.add_column(variant, justify="right")
    for figures in (quantities, _resident):
        lines = {variant: figures(found) for variant, found in comparison.footprints.items()}
        for name in next(iter(lines.values())):
            values = [line[name] for line in lines.values()]
            if any(value is not None for value in values):
                table.add_row(name, *map(bytes_text, values))
    return table


def layer_table(comparison: Comparison) -> Table:
    """A line for each layer: each variant's bytes."""
    table = Table(title="by layer", title_justify="left")
    for name in ("layer", "variant", "parameters", "buffers", "checkpoint", "optimizer", "forward, peak"):
        table.add_column(name, justify="left" if name in ("layer", "variant") else "right")
    footprints = comparison.footprints
    names = list(dict.fromkeys(layer.name for found in footprints.values() for layer in found.layers))
    for name in names:
        told = name
        for variant, found in footprints.items():
            for layer in found.layers:
                if layer.name == name:
                    figures = (*(getattr(layer, held) for held in _HELD), layer.forward)
                    table.add_row(told, variant, *map(bytes_text, figures))
                    told = ""
    return table


def curve_table(curve: dict[str, Any]) -> Table:
    """A line for each number of tasks: bytes held and saved, three ways."""
    table = Table(
        title="by number of tasks: parameters and buffers / checkpoint",
        title_justify="left",
        caption="Measured on as many networks, or contexts, as there are tasks.",
        caption_justify="left",
    )
    table.add_column("tasks", justify="right")
    for way in WAYS:
        table.add_column(_TOLD[way], justify="right")
    for place, count in enumerate(curve["tasks"]):
        cells = [
            f"{bytes_text(curve[way]['held'][place])} / {bytes_text(curve[way]['checkpoint'][place])}"
            for way in WAYS
        ]
        table.add_row(str(count), *cells)
    return table


def save_figure(path: Path, comparison: Comparison, curve: dict[str, Any] | None, title: str) -> None:
    """Bars of every quantity, and the curve against the number of tasks where there is one."""
    figure = Figure(figsize=(11 if curve else 6.5, 4.4), dpi=140, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    axes = figure.subplots(1, 2 if curve else 1, squeeze=False)[0]
    _bars(axes[0], comparison)
    if curve:
        _curve(axes[1], curve)
    FigureCanvasAgg(figure).print_png(path)


def _bars(ax: Axes, comparison: Comparison) -> None:
    variants = list(comparison.footprints)
    lines = {variant: quantities(comparison[variant]) for variant in variants}
    names = list(next(iter(lines.values())))
    height = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        values = [lines[variant][name] or 0 for name in names]
        places = np.arange(len(names)) + (index - (len(variants) - 1) / 2) * height
        ax.barh(places, values, height, color=_COLORS[variant], label=variant)
        for place, name, value in zip(places, names, values, strict=True):
            told = bytes_text(lines[variant][name])
            ax.annotate(
                told, (max(value, 1), place), (3, 0), textcoords="offset points", va="center", fontsize=6.5
            )
    ax.set_xscale("symlog", linthresh=1024)
    ax.set_xlim(0, 30 * max(value or 0 for line in lines.values() for value in line.values()))
    ax.set_xticks([0, 2**10, 2**20, 2**30], ["0", "1 KiB", "1 MiB", "1 GiB"])
    ax.minorticks_off()
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def _curve(ax: Axes, curve: dict[str, Any]) -> None:
    for way in WAYS:
        points = [
            (t, b) for t, b in zip(curve["tasks"], curve[way]["checkpoint"], strict=True) if b is not None
        ]
        if points:
            ax.plot(*zip(*points, strict=True), "o-", color=_COLORS[way], markersize=4, label=_TOLD[way])
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(curve["tasks"], [str(count) for count in curve["tasks"]])
    ax.yaxis.set_major_formatter(lambda value, _: bytes_text(round(value)))
    ax.minorticks_off()
    ax.set_xlabel("tasks", fontsize=9)
    ax.set_ylabel("bytes of a checkpoint of all tasks", fontsize=9)
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.legend(frameon=False, fontsize=8)
