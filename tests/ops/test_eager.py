"""The short way of everyday eager calls: what takes it, what must not; both ways give the same bits."""

import contextlib
import copy
import importlib
import io
import pickle
import types
from functools import partial

import pytest
import torch
from formula import generator, normals
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import nmkern
from nmkern import RandomMatrix, modulated_linear
from nmkern.backends import cpu, packed
from nmkern.nn import ModulatedLinear
from nmkern.ops.rules import plain_apply

MATRIX = RandomMatrix(6, 4, seed=1)
SHORT, CHECKED = {"nmkern::packed_matmul"}, {"nmkern::cpu_modulated_matmul"}


@pytest.fixture(autouse=True)
def _served_by_the_cpu_backend():
    if reason := cpu.refusal("uniform", torch.float32, "cpu"):
        pytest.skip(reason)
    with nmkern.use_backend("cpu"):
        yield


@contextlib.contextmanager
def checked_only():
    """Every call in the block is checked and goes to the public primitives."""
    module = importlib.import_module("nmkern.ops.modulated_linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_matmul", lambda *_: None)
        yield


def ran(call):
    """The result of a call, and the nmkern operators that the profiler saw in it."""
    with torch.autograd.profiler.profile() as profile:
        result = call()
    return result, {event.name for event in profile.function_events if event.name.startswith("nmkern::")}


def gains(*names, dtype=torch.float32, grad=False, seed=2):
    g = generator(seed)
    sizes = {"in_gain": 4, "out_gain": 6, "bias": 6}
    return {name: normals((sizes[name],), g, dtype).requires_grad_(grad) for name in names}


# What takes it

EVERY = ("in_gain", "out_gain", "bias")
NAMES = [(), ("in_gain",), ("out_gain",), ("bias",), ("in_gain", "bias"), EVERY]
INPUTS = {
    "matrix": lambda x: x,
    "vector": lambda x: x[0],
    "three dimensions": lambda x: x.view(2, 3, 4),
    "five dimensions": lambda x: x.view(2, 1, 3, 1, 4),
    "nothing": lambda x: x[:0],
    "columns apart": lambda x: x.repeat(1, 2)[:, ::2],
    "rows apart": lambda x: x.repeat(2, 1)[::2],
    "one row many times": lambda x: x[:1].expand(6, 4),
    "columns first": lambda x: x.T.contiguous().T,
}
MATRICES = {
    "whole": MATRIX,
    "transposed": RandomMatrix(4, 6, seed=2**64 - 1, family="rademacher", scale=3.0).T,
    "slice": RandomMatrix(40, 30, seed=7, family="normal")[5:11, 3:7],
    "transposed slice": RandomMatrix(2**34 - 2, 40, seed=7).T[3:9, 2**34 - 7 : 2**34 - 3],
}


def both_ways(form, matrix, names, dtype, gradient):
    """Result and gradients of both ways, and what ran in the short one."""
    found = []
    for way in (contextlib.nullcontext, checked_only):
        base = normals((6, 4), generator(1), dtype).requires_grad_()
        named = gains(*names, grad=True)

        def step(base=base, named=named):
            y = modulated_linear(INPUTS[form](base), matrix, **named)
            dy = normals((y.numel(),), generator(3), dtype).view(y.shape)
            return y, *torch.autograd.grad(y, [base, *named.values()], gradient(dy))

        with way():
            found.append(ran(step))
    (ours, operators), (theirs, _) = found
    assert operators and all(name.startswith("nmkern::packed_") for name in operators)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("form", INPUTS)
def test_both_ways_give_the_same_bits_for_every_form_of_input(form, names):
    both_ways(form, MATRIX, names, torch.float32, lambda dy: dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("matrix", MATRICES)
def test_both_ways_give_the_same_bits_for_every_matrix(matrix, dtype):
    for names in ((), EVERY):
        both_ways("three dimensions", MATRICES[matrix], names, dtype, lambda dy: dy)


@pytest.mark.parametrize(
    "gradient",
    [lambda dy: dy[:1].expand(dy.shape), lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1)],
    ids=["expanded", "transposed"],
)
@pytest.mark.parametrize("form", ["matrix", "one row many times"])
def test_both_ways_give_the_same_bits_for_every_layout_of_the_gradient(form, gradient):
    for names in ((), EVERY):
        both_ways(form, MATRIX, names, torch.float32, gradient)


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("needing", EVERY)
def test_only_what_needs_a_gradient_gets_one(names, needing):
    named = gains(*names)
    x = torch.ones(5, 4)
    leaf = named.get(needing, x).requires_grad_()
    y, operators = ran(lambda: modulated_linear(x, MATRIX, **named))
    assert operators == SHORT and y.grad_fn is not None
    with checked_only():
        want = torch.autograd.grad(modulated_linear(x, MATRIX, **named).sum(), leaf)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], want[0])
    assert not modulated_linear(x.detach(), MATRIX).requires_grad
    with torch.no_grad():
        y, operators = ran(lambda: modulated_linear(x, MATRIX, **named))
    assert operators == SHORT and not y.requires_grad


def test_parameters_inference_mode_and_a_module_take_it():
    layer = ModulatedLinear(4, 6, gain="both")
    x = torch.ones(2, 4)
    assert ran(lambda: layer(x))[1] == SHORT
    assert ran(lambda: layer(nn.Parameter(x)))[1] == SHORT
    fresh = ModulatedLinear(4, 6, gain="both")
    with torch.inference_mode():  # where the matrix is packed, for use outside of it as well
        y, operators = ran(lambda: fresh(x))
        assert operators == SHORT and y.is_inference()
    assert torch.equal(y, fresh(x)) and fresh(x).requires_grad


@pytest.mark.parametrize("names", [(), EVERY], ids=["bare", "every"])
def test_with_a_default_device_calls_take_it(names):
    """Which is a mode of functions, but concerns new tensors only."""
    x, named = torch.ones(2, 4, requires_grad=True), gains(*names, grad=True)
    leaves = [x, *named.values()]

    def step():
        return torch.autograd.grad(modulated_linear(x, MATRIX, **named).sum(), leaves)

    want, operators = ran(step)
    with torch.device("meta"):
        found, same = ran(step)
        assert same == operators and all(name.startswith("nmkern::packed_") for name in operators)
        with pytest.raises(ValueError, match="x: expected shape"):
            modulated_linear(x[:, :3], MATRIX)
        assert torch.empty(1).is_meta
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_first_call_takes_it(dtype):
    """No choice has been made yet here: a recomputed call would save other shapes than the first."""
    x = torch.ones(2, 4, dtype=dtype, requires_grad=True)
    call = partial(modulated_linear, matrix=MATRIX, **gains("in_gain"))
    checkpoint(call, x, use_reentrant=False).sum().backward()
    with nmkern.use_backend("cpu"):
        assert ran(lambda: call(x))[1] == SHORT


def test_a_process_may_begin_with_a_checkpoint(run_python):
    assert (
        run_python(
            "import torch, nmkern\n"
            "from torch.utils.checkpoint import checkpoint\n"
            "x, layer = torch.ones(3, 8, requires_grad=True), nmkern.nn.ModulatedLinear(8, 6)\n"
            "checkpoint(layer, x, use_reentrant=False).sum().backward()\n"
            "print(list(x.grad.shape))"
        )
        == "[3, 8]\n"
    )


# What must not take it


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


class FunctionsSeen(TorchFunctionMode):
    names: set

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload):
            self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_modes_see_the_public_operator():
    x = torch.ones(2, 4, requires_grad=True)
    with Seen() as mode:
        y = modulated_linear(x, MATRIX, **gains("in_gain"))
    assert {name for name in mode.names if name.startswith("nmkern")} == CHECKED
    with Seen() as mode:  # and in a backward pass, of a call that none has seen
        modulated_linear(x, MATRIX).sum().backward()
        y.sum().backward()
    assert {name for name in mode.names if name.startswith("nmkern")} == CHECKED
    with FunctionsSeen() as functions:
        functions.names = set()
        modulated_linear(x, MATRIX)
    assert functions.names <= CHECKED
    with torch.device("cpu"), functions:  # one that may pass, and one that may not
        assert ran(lambda: modulated_linear(x, MATRIX))[1] == CHECKED


@pytest.mark.parametrize("missing", ["_len_torch_dispatch_stack", "_len_torch_function_stack"])
def test_without_a_view_of_the_modes_every_call_is_checked(run_python, missing):
    printed = run_python(
        f"import torch; del torch._C.{missing}\n"
        "import nmkern\n"
        "from nmkern.ops import eager\n"
        "x, matrix = torch.ones(1, 4), nmkern.RandomMatrix(6, 4, seed=1)\n"
        "nmkern.modulated_linear(x, matrix)\n"
        "print(eager.eager_matmul(x, matrix, None, None, None), nmkern.explain(matrix).backend)"
    )
    assert printed == "None cpu\n"


def test_apply_without_what_python_adds_to_it():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    apply = plain_apply(Twice)
    assert isinstance(apply, types.BuiltinMethodType)  # torch's own, not Function.apply around it
    assert torch.equal(torch.autograd.grad(apply(x).sum(), x)[0], torch.full((3,), 2.0))


class Subclass(torch.Tensor):
    pass


OTHERS = {
    "a subclass": lambda x: modulated_linear(x.as_subclass(Subclass), MATRIX),
    "a gain of a subclass": lambda x: modulated_linear(x, MATRIX, in_gain=x[0].as_subclass(Subclass)),
    "a bank": lambda x: modulated_linear(x, MATRIX, in_gain=torch.ones(1, 4)),
    "a vector for each row": lambda x: modulated_linear(x, MATRIX, bias=torch.ones(2, 6)),
    "a context": lambda x: modulated_linear(x, MATRIX, in_gain=torch.ones(3, 4), context=1),
    "a strength": lambda x: modulated_linear(x, MATRIX, strength=2.0),
    "a strength to learn": lambda x: modulated_linear(x, MATRIX, strength=torch.tensor(2.0)),
    "a narrow gain": lambda x: modulated_linear(x.bfloat16(), MATRIX, in_gain=x[0].bfloat16()),
    "dimensions apart": lambda x: modulated_linear(torch.stack([x, -x], 1).transpose(0, 1), MATRIX),
    "vmap": lambda x: torch.func.vmap(partial(modulated_linear, matrix=MATRIX))(x),
    "grad": lambda x: torch.func.grad(lambda x: modulated_linear(x, MATRIX).sum())(x),
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_checked(name):
    x = torch.arange(8.0).view(2, 4)
    found, operators = ran(lambda: OTHERS[name](x))
    with checked_only():
        assert torch.equal(found, OTHERS[name](x))
    assert operators == CHECKED


def test_other_backends_are_asked():
    x = torch.ones(2, 4)
    with nmkern.use_backend("reference"):
        for _ in range(2):
            assert ran(lambda: modulated_linear(x, MATRIX))[1] == {"nmkern::reference_modulated_matmul"}
    assert ran(lambda: modulated_linear(x, MATRIX))[1] == SHORT
    with nmkern.use_backend("cpu"), pytest.raises(RuntimeError, match="no backend can serve this call"):
        modulated_linear(x.double(), MATRIX)


def test_autocast_chooses_the_dtype():
    x = torch.ones(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, operators = ran(lambda: modulated_linear(x, MATRIX))
    assert operators == CHECKED and y.dtype == torch.bfloat16


def test_a_compiled_call_is_one_public_operator():
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if "nmkern" in str(node.target)})
        return graph

    x = torch.ones(2, 4, requires_grad=True)
    named = gains("in_gain", "bias", grad=True)
    compiled = torch.compile(
        partial(modulated_linear, matrix=MATRIX, **named), fullgraph=True, backend=record
    )
    assert torch.equal(compiled(x), modulated_linear(x, MATRIX, **named))
    assert graphs == [{"nmkern.cpu_modulated_matmul.default"}]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("names", [(), EVERY], ids=["bare", "every"])
def test_a_trace_of_torch_jit_keeps_the_gradients(names, recorded):
    layer = ModulatedLinear(4, 6, gain="both")

    def bare(x):
        return modulated_linear(x, MATRIX)

    function = layer if names else bare
    x = normals((5, 4), generator(1)).requires_grad_()
    leaves = [x, *(layer.parameters() if names else ())]
    want = torch.autograd.grad((function(x) ** 2).sum(), leaves)
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(function, (x[:2],))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        graph = {node.kind() for node in program.inlined_graph.nodes()}
        assert {kind for kind in graph if kind.startswith("nmkern")} == CHECKED
        y = program(x)
        assert torch.equal(y, function(x))
        again = [x, *(program.parameters() if names else ())]
        found = torch.autograd.grad((y**2).sum(), again)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# Errors


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": torch.ones(2, 5)},
        {"x": torch.ones(())},
        {"x": torch.ones(2, 4).to_sparse()},
        {"x": torch.ones(2, 4, dtype=torch.int64)},
        {"x": [1.0]},
        {"matrix": RandomMatrix(6, 4, seed=1, family="sparse", fan_in=2)},
        {"matrix": torch.ones(6, 4)},
        {"in_gain": torch.ones(6)},
        {"out_gain": torch.ones(4)},
        {"bias": torch.ones(1)},
        {"bias": torch.ones(6, dtype=torch.float64)},
        {"bias": torch.ones(6, device="meta")},
        {"bias": 1.0},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_errors_are_worded_as_in_a_checked_call(arguments, grad):
    named = {"x": torch.ones(2, 4, requires_grad=grad), "matrix": MATRIX, **arguments}
    errors = []
    for way in (contextlib.nullcontext, checked_only):
        with way(), pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
            modulated_linear(**named)
        errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]
    assert errors[0][1].startswith(next(iter(arguments)))


@pytest.mark.parametrize("shape", [(7,), (1, 8), (9,)])
def test_the_operators_refuse_what_is_no_packed_matrix(shape):
    with pytest.raises(RuntimeError, match=r"matrix: expected int64 of shape \[8\]"):
        packed.matmul_bare(torch.ones(2, 4), torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"matrix: expected int64 of shape \[8\]"):
        packed.matmul_bare(torch.ones(2, 4), torch.zeros(8))


@pytest.mark.parametrize("other", [torch.ones(2, 5), torch.ones(3, 6), torch.ones(6), torch.ones(2, 1, 6)])
def test_the_gradient_of_a_gain_refuses_other_shapes(other):
    with pytest.raises(RuntimeError, match="other: expected"):
        packed.gain_grad(torch.ones(2, 4), None, None, other, True, packed.pack(MATRIX)[0])
    with pytest.raises(RuntimeError, match="other: expected"):
        packed.gain_grad(torch.ones(2, 1, 4), None, None, other.view(-1), True, packed.pack(MATRIX)[0])


# Gradients of gradients, and passes that are watched


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("form", ["matrix", "vector", "three dimensions"])
def test_second_derivatives_and_batched_gradients(form, names):
    results = []
    for way in (contextlib.nullcontext, checked_only):
        base = normals((6, 4), generator(1)).requires_grad_()
        leaves = [base, *gains(*names, grad=True).values()]
        with way():
            y, operators = ran(
                lambda leaves=leaves: modulated_linear(
                    INPUTS[form](leaves[0]), MATRIX, **dict(zip(names, leaves[1:], strict=True))
                )
            )
        dys = normals((3, y.numel()), generator(4)).view(3, *y.shape)
        batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
        first = torch.autograd.grad((y * y).sum(), leaves, create_graph=True)
        slope = sum((grad * grad).sum() for grad in first)
        results.append([*batched, *first, *torch.autograd.grad(slope, leaves)])
        assert operators == (SHORT if way is contextlib.nullcontext else CHECKED)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_saved_tensors_are_those_of_the_hooks_and_checkpoints_recompute():
    x, named = normals((2, 4), generator(1)).requires_grad_(), gains("in_gain", "bias", grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = modulated_linear(x, MATRIX, **named)
    assert saved == [x.shape, named["in_gain"].shape]
    want = torch.autograd.grad(y.sum(), [x, *named.values()])
    y = checkpoint(partial(modulated_linear, matrix=MATRIX, **named), x, use_reentrant=False)
    found = torch.autograd.grad(y.sum(), [x, *named.values()])
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_tensor_that_outlived_a_transform():
    x, gain = normals((2, 4), generator(1)), torch.ones(4, requires_grad=True)
    kept = []
    torch.func.grad(lambda v: (kept.append(v), v.sum())[1])(x)
    found = modulated_linear(kept[0], MATRIX, in_gain=gain)
    assert torch.equal(found, modulated_linear(x, MATRIX))
    (grad,) = torch.autograd.grad(found.sum(), gain)
    (want,) = torch.autograd.grad(modulated_linear(x, MATRIX, in_gain=gain).sum(), gain)
    assert torch.equal(grad, want)


# The matrix


def test_a_packed_matrix_is_the_same_value():
    matrix, other = (RandomMatrix(6, 4, seed=3) for _ in range(2))
    modulated_linear(torch.ones(1, 4), matrix)
    assert matrix._packed and not other._packed
    assert matrix == other and hash(matrix) == hash(other) and repr(matrix) == repr(other)
    assert pickle.dumps(matrix) == pickle.dumps(other)
    for copied in (copy.copy(matrix), copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert copied == matrix and copied.factor == matrix.factor and not copied._packed
    assert not matrix.T._packed


def test_no_mode_packs_a_matrix():
    from torch._subclasses import FakeTensorMode

    matrix = RandomMatrix(6, 4, seed=4)
    with FakeTensorMode() as mode:
        y = modulated_linear(mode.from_tensor(torch.ones(2, 4)), matrix)
        with contextlib.suppress(AssertionError):  # a real tensor among fake ones
            modulated_linear(torch.ones(2, 4), matrix)
    assert y.shape == (2, 6) and not matrix._packed
