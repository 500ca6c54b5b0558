"""Rivals: every one that can run here passes its gate, wrong ones are refused, missing ones are named."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from nmkern.bench import cases, rivals
from nmkern.bench.clocks import HostClock
from nmkern.bench.harness import Report
from nmkern.bench.plan import Row, follow
from nmkern.bench.rivals import RIVALS, Operands, base

F32 = torch.float32


def operands(family="uniform", m=3, k=256, n=512, dtype=F32, device=None):
    layer = cases.Layer(n, k, family, fan_in=7 if family == "sparse" else None)
    x = torch.randn(m, k, generator=cases.generator()).to(dtype)
    ours = x.double() @ layer.matrix.materialize(torch.float64).T
    kind = Operands if device is None else type("Elsewhere", (Operands,), {"device": device})
    return kind(layer.matrix, [x, x.clone()], lambda: layer.stored(dtype), ours, cases.BOUNDS[dtype])


@pytest.mark.parametrize("family", ["uniform", "normal", "rademacher", "sparse"])
@pytest.mark.parametrize("m", [1, 5])
def test_what_needs_no_other_package_passes_its_gate(family, m):
    names = [name for name in rivals.names_of(family) if RIVALS[name].missing("cpu") is None]
    names = [name for name in names if name not in ("compiled", "brainevent")]
    calls, not_timed, own = rivals.prepare(names, operands(family, m))
    want = {"sparse": {"dense", "csr", "sklearn"}, "rademacher": {"stored", "generate", "sklearn"}}
    assert calls.keys() == want.get(family, {"stored", "generate", "numpy", "sklearn"})
    refused = {
        "uniform": {"int4": "refused: needs dtype bfloat16"},
        "rademacher": {
            "numpy": "refused: needs family uniform or normal",
            "int4": "refused: needs dtype bfloat16",
        },
    }
    assert not_timed == refused.get(family, {})
    assert set(own) == calls.keys() & {"generate", "numpy"}


@pytest.mark.parametrize("family", ["uniform", "rademacher"])
@pytest.mark.parametrize("transposed", [False, True])
def test_pytorchs_4_bits_hold_our_weights(family, transposed):
    # Products with unit vectors are weights: those of the rival differ from ours by the factor's rounding.
    layer = cases.Layer(256, 128 * 2, family)
    matrix = layer.matrix.T if transposed else layer.matrix
    x = torch.eye(matrix.cols, dtype=torch.bfloat16)
    weights = matrix.materialize(torch.float64)
    given = Operands(
        matrix,
        [x],
        lambda: [w.T if transposed else w for w in layer.stored(torch.bfloat16)],
        weights.T,
        cases.BOUNDS[torch.bfloat16],
    )
    calls, not_timed, own = rivals.prepare(["int4"], given)
    assert not_timed == {} and own == ()
    factor = torch.tensor(matrix.factor).bfloat16().item()
    assert torch.equal(calls["int4"](), (weights.T / matrix.factor).round().mul(factor).bfloat16())


@pytest.mark.parametrize(
    ("k", "n", "needs"), [(200, 64, "inputs in multiples of 128"), (256, 40, "outputs in multiples of 16")]
)
def test_pytorchs_4_bits_say_which_sizes_they_take(k, n, needs):
    _, not_timed, _ = rivals.prepare(["int4"], operands(k=k, n=n, dtype=torch.bfloat16))
    assert not_timed["int4"].startswith(f"refused: needs {needs}")


@pytest.mark.slow
def test_a_compiled_product_stays_compiled_beyond_eight_shapes():
    for m in range(1, 11):
        calls, not_timed, _ = rivals.prepare(["compiled"], operands(m=m, k=16, n=16))
        assert not_timed == {} and calls["compiled"]().shape == (m, 16)
    assert torch._dynamo.utils.counters["unimplemented"] == {}


def product_of(function, own=False):
    given = operands()
    weight = given.stored()[0]
    built = base.Product(lambda x: function(x, weight), given.inputs)
    return replace(RIVALS["generate" if own else "stored"], build=lambda _: built), given


@pytest.mark.parametrize(
    ("function", "own"),
    [
        (lambda x, w: F.linear(x, w) * 1.001, False),
        (lambda x, w: F.linear(x, -w), False),
        (lambda x, w: F.linear(x, w).relu(), True),  # not linear
        (lambda x, w: F.linear(x, torch.rand(w.shape)), True),  # other weights in every call
        (lambda x, w: F.linear(x, w)[:, :-1], True),
        (lambda x, w: F.linear(x, w) * 0, True),
        (lambda x, w: F.linear(x, w) + 0.01, True),
    ],
)
def test_a_wrong_product_is_refused_and_never_timed(function, own, monkeypatch):
    rival, given = product_of(function, own)
    monkeypatch.setitem(RIVALS, rival.name, rival)
    with torch.random.fork_rng():
        calls, not_timed, _ = rivals.prepare([rival.name], given)
    assert calls == {} and "not timed" in not_timed[rival.name]


def test_a_rivals_failure_costs_nothing_but_its_own_figure(monkeypatch):
    def broken(_):
        raise ZeroDivisionError("its own\nbusiness")

    monkeypatch.setitem(RIVALS, "generate", replace(RIVALS["generate"], build=broken))
    report = Report(None, HostClock(), tell=lambda _: None)
    cases.product(report, cases.Layer(32, 16, "uniform"), 2, F32, False, 0.0, against=("stored", "generate"))
    (row,) = report.rows
    assert row["ratios"].keys() == {"stored"}
    assert row["not_timed"] == {"generate": "failed: ZeroDivisionError: its own business"}


def test_our_own_wrong_result_is_a_failed_row_without_a_figure(monkeypatch):
    right = cases.modulated_linear
    monkeypatch.setattr(cases, "modulated_linear", lambda x, matrix: 1.001 * right(x, matrix))
    report = Report(None, HostClock(), tell=lambda _: None)
    layer = cases.Layer(32, 16, "uniform")
    row = Row("wrong", 0, lambda: cases.product(report, layer, 2, F32, False, 0.0))
    assert "not timed" in follow([row], report, float("inf")).failed["wrong"]
    assert "seconds" not in report.rows[0]


def test_missing_rivals_are_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = base.importlib.util.find_spec
    absent = ("sklearn", "fast_jl", "torchao")
    monkeypatch.setattr(
        base.importlib.util, "find_spec", lambda name: None if name in absent else found(name)
    )
    _, not_timed, _ = rivals.prepare(["stored", "sklearn", "torchao"], operands())
    assert not_timed == {
        "sklearn": "missing: scikit-learn is not installed",
        "torchao": "missing: torchao is not installed",
    }
    _, not_timed, _ = rivals.prepare(["fast_jl"], operands("rademacher"))
    assert not_timed == {"fast_jl": "missing: fast_jl is not installed"}


def test_a_rival_of_another_device_says_so(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    _, not_timed, _ = rivals.prepare(["bitsandbytes"], operands())
    assert not_timed == {"bitsandbytes": "missing: needs a tensor on cuda, not on cpu"}


# Stand-ins for libraries that need a GPU, with the calls that the adapters make. They show that an adapter
# hands over the right operands, not that it fits the library.


def four_bits(weight):
    scale = weight.abs().max() / 7
    return (weight / scale).round().clamp(-8, 7) * scale


class Marlin:
    class Layer(torch.nn.Module):
        def __init__(self, k, n, groupsize):
            super().__init__()
            self.shape = (n, k)

        def pack(self, linear, scales):
            assert linear.weight.shape == self.shape and scales.shape == (self.shape[0], self.shape[1] // 128)
            self.weight = linear.weight

        def forward(self, x):
            return F.linear(x, self.weight)


class Bitsandbytes:
    class functional:  # noqa: N801
        @staticmethod
        def quantize_4bit(weight, blocksize, quant_type):
            return four_bits(weight), None

    @staticmethod
    def matmul_4bit(x, weight, quant_state):
        return x @ weight


class Quantization:
    Int4WeightOnlyConfig = staticmethod(lambda **options: options)

    @staticmethod
    def quantize_(model, config):
        model[0].weight.data = four_bits(model[0].weight.data)


class FastJL:
    @staticmethod
    def project_rademacher_8(x, n, seed, processors):
        return x @ torch.randn(x.shape[1], n, generator=torch.Generator().manual_seed(seed)).sign()


@pytest.mark.parametrize(
    ("name", "modules", "family", "dtype"),
    [
        ("marlin", {"marlin": Marlin}, "normal", torch.float16),
        ("bitsandbytes", {"bitsandbytes": Bitsandbytes}, "uniform", torch.bfloat16),
        ("torchao", {"torchao": types, "torchao.quantization": Quantization}, "uniform", torch.bfloat16),
        ("fast_jl", {"fast_jl": FastJL}, "rademacher", F32),
    ],
)
def test_adapters_of_gpu_libraries_hand_over_the_right_operands(name, modules, family, dtype, monkeypatch):
    for module, stand_in in modules.items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda _: object())
    processors = types.SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    given = operands(family, dtype=dtype, device="cuda")
    calls, not_timed, own = rivals.prepare([name], given)
    assert not_timed == {} and own == (name,)
    assert calls[name]().shape == given.ours.shape
