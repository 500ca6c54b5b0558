"""The programs for a GPU, built by an nvcc that only writes down what it was asked for."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from native import device_programs

NVCC = """#!/bin/sh
case "$1" in
--help) echo "{help}"; exit;;
--version) echo "{version}"; exit;;
esac
echo "$*" >> {log}
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A function that puts such an nvcc on PATH; its calls since then."""
    monkeypatch.setattr(device_programs, "BUILT", tmp_path / "built")

    def put(help="--split-compile <number>", version="13.0"):
        log = tmp_path / "log"
        log.write_text("")
        tool = tmp_path / "bin/nvcc"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(NVCC.format(help=help, version=version, log=log))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        return lambda: [line.split() for line in log.read_text().splitlines()]

    return put


def test_all_are_built_once_by_a_compiler_for_each_file(nvcc):
    calls = nvcc()
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda name: device_programs.program(name, "90a"), device_programs.KERNELS))
    assert [path.name for path in made] == [f"{name}_device" for name in device_programs.KERNELS]
    assert all(path.exists() for path in made)
    compiled = [call[call.index("-c") + 1].split("/")[-1] for call in calls() if "-c" in call]
    cuda = {path.name for path in (device_programs.ROOT / "csrc/cuda").glob("*.cu")}
    assert sorted(compiled) == sorted(cuda | {f"{name}_device.cpp" for name in device_programs.KERNELS})
    linked = {call[-1].split("/")[-1]: call for call in calls() if "-c" not in call}
    assert len(linked) == 3
    for name, files in device_programs.KERNELS.items():
        objects = {arg.split("/")[-1] for arg in linked[f"{name}_device.linked"] if arg.endswith(".o")}
        assert objects == {"device.o", f"{name}_device.o", *(f"{file}.o" for file in files)}


@pytest.mark.parametrize("help", ["--split-compile <number>", "--threads <number>"])
def test_large_files_are_compiled_by_threads_where_the_compiler_can(nvcc, help):
    calls = nvcc(help)
    device_programs.program("sparse", "80")
    split = [call[call.index("-c") + 1].split("/")[-1] for call in calls() if "-split-compile=0" in call]
    assert sorted(split) == (["skinny.cu", "wide.cu"] if "split" in help else [])


def test_what_the_programs_are_made_from_is_in_their_name(nvcc, monkeypatch, tmp_path):
    nvcc()
    made = [device_programs.program("dense", target) for target in ("90a", "80", "80")]
    assert made[0] != made[1] == made[2]
    calls = nvcc(version="13.1")
    made.append(device_programs.program("dense", "80"))
    assert len(calls()) > 0
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(device_programs, "HERE", tmp_path / "tests")
    for text in ("a", "b"):
        (tmp_path / "tests/x.h").write_text(text)
        made.append(device_programs.program("dense", "80"))
    assert len(set(made)) == 5


def test_a_compiler_that_fails_leaves_no_program(nvcc, tmp_path):
    nvcc()
    tool = tmp_path / "bin/nvcc"
    works = tool.read_text()
    tool.write_text(works.replace('echo "$*"', 'case "$*" in *linked) exit 1;; esac; echo "$*"'))
    with pytest.raises(device_programs.subprocess.CalledProcessError):
        device_programs.program("dense", "80")
    tool.write_text(works)
    assert device_programs.program("dense", "80").exists()


def test_what_a_tool_says_is_in_its_file_before_it_ends(tmp_path, monkeypatch):
    told = tmp_path / "told"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"\necho found >&2\ncp {told} {tmp_path}/early\nexit 9\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert device_programs.watch(tmp_path / "dense_device", "memcheck", told) == 9
    assert told.read_text() == f"--tool=memcheck --error-exitcode=9 {tmp_path}/dense_device\nfound\n"
    assert (tmp_path / "early").read_text() == told.read_text()


def test_hopper_has_an_architecture_of_its_own():
    assert [device_programs.arch(found) for found in ((8, 0), (8, 9), (9, 0), (10, 0))] == [
        "80",
        "89",
        "90a",
        "100",
    ]
