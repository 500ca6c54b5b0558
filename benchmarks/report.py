"""The README's table and figure, from the committed rows: nothing in them is typed by hand."""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_SHOWN = (1, 4, 8, 16, 64, 256, 1024)


def read(path: Path) -> list[dict]:
    """Rows as written by ``harness``; of rows with one case, the last."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    latest = {tuple(row[key] for key in ("name", "m", "k", "n", "dtype", "family")): row for row in rows}
    return list(latest.values())


def _ratio(rows: list[dict], name: str, m: int, dtype: str, family: str) -> str:
    for row in rows:
        if (row["name"], row["m"], row["dtype"], row["family"]) == (name, m, dtype, family):
            return f"{row['ratios']['stored']:.1f}"
    return "not measured"


def _heading(rows: list[dict]) -> str:
    first = rows[0]
    size = max(row["k"] for row in rows if row["name"] == "linear")
    return (
        f"{first['kernel']}, {size} x {size}, {first['threads']} threads of an {first['cpu']}, PyTorch "
        f"{first['versions']['torch']}, commit {first['commit']}"
    )


def table(rows: list[dict]) -> str:
    """Markdown of one machine: stored time over ours by batch size."""
    lines = [f"{_heading(rows)}:", ""]
    lines += ["| M | " + " | ".join(str(m) for m in _SHOWN) + " |", "| --- |" + " --- |" * len(_SHOWN)]
    for family in ("uniform", "normal", "rademacher"):
        for dtype in ("float32", "bfloat16"):
            cells = [_ratio(rows, "linear", m, dtype, family) for m in _SHOWN]
            lines.append(f"| {family}, {dtype} | " + " | ".join(cells) + " |")
    cells = [_ratio(rows, "linear, transposed", m, "float32", "uniform") for m in _SHOWN]
    return "\n".join([*lines, "| uniform, float32, transposed | " + " | ".join(cells) + " |"])


def others(machines: list[list[dict]]) -> str:
    """Markdown of what is no dense product: our time, and how many times it the rivals take."""
    cells: dict[str, list[str]] = {}
    for column, rows in enumerate(machines):
        for row in rows:
            if row["name"].startswith(("linear", "layer")):
                continue
            rivals = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in row["ratios"].items())
            what = f"{row['name']}, {row['k']} to {row['n']}, batch {row['m']}"
            line = cells.setdefault(what, ["not measured"] * len(machines))
            line[column] = f"{1e3 * row['seconds']['ours']['median']:.3f} ms: {rivals}"
    head = "| other work | " + " | ".join(rows[0]["kernel"] for rows in machines) + " |"
    lines = [head, "| --- |" + " --- |" * len(machines)]
    return "\n".join(lines + [f"| {what} | " + " | ".join(line) + " |" for what, line in cells.items()])


def figure(machines: list[list[dict]]) -> Figure:
    """Speed-up against M, a panel for each machine, a line for each dtype and direction of uniform."""
    result = Figure(figsize=(4.5 * len(machines), 4), dpi=150, layout="constrained")
    panels = result.subplots(1, len(machines), sharey=True, squeeze=False)[0]
    for ax, rows in zip(panels, machines, strict=True):
        for dtype, color in (("float32", "#1f5a92"), ("bfloat16", "#d9822b")):
            for name, style in (("linear", "o-"), ("linear, transposed", "o--")):
                points = sorted(
                    (row["m"], row["ratios"]["stored"])
                    for row in rows
                    if (row["name"], row["dtype"], row["family"]) == (name, dtype, "uniform")
                )
                ax.plot(
                    *zip(*points, strict=True), style, color=color, markersize=4, label=f"{name}, {dtype}"
                )
        ax.axhline(1, color="#666666", linewidth=0.8)
        ax.set_title(rows[0]["kernel"], fontsize=10)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xlabel("M (rows of the batch)")
        ax.yaxis.set_major_formatter("{x:g}x")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(color="#e5e5e5", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("stored weights' time / ours")
    panels[0].legend(frameon=False, fontsize=8)
    return result


def rebuild() -> None:
    """Write the figure, and the tables between the README's markers."""
    machines = [read(path) for path in sorted(RESULTS.glob("cpu_*.jsonl"), reverse=True)]
    FigureCanvasAgg(figure(machines)).print_png(RESULTS / "speedup.png")
    intro = "Time of PyTorch's linear layer with stored weights over ours, so that above 1 is faster."
    picture = "![speed-up against the batch size](benchmarks/results/speedup.png)"
    results = "\n\n".join([intro, *map(table, machines), picture, others(machines)])
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    README.write_text(f"{head}{BEGIN}\n{results}\n{END}{tail}")
