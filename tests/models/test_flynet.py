"""FlyNet: the paper's network, held to its formulas written with stored matrices."""

import copy
import math

import pytest
import torch
from formula import generator, normals
from torch import nn

from nmkern import RandomMatrix
from nmkern.models import FlyNet
from nmkern.nn import ModulatedLinear, SparseProjection
from nmkern.ops.sparse_projection import sparse_project


class Plain(nn.Module):
    """Section 4 of the design in float64, from stored weights: the network as its authors write it."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder.double(), decoder.double()

    def forward(self, x, context, strength):
        m = x.double() @ self.encoder.T
        r = torch.relu(m - m.mean(-1, keepdim=True))
        return (context.double() * r) @ (self.decoder * strength.double()).T


def stored(model):
    """The plain network of a model, from nothing but its sizes and its seed."""
    inputs, hidden, classes = model.encoder.in_features, model.hidden_features, model.decoder.out_features
    seed = model.encoder.matrix.seed
    encoder = RandomMatrix(hidden, inputs, seed=seed, family="sparse", fan_in=model.encoder.matrix.fan_in)
    # U(-1/sqrt(hidden), 1/sqrt(hidden)) has the standard deviation 1/sqrt(3 hidden).
    decoder = RandomMatrix(classes, hidden, seed=seed, scale=1 / math.sqrt(3 * hidden))
    return Plain(encoder.materialize(torch.float64), decoder.materialize(torch.float64))


def relative_error(actual, exact):
    return ((actual.detach().double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("inputs", "classes", "multiple", "fan_in"), [(784, 10, 10, 7), (33, 5, 4, 3), (50, 2, 1, 20)]
)
def test_equals_the_plain_formulation(backend, few, inputs, classes, multiple, fan_in):
    """Logits and the gradients of context and strength, per context.

    Float32 sums over up to 7840 hidden units, each a sum of fan_in: the errors of the two layers' sums
    add, so twice the house bound of 2e-6 at 8192 inputs; the mean is a third sum, the gradients a fourth.
    """
    model = FlyNet(inputs, classes, width_multiple=multiple, fan_in=fan_in, contexts=2, seed=6)
    plain = stored(model)
    x = normals((12, inputs), generator(3))
    dy = normals((12, classes), generator(4))
    for index in few((0, 1), 2, start=1):
        tensors = model.decoder.context_tensors(index)
        leaves = tensors["in_gain"], tensors["strength"]
        exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        want = plain(x, *exact_leaves)
        y = model(x, index)
        assert y.shape == (12, classes)
        assert relative_error(y, want.detach()) <= 4e-6
        want_grads = torch.autograd.grad(want, exact_leaves, dy.double())
        grads = torch.autograd.grad(y, leaves, dy)
        for actual, exact in zip(grads, want_grads, strict=True):
            assert relative_error(actual, exact) <= 8e-6


def test_hidden_units_are_the_mean_subtracted_relu(backend_once):
    model = FlyNet(40, 3, fan_in=5)
    x = normals((2, 6, 40), generator(1))
    m = model.encoder(x)
    hidden = model.hidden(x)
    assert hidden.shape == (2, 6, 400)
    assert (hidden >= 0).all()
    assert torch.equal(hidden > 0, m > m.mean(-1, keepdim=True))


def test_the_papers_sizes_and_its_7841_parameters_a_task():
    model = FlyNet(784, 10)
    assert model.hidden_features == 7840
    assert model.encoder.matrix.fan_in == 7
    assert model.encoder.matrix.shape == (7840, 784) and model.decoder.matrix.shape == (10, 7840)
    assert sum(p.numel() for p in model.parameters()) == 7841
    assert model.add_context() == 1
    assert sum(p.numel() for p in model.parameters()) == 2 * 7841
    model.finish_context(0)
    assert sum(p.numel() for p in model.parameters()) == 7841  # a finished task's are frozen
    assert sum(b.numel() for name, b in model.named_buffers() if "contexts" in name) == 7841


def test_initial_contexts_are_xavier_normal():
    model = FlyNet(784, 10, contexts=300)
    gains = torch.stack([c.in_gain.detach() for c in model.decoder.contexts]).double()
    strengths = torch.stack([c.strength.detach() for c in model.decoder.contexts]).double()
    for drawn, std in ((gains, math.sqrt(2 / 7841)), (strengths, 1.0)):
        # Five standard errors of a normal sample's standard deviation.
        assert abs(drawn.std().item() / std - 1) < 5 / (2 * drawn.numel()) ** 0.5


def test_two_networks_of_one_seed_and_other_shapes():
    """Each is its own formula; the dense weights they share are shared, and neither touches the other."""
    small, large = FlyNet(20, 3, fan_in=4, seed=2), FlyNet(31, 5, fan_in=4, seed=2)
    xs = normals((4, 20), generator(1)), normals((4, 31), generator(2))
    before = large(xs[1])
    assert small(xs[0]).shape == (4, 3) and before.shape == (4, 5)
    small(xs[0]).sum().backward()
    assert all(p.grad is None for p in large.parameters())
    assert torch.equal(large(xs[1]), before)
    # Up to the scale, the smaller decoder is the larger one's corner: identity is by index alone.
    corner = large.decoder.matrix[:3, :200].materialize() / large.decoder.matrix.factor
    assert torch.allclose(small.decoder.matrix.materialize() / small.decoder.matrix.factor, corner, rtol=1e-6)
    other = FlyNet(20, 3, fan_in=4, seed=3)
    assert not torch.equal(other.encoder.matrix.materialize(), small.encoder.matrix.materialize())


def test_tasks_learn_one_after_the_other_and_none_is_forgotten():
    """Two tasks on the same inputs with opposite labels; the first is bit-identical after the second."""
    model = FlyNet(16, 2, contexts=2, seed=1)
    g = generator(3)
    x = normals((128, 16), g)
    label = (x[:, 0] > 0).long()
    accuracy = lambda task, labels: (model(x, task).argmax(1) == labels).float().mean()  # noqa: E731
    for task, labels in ((0, label), (1, 1 - label)):
        model.select_context(task)
        optimizer = torch.optim.RMSprop(model.decoder.contexts[task].parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        model.finish_context(task)
        if task == 0:
            first, mirror = model(x, 0), copy.deepcopy(model.decoder.contexts[0].state_dict())
    assert accuracy(0, label) > 0.9 and accuracy(1, 1 - label) > 0.9
    assert torch.equal(model(x, 0), first)
    assert all(torch.equal(v, mirror[k]) for k, v in model.decoder.contexts[0].state_dict().items())


def test_a_batch_may_mix_tasks(backend_once):
    model = FlyNet(16, 3, contexts=3)
    x = normals((6, 16), generator(1))
    tasks = torch.tensor([0, 2, 1, 1, 0, 2])
    mixed = model(x, tasks)
    for row, task in enumerate(tasks.tolist()):
        assert relative_error(mixed[row], model(x[row], task).detach().double()) <= 2e-6


class Doubled(SparseProjection):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(ModulatedLinear):
    def forward(self, x, context=None):
        return -super().forward(x, context)


def test_a_submodule_that_does_more_than_its_matrix_is_called():
    """A class of its own, or a forward of its own: no kernel that knows the matrices alone may stand in."""
    x, plain = normals((4, 16), generator(1)), FlyNet(16, 3, contexts=2)
    want = [plain(x, 1).detach().double(), plain.hidden(x).double()]

    def check(model, logits, hidden):
        assert relative_error(model(x, 1), logits * want[0]) <= 2e-6
        assert relative_error(model.hidden(x), hidden * want[1]) <= 2e-6
        with model.use_context(1):
            assert torch.equal(model(x), model(x, 1))

    check(plain, 1, 1)
    model = FlyNet(16, 3, contexts=2)
    model.encoder = Doubled(16, 160, 7)
    check(model, 2, 2)
    model.encoder.forward = lambda x: 3 * sparse_project(x, model.encoder.matrix)
    check(model, 3, 3)
    model = FlyNet(16, 3, contexts=2)
    model.decoder.__class__ = Negated
    check(model, -1, 1)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("name", ["encoder", "decoder"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_submodules_are_called(hook, name):
    model, seen = FlyNet(16, 3), []
    x = normals((4, 16), generator(1)).requires_grad_()
    handle = HOOKS[hook](model.get_submodule(name), seen)
    model(x).sum().backward()
    assert seen == [1]
    handle.remove()
    model(x).sum().backward()
    assert seen == [1]


def test_dtypes_and_classes_of_weights():
    x = normals((3, 16), generator(1))
    for family in ("uniform", "normal", "rademacher"):
        assert FlyNet(16, 3, family=family).decoder.matrix.family == family
    assert FlyNet(16, 3, dtype=torch.float64)(x.double()).dtype == torch.float64
    assert FlyNet(16, 3).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_compiles_without_graph_breaks(backend_once):
    torch._dynamo.reset()
    model = FlyNet(16, 3, contexts=2)
    x = normals((4, 16), generator(1))
    want = model(x, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Fused or not, the mean and the relu are PyTorch's: equal but for the rounding of one sum.
    assert relative_error(compiled(x, 1), want.detach().double()) <= 2e-6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fan_in": 17}, "fan_in: expected 1 <= fan_in <= 16"),
        ({"family": "sparse"}, "family: expected a dense family"),
        ({"contexts": 0}, "contexts: expected at least 1, got 0"),
        ({"in_features": 0}, "in_features: expected at least 1, got 0"),
        ({"width_multiple": 0}, "width_multiple: expected at least 1, got 0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        FlyNet(**{"in_features": 16, "num_classes": 3, **arguments})
