"""machine: what a CPU is called, from what Linux tells of it."""

import pytest

from nmkern.machine import cpu_model

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC

processor\t: 1
model\t\t: 2
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd
CPU implementer\t: 0x41
"""


def test_a_line_of_products_is_told_apart_by_family_and_model(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(X86)
    assert cpu_model(path) == "AMD EPYC (family 25, model 1)"
    path.write_text(X86.replace("cpu family\t: 25\n", ""))
    assert cpu_model(path) == "AMD EPYC"


@pytest.mark.parametrize("told", [ARM, "", None], ids=["ARM", "nothing", "no file"])
def test_without_a_name_it_is_what_python_calls_it(tmp_path, monkeypatch, told):
    path = tmp_path / "cpuinfo"
    if told is not None:
        path.write_text(told)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_model(path) == "aarch64"
