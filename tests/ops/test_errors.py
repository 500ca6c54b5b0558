"""Bad input gets an exception that names the argument, what came and what was expected, before any kernel.

ValueError for values and shapes, TypeError for types and dtypes, RuntimeError for devices and backends.
"""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nmkern
from nmkern import RandomMatrix, modulated_linear, sparse_project

DENSE = RandomMatrix(6, 4, seed=1)
SPARSE = RandomMatrix(6, 4, seed=1, family="sparse", fan_in=2)
X = torch.ones(5, 4)
NAN = float("nan")


class Kernels(TorchDispatchMode):
    """Records every nmkern operator that the dispatcher is asked to run."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "nmkern":
            self.ran.append(str(function))
        return function(*args, **(kwargs or {}))


def refuse(operator, arguments, error, text):
    """Every part of ``text``, between its dots, stands in the message of one ``error``; nothing ran.

    Nor is it another error where no mode watches and small calls are not checked at first.
    """
    default = {"x": X, "matrix": DENSE if operator is modulated_linear else SPARSE}
    named = {**default, **arguments}
    x, matrix = named.pop("x"), named.pop("matrix")
    with Kernels() as kernels, warnings.catch_warnings():
        warnings.simplefilter("error")  # told once: by the exception
        with pytest.raises(error) as raised:
            operator(x, matrix, **named)
    message = str(raised.value)
    assert type(raised.value) is error
    assert all(part in message for part in text.split("...")), message
    assert message.startswith(text.split("...")[0]), message
    assert kernels.ran == []
    with pytest.raises(error) as unwatched:
        operator(x, matrix, **named)
    assert (type(unwatched.value), str(unwatched.value)) == (error, message)


def test_the_recorder_sees_kernels_run():
    """Else "no kernel ran" would say nothing."""
    with Kernels() as kernels:
        modulated_linear(X, DENSE)
        sparse_project(X, SPARSE)
    assert len(kernels.ran) == 2


INPUT = [
    ({"x": [1.0] * 4}, TypeError, "x: expected a tensor, got list"),
    ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    ({"x": X.int()}, TypeError, "x: expected float32, float64, bfloat16, float16, got int32"),
    ({"x": X.bool()}, TypeError, "x: expected float32, float64, bfloat16, float16, got bool"),
    ({"x": X.to(torch.complex64)}, TypeError, "x: expected float32, ..., got complex64"),
    ({"x": X.to(torch.float8_e4m3fn)}, TypeError, "x: expected float32, ..., got float8_e4m3fn"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape [..., 4] for a matrix of shape [6, 4], got []"),
    ({"x": torch.ones(4, 5)}, ValueError, "x: expected shape [..., 4] ... [6, 4], got [4, 5]"),
    ({"x": torch.ones(2, 0)}, ValueError, "x: expected shape [..., 4] ... got [2, 0]"),
    ({"matrix": torch.ones(6, 4)}, TypeError, "matrix: expected a RandomMatrix, got Tensor"),
    ({"matrix": None}, TypeError, "matrix: expected a RandomMatrix, got NoneType"),
]


@pytest.mark.parametrize("operator", [modulated_linear, sparse_project])
@pytest.mark.parametrize(("arguments", "error", "text"), INPUT, ids=lambda value: str(value)[:60])
def test_bad_input_or_matrix(operator, arguments, error, text):
    refuse(operator, arguments, error, text)


@pytest.mark.parametrize("operator", [modulated_linear, sparse_project])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_a_layout_without_strides(operator, layout):
    x = getattr(X, "to_" + layout.replace("_coo", ""))()
    with Kernels() as kernels, pytest.raises((TypeError, ValueError), match=r"^x: expected .*sparse"):
        operator(x, DENSE if operator is modulated_linear else SPARSE)
    assert kernels.ran == []


@pytest.mark.parametrize(
    ("operator", "matrix", "text"),
    [
        (modulated_linear, SPARSE, "matrix: expected a dense family, got 'sparse', which sparse_project"),
        (sparse_project, DENSE, "matrix: expected a sparse family, got 'uniform', which modulated_linear"),
    ],
)
def test_a_matrix_of_the_other_kind(operator, matrix, text):
    refuse(operator, {"matrix": matrix}, ValueError, text)


BANKS = {"in_gain": 4, "out_gain": 6, "bias": 6}


@pytest.mark.parametrize("name", BANKS)
@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda f: [1.0] * f, TypeError, "expected a tensor, got list"),
        (lambda f: 1.0, TypeError, "expected a tensor, got float"),
        (
            lambda f: torch.ones(f, dtype=torch.int64),
            TypeError,
            "expected float32 for x of float32, got int64",
        ),
        (
            lambda f: torch.ones(f, dtype=torch.float64),
            TypeError,
            "expected float32 for x of float32, got float64",
        ),
        (
            lambda f: torch.ones(f, dtype=torch.bfloat16),
            TypeError,
            "expected float32 for x of float32, got bfloat16",
        ),
        (lambda f: torch.ones(f, device="meta"), RuntimeError, "expected device cpu, that of x, got meta"),
        (lambda f: torch.tensor(1.0), ValueError, "expected [..., {f}], got shape []"),
        (lambda f: torch.ones(f + 1), ValueError, "expected [..., {f}], got shape [{g}]"),
        (lambda f: torch.ones(f, 1), ValueError, "expected [..., {f}], got shape [{f}, 1]"),
        (
            lambda f: torch.ones(3, f),
            ValueError,
            "expected a vector, or one per row that broadcasts to [5] rows, got shape [3, {f}]; "
            "a bank of contexts needs context=",
        ),
        (lambda f: torch.ones(2, 5, f), ValueError, "... that broadcasts to [5] rows, got shape [2, 5, {f}]"),
    ],
)
def test_bad_gains_and_bias(name, make, error, text):
    features = BANKS[name]
    expected = f"{name}: " + text.replace("{f}", str(features)).replace("{g}", str(features + 1))
    refuse(modulated_linear, {name: make(features)}, error, expected)


@pytest.mark.parametrize(
    ("dtype", "bank", "text"),
    [
        (
            torch.bfloat16,
            torch.float16,
            "in_gain: expected bfloat16 or float32 for x of bfloat16, got float16",
        ),
        (torch.float16, torch.float64, "in_gain: expected float16 or float32 for x of float16, got float64"),
        (torch.float64, torch.float32, "in_gain: expected float64 for x of float64, got float32"),
    ],
)
def test_gains_in_a_dtype_that_x_does_not_go_with(dtype, bank, text):
    refuse(modulated_linear, {"x": X.to(dtype), "in_gain": torch.ones(4, dtype=bank)}, TypeError, text)


GAIN = {"in_gain": torch.ones(3, 4)}
C = torch.tensor([0, 1, 2, 1, 0])
CONTEXT = [
    ({**GAIN, "context": True}, TypeError, "context: expected an int or an integer tensor, got True"),
    ({**GAIN, "context": 1.0}, TypeError, "context: expected an int or an integer tensor, got 1.0"),
    ({**GAIN, "context": "1"}, TypeError, "context: expected an int or an integer tensor, got '1'"),
    ({**GAIN, "context": [0] * 5}, TypeError, "context: expected an int or an integer tensor, got [0,"),
    ({**GAIN, "context": C.float()}, TypeError, "context: expected an integer dtype, got float32"),
    ({**GAIN, "context": C.bool()}, TypeError, "context: expected an integer dtype, got bool"),
    ({**GAIN, "context": C.to("meta")}, RuntimeError, "context: expected device cpu, that of x, got meta"),
    ({**GAIN, "context": C[:4]}, ValueError, "context: expected shape [5], the leading shape of x, got [4]"),
    ({**GAIN, "context": C[None]}, ValueError, "context: expected shape [5], ..., got [1, 5]"),
    (
        {**GAIN, "context": 3},
        ValueError,
        "context: expected 0 <= context < 3, ... in_gain, got 3",
    ),
    ({**GAIN, "context": -1}, ValueError, "context: expected 0 <= context < 3, ... in_gain, got -1"),
    (
        {"bias": torch.ones(2, 6), "context": C},
        ValueError,
        "context: expected 0 <= context < 2, the contexts of bias, got values from 0 to 2",
    ),
    ({**GAIN, "context": C - 1}, ValueError, "context: expected 0 <= context < 3, ... from -1 to 1"),
    (
        {"strength": torch.ones(2), "context": C},
        ValueError,
        "context: expected 0 <= context < 2, the contexts of strength, got values from 0 to 2",
    ),
    ({"strength": torch.ones(2), "context": 2}, ValueError, "context: expected 0 <= context < 2, ... got 2"),
    (
        {"in_gain": torch.ones(1, 3, 4), "context": C},
        ValueError,
        "in_gain: expected a vector or a bank [contexts, 4] beside context, got shape [1, 3, 4]",
    ),
    (
        {"out_gain": torch.ones(0, 6), "context": C},
        ValueError,
        "out_gain: expected a vector or a bank [contexts, 6] beside context, got shape [0, 6]",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), CONTEXT, ids=lambda value: str(value)[:60])
def test_bad_contexts(arguments, error, text):
    refuse(modulated_linear, arguments, error, text)


STRENGTH = [
    ("1", TypeError, "strength: expected a number or a tensor, got '1'"),
    (True, TypeError, "strength: expected a number or a tensor, got True"),
    ([1.0], TypeError, "strength: expected a number or a tensor, got [1.0]"),
    (NAN, ValueError, "strength: expected a finite number, got nan"),
    (float("inf"), ValueError, "strength: expected a finite number, got inf"),
    (1e300, ValueError, "strength: ...got 1e+300"),
    (10**400, ValueError, "strength: "),
    (torch.tensor(1.0, dtype=torch.float64), TypeError, "strength: expected float32 ..., got float64"),
    (torch.tensor(1), TypeError, "strength: expected float32 for x of float32, got int64"),
    (torch.tensor(1.0, device="meta"), RuntimeError, "strength: expected device cpu, ..., got meta"),
    (torch.ones(3), ValueError, "strength: ... broadcasts to [5] rows, got shape [3]; ... needs context="),
]


@pytest.mark.parametrize(("strength", "error", "text"), STRENGTH, ids=lambda value: str(value)[:40])
def test_bad_strengths(strength, error, text):
    refuse(modulated_linear, {"strength": strength}, error, text)


@pytest.mark.parametrize(("operator", "family"), [(modulated_linear, "uniform"), (sparse_project, "sparse")])
def test_no_backend_for_the_call(operator, family):
    with nmkern.use_backend("cpu"):
        refuse(
            operator,
            {"x": X.double()},
            RuntimeError,
            "no backend can serve this call: cpu: computes float32, bfloat16 and float16, not float64"
            "; cuda: cpu is forced; triton: cpu is forced; reference: cpu is forced",
        )


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_a_context_out_of_range_is_refused_where_python_cannot_look(backend_once, index):
    """Traced and batched, a context has no values to check: the kernel does, before it reads a bank."""
    modulated_linear(X, DENSE)  # the choice of a backend is made once
    bank = torch.ones(3, 4)
    context = torch.tensor([0, 1, index, 1, 0])

    def call(x, context):
        return modulated_linear(x, DENSE, in_gain=bank, context=context)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    batched = torch.func.vmap(call, (None, 0))
    for run in (lambda: compiled(X, context), lambda: batched(X, context[None])):
        with pytest.raises((RuntimeError, IndexError)):
            run()
