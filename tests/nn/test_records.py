"""Checkpoints: no weights in them, and a load that does not fit changes nothing at all."""

import io
import json

import pytest
import safetensors.torch
import torch
from formula import generator, normals
from torch import nn

import nmkern
from nmkern.models import FlyNet
from nmkern.nn import (
    ModulatedLinear,
    SparseProjection,
    add_context,
    context_parameters,
    finish_context,
    num_contexts,
    use_context,
)

RECORD = "_extra_state"


def layer(**changes):
    arguments = {"gain": "both", "strength": True, "seed": 3, "contexts": 2, "init": "xavier_normal"}
    return ModulatedLinear(**{"in_features": 9, "out_features": 5, **arguments, **changes})


def parent(**changes):
    """A plain module tree around the layers, whose ordinary parameters come first."""
    linear = nn.utils.skip_init(nn.Linear, 6, 6)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, SparseProjection(6, 9, 3, seed=1), nn.ModuleDict({"head": layer(**changes)}))


def forward(model, x, index):
    with use_context(model, index):
        if isinstance(model, nn.Sequential):
            return model[2]["head"](model[1](model[0](x)))
        return model(x)


def load(model, state, **arguments):
    if isinstance(model, nn.Sequential):
        return nmkern.nn.load_state_dict(model, state, **arguments)
    return model.load_state_dict(state, **arguments)


def flynet(**changes):
    return FlyNet(**{"in_features": 6, "num_classes": 3, "fan_in": 2, "contexts": 2, "seed": 4, **changes})


BUILDERS = {"layer": layer, "parent": parent, "flynet": flynet}
INPUTS = {"layer": 9, "parent": 6, "flynet": 6}
every_builder = pytest.mark.parametrize("name", BUILDERS)


def trained(name, **changes):
    """A model whose tensors are no initial values, with context 0 finished."""
    model = BUILDERS[name](**changes)
    g = generator(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    finish_context(model, 0)
    return model


def snapshot(model):
    """Everything that a load can change."""
    values = {key: value.clone() for key, value in model.state_dict().items()}
    contexts = [c for m in model.modules() if isinstance(m, ModulatedLinear) for c in m.contexts]
    return values, {id(p) for p in model.parameters()}, [c.finished for c in contexts]


def unchanged(model, before):
    values, parameters, finished = snapshot(model)
    return (
        values.keys() == before[0].keys()
        and all(torch.equal(value, before[0][key]) for key, value in values.items())
        and (parameters, finished) == before[1:]
    )


def refused(model, state, text, **arguments):
    """RuntimeError with the text, and nothing changed; the state is not changed either."""
    before, given = snapshot(model), {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}
    with pytest.raises(RuntimeError) as raised:
        load(model, state, **arguments)
    assert all(part in str(raised.value) for part in text.split("...")), str(raised.value)
    assert unchanged(model, before)
    assert all(torch.equal(state[key], value) for key, value in given.items())


def record_of(state):
    """(key, record) of the layer with contexts."""
    key = [key for key in state if key.endswith(RECORD)][-1]
    return key, json.loads(bytes(state[key].tolist()))


def encoded(record):
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


# What is saved


@every_builder
def test_a_checkpoint_holds_no_weights(name):
    model = trained(name)
    state = model.state_dict()
    records = [value for key, value in state.items() if key.endswith(RECORD)]
    tensors = [value for key, value in state.items() if not key.endswith(RECORD)]
    assert records and all(r.dtype == torch.uint8 and r.nbytes < 500 for r in records)
    of_contexts = sum(p.nbytes for key, p in state.items() if "contexts." in key and not key.endswith(RECORD))
    linear = 4 * (36 + 6) if name == "parent" else 0
    assert sum(value.nbytes for value in tensors) == of_contexts + linear
    matrices = [m.matrix for m in model.modules() if hasattr(m, "matrix")]
    shapes = {tuple(value.shape) for value in tensors}
    assert not shapes & {matrix.shape for matrix in matrices}


def test_the_checkpoint_of_a_large_layer_is_small():
    model = ModulatedLinear(2**17, 2**17, gain="in", bias=False)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 4 * 2**17 + 4096 < model.matrix.stored_bytes() / 100_000


def through_torch(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors(state):
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@every_builder
def test_a_round_trip_through_a_file(name, through):
    model = trained(name)
    other = BUILDERS[name]()
    x = normals((4, INPUTS[name]), generator(1))
    assert not torch.equal(forward(other, x, 1), forward(model, x, 1))
    load(other, through(model.state_dict()))
    for index in (0, 1):
        assert torch.equal(forward(other, x, index), forward(model, x, index))
    assert snapshot(other)[2] == snapshot(model)[2] == [True, False]
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@every_builder
def test_a_model_with_fewer_contexts_grows(name):
    model = trained(name)
    add_context(model)
    add_context(model)
    finish_context(model, 3)
    other = BUILDERS[name](contexts=1)
    load(other, model.state_dict())
    assert num_contexts(other) == 4
    assert snapshot(other)[2] == [True, False, False, True]
    x = normals((4, INPUTS[name]), generator(1))
    for index in range(4):
        assert torch.equal(forward(other, x, index), forward(model, x, index))


def test_growing_keeps_the_dtype_of_the_model():
    model, other = trained("layer"), layer(contexts=1).to(torch.float64)
    other.load_state_dict(model.state_dict())
    assert {v.dtype for k, v in other.state_dict().items() if not k.endswith(RECORD)} == {torch.float64}


@every_builder
def test_loading_with_assign(name):
    model, other = trained(name), BUILDERS[name]()
    state = model.state_dict()
    load(other, state, assign=True)
    x = normals((4, INPUTS[name]), generator(1))
    assert torch.equal(forward(other, x, 1), forward(model, x, 1))
    assert snapshot(other)[2] == [True, False] and context_parameters(other, 0) == []
    taken = {key for key, value in other.state_dict().items() if value.data_ptr() == state[key].data_ptr()}
    assert taken == {key for key in state if not key.endswith(RECORD)}


@every_builder
def test_loading_with_assign_into_a_model_on_the_meta_device(name):
    """As low-memory loading does it: what the model then is, grown contexts included, is the checkpoint's."""
    model = trained(name).to(torch.float16)
    add_context(model)
    with torch.device("meta"):
        other = BUILDERS[name](contexts=1)
    load(other, model.state_dict(), assign=True)
    other.to("cpu")  # nothing of it is left on the meta device
    assert snapshot(other)[2] == [True, False, False]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    born = context_parameters(other, add_context(other))
    assert {(p.device.type, p.dtype) for p in born} == {("cpu", torch.float16)}


def test_not_strict_takes_what_is_there():
    model, other = trained("layer"), layer()
    state = model.state_dict()
    del state["contexts.1.bias"]
    missing, unexpected = other.load_state_dict({**state, "more": torch.ones(1)}, strict=False)
    assert (missing, unexpected) == (["contexts.1.bias"], ["more"])
    assert torch.equal(other.contexts[1].in_gain, model.contexts[1].in_gain)
    assert not other.contexts[1].bias.any()


# What is refused


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 8}, "made with another matrix: seed 8 (this model: 3)"),
        ({"family": "normal"}, "made with another matrix: family 'normal' (this model: 'uniform')"),
        ({"scale": 0.5}, "made with another matrix: scale 0.5 (this model: 0.19"),
        ({"out_features": 6}, "made with another matrix: rows 6 (this model: 5)"),
        ({"in_features": 10}, "made with another matrix: cols 10 (this model: 9)... scale"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["layer", "parent"])
def test_another_matrix(name, change, text):
    state = trained(name, **change).state_dict()
    path = "head: " if name == "parent" else "ModulatedLinear: the checkpoint"
    refused(BUILDERS[name](), state, f"{path}...{text}")
    refused(BUILDERS[name](), state, text, strict=False)


def test_another_encoder_is_refused_too():
    # The encoder is loaded first: the contexts behind it stay as they are, and so the other way round.
    for change in ({"fan_in": 3}, {"seed": 5}, {"width_multiple": 9}):
        refused(flynet(), trained("flynet", **change).state_dict(), "made with another matrix")


@every_builder
@pytest.mark.parametrize("version", [2, 0, None])
def test_another_stream_version(name, version):
    state = trained(name).state_dict()
    key, record = record_of(state)
    record["matrix"]["stream_version"] = version
    state[key] = encoded(record)
    refused(BUILDERS[name](), state, f"stream_version {version!r} (this model: 1)")


@every_builder
def test_a_truncated_checkpoint(name):
    state = trained(name).state_dict()
    model = BUILDERS[name]()
    for key in state:
        refused(model, {k: v for k, v in state.items() if k != key}, f"missing {key}")
    refused(model, {}, "missing")


@every_builder
def test_a_checkpoint_truncated_where_the_model_would_grow(name):
    model = trained(name)
    add_context(model)
    state = model.state_dict()
    key = next(key for key in state if key.endswith("contexts.2.in_gain"))
    del state[key]
    refused(BUILDERS[name](), state, f"missing {key}")


@every_builder
def test_more_than_the_model_has(name):
    refused(BUILDERS[name](), {**trained(name).state_dict(), "more": torch.ones(1)}, "unexpected more")


@every_builder
@pytest.mark.parametrize("strict", [True, False])
def test_a_tensor_of_another_shape(name, strict):
    state = trained(name).state_dict()
    key = [key for key in state if key.endswith("in_gain")][-1]
    state[key] = torch.ones(4)
    refused(BUILDERS[name](), state, f"{key} has shape...4...expected", strict=strict)
    refused(BUILDERS[name](), {**state, key: "no tensor"}, f"{key} has shape None", strict=strict)


@every_builder
def test_fewer_contexts_than_the_model_has(name):
    model = BUILDERS[name](contexts=3)
    refused(model, trained(name).state_dict(), "the checkpoint has 2 contexts...this model has 3")


GARBLED = {
    "noise": torch.tensor([255, 3, 7, 200], dtype=torch.uint8),
    "empty": torch.empty(0, dtype=torch.uint8),
    "cut": lambda record: encoded(json.dumps(record).encode()[:-9]),
    "another dtype": lambda record: encoded(record).float(),
    "large numbers": torch.tensor([300, 1]),
    "two dimensions": lambda record: encoded(record)[None],
    "no tensor": "text",
    "null": encoded(None),
    "a number": encoded(3),
    "a list": encoded([1, 2]),
    "a string": encoded("matrix"),
    "no matrix": lambda record: encoded({k: v for k, v in record.items() if k != "matrix"}),
    "a matrix of nothing": lambda record: encoded({**record, "matrix": {}}),
    "a matrix that is a list": lambda record: encoded({**record, "matrix": [1]}),
    "no contexts": lambda record: encoded({k: v for k, v in record.items() if k != "contexts"}),
    "contexts: text": lambda record: encoded({**record, "contexts": "2"}),
    "contexts: null": lambda record: encoded({**record, "contexts": None}),
    "contexts: a fraction": lambda record: encoded({**record, "contexts": 2.5}),
    "contexts: not a whole number": lambda record: encoded({**record, "contexts": 3.0}),
    "contexts: negative": lambda record: encoded({**record, "contexts": -1}),
    "contexts: infinite": lambda record: encoded({**record, "contexts": float("inf")}),
    "no list of finished": lambda record: encoded({k: v for k, v in record.items() if k != "finished"}),
    "finished: null": lambda record: encoded({**record, "finished": None}),
    "finished: text": lambda record: encoded({**record, "finished": ["0"]}),
    "finished: a fraction": lambda record: encoded({**record, "finished": [0.5]}),
    "finished: too large": lambda record: encoded({**record, "finished": [2]}),
    "finished: negative": lambda record: encoded({**record, "finished": [-1]}),
}


@every_builder
@pytest.mark.parametrize("garbage", GARBLED)
def test_a_garbled_record(name, garbage):
    state = trained(name).state_dict()
    key, record = record_of(state)
    value = GARBLED[garbage]
    state[key] = value(record) if callable(value) else value
    refused(BUILDERS[name](), state, "")


def test_a_record_of_more_contexts_than_the_checkpoint_holds():
    """Refused by a look at the keys: no work and no message that grow with what the record claims."""
    state = trained("layer").state_dict()
    key, record = record_of(state)
    state[key] = encoded({**record, "contexts": 20_000})
    model = layer()
    before = snapshot(model)
    with pytest.raises(RuntimeError) as raised:
        load(model, state)
    told = len(str(raised.value))
    assert told < 10_000
    assert unchanged(model, before)


def test_torchs_own_load_refuses_another_matrix_too():
    """A plain parent's own load_state_dict is not all or nothing, but no wrong matrix passes."""
    with pytest.raises(RuntimeError, match="made with another matrix"):
        parent().load_state_dict(trained("parent", seed=8).state_dict())
