"""Contexts: adding, selecting, finishing; and that nothing moves a finished one."""

import copy
import pickle

import numpy as np
import pytest
import torch
from formula import generator, normals
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune
from torch.testing._internal.distributed.fake_pg import FakeStore

from nmkern.memory import stored_twin
from nmkern.models import FlyNet
from nmkern.nn import (
    ModulatedLinear,
    SparseProjection,
    add_context,
    context_parameters,
    finish_context,
    num_contexts,
    select_context,
    use_context,
)


def network(contexts=2):
    """Two layers with contexts, with other modules around and between them."""
    return nn.Sequential(
        SparseProjection(6, 12, 3, seed=1),
        ModulatedLinear(12, 16, gain="both", strength=True, init="xavier_normal", contexts=contexts, seed=2),
        nn.Sequential(nn.ReLU(), ModulatedLinear(16, 5, gain="out", contexts=contexts, seed=3)),
    )


def layers(model):
    return [module for module in model.modules() if isinstance(module, ModulatedLinear)]


def filled(model, seed=4):
    g = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g))
    return model


def bits(model, index):
    """Copies of all tensors of a context."""
    tensors = [layer.context_tensors(index) for layer in layers(model)]
    return [value.detach().clone() for named in tensors for value in named.values()]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


X = normals((8, 6), generator(1))


# Adding


def test_adding_contexts():
    model = network(1)
    assert num_contexts(model) == 1
    before = bits(model, 0)
    assert [add_context(model), add_context(model)] == [1, 2]
    assert num_contexts(model) == 3
    assert same(bits(model, 0), before)
    assert not same(bits(model, 1), before)
    assert [layer.num_contexts for layer in layers(model)] == [3, 3]
    assert layers(model)[0].add_context() == 3  # a layer of its own is a model too
    with pytest.raises(ValueError, match=r"^model: expected equally many contexts .*, got \[3, 4\]"):
        num_contexts(model)


def test_an_added_context_is_born_in_the_dtype_of_the_layer():
    model = network().to(torch.float64)
    index = add_context(model)
    assert {p.dtype for p in context_parameters(model, index)} == {torch.float64}


def test_context_parameters_are_those_of_one_context():
    model = network(3)
    sets = [context_parameters(model, index) for index in range(3)]
    assert [len(found) for found in sets] == [6, 6, 6]  # two gains, strength and bias; a gain and a bias
    assert {id(p) for found in sets for p in found} == {id(p) for p in model.parameters()}
    finish_context(model, 1)
    assert context_parameters(model, 1) == []
    assert {id(p) for p in model.parameters()} == {id(p) for p in [*sets[0], *sets[2]]}


# Initial values again


def started(build):
    """A model made on the meta device and started as torch.nn.utils.skip_init and FSDP do."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.fill_(torch.nan)  # what was in that memory
    reset(model)
    return model


def reset(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize(
    "build", [network, lambda: FlyNet(6, 3, contexts=2, fan_in=2)], ids=["layers", "flynet"]
)
def test_a_model_from_the_meta_device_starts_with_the_initial_values(build):
    want, model = build(), started(build)
    assert same(list(model.parameters()), list(want.parameters()))
    assert torch.equal(model(X), want(X))


def test_resetting_keeps_the_parameters_and_finished_contexts():
    model = filled(network(3))
    finish_context(model, 1)
    parameters, before = list(model.parameters()), bits(model, 1)
    reset(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert same(bits(model, 1), before)
    for index in (0, 2):
        assert same(bits(model, index), bits(network(3), index))
    skipped = nn.utils.skip_init(ModulatedLinear, 8, 6, contexts=2, dtype=torch.float64)
    reset(skipped)
    assert same(bits(skipped, 1), bits(ModulatedLinear(8, 6, dtype=torch.float64), 0))


@pytest.mark.parametrize("init", ["ones", "xavier_normal"])
def test_resetting_a_sharded_model_fills_the_part_that_each_rank_holds(init):
    def build():
        return ModulatedLinear(8, 6, gain="both", strength=True, contexts=2, init=init)

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with torch.device("meta"):
            model = build()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model.to_empty(device="cpu")
        reset(model)
        parts = [p.to_local() for p in model.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    assert same(parts, [p[(len(p) + 1) // 2 :] for p in build().parameters()])


@pytest.mark.parametrize(
    "build",
    [
        lambda: FlyNet(20, 3, contexts=2),
        lambda: ModulatedLinear(20, 3, gain="both", strength=True, contexts=2, init="xavier_normal"),
    ],
)
def test_a_sharded_model_trains(build):
    """By FSDP's second version, which takes no parameter without a dimension."""
    model, sharded = build(), build()
    x = normals((4, 20), generator(1))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        for context in (1, torch.tensor([0, 1, 1, 0])):
            for one in (model, sharded):
                one.zero_grad()
                one(x, context).square().sum().backward()
            # What a call has not used has no gradient, or one of zeros after other calls.
            for want, got in zip(model.parameters(), sharded.parameters(), strict=True):
                expected = torch.zeros_like(want) if want.grad is None else want.grad
                found = torch.zeros_like(want) if got.grad is None else got.grad.to_local()
                assert torch.equal(found, expected)
    finally:
        torch.distributed.destroy_process_group()


# Selecting


def test_every_way_to_select_a_context_agrees():
    model = filled(network(3))
    first, last = layers(model)
    want = []
    for index in range(3):
        hidden = first(model[0](X), index)  # the argument of the call, layer by layer
        want.append(last(torch.relu(hidden), index))
    assert not torch.equal(want[0], want[1])
    assert torch.equal(model(X), want[0])  # at first: context 0
    for index in (2, 1):
        select_context(model, index)
        assert torch.equal(model(X), want[index])
        with use_context(model, 0):
            assert torch.equal(model(X), want[0])
        assert torch.equal(model(X), want[index])
    first.select_context(2)  # the method: of this layer alone
    assert (first.selected, last.selected) == (2, 1)


def test_an_argument_comes_before_what_is_selected():
    layer = filled(ModulatedLinear(6, 5, contexts=2))
    layer.select_context(1)
    assert torch.equal(layer(X, 0), layer(X, context=0))
    assert not torch.equal(layer(X, 0), layer(X))
    assert layer.selected == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_context_per_row(backend_once, dtype):
    """A mixed batch is what its rows are in their own contexts, bit for bit or to the rounding of sums."""
    model = filled(network(3))
    contexts = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0], dtype=dtype)
    with use_context(model, contexts):
        mixed = model(X)
    for index in range(3):
        with use_context(model, index):
            alone = model(X)
        rows = contexts == index
        # Two layers of sums of at most 16 products each, rounded otherwise in another batch.
        error = (mixed[rows] - alone[rows]).norm() / alone[rows].norm()
        assert error <= 2 * 16 * 2.0**-24
    layer = filled(ModulatedLinear(6, 5, contexts=3))
    shaped = layer(X.view(2, 4, 6), contexts.view(2, 4))
    assert torch.equal(shaped.view(8, 5), layer(X, contexts))


def test_use_context_restores_after_an_exception_and_nests():
    model = network(3)
    layers(model)[0].selected = 2  # each layer gets back what it had

    def selected():
        return [layer.selected for layer in layers(model)]

    def fail_inside():
        with use_context(model, 1):
            assert selected() == [1, 1]
            with use_context(model, torch.zeros(8, dtype=torch.int64)):
                assert all(torch.is_tensor(value) for value in selected())
            assert selected() == [1, 1]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert selected() == [2, 0]


@pytest.mark.parametrize("index", [3, -1])
def test_contexts_out_of_range(index):
    model = network(3)
    message = rf"^context: expected 0 <= context < 3, got {index}$"
    calls = (
        lambda: select_context(model, index),
        lambda: context_parameters(model, index),
        lambda: finish_context(model, index),
        lambda: layers(model)[0](torch.ones(12), index),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=message), use_context(model, index):
        pass
    assert [layer.selected for layer in layers(model)] == [0, 0]
    with pytest.raises(ValueError, match=r"^context: expected 0 <= context < 3, .* got values from"):
        layers(model)[0](torch.ones(2, 12), torch.tensor([0, index]))


WRONG = [True, None, "a", [0, 1], 1.0, torch.ones(8), torch.ones(8, dtype=torch.bool)]


@pytest.mark.parametrize("context", WRONG, ids=repr)
def test_what_is_no_context_is_refused_at_once(context):
    model = network(2)
    calls = [lambda: select_context(model, context), lambda: use_context(model, context).__enter__()]
    if context is not None:  # which leaves the choice to what is selected
        layer, net, x = layers(model)[0], FlyNet(6, 3, contexts=2, fan_in=2), torch.ones(8, 12)
        calls += [lambda: layer(x, context), lambda: net(X, context), lambda: stored_twin(layer)(x, context)]
    if not torch.is_tensor(context):
        calls += [lambda: finish_context(model, context), lambda: context_parameters(model, context)]
    for call in calls:
        with pytest.raises(TypeError, match=r"^context: expected an int"):
            call()
    assert [layer.selected for layer in layers(model)] == [0, 0]


def test_an_index_may_be_numpys():
    model = network(2)
    select_context(model, np.int64(1))
    assert [(layer.selected, type(layer.selected)) for layer in layers(model)] == [(1, int)] * 2
    finish_context(model, np.int64(1))
    assert [context.finished for context in layers(model)[0].contexts] == [False, True]


@pytest.mark.parametrize("call", [num_contexts, add_context, lambda m: select_context(m, 0)])
def test_a_model_without_contexts(call):
    with pytest.raises(ValueError, match=r"^model: expected a module with context layers, got Linear$"):
        call(nn.utils.skip_init(nn.Linear, 3, 2))


# Finishing


def test_finishing_keeps_bits_keys_and_outputs():
    model = filled(network())
    before, keys, output = bits(model, 0), list(model.state_dict()), model(X)
    finish_context(model, 0)
    assert same(bits(model, 0), before)
    assert sorted(model.state_dict()) == sorted(keys)
    assert torch.equal(model(X), output)
    finish_context(model, 0)  # once more changes nothing
    assert same(bits(model, 0), before)
    assert all(layer.contexts[0].finished and not layer.contexts[1].finished for layer in layers(model))
    model.requires_grad_(True)  # and no switch brings it back
    assert not any(value.requires_grad for layer in layers(model) for value in layer.contexts[0].buffers())
    assert not model(X).requires_grad
    for layer in layers(model):
        assert [name for name, _ in layer.contexts[0].named_parameters()] == []


class Double(nn.Module):
    def forward(self, value):
        return 2 * value


@pytest.mark.parametrize(
    ("compute", "plain"),
    [
        (
            lambda c: nn.utils.parametrize.register_parametrization(c, "out_gain", Double()),
            lambda c: nn.utils.parametrize.remove_parametrizations(c, "out_gain"),
        ),
        (
            lambda c: nn.utils.parametrizations.weight_norm(c, "out_gain"),
            lambda c: nn.utils.parametrize.remove_parametrizations(c, "out_gain"),
        ),
        (
            lambda c: prune.l1_unstructured(c, "out_gain", amount=2),
            lambda c: prune.remove(c, "out_gain"),
        ),
    ],
    ids=["parametrization", "weight_norm", "pruning"],
)
def test_what_is_no_plain_parameter_is_not_finished(compute, plain):
    """Before any layer is: a context is never finished in half of a model."""
    model = filled(network(1))
    last = layers(model)[1].contexts[0]
    compute(last)
    before, keys, output = bits(model, 0), list(model.state_dict()), model(X)
    message = "^context: expected plain parameters to finish, got out_gain computed from others"
    for finish in (lambda: finish_context(model, 0), last.finish):
        with pytest.raises(ValueError, match=message):
            finish()
        assert not any(layer.contexts[0].finished for layer in layers(model))
        assert list(model.state_dict()) == keys and same(bits(model, 0), before)
        assert torch.equal(model(X), output)
    plain(last)
    finish_context(model, 0)
    assert same(bits(model, 0), before)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
}


def train(model, optimizer, index, steps=4):
    target = normals((8, 5), generator(10 + index))

    def closure():
        # Zeros instead of None: what the optimizer still holds gets a gradient, of zero.
        optimizer.zero_grad(set_to_none=False)
        with use_context(model, index):
            loss = (model(X) - target).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_a_finished_context(backend_once, optimizer):
    """It goes on with the old parameters, their momentum, decay and history; the context stays."""
    model = filled(network())
    parameters = list(model.parameters())
    opt = OPTIMIZERS[optimizer](parameters)
    old = context_parameters(model, 0)
    train(model, opt, 0)
    assert all(bool(p.grad.any()) for p in old)
    before = bits(model, 0)
    finish_context(model, 0)
    output = model(X).detach()
    held = [p.detach().clone() for p in old]
    other = bits(model, 1)
    train(model, opt, 1)
    assert same(bits(model, 0), before)
    assert torch.equal(model(X), output)
    assert not same(bits(model, 1), other)
    # The optimizer did move what it held: an unfinished context would have been moved.
    assert not any(torch.equal(p, h) for p, h in zip(old, held, strict=True))


def test_training_one_context_gives_no_gradient_to_another():
    model = filled(network(3))
    opt = torch.optim.SGD(context_parameters(model, 1), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = [bits(model, index) for index in range(3)]
    train(model, opt, 1)
    assert [same(bits(model, index), before[index]) for index in range(3)] == [True, False, True]


def test_a_mixed_batch_trains_the_unfinished_contexts_only():
    model = filled(network(3))
    finish_context(model, 1)
    before = [bits(model, index) for index in range(3)]
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    with use_context(model, torch.tensor([0, 1, 2, 1, 0, 1, 2, 1])):
        model(X).square().sum().backward()
    opt.step()
    assert [same(bits(model, index), before[index]) for index in range(3)] == [False, True, False]


def test_a_context_that_no_row_of_a_mixed_batch_uses():
    """As an unused row of torch.nn.Embedding: a gradient of zero, with which weight decay may move it."""
    model = filled(network(3))
    finish_context(model, 2)
    finished = bits(model, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with use_context(model, torch.zeros(8, dtype=torch.int64)):
        model(X).square().sum().backward()
    unused = context_parameters(model, 1)
    assert all(p.grad is not None and not p.grad.any() for p in unused)
    decayed = [(1 - 0.1 * 0.1) * p.detach() for p in unused]
    opt.step()
    assert all(torch.allclose(p, want) for p, want in zip(unused, decayed, strict=True))
    assert same(bits(model, 2), finished)


# Whose tensors they are


def test_a_context_answers_with_what_a_wrapper_puts_in_its_place():
    """A call reads the tensors of the moment: whatever replaced a parameter, and however."""
    layer = filled(ModulatedLinear(6, 5, gain="both"))
    gain = layer.contexts[0].in_gain.detach().clone()
    want = layer(X, 0).detach()

    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.contexts[0].in_gain.mul_(2)
    doubled = other(X).detach()
    assert not torch.equal(doubled, want)
    swapped = {"contexts.0.in_gain": 2 * gain}
    assert torch.equal(torch.func.functional_call(layer, swapped, (X,)), doubled)
    assert torch.equal(layer(X), want)
    (grad,) = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (X,)).sum())(swapped).values()
    assert bool(grad.any())
    nn.utils.parametrize.register_parametrization(layer.contexts[0], "in_gain", Double())
    assert torch.equal(layer(X), doubled)
    nn.utils.parametrize.remove_parametrizations(layer.contexts[0], "in_gain", leave_parametrized=False)
    assert torch.equal(layer(X), want)
    state = {**layer.state_dict(), "contexts.0.in_gain": 2 * gain}
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(X), doubled)
    layer.contexts[0].in_gain = nn.Parameter(gain)
    assert torch.equal(layer(X), want)
    layer.finish_context(0)
    assert torch.equal(torch.func.functional_call(layer, swapped, (X,)), doubled)
    assert torch.equal(layer(X), want)
    assert layer.to(torch.bfloat16)(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("context", [1, torch.tensor([0, 1] * 4)], ids=["index", "tensor"])
def test_a_pruned_context_trains_and_stays_pruned(context):
    """Pruning computes the tensor in a hook before the module's forward pass: reading it runs the hook."""
    layer = filled(ModulatedLinear(6, 5, contexts=2))
    prune.l1_unstructured(layer.contexts[1], "in_gain", amount=2)
    kept = layer.contexts[1].in_gain_mask
    layer(X, context).square().sum().backward()
    original = layer.contexts[1].in_gain_orig
    assert torch.equal(original.grad != 0, kept != 0)
    with torch.no_grad():
        original.add_(1)
    plain = ModulatedLinear(6, 5, contexts=2)
    plain.contexts[0].load_state_dict(layer.contexts[0].state_dict())
    plain.contexts[1].load_state_dict({"in_gain": original * kept, "bias": layer.contexts[1].bias})
    assert torch.equal(layer(X, context), plain(X, context))


# Copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(duplicate):
    model = filled(network(3))
    finish_context(model, 1)
    select_context(model, torch.tensor([0, 1, 2, 1, 0, 1, 2, 1]))
    other = duplicate(model)
    assert torch.equal(other(X), model(X))
    for index in range(3):
        assert same(bits(other, index), bits(model, index))
    assert [context.finished for context in layers(other)[0].contexts] == [False, True, False]
    before = bits(model, 0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    add_context(other)
    assert same(bits(model, 0), before) and num_contexts(model) == 3 and num_contexts(other) == 4
