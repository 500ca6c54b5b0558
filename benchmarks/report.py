"""The README's tables and figures, from the committed rows: nothing in them is typed by hand.

cpu_*.jsonl            python -m benchmarks cpu --out FILE, one a kernel
bench.jsonl            rows.jsonl of nmkern bench
huge.jsonl             rows.jsonl of nmkern bench --huge
memory_flynet.json     memory.json of nmkern memory flynet
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nmkern.bench import rows as bench_rows
from nmkern.bench.figures import rate_figure
from nmkern.bench.rivals import RIVALS
from nmkern.bench.table import figure as figure_of
from nmkern.bench.table import heading
from nmkern.memory import table as memory_table
from nmkern.memory.measuring import Comparison, Footprint

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_SHOWN = (1, 4, 8, 16, 64, 256, 1024)


def read(path: Path) -> list[dict]:
    """Rows as written by ``harness``; of rows with one case, the last."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    latest = {bench_rows.key_of(row): row for row in rows}
    return list(latest.values())


def _ratio(rows: list[dict], name: str, m: int, dtype: str, family: str, rival: str = "stored") -> str:
    for row in rows:
        if (row["name"], row["m"], row["dtype"], row["family"]) == (name, m, dtype, family):
            return f"{row['ratios'][rival]:.1f}" if rival in row["ratios"] else "not measured"
    return "not measured"


def _heading(rows: list[dict]) -> str:
    first = rows[0]
    size = max(row["k"] for row in rows if row["name"] == "linear")
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"{first['kernel']}, {size} x {size}, {first['threads']} threads of an {first['cpu']}, PyTorch "
        f"{first['versions']['torch']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
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
    lines.append("| uniform, float32, transposed | " + " | ".join(cells) + " |")
    if any("int4" in row["ratios"] for row in rows):
        cells = [_ratio(rows, "linear", m, "bfloat16", "uniform", "int4") for m in _SHOWN]
        lines.append("| uniform, bfloat16, the same weights in PyTorch's int4 | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def rivals(found: list[dict]) -> str:
    """Markdown of a sweep: our time, and how many times it each rival takes."""
    products = [row for row in found if row["name"] != "copy"]
    names = list(dict.fromkeys(name for row in products for name in row["ratios"]))
    told = "; ".join(f"{name}: {RIVALS[name].what}" for name in names)
    lines = [f"{heading(products[0])}. Times of others over ours ({told}); `~`: not known within 5 %.", ""]
    lines += ["| layer | M | ms | " + " | ".join(names) + " |", "| --- | --- | --- |" + " --- |" * len(names)]
    for row in products:
        cells = [f"{row['k']} to {row['n']}, {row['dtype']}", f"{row['m']}", _milliseconds(row)]
        for name in names:
            ratio = row["ratios"].get(name)
            cells.append("-" if ratio is None else f"{'~' * (name in row['noisy'])}{figure_of(ratio)}x")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _milliseconds(row: dict) -> str:
    noisy = {"ours", "machine"} & set(row["noisy"])
    return f"{'~' if noisy else ''}{figure_of(1e3 * row['seconds']['ours']['median'])}"


def huge(found: list[dict]) -> str:
    """Markdown of layers that do not fit into memory: predicted and measured time."""
    lines = [
        "Layers whose stored weights exceed the machine's memory, float32, predicted from the rate at "
        "8192 x 8192:",
        "",
    ]
    lines += ["| layer | stored | memory | M | predicted ms | measured ms |", "| --- |" + " --- |" * 5]
    for row in found:
        if row["name"] == "linear, huge":
            extra = row["extra"]
            sizes = (memory_table.bytes_text(extra[key]) for key in ("stored_bytes", "memory_bytes"))
            predicted = figure_of(1e3 * extra["predicted_seconds"])
            cells = (f"{row['k']} x {row['n']}", *sizes, f"{row['m']}", predicted, _milliseconds(row))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory(record: dict) -> tuple[Comparison, str]:
    """The footprints of a record, and Markdown of them."""
    found = {name: Footprint.from_dict(each) for name, each in record["footprints"].items()}
    comparison = Comparison(found, record["device"], record["optimizer"])
    lines = [
        f"Bytes of FlyNet at the paper's sizes (input {record['input']}, {record['dtype']}, "
        f"{record['optimizer']}), each column measured in a process of its own, commit {record['commit']}:",
        "",
    ]
    lines += ["| | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    columns = [memory_table.quantities(each) for each in found.values()]
    for name in columns[0]:
        cells = [memory_table.bytes_text(column[name]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return comparison, "\n".join(lines)


def text(machines: list[list[dict]], sweep: list[dict], beyond: list[dict], bytes_of_flynet: str) -> str:
    """All that stands between the README's markers."""
    parts = [
        "Time of PyTorch's linear layer with stored weights over ours, so that above 1 is faster.",
        *map(table, machines),
        "![speed-up against the batch size](benchmarks/results/speedup.png)",
        others(machines),
        rivals(sweep),
        "![weights per second against the batch size](benchmarks/results/roofline.png)",
        huge(beyond),
        bytes_of_flynet,
        "![bytes of FlyNet, and of many tasks](benchmarks/results/memory_flynet.png)",
    ]
    return "\n\n".join(parts)


def rebuild(readme: Path = README, pictures: Path = RESULTS) -> None:
    """Write the pictures, and the tables between the README's markers."""
    machines = [read(path) for path in sorted(RESULTS.glob("cpu_*.jsonl"), reverse=True)]
    sweep, beyond = (bench_rows.read(RESULTS / name) for name in ("bench.jsonl", "huge.jsonl"))
    record = json.loads((RESULTS / "memory_flynet.json").read_text())
    comparison, bytes_of_flynet = memory(record)
    FigureCanvasAgg(figure(machines)).print_png(pictures / "speedup.png")
    products, copies = ([row for row in sweep if (row["name"] == "copy") == copy] for copy in (False, True))
    FigureCanvasAgg(rate_figure(products, copies)).print_png(pictures / "roofline.png")
    title = "FlyNet, 784 - 7840 - 10"
    memory_table.save_figure(pictures / "memory_flynet.png", comparison, record["tasks"], title)
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    results = text(machines, sweep, beyond, bytes_of_flynet)
    readme.write_text(f"{before}{BEGIN}\n{results}\n{END}{after}")
