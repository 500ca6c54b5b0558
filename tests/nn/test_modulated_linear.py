"""ModulatedLinear: torch.nn.Linear from outside, contexts and no weights inside."""

import inspect
import math

import numpy as np
import pytest
import torch
from formula import Expected, generator, normals
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmkern import RandomMatrix
from nmkern.nn import ModulatedLinear


def filled(layer, seed=3):
    """The layer with random contexts in place of ones and zeros."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return layer


def linear_layer(*arguments, **named):
    """A torch.nn.Linear that draws nothing from the global random state."""
    return nn.utils.skip_init(nn.Linear, *arguments, **named)


# The interface of torch.nn.Linear


def test_arguments_are_those_of_linear_in_the_same_order():
    def positional(layer):
        parameters = inspect.signature(layer).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(ModulatedLinear) == positional(nn.Linear)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_positional_arguments_do_what_they_do_for_linear(bias, dtype):
    ours = ModulatedLinear(4, 3, bias, "cpu", dtype)
    theirs = linear_layer(4, 3, bias, dtype=dtype)
    assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
    assert ("bias" in dict(ours.contexts[0].named_parameters())) == (theirs.bias is not None) == bias
    x = torch.ones(2, 5, 4, dtype=theirs.weight.dtype)
    assert ours(x).shape == theirs(x).shape
    assert ours(x).dtype == theirs(x).dtype
    for parameter in ours.parameters():
        assert parameter.dtype == theirs.weight.dtype and parameter.device == theirs.weight.device


def test_keyword_arguments_are_those_of_linear():
    layer = ModulatedLinear(in_features=4, out_features=3, bias=False, device="cpu", dtype=torch.float64)
    assert layer(torch.ones(4, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("gain", ["in", "out", "both"])
@pytest.mark.parametrize("strength", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ["rademacher", "uniform", "normal"])
def test_equals_a_linear_layer_that_holds_the_weights(backend_once, gain, strength, bias, family):
    layer = filled(
        ModulatedLinear(21, 13, bias, gain=gain, strength=strength, family=family, seed=7, contexts=2)
    )
    layer.select_context(1)
    named = layer.context_tensors(1)
    x = normals((6, 21), generator(1))
    given = {name: value.detach().squeeze(-1) for name, value in named.items()}  # the operator's is a scalar
    want = Expected(x, layer.matrix, given)
    want.check(layer(x))
    # And so does the module that a user would write with stored weights.
    weight = layer.matrix.materialize() * named.get("in_gain", torch.ones(21))
    weight = weight * (named.get("out_gain", torch.ones(13)) * named.get("strength", 1.0))[:, None]
    linear = linear_layer(21, 13, bias)
    linear.load_state_dict({"weight": weight.detach(), **({"bias": named["bias"].detach()} if bias else {})})
    want.check(linear(x))


def test_a_new_layer_is_the_plain_random_layer():
    layer = ModulatedLinear(30, 20, seed=5, gain="both", strength=True)
    x = normals((4, 30), generator(2))
    Expected(x, layer.matrix, {}).check(layer(x))


@pytest.mark.parametrize("features", [1, 100])
def test_the_default_scale_is_that_of_linear(features):
    # torch.nn.Linear draws from U(-b, b) with b = 1 / sqrt(in_features): standard deviation b / sqrt(3).
    assert ModulatedLinear(features, 3).matrix.scale == pytest.approx(1 / math.sqrt(3 * features), rel=1e-15)
    assert ModulatedLinear(features, 3, scale=0.5).matrix.scale == 0.5


def test_what_the_arguments_choose():
    layer = ModulatedLinear(6, 4, seed=9, family="normal", scale=2.0, contexts=3)
    assert layer.matrix == RandomMatrix(4, 6, seed=9, family="normal", scale=2.0)
    assert layer.num_contexts == 3
    shapes = {
        ("in", False, True): {"in_gain": (6,), "bias": (4,)},
        ("out", True, False): {"out_gain": (4,), "strength": (1,)},
        ("both", True, True): {"in_gain": (6,), "out_gain": (4,), "strength": (1,), "bias": (4,)},
    }
    for (gain, strength, bias), want in shapes.items():
        layer = ModulatedLinear(6, 4, bias, gain=gain, strength=strength, contexts=2)
        for context in layer.contexts:
            assert {name: tuple(p.shape) for name, p in context.named_parameters()} == want


def test_it_prints_what_it_is():
    text = repr(ModulatedLinear(6, 4, False, seed=3, contexts=2, gain="out", strength=True))
    assert "in_features=6, out_features=4, bias=False, contexts=2, seed=3, family='uniform'" in text
    assert "gain='out', strength=True\n" in text  # what has its default is not told
    text = repr(ModulatedLinear(6, 4, scale=0.5, init="xavier_normal"))
    assert "strength=False, scale=0.5, init='xavier_normal'\n" in text


def test_it_prints_which_contexts_are_finished():
    layer = ModulatedLinear(6, 4, contexts=4)
    layer.finish_context(0)
    layer.finish_context(1)
    assert "(0-1): 2 x Context(finished)\n" in repr(layer) and "(2-3): 2 x Context()\n" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"family": "sparse"}, ValueError, "family: expected a dense family, got 'sparse'"),
        ({"family": "cauchy"}, ValueError, "family: expected one of"),
        ({"gain": "left"}, ValueError, "gain: expected one of in, out, both, got 'left'"),
        ({"init": "zeros"}, ValueError, "init: expected one of ones, xavier_normal, got 'zeros'"),
        ({"contexts": 0}, ValueError, "contexts: expected at least 1, got 0"),
        ({"contexts": 1.0}, TypeError, "contexts: expected an int, got 1.0"),
        ({"contexts": True}, TypeError, "contexts: expected an int, got True"),
        ({"seed": -1}, ValueError, "seed: expected 0 <= seed < 2^64, got -1"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite"),
        ({"in_features": 0}, ValueError, "in_features: expected at least 1, got 0"),
        ({"in_features": "6"}, TypeError, "in_features: expected an int, got '6'"),
        ({"in_features": True}, TypeError, "in_features: expected an int, got True"),
        ({"out_features": 4.0}, TypeError, "out_features: expected an int, got 4.0"),
        ({"out_features": -4}, ValueError, "out_features: expected at least 1, got -4"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error) as raised:
        ModulatedLinear(**{"in_features": 6, "out_features": 4, **arguments})
    assert str(raised.value).startswith(text)


# Initial contexts


def test_xavier_normal_has_the_papers_standard_deviations():
    layer = ModulatedLinear(7840, 2000, gain="both", strength=True, init="xavier_normal", contexts=200)
    for name, std in (("in_gain", math.sqrt(2 / 7841)), ("out_gain", math.sqrt(2 / 2001)), ("strength", 1.0)):
        drawn = torch.stack([context.tensors()[name].detach() for context in layer.contexts]).double()
        # n normal draws: the mean's standard error is std / sqrt(n), that of the standard deviation
        # std / sqrt(2 n). Five of them: a chance of 6e-7.
        assert drawn.mean().abs() < 5 * std / drawn.numel() ** 0.5
        assert abs(drawn.std().item() / std - 1) < 5 / (2 * drawn.numel()) ** 0.5


def test_initial_contexts_come_from_the_stream_and_differ():
    """Of each other in every tensor and context, and of the weights, whose seed they share."""

    def make(contexts=40, seed=4):
        arguments = {"gain": "both", "strength": True, "init": "xavier_normal", "family": "normal"}
        return ModulatedLinear(40, 40, contexts=contexts, seed=seed, **arguments)

    grown = make(1)
    grown.grow(40)  # the same contexts, whether born together or one by one, on every machine
    for one, other in zip(grown.parameters(), make().parameters(), strict=True):
        assert torch.equal(one, other)
    layer = make()
    stacked = {
        name: torch.stack([context.tensors()[name].detach() for context in layer.contexts])
        for name in ("in_gain", "out_gain", "strength")
    }
    # Forty signs each: two independent lines agree in all of them with a chance of 1e-12.
    lines = [*stacked["in_gain"], *stacked["out_gain"], *layer.matrix.materialize()]
    lines += [stacked["strength"][:, 0], stacked["in_gain"][:, 0], stacked["out_gain"][:, 0]]
    lines += [make(1, seed=5).contexts[0].in_gain.detach()]
    assert len({str(line.sign().tolist()) for line in lines}) == len(lines) == 124


# Life of a module


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_a_dtype_and_contexts_added_after(dtype):
    layer = filled(ModulatedLinear(9, 4, gain="both", strength=True)).to(dtype)
    layer.add_context()
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = normals((3, 9), generator(1), dtype)
    for context in (0, 1):
        tensors = {name: value.detach() for name, value in layer.context_tensors(context).items()}
        Expected(x, layer.matrix, tensors).check(layer(x, context))


def test_sizes_and_seeds_may_be_numpys():
    layer = ModulatedLinear(np.prod((4, 2)), np.int32(6), contexts=np.int64(2), seed=np.uint64(2**63))
    assert repr(layer) == repr(ModulatedLinear(8, 6, contexts=2, seed=2**63))
    assert {type(size) for size in (layer.in_features, layer.out_features)} == {int}
    layer.load_state_dict(layer.state_dict())


def test_meta_device_holds_shapes_only():
    layer = ModulatedLinear(2**20, 2**20, device="meta")
    layer.add_context()
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("init", ["ones", "xavier_normal"])
def test_nothing_is_made_for_the_meta_device(init):
    """No tensor anywhere else on the way, and no weight drawn: 2^33 features take no memory and no time."""
    seen = set()

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                seen.add(made.device.type)
            return made

    def no_weight(*arguments):
        raise AssertionError("a weight was drawn")

    with pytest.MonkeyPatch.context() as patch, Devices():
        patch.setattr(RandomMatrix, "materialize", no_weight)
        arguments = {"gain": "both", "strength": True, "init": init, "contexts": 2}
        layer = ModulatedLinear(9, 2**33, device="meta", **arguments)
        with torch.device("meta"):
            layer.add_context()
            ModulatedLinear(2**33, 9, **arguments)
    assert seen == {"meta"}


def test_gradients_reach_the_selected_context_only(backend_once):
    layer = filled(ModulatedLinear(9, 4, gain="both", strength=True, contexts=3))
    layer(normals((5, 9), generator(1)), 1).sum().backward()
    for index, context in enumerate(layer.contexts):
        assert all((p.grad is not None) == (index == 1) for p in context.parameters())
    tensors = {name: value.detach() for name, value in layer.context_tensors(1).items()}
    want = Expected(normals((5, 9), generator(1)), layer.matrix, tensors, torch.ones(5, 4))
    grads = {name: p.grad for name, p in layer.contexts[1].named_parameters()}
    want.check_grads({"x": want.grads["x"], **{name: grads[name] for name in tensors}})


def test_a_stack_of_layers_learns():
    """The contexts alone fit a small task: the loss falls to a tenth."""
    model = nn.Sequential(
        ModulatedLinear(8, 64, seed=1, gain="out"), nn.ReLU(), ModulatedLinear(64, 1, seed=2, scale=0.3)
    )
    g = generator(5)
    x = normals((64, 8), g)
    target = x[:, :1] - x[:, 1:2].abs()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_compiles_without_graph_breaks(backend_once):
    torch._dynamo.reset()
    layer = filled(ModulatedLinear(9, 4, gain="both", strength=True, contexts=2))
    x = normals((3, 9), generator(1))
    want = layer(x, 1), layer(x, torch.tensor([1, 0, 1]))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 1), want[0])
    assert torch.equal(compiled(x, torch.tensor([1, 0, 1])), want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_a_linear_layer_does(dtype):
    """Parameters of any dtype work under autocast, whose dtype the result has."""
    ours, theirs = ModulatedLinear(9, 4, dtype=dtype), linear_layer(9, 4, dtype=dtype)
    for x in (torch.ones(3, 9), torch.ones(3, 9, dtype=dtype)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x).dtype == theirs(x).dtype == torch.bfloat16
