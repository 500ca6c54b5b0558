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


def table(rows: list[dict]) -> str:
    """Markdown: stored time over ours by batch size, and the rest in sentences."""
    first = rows[0]
    size = max(row["k"] for row in rows if row["name"] == "linear")
    lines = [
        f"Time of PyTorch's linear layer with stored weights over ours, {size} x {size}, on "
        f"{first['threads']} threads of an {first['cpu']} ({first['kernel']}), PyTorch "
        f"{first['versions']['torch']}, commit {first['commit']}; above 1 is faster:",
        "",
        "| M | " + " | ".join(str(m) for m in _SHOWN) + " |",
        "| --- |" + " --- |" * len(_SHOWN),
    ]
    for family in ("uniform", "normal", "rademacher"):
        for dtype in ("float32", "bfloat16"):
            cells = [_ratio(rows, "linear", m, dtype, family) for m in _SHOWN]
            lines.append(f"| {family}, {dtype} | " + " | ".join(cells) + " |")
    cells = [_ratio(rows, "linear, transposed", m, "float32", "uniform") for m in _SHOWN]
    lines.append("| uniform, float32, transposed | " + " | ".join(cells) + " |")
    lines += ["", "![speed-up against the batch size](benchmarks/results/speedup.png)", ""]
    lines += ["| other work | ours | against |", "| --- | --- | --- |"]
    for row in rows:
        if row["name"].startswith("linear") or row["name"].startswith("layer"):
            continue
        rivals = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in row["ratios"].items())
        time = f"{1e3 * row['seconds']['ours']['median']:.3f} ms"
        lines.append(f"| {row['name']}, {row['k']} to {row['n']}, batch {row['m']} | {time} | {rivals} |")
    return "\n".join(lines)


def figure(rows: list[dict]) -> Figure:
    """Speed-up against M, one line for each dtype and direction of the uniform family."""
    result = Figure(figsize=(7.5, 4), dpi=150, layout="constrained")
    ax = result.subplots()
    for dtype, color in (("float32", "#1f5a92"), ("bfloat16", "#d9822b")):
        for name, style in (("linear", "o-"), ("linear, transposed", "o--")):
            points = sorted(
                (row["m"], row["ratios"]["stored"])
                for row in rows
                if (row["name"], row["dtype"], row["family"]) == (name, dtype, "uniform")
            )
            ax.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=f"{name}, {dtype}")
    ax.axhline(1, color="#666666", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xlabel("M (rows of the batch)")
    ax.set_ylabel("stored weights' time / ours")
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return result


def rebuild() -> None:
    """Write the figure, and the table between the README's markers."""
    rows = read(RESULTS / "cpu.jsonl")
    FigureCanvasAgg(figure(rows)).print_png(RESULTS / "speedup.png")
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    README.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}")
