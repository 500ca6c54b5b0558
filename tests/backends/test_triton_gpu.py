"""The triton and cuda backends on CUDA tensors: the formulas' checks, the error bound, CUDA graphs.

The cuda backend twice: with the batches that its kernel is right for, others handed on, and with all of
them, so that every kernel runs on every GPU.
"""

from functools import partial

import pytest
import torch
from formula import KINDS, Expected, T, arguments, exact_matrix, generator, integers, normals, stored_weights

import nmkern
from nmkern import RandomMatrix, explain, flynet, modulated_linear, sparse_project, stream
from nmkern.backends import cuda, primitives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
FAMILIES = tuple(stream.DENSE_FAMILIES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.cuda_library)])
def sparse_backend(request):
    with nmkern.use_backend(request.param):
        yield request.param


@pytest.fixture(
    params=[
        "triton",
        *(pytest.param(n, marks=pytest.mark.cuda_library) for n in ("cuda", "cuda, small", "cuda, wide")),
    ]
)
def dense_backend(request):
    name, _, every = request.param.partition(", ")  # one kernel of it for every batch
    with nmkern.use_backend(name):
        if every:
            cuda.set_small_rows(10**6 if every == "small" else 0)
        yield name
        if every:
            cuda.set_small_rows(None)


def run(x, matrix, named, dy):
    """Result and gradients, computed on the GPU and brought back."""
    leaves = {"x": x.cuda().requires_grad_()}
    moved = {}
    for name, value in named.items():
        moved[name] = value.cuda() if torch.is_tensor(value) else value
        if torch.is_tensor(value) and value.is_floating_point():
            leaves[name] = moved[name] = moved[name].requires_grad_()
    y = modulated_linear(leaves["x"], matrix, **moved)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.cuda())
    return y.detach().cpu(), {k: v.cpu() for k, v in zip(leaves, grads, strict=True)}


# A test each: together they compile some 350 kernels, which workers share.
@pytest.mark.parametrize(("rows", "kind"), list(zip((1, 5, 16, 17, 33, 64, 70, 130, 2), KINDS, strict=False)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_integers_give_exact_results_and_gradients(dense_backend, family, dtype, rows, kind):
    g = generator(rows)
    wide = exact_matrix(family, 104, 156, -10)[3:, 7:]
    for matrix in (wide, exact_matrix(family, 156, 104, -10)[7:, 3:].T):
        x, dy = integers((rows, 149), 1, g, dtype), integers((rows, 101), 1, g, dtype)
        named = arguments(kind, (rows,), matrix, partial(integers, limit=2, generator=g), g)
        named.pop("strength", None)
        want = Expected(x, matrix, named, dy)
        y, grads = run(x, matrix, named, dy)
        assert torch.equal(y, want.y.to(dtype))
        for name, grad in grads.items():
            assert torch.equal(grad, want.grads[name].to(grad.dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_float32_error_at_k_8192(dense_backend, family, transposed):
    matrix = RandomMatrix(*((8192, 96) if transposed else (96, 8192)), seed=4, family=family)
    matrix = matrix.T if transposed else matrix
    for rows in (1, 33, 200):  # of each kind of tile
        x = normals((rows, 8192), generator(rows))
        want = x.double() @ stored_weights(matrix).T
        y = modulated_linear(x.cuda(), matrix).double().cpu()
        assert (y - want).norm() / want.norm() <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows", [5, 200])
def test_error_of_narrow_inputs_times_their_gain(dense_backend, rows, dtype):
    """It is rounded to 11 bits."""
    g = generator(rows)
    matrix = RandomMatrix(96, 700, seed=4)
    x, gain = normals((rows, 700), g, dtype), normals((700,), g)
    want = Expected(x, matrix, {"in_gain": gain})
    y = modulated_linear(x.cuda(), matrix, in_gain=gain.cuda())
    want.check(y.cpu(), rounded=2.0**-11)


@pytest.mark.parametrize("rows", [4, 70])
def test_a_call_can_be_captured_in_a_cuda_graph(dense_backend, rows):
    matrix = RandomMatrix(300, 4100, seed=1)
    x = normals((rows, 4100), generator(1), torch.bfloat16).cuda()
    want = modulated_linear(x, matrix)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modulated_linear(x, matrix)
    graph.replay()
    assert torch.equal(y, want)


def test_gradients_of_a_bank_repeat_their_bits_and_can_be_captured(dense_backend):
    matrix = RandomMatrix(300, 700, seed=1)
    g = generator(1)
    x, dy = normals((400, 700), g, torch.bfloat16).cuda(), normals((400, 300), g, torch.bfloat16).cuda()
    banks = [normals((T, size), g).cuda().requires_grad_() for size in (700, 300)]
    context = torch.randint(T, (400,), generator=g).cuda()

    def call():
        y = modulated_linear(x, matrix, in_gain=banks[0], out_gain=banks[1], context=context)
        return y.detach(), *torch.autograd.grad(y, banks, dy)

    first = call()
    assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))


def test_repeats_give_the_same_bits(dense_backend):
    matrix = RandomMatrix(8192, 8192, seed=1)
    x = normals((7, 8192), generator(1), torch.bfloat16).cuda()
    first = modulated_linear(x, matrix)
    assert all(torch.equal(modulated_linear(x, matrix), first) for _ in range(5))


def check_overlap(network, inputs):
    """Of network(x), a tuple: the same bits as without overlap, in eager calls and in a graph.

    Inputs take turns, so that what is left of the run before is wrong.
    """

    def agree(found, turn):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[turn % len(inputs)], strict=True)), turn

    with nmkern.use_backend("cuda"):
        cuda.set_overlap(False)
        try:
            wanted = [network(x) for x in inputs]
        finally:
            cuda.set_overlap(True)
        assert not any(torch.equal(a, b) for a, b in zip(wanted[0], wanted[1], strict=True))
        for turn in range(30):
            agree(network(inputs[turn % len(inputs)]), turn)
        x = inputs[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = network(x)
        for turn in range(30):
            x.copy_(inputs[turn % len(inputs)])
            graph.replay()
            agree(captured, turn)


@pytest.mark.cuda_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [4, 70, 300])
def test_kernels_that_overlap_give_the_bits_of_those_that_do_not(rows, dtype):
    """Each reads what the one before has just written, in memory that earlier ones have just read."""
    g = generator(rows)
    matrices = [RandomMatrix(500, 2000, seed=1, family=family, scale=0.01) for family in FAMILIES]
    sparse = RandomMatrix(2000, 2000, seed=2, family="sparse", fan_in=7)
    decoder = RandomMatrix(10, 2000, seed=3, scale=0.01)
    gains, fly_gain = (normals((T, 2000), g).cuda().requires_grad_() for _ in range(2))
    context = torch.randint(T, (rows,), generator=g).cuda()
    inputs = [normals((rows, 2000), g, dtype).cuda() for _ in range(3)]

    def network(x):
        y = x
        for matrix in matrices:
            y = torch.relu(modulated_linear(y, matrix, in_gain=gains, context=context))
            y = sparse_project(modulated_linear(y, matrix.T), sparse)
        logits = flynet(y, sparse, decoder, gain=fly_gain, context=context)
        return logits.detach(), *torch.autograd.grad(logits, (gains, fly_gain), torch.ones_like(logits))

    check_overlap(network, inputs)


@pytest.mark.cuda_library
def test_kernels_that_overlap_wait_for_other_streams():
    """Where two streams meet."""
    g = generator(1)
    down, up = (RandomMatrix(*shape, seed=1, scale=0.01) for shape in ((500, 2000), (2000, 500)))
    inputs = [normals((4, 2000), g).cuda() for _ in range(3)]
    side = torch.cuda.Stream()

    def network(x):
        y = modulated_linear(x, down)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            left = modulated_linear(modulated_linear(y, up), down)
        right = modulated_linear(modulated_linear(-y, up), down)
        torch.cuda.current_stream().wait_stream(side)
        return (modulated_linear(left - 2 * right, up),)

    check_overlap(network, inputs)


def test_a_context_out_of_range_reads_the_nearest_row(dense_backend):
    g = generator(3)
    matrix = exact_matrix("uniform", 7, 12)
    x, bank = integers((4, 12), 2, g).cuda(), integers((T, 12), 2, g).cuda()
    wrong, right = (torch.tensor(c).cuda() for c in ([0, -5, T, 2**40], [0, 0, T - 1, T - 1]))
    found, want = (modulated_linear(x, matrix, in_gain=bank, context=c) for c in (wrong, right))
    assert torch.equal(found, want)


def test_every_device_and_stream(dense_backend):
    """A call runs on the device of its tensors and on PyTorch's current stream there."""
    matrix = RandomMatrix(300, 4100, seed=1)
    x = normals((4, 4100), generator(1), torch.bfloat16)
    want = modulated_linear(x.cuda(), matrix).cpu()
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        with torch.cuda.stream(torch.cuda.Stream(index)):
            y = modulated_linear(x.to(f"cuda:{index}"), matrix)
        torch.cuda.synchronize(index)
        assert y.device.index == index and torch.equal(y.cpu(), want)
    assert torch.cuda.current_device() == before


@pytest.mark.cuda_library
def test_batches_go_where_explain_says():
    matrix = RandomMatrix(64, 96, seed=1)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    most = 16 if hopper else 64
    assert cuda.kernels() == (most, hopper)
    for rows, backend in ((1, "cuda"), (most, "cuda"), (most + 1, "cuda" if hopper else "triton")):
        assert explain(matrix, torch.bfloat16, "cuda", rows).backend == backend
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            modulated_linear(torch.ones(rows, 96, device="cuda", dtype=torch.bfloat16), matrix)
        ran = {event.key for event in profile.key_averages() if event.key.startswith("nmkern::")}
        assert ("nmkern::triton_modulated_matmul" in ran) == (backend == "triton")
        assert ran & {"nmkern::cuda_modulated_matmul", "nmkern::packed_matmul"}  # at first, then


@pytest.mark.cuda_library
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("names", [(), ("in_gain", "bias"), ("in_gain", "out_gain", "bias")], ids=str)
def test_everyday_calls_are_packed_and_give_the_same_bits(names, rows):
    """See nmkern.ops.eager."""
    g = generator(rows)
    matrix = RandomMatrix(300, 700, seed=1)
    sizes = {"in_gain": 700, "out_gain": 300, "bias": 300}
    leaves = [
        normals((2, rows, 700), g, torch.bfloat16).cuda(),
        *(normals((sizes[n],), g).cuda() for n in names),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    dy = normals((2, rows, 300), g, torch.bfloat16).cuda()

    def call(**context):
        y = modulated_linear(leaves[0], matrix, **dict(zip(names, leaves[1:], strict=True)), **context)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    call()  # which chooses the backend
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = call()
    ran = {event.key for event in profile.key_averages() if event.key.startswith("nmkern::")}
    ours = {name for name in ran if "triton" not in name}  # what they hand on apart
    assert ours and all(name.startswith("nmkern::packed_matmul") for name in ours)
    for one, same in zip(found, call(strength=1.0), strict=True):  # a strength is not plain
        assert torch.equal(one, same)


@pytest.mark.cuda_library
def test_sparse_matrices_go_where_explain_says():
    """What has no room in a block's shared memory, of any GPU, is Triton's."""
    for cols, backend in ((784, "cuda"), (20000, "triton")):
        matrix = RandomMatrix(64, cols, seed=1, family="sparse", fan_in=3)
        assert explain(matrix, torch.float32, "cuda", 5).backend == backend
        x = integers((5, cols), 3, generator(1))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = sparse_project(x.cuda(), matrix)
        ran = {event.key for event in profile.key_averages() if event.key.startswith("nmkern::")}
        assert ("nmkern::triton_sparse_matmul" in ran) == (backend == "triton")
        assert "nmkern::cuda_sparse_matmul" in ran
        assert torch.equal(y.cpu().double(), x.double() @ stored_weights(matrix).T)


@pytest.mark.cuda_library
def test_opcheck_of_sparse_and_flynet():
    encoder = RandomMatrix(32, 12, seed=1, family="sparse", fan_in=3)
    decoder = RandomMatrix(5, 32, seed=2)
    g = generator(4)
    x, gain, d_logits = (integers(s, 2, g).cuda() for s in ((6, 12), (T, 32), (6, 5)))
    gain.requires_grad_()
    context = torch.randint(T, (6,), generator=g).cuda()
    args = primitives.flynet_args(encoder, decoder)
    torch.library.opcheck(primitives.overload("cuda", "flynet_logits"), (x, gain, context, *args))
    d_logits.requires_grad_()
    torch.library.opcheck(primitives.overload("cuda", "flynet_gain_grad"), (x, d_logits, context, T, *args))
    x.requires_grad_()
    sparse = primitives.sparse_args(encoder)
    torch.library.opcheck(primitives.overload("cuda", "sparse_matmul"), (x, *sparse))


@pytest.mark.cuda_library
@pytest.mark.parametrize("primitive", ["modulated_matmul", "modulated_matmul_gain_grad"])
def test_opcheck(primitive):
    g = generator(4)
    matrix = exact_matrix("uniform", 4, 6)
    x, bank = integers((5, 6), 2, g), integers((T, 6), 2, g)
    values = [x, bank, None, None, torch.randint(T, (5,), generator=g)]
    if primitive == "modulated_matmul_gain_grad":
        values = [*values[:3], integers((5, 4), 2, g), values[4], T, True]
    values = [v.cuda() if torch.is_tensor(v) else v for v in values]
    values = [v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]
    torch.library.opcheck(primitives.overload("cuda", primitive), (*values, *primitives.dense_args(matrix)))


def test_a_compiled_graph_serves_batches_of_both(dense_backend):
    torch._dynamo.reset()
    matrix = exact_matrix("uniform", 9, 13)
    compiled = torch.compile(modulated_linear, fullgraph=True, dynamic=True)
    for rows in (4, 100, 7):
        x = integers((rows, 13), 2, generator(rows))
        assert torch.equal(compiled(x.cuda(), matrix).cpu(), (x.double() @ stored_weights(matrix).T).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fan_in", [1, 7, 33])
def test_sparse_integers_are_exact(sparse_backend, fan_in, dtype):
    matrix = RandomMatrix(500, 300, seed=5, family="sparse", fan_in=fan_in)[3:, 7:]
    weights = stored_weights(matrix)
    for rows in (1, 5, 17, 33, 130):
        x, dy = (integers((rows, size), 3, generator(rows), dtype) for size in matrix.shape[::-1])
        leaf = x.cuda().requires_grad_()
        y = sparse_project(leaf, matrix)
        grad = torch.autograd.grad(y, leaf, dy.cuda())[0]
        assert torch.equal(y.detach().cpu(), (x.double() @ weights.T).to(dtype))
        assert torch.equal(grad.cpu(), (dy.double() @ weights).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["rademacher", "uniform"])
@pytest.mark.parametrize("kind", ["vector", "bank", "rows"])
def test_flynet_integers_are_exact(sparse_backend, family, dtype, kind):
    """128 units, so that the mean is exact: see tests/ops/test_flynet.py for the bounds."""
    encoder = RandomMatrix(131, 45, seed=7, family="sparse", fan_in=3)[3:, 5:]
    rms = stream.DENSE_FAMILIES[family].rms
    p = stored_weights(encoder)
    for rows, classes in ((1, 3), (16, 11), (33, 5), (70, 11)):
        decoder = RandomMatrix(classes + 2, 137, seed=9, family=family, scale=rms)[2:, 9:]
        w = stored_weights(decoder)
        g = generator(rows)
        x, d_logits = integers((rows, 40), 1, g), integers((rows, classes), 1, g)
        context = torch.randint(3, (rows,), generator=g) if kind == "bank" else None
        shape = {"vector": (128,), "bank": (3, 128), "rows": (rows, 128)}[kind]
        gain = (2 * torch.randint(2, shape, generator=g) - 1).float()
        exact = gain.double().requires_grad_()
        m = x.double() @ p.T
        r = torch.relu(m - m.mean(1, keepdim=True))
        want = (r * (exact if context is None else exact[context])) @ w.T
        want_grad = torch.autograd.grad(want, exact, d_logits.double())[0]
        leaf = gain.cuda().requires_grad_()
        on = None if context is None else context.cuda()
        y = flynet(x.to(dtype).cuda(), encoder, decoder, gain=leaf, context=on)
        grad = torch.autograd.grad(y, leaf, d_logits.to(dtype).cuda())[0]
        assert torch.equal(y.detach().cpu(), want.detach().to(dtype))
        assert torch.equal(grad.cpu().double(), want_grad)


def test_sparse_and_flynet_repeat_their_bits_and_can_be_captured(sparse_backend):
    encoder = RandomMatrix(7840, 784, seed=1, family="sparse", fan_in=7)
    decoder = RandomMatrix(10, 7840, seed=2, scale=0.01)
    g = generator(1)
    x, dy = normals((128, 784), g).cuda(), normals((128, 7840), g).cuda()
    d_logits, gain = normals((128, 10), g).cuda(), normals((7840,), g).cuda().requires_grad_()

    def call():
        y = flynet(x, encoder, decoder, gain=gain)
        grad = torch.autograd.grad(y, gain, d_logits)[0]
        return sparse_project(x, encoder), sparse_project(dy, encoder.T), y.detach(), grad

    first = call()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
