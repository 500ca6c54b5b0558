"""A call holds its outputs and a bounded scratch: no weights, whatever the layer's size."""

import json

import pytest

# 16384 x 16384 weights are 1 GiB in float32. Forward and backward need a few vectors of 16384 numbers a
# row (some MiB) and the kernels' scratch. Measured is the growth of the highest resident set, whose mark
# is set back right before the call; last, that the meter sees 64 MiB where they are taken.
SCRIPT = """
import json, pathlib, torch, nmkern

def highest():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

def growth(call):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = highest()
    call()
    return highest() - before

def step(rows, size):
    matrix = nmkern.RandomMatrix(size, size, seed=1)
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, size, generator=g, requires_grad=True)
    in_gain, bias = (torch.randn(size, generator=g, requires_grad=True) for _ in range(2))
    def call():
        y = nmkern.modulated_linear(x, matrix, in_gain=in_gain, bias=bias)
        grads = torch.autograd.grad(y.square().sum(), (x, in_gain, bias))
        assert all(bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads)
    return call

step(3, 512)()  # loads what is loaded once
print(json.dumps({
    "kernel": nmkern.explain(nmkern.RandomMatrix(1, 1, seed=1)).kernel,
    "growth": {rows: growth(step(rows, 16384)) for rows in (1, 8)},
    "meter": growth(lambda: torch.ones(64 << 18)),
}))
"""


@pytest.mark.slow
def test_forward_and_backward_of_a_gibibyte_of_weights_in_64_mebibytes(run_python):
    told = json.loads(run_python(SCRIPT))
    assert told["meter"] >= 60 << 20
    for rows, growth in told["growth"].items():
        assert growth < 64 << 20, f"M = {rows} grew by {growth >> 20} MiB on {told['kernel']}"
