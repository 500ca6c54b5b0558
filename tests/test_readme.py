"""The README is true: its Python runs, its commands exist, its tables are those of the code."""

import re
from pathlib import Path

import pytest

from nmkern import environment
from nmkern.cli import build_parser, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TYPED = re.findall(r"^\$ nmkern (.*)$", README, re.MULTILINE)
COMMANDS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split("\n")[0])
def test_python_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_two_commands_and_both_set_everything_up():
    assert len(COMMANDS) == 2
    assert [command.split(" && ")[0] for command in COMMANDS] == ["bash .ci/setup"] * 2
    assert (ROOT / ".ci/setup").is_file()


def test_the_commands_that_measure_exist():
    assert [build_parser().parse_args(command.split()).command for command in TYPED] == ["bench"] * 2 + [
        "memory"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", TYPED)
def test_the_commands_that_measure_run(command, tmp_path):
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.png")) and (tmp_path / "table.txt").is_file()


def test_the_environment_table_is_the_code():
    rows = re.findall(r"^\| `([A-Z]+_\w+)` \| (.*) \|$", README, re.MULTILINE)
    assert dict(rows) == environment.VARIABLES


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\((?!https://)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_stream_is_as_short_as_told():
    told = int(re.search(r"in (\d+) lines of NumPy", README).group(1))
    lines = len((ROOT / "nmkern/stream.py").read_text().splitlines())
    assert lines <= told < lines + 20
