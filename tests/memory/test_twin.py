"""The stored-weight twin computes what the model computes, and keeps its contexts."""

import copy

import pytest
import torch
from torch import nn

from nmkern import nn as modulated
from nmkern.memory import StoredLinear, StoredProjection, stored_twin
from nmkern.models import FlyNet


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def close(found, want):
    assert found.shape == want.shape
    found, want = found.detach(), want.detach()
    assert float((found - want).norm() / want.norm()) < 4e-6


def build(kind, contexts=3):
    model = {
        "in": lambda: modulated.ModulatedLinear(24, 16, contexts=contexts, seed=1),
        "both": lambda: modulated.ModulatedLinear(
            24,
            16,
            False,
            contexts=contexts,
            gain="both",
            strength=True,
            init="xavier_normal",
            family="normal",
        ),
        "out": lambda: modulated.ModulatedLinear(24, 16, contexts=contexts, gain="out", family="rademacher"),
        "projection": lambda: modulated.SparseProjection(24, 16, 5, seed=1, scale=0.5),
        "flynet": lambda: FlyNet(24, 5, contexts=contexts),
        "tree": lambda: nn.Sequential(
            modulated.SparseProjection(24, 40, 3),
            nn.Sequential(nn.ReLU(), modulated.ModulatedLinear(40, 8, contexts=contexts)),
            nn.Linear(8, 2, device="meta").to_empty(device="cpu"),
        ),
    }[kind]()
    with torch.no_grad():
        for parameter in model[-1].parameters() if kind == "tree" else ():
            parameter.fill_(0.5)
        for parameter in model.parameters():
            parameter.add_(0.1 * numbers(*parameter.shape))
    return model


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("kind", ["in", "both", "out", "projection", "flynet", "tree"])
def test_outputs_and_gradients_are_the_models(kind, layout):
    model, x = build(kind), numbers(6, 24)
    twin = stored_twin(model, layout)
    contexts = [None] if kind == "projection" else [1, torch.tensor([0, 2, 1, 0, 0, 2])]
    for context in contexts:
        grads = []
        for each in (model, twin):
            if context is not None:
                modulated.select_context(each, context)
            y = each(x)
            trained = list(each.parameters())
            grads.append(
                (y, torch.autograd.grad(y.square().sum(), trained, allow_unused=True) if trained else ())
            )
        close(grads[1][0], grads[0][0])
        for found, want in zip(grads[1][1], grads[0][1], strict=True):
            assert (found is None) == (want is None)
            if want is not None and bool(want.any()):
                close(found, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("kind", ["in", "both", "flynet"])
def test_a_context_per_row_of_any_integer_dtype(kind, dtype):
    model, x = build(kind), numbers(6, 24)
    contexts = torch.tensor([1, 0, 2, 0, 1, 1], dtype=dtype)
    close(stored_twin(model)(x, contexts), model(x, contexts))
    for wrong in (contexts.bool(), contexts.float()):
        with pytest.raises(TypeError, match=r"^context: expected an integer dtype"):
            stored_twin(model)(x, wrong)


def test_weights_are_buffers_and_the_model_is_left_alone():
    model = build("tree")
    before = copy.deepcopy(model.state_dict())
    twin = stored_twin(model)
    assert [type(m) for m in (twin[0], twin[1][1], twin[2])] == [StoredProjection, StoredLinear, nn.Linear]
    assert torch.equal(twin[1][1].weight, model[1][1].matrix.materialize())
    names = [name for name, _ in twin.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()] and not any(
        "weight" in n for n in names[:-2]
    )
    assert type(model[0]) is modulated.SparseProjection
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_module_in_two_places_has_one_twin():
    layer = build("in")
    twin = stored_twin(nn.ModuleList([layer, nn.Sequential(layer)]))
    assert twin[0] is twin[1][0]


def test_contexts_can_be_added_finished_selected_and_saved():
    model = build("flynet", contexts=2)
    modulated.finish_context(model, 0)
    twin = stored_twin(model)
    assert twin.num_contexts == 2 and twin.decoder.context(0).finished
    assert modulated.add_context(twin) == modulated.add_context(model) == 2
    with twin.use_context(2), model.use_context(2):
        close(twin(numbers(3, 24)), model(numbers(3, 24)))
    other = stored_twin(build("flynet", contexts=1))
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(numbers(3, 24)), twin(numbers(3, 24)))


@pytest.mark.parametrize("kind", ["projection", "flynet", "tree"])
def test_the_twin_has_the_dtype_of_the_model(kind):
    model = build(kind).to(torch.bfloat16)
    x = numbers(4, 24).to(torch.float32 if kind == "projection" else torch.bfloat16)
    y, want = stored_twin(model)(x).detach(), model(x).detach()
    assert y.dtype == want.dtype
    assert float((y.float() - want.float()).norm() / want.float().norm()) < 0.05


def test_what_has_no_stored_form_is_refused():
    with pytest.raises(ValueError, match="expected dense or csr, got 'coo'"):
        stored_twin(build("in"), "coo")

    class Other(modulated.records.MatrixModule):
        pass

    with pytest.raises(ValueError, match="no stored form of Other is known"):
        stored_twin(nn.Sequential(Other(build("in").matrix)))
