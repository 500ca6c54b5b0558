"""The library for CUDA without a GPU: bindings, host code and PTX, called on CPU tensors."""

import subprocess
import sys
from pathlib import Path

import pytest

from native import emulated_library

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REFUSAL = emulated_library.refusal()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(REFUSAL is not None, reason=REFUSAL or "")]


@pytest.mark.parametrize("with_stub", [True, False], ids=["cuda", "no cuda"])
def test_calls_without_a_gpu(with_stub):
    library, stub, environment = emulated_library.built("90a")
    done = subprocess.run(
        [sys.executable, HERE / "emulated_cuda.py", library, stub if with_stub else "none"],
        env={**environment, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr
