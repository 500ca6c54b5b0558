"""What launches a kernel that is known already: no other than Triton would, and seen by who watches launches.

Without a GPU, and not in Triton's interpreter: simulated_launches.py says how.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import nmkern
from nmkern.backends.triton import launch

CHECKS = [
    "what_is_known_launches_what_triton_would",
    "the_key_tells_apart_what_triton_does",
    "hooks_see_every_launch",
    "what_is_not_compiled_or_to_be_watched_goes_to_triton",
    "of_another_triton_nothing_is_used_but_its_kernels",
    "no_more_is_kept_than_said",
]


@pytest.mark.parametrize("target", ["cuda", "hip"])
@pytest.mark.parametrize("check", CHECKS)
def test_simulated(check, target):
    # A process of its own: this one may have chosen Triton's interpreter. Of options left to defaults that
    # are to change, Triton warns.
    script = Path(__file__).with_name("simulated_launches.py")
    done = subprocess.run(
        [sys.executable, "-W", "error:TRITON_", script, check, target],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(nmkern.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "passed\n", done.stdout + done.stderr


def test_a_device_that_is_current_is_not_made_so_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, switched in (("cuda:0", True), ("cuda:1", False), ("cpu", False)):
        assert isinstance(launch.on_device(torch.device(name)), torch.cuda.device) == switched, name
