"""The README's results are those of the committed rows, and of nothing else."""

import sys
from pathlib import Path

# Benchmarks are no part of the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import report


def test_the_readme_is_what_the_command_writes(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text().replace(" | ", " / "))  # a rebuild must repair the tables
    report.rebuild(readme, tmp_path)
    _, _, rest = readme.read_text().partition(report.BEGIN)
    _, _, committed = report.README.read_text().partition(report.BEGIN)
    assert rest.partition(report.END)[0] == committed.partition(report.END)[0]
    for name in ("speedup.png", "roofline.png", "memory_flynet.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (report.RESULTS / name).is_file()


def test_every_figure_of_the_results_has_a_passed_check():
    for name in ("bench.jsonl", "huge.jsonl"):
        for row in report.bench_rows.read(report.RESULTS / name):
            assert row["relative_error"] <= 2**-8 and row["commit"] not in ("unknown", None)
            assert "dirty" not in row["commit"]
