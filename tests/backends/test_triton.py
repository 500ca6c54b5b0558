"""What only the triton backend has: splits, batches in parts, contexts out of range, ops by name.

That it computes the formula is tested with all other backends, in tests/ops. Here, too, kernels run under
Triton's interpreter where there is no CUDA device, and compiled on CUDA tensors where there is one.
"""

import os
from itertools import product

import pytest
import torch
from formula import T, exact_matrix, generator, integers, normals, stored_weights

pytest.importorskip("triton")
import triton.language as tl

from nmkern import RandomMatrix, stream
from nmkern.backends import primitives, triton
from nmkern.backends.triton import configs, dense, flynet, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def matmul(x, matrix, in_gain=None, out_gain=None, bias=None, context=None):
    return launch.modulated_matmul(x, in_gain, out_gain, bias, context, *primitives.dense_args(matrix))


def gain_grad(x, other, matrix, contexts, context=None, in_gain=None, out_gain=None):
    args = primitives.dense_args(matrix)
    return launch.modulated_matmul_gain_grad(x, in_gain, out_gain, other, context, contexts, True, *args)


@pytest.fixture
def operands(monkeypatch):
    """A function that sets in how many parts x is multiplied, and in what; in the interpreter float32."""

    def clear():
        launch._plan.cache_clear()
        flynet.plan_of.cache_clear()

    def set_operands(parts, dtype=torch.float32 if INTERPRETED else torch.bfloat16):
        for module in (launch, flynet):
            monkeypatch.setattr(module, "operand_of", lambda *_: (dtype, parts))
        clear()

    yield set_operands
    clear()


@pytest.mark.parametrize(("transposed", "parts"), [(False, 0), (True, 0), (False, 1), (True, 2)])
def test_a_split_sum_is_the_sum(monkeypatch, operands, transposed, parts):
    """As many splits as there are, and none: with exact sums the same bits, gains and bias included."""
    operands(max(1, parts))
    g = generator(1)
    matrix = exact_matrix("uniform", *((700, 40) if transposed else (40, 700)))
    matrix = matrix.T if transposed else matrix
    dtype = torch.float32 if parts > 1 else torch.bfloat16
    x, out_gain, bias = (integers(s, 3, g).to(DEVICE) for s in ((5, 700), (1, 40), (5, 40)))
    in_gain = integers((1, 700), 2, g).to(DEVICE) if parts else None
    gained = x if in_gain is None else x * in_gain
    want = (gained.double().cpu() @ stored_weights(matrix).T * out_gain.cpu() + bias.cpu()).to(dtype)
    x = x.to(dtype)
    plans = []
    for programs in (1, 8, 264):
        monkeypatch.setattr(launch, "_PROGRAMS", programs)
        monkeypatch.setattr(launch, "_LEAST_STEPS", 2)
        launch._plan.cache_clear()
        assert torch.equal(matmul(x, matrix, in_gain, out_gain, bias).cpu(), want)
        args = primitives.dense_args(matrix)[:-1]
        plans.append(launch._plan(args, 5, x.dtype, parts > 0, True, False))
    assert [plan.parts for plan in plans] == [parts] * 3
    assert plans[0].splits == 1 < plans[1].splits < plans[2].splits


@pytest.mark.parametrize("kind", ["one", "each", "context"])
def test_a_batch_in_parts(monkeypatch, kind):
    """Partial sums that do not fit the scratch: gain gradients are added up over the parts."""
    g = generator(2)
    matrix = exact_matrix("rademacher", 9, 33)
    x, other = integers((300, 33), 2, g), integers((300, 9), 2, g)
    context = torch.randint(T, (300,), generator=g) if kind == "context" else None
    contexts = {"one": 1, "each": 300, "context": T}[kind]
    bank, out = integers((contexts, 33), 2, g), integers((contexts, 9), 2, g)
    monkeypatch.setattr(launch, "SCRATCH", 4 * 9 * 128)
    launch._plan.cache_clear()
    assert len(launch.parts(300, 36)) == 3
    device = [v if v is None else v.to(DEVICE) for v in (x, other, context, bank, out)]
    product, grad = gain_grad(device[0], device[1], matrix, contexts, *device[2:])
    launch._plan.cache_clear()
    row = context if kind == "context" else torch.arange(300) % contexts
    z = (x.double() * bank[row]) @ stored_weights(matrix).T
    assert torch.equal(product.double().cpu(), z * out[row])
    want = torch.zeros(contexts, 9, dtype=torch.float64).index_add_(0, row, other * z)
    assert torch.equal(grad.double().cpu(), want)


@pytest.mark.parametrize("parts", [0, 1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("family", ["uniform", "rademacher"])
def test_x_is_prepared_whole_in_another_order(operands, family, transposed, parts):
    """Each step of the reduction holds its columns of x once, and zeros; parts are a value's leading bits.

    0 parts: x as it is, neither gained nor scaled.
    """
    dtype = torch.float32 if parts else torch.float16
    operands(max(1, parts), torch.float16)
    g = generator(parts)
    matrix = exact_matrix(family, *((150, 9) if transposed else (9, 150)))
    matrix = matrix[5:].T if transposed else matrix[:, 5:]
    x, bank = normals((70, 145), g, dtype).to(DEVICE), normals((T, 145), g).to(DEVICE)
    context = torch.randint(T, (70,), generator=g).to(DEVICE)
    plan = launch._plan(primitives.dense_args(matrix)[:-1], 70, x.dtype, parts > 0, False, False)
    assert plan.parts == max(1, parts)
    found, scale = launch._prepare(x, bank if parts else None, context if parts else None, plan)
    assert found.dtype == torch.float16 and (scale is not None) == plan.scaled == (parts > 0)
    found = found.cpu().double()  # [steps, parts, rows, step]
    step = found.shape[-1]
    want = torch.zeros(70, found.shape[0] * step)
    skip = 5 % (4 if transposed else {"uniform": 8, "rademacher": 32}[family])
    want[:, skip : skip + 145] = (x * bank[context] if parts else x).cpu()
    if parts:
        largest = found[:, -1].abs().amax((0, 2))
        assert ((largest >= 2.0**14) & (largest <= 2.0**15)).all()
        assert (scale.log2() == scale.log2().round()).all()
        found *= scale.cpu().double()[:, None]
    total = found.sum(1).sort(-1).values
    want = want.double().view(70, -1, step).transpose(0, 1)
    largest, want = want.abs().amax((0, 2))[:, None], want.sort(-1).values
    lost = {0: 0, 1: 2.0**-11, 2: 2.0**-23}[parts]
    assert ((total - want).abs() <= lost * want.abs() + (2.0**-39 * largest if parts else 0)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("family", "dtype", "parts", "pieces"),
    [
        ("uniform", torch.bfloat16, 1, 1),
        ("uniform", torch.float32, 2, 2),
        ("uniform", torch.float16, 2, 2),
        ("rademacher", torch.float16, 1, 2),
        ("normal", torch.float32, 1, 2),
        ("normal", torch.bfloat16, 2, 1),
    ],
)
def test_large_batches(monkeypatch, operands, family, dtype, parts, transposed, pieces):
    """Ragged sizes at an offset, gains and bias by context or for all: results and gradients are exact."""
    if INTERPRETED:
        operands(parts)
        monkeypatch.setattr(launch, "pieces", lambda *_: pieces)
    g = generator(7)
    matrix = exact_matrix(family, *((75, 140) if transposed else (140, 75)), -8)
    matrix = matrix[3:, 2:].T if transposed else matrix[2:, 3:]
    rows, (outputs, columns) = 131, matrix.shape
    banks = T if parts == 1 else 1
    x, other = integers((rows, columns), 1, g, dtype), integers((rows, outputs), 1, g, dtype)
    x *= 2.0 ** torch.randint(4, (rows, 1), generator=g)  # rows that are scaled otherwise
    gain, out, bias = (integers((banks, size), 1, g) for size in (columns, outputs, outputs))
    context = torch.randint(T, (rows,), generator=g) if banks > 1 else None
    row = torch.zeros(rows, dtype=torch.long) if context is None else context
    device = [v if v is None else v.to(DEVICE) for v in (x, other, gain, out, bias, context)]
    z = (x.double() * gain[row]) @ stored_weights(matrix).T
    y = matmul(device[0], matrix, *device[2:])
    assert torch.equal(y.cpu(), (z * out[row] + bias[row]).to(dtype))
    product, grad = gain_grad(device[0], device[1], matrix, banks, device[5], device[2], device[3])
    assert torch.equal(product.cpu(), (z * out[row]).to(dtype))
    want = torch.zeros(banks, outputs, dtype=torch.float64).index_add_(0, row, other * z)
    assert torch.equal(grad.double().cpu(), want)


@pytest.mark.parametrize("gained", [False, True])
def test_a_batch_whose_prepared_x_does_not_fit_the_scratch(monkeypatch, gained):
    """Parts of 128 rows, the last of them few enough to be read as they are if nothing is gained."""
    g = generator(8)
    matrix = exact_matrix("uniform", 9, 70)
    x, bank = integers((264, 70), 1, g, torch.bfloat16), integers((264, 70), 1, g)
    bias = integers((264, 9), 1, g)
    whole = [v.to(DEVICE) for v in (x, bank, bias)]
    prepared = []
    prepare = launch._prepare
    monkeypatch.setattr(launch, "SCRATCH", 1)
    monkeypatch.setattr(launch, "_prepare", lambda x, *rest: prepared.append(x.shape[0]) or prepare(x, *rest))
    launch._plan.cache_clear()
    y = matmul(whole[0], matrix, whole[1] if gained else None, None, whole[2])
    launch._plan.cache_clear()
    assert prepared == [128, 128, *([8] if gained else [])]
    want = (x.double() * (bank if gained else 1)) @ stored_weights(matrix).T + bias
    assert torch.equal(y.double().cpu(), want)


@pytest.mark.parametrize("programs", [1, 264])
def test_the_gradient_of_a_bank_is_summed_in_slices(monkeypatch, programs):
    """Contexts of many rows and of none; one program for each, or several."""
    g = generator(9)
    matrix = exact_matrix("uniform", 70, 12)
    x, other = integers((200, 12), 2, g).to(DEVICE), integers((200, 70), 2, g).to(DEVICE)
    context = torch.tensor([5, 0, 5, 2])[torch.randint(4, (200,), generator=g)].to(DEVICE)
    monkeypatch.setattr(launch, "_PROGRAMS", programs)
    slices = []
    sums = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *dim: slices.append(self.shape) or sums(self, *dim))
    launch._plan.cache_clear()
    grad = gain_grad(x, other, matrix, 7, context)[1]
    launch._plan.cache_clear()
    assert slices == ([] if programs == 1 else [(7, 3, 70)])
    z = x.double().cpu() @ stored_weights(matrix).T
    want = torch.zeros(7, 70, dtype=torch.float64).index_add_(0, context.cpu(), other.cpu() * z)
    assert torch.equal(grad.double().cpu(), want)


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    """PyTorch's setting for float32 products on CUDA."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def test_torchs_setting_for_float32_products_is_honoured(monkeypatch, precision):
    """By dense products and by both ways of FlyNet's decoder, and by nothing but float32."""
    fewer = precision == "tf32"
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for dtype, gained, layer, fly in (
        *((torch.float32, gained, (torch.float16, 2 - fewer), 3 - fewer) for gained in (False, True)),
        (torch.bfloat16, True, (torch.float16, 1), 3),
        (torch.bfloat16, False, (torch.bfloat16, 1), 1),
        (torch.float16, False, (torch.float16, 1), 1),
    ):
        tf32 = launch.may_use_tf32(dtype)
        assert launch.operand_of(dtype, gained, tf32) == layer
        assert flynet.operand_of(dtype, gained, tf32)[1] == fly
    flynet.plan_of.cache_clear()
    for gained in (False, True):
        plan = flynet.plan_of((0x102, 0, 0, 0, 10), 64, 8, torch.float32, gained, precision == "tf32")
        assert plan.logits.constants["PARTS"] == 3 - fewer
    flynet.plan_of.cache_clear()
    seen = []
    monkeypatch.setattr(flynet, "plan_of", lambda *args: seen.append(args[-1]) or 1 / 0)
    encoder = RandomMatrix(64, 9, seed=1, family="sparse", fan_in=2)
    args = primitives.flynet_args(encoder, exact_matrix("uniform", 3, 64))
    for dtype in (torch.float32, torch.bfloat16):
        x, d_logits = torch.ones(2, 9, dtype=dtype), torch.ones(2, 3, dtype=dtype)
        with pytest.raises(ZeroDivisionError):
            flynet.flynet_logits(x, torch.ones(1, 64), None, *args)
        with pytest.raises(ZeroDivisionError):
            flynet.flynet_gain_grad(x, d_logits, None, 1, *args)
    assert seen == [precision == "tf32"] * 2 + [False] * 2


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU every float16 input is multiplied so")
@pytest.mark.parametrize("family", stream.DENSE_FAMILIES)
def test_sums_of_weights_in_float16_are_scaled(operands, family):
    """As GPUs decode and multiply them; the interpreter would else take float32, whose codes have no unit."""
    operands(1, torch.float16)
    g = generator(5)
    matrix = exact_matrix(family, 37, 83)
    for rows in (3, 40):  # as it is, prepared
        for view in (matrix, matrix.T):
            x = integers((rows, view.cols), 1, g, torch.float16)
            assert torch.equal(matmul(x, view), (x.double() @ stored_weights(view).T).half())
    encoder, decoder = RandomMatrix(83, 9, seed=1, family="sparse", fan_in=2), matrix[:10]
    args = primitives.flynet_args(encoder, decoder)
    x, d_logits = integers((6, 9), 1, g, torch.float16), integers((6, 10), 1, g, torch.float16)
    m = x.double() @ stored_weights(encoder).T
    hidden = torch.relu(m - m.mean(1, keepdim=True))
    w = stored_weights(decoder)
    grad = flynet.flynet_gain_grad(x, d_logits, None, 1, *args)
    operands(3, torch.float16)
    logits = flynet.flynet_logits(x, torch.ones(1, 83), None, *args)
    for found, want in ((logits, hidden @ w.T), (grad, (hidden * (d_logits.double() @ w)).sum(0))):
        assert (found.double() - want).abs().max() <= 2**-9 * want.abs().max()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy in the interpreter
@pytest.mark.skipif(not INTERPRETED, reason="tests/ops/test_float32.py and the GPU's tests bound its errors")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, 2), (torch.float32, 1), (torch.bfloat16, 1)])
def test_rows_of_any_size_are_prepared_in_float16(operands, dtype, parts, transposed):
    """What prepare_rows_kernel promises, of values of many sizes in a row; what is not finite stays so.

    The interpreter's sums are float32, of 200 products in 2 parts and the chains that they are added up in.
    """
    operands(parts, torch.float16)
    g = generator(11)
    matrix = exact_matrix("normal", *((200, 21) if transposed else (21, 200)))
    matrix = matrix.T if transposed else matrix
    size = 2.0 ** torch.randint(-60, 60, (19, 200), generator=g)
    for row, exponent in enumerate((-149, -133, -120, -112, 100)):
        size[row] = 2.0**exponent
    x, gain = (normals((19, 200), g) * size).to(dtype), normals((1, 200), g)
    x[:, 3] = 0
    gain = None if dtype == torch.float32 else gain
    value = (x.float() if gain is None else x.float() * gain).double()
    weights = stored_weights(matrix)
    y = matmul(x, matrix, gain).double()
    of_value, of_largest = 2.0**-11 if parts == 1 else 2.0**-23, 2.0**-39
    off = value.abs() * (of_value + 404 * 2.0**-24) + value.abs().amax(1, keepdim=True) * of_largest
    off += 2.0**-149  # of a subnormal product
    want = value @ weights.T
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    assert ((y - want).abs() <= off @ weights.abs().T + unit * want.abs()).all()
    if parts == 1:  # and no finer, or it is in two
        assert ((y - want).abs() > 2.0**-18 * (value.abs() @ weights.abs().T)).any()
    for strange in (float("inf"), float("nan")):
        x[7, 3] = strange
        again = matmul(x, matrix, gain).double()
        assert not again[7].isfinite().any() and torch.equal(again[8:], y[8:])
        assert again[7].isnan().all() == (strange != strange)


def test_an_empty_batch():
    matrix = exact_matrix("normal", 7, 12)
    x = torch.empty(0, 12, device=DEVICE)
    assert matmul(x, matrix).shape == (0, 7)
    for contexts in (1, T):
        product, grad = gain_grad(x, torch.empty(0, 7, device=DEVICE), matrix, contexts)
        assert product.shape == (0, 7) and torch.equal(grad.cpu(), torch.zeros(contexts, 7))


def test_a_context_out_of_range_reads_the_nearest_row():
    """Python checks contexts that lie on the CPU. On a GPU it cannot look, so the kernel stays inside."""
    g = generator(3)
    matrix = exact_matrix("uniform", 7, 12)
    x, bank = integers((4, 12), 2, g).to(DEVICE), integers((T, 12), 2, g).to(DEVICE)
    wrong = torch.tensor([0, -5, T, 2**40], device=DEVICE)
    right = torch.tensor([0, 0, T - 1, T - 1], device=DEVICE)
    assert torch.equal(matmul(x, matrix, bank, context=wrong), matmul(x, matrix, bank, context=right))
    other = integers((4, 7), 2, g).to(DEVICE)
    found, want = (gain_grad(x, other, matrix, T, c)[1] for c in (wrong, right))
    assert torch.equal(found, want)


def test_a_plan_does_not_depend_on_values():
    """What is cached per call: the matrix, the size of the batch and the dtype, nothing of a tensor."""
    args = primitives.dense_args(exact_matrix("uniform", 4096, 4096))[:-1]
    small = launch._plan(args, 1, torch.bfloat16, False, False, False)
    assert small is launch._plan(args, 1, torch.bfloat16, False, False, False)
    assert small.splits == 16  # 16 blocks of 256 outputs: 256 programs on 132 multiprocessors
    large = launch._plan(args, 4096, torch.bfloat16, False, False, False)
    assert (large.splits, large.grid) == (1, 64 * 16)


@pytest.mark.parametrize("tag", configs.REDUCTION)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("amd", "lanes"), [(False, 32), (True, 64), (True, 32)])
def test_tiles_hold_whole_patches(monkeypatch, tag, transposed, amd, lanes):
    """What the index arithmetic of the kernel asks of a tile, for every batch, and the registers it has."""
    monkeypatch.setattr(configs, "AMD", amd)
    for batch in (1, 16, 17, 33, 64, 65, 10**6):
        for parts in (1, 2, 3):
            tile = configs.tile_of(tag, transposed, batch, parts, lanes)
            assert tile.outputs * tile.batch <= 128 * lanes * tile.warps
            held = tile.fields if transposed else 4
            assert tile.outputs % ((16 if amd else 8) * tile.warps * held) == 0
            assert tile.fields <= (8 if tag < 0x103 else 4)


@pytest.mark.skipif(not INTERPRETED, reason="the order is that of the GPU that it is compiled for")
@pytest.mark.parametrize("family", stream.DENSE_FAMILIES)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
def test_the_order_of_amds_matrix_cores_gives_the_same_bits(monkeypatch, family, transposed):
    """On integers, whose sums are exact in any order: all regimes, x as it is, prepared, and multiplied."""
    monkeypatch.setattr(configs, "AMD", True)
    monkeypatch.setattr(configs, "warp_lanes", lambda: 64)
    monkeypatch.setattr(dense, "MFMA", tl.constexpr(True))
    launch._plan.cache_clear()
    g = generator(3)
    matrix = exact_matrix(family, 300, 210)[5:, 3:]
    args = primitives.dense_args(matrix.T if transposed else matrix)
    n, k = (207, 295) if transposed else (295, 207)
    reference = primitives.overload("reference", "modulated_matmul")
    for rows, gained in product((1, 20, 40, 70), (False, True)):
        x, gain = integers((rows, k), 2, g), integers((1, k), 2, g) if gained else None
        found = launch.modulated_matmul(x, gain, None, None, None, *args)
        assert torch.equal(found, reference(x, gain, None, None, None, *args)), (rows, gained)
        assert found.shape == (rows, n)
    launch._plan.cache_clear()


@pytest.mark.parametrize("primitive", ["modulated_matmul", "modulated_matmul_gain_grad"])
def test_opcheck(primitive):
    g = generator(4)
    matrix = exact_matrix("uniform", 4, 6)
    x, bank = integers((5, 6), 2, g).requires_grad_(), integers((T, 6), 2, g).requires_grad_()
    context = torch.randint(T, (5,), generator=g)
    values = [x, bank, None, None, context]
    if primitive == "modulated_matmul_gain_grad":
        values = [x, bank, None, integers((5, 4), 2, g).requires_grad_(), context, T, True]
    values = [v.to(DEVICE) if torch.is_tensor(v) else v for v in values]
    torch.library.opcheck(primitives.overload("triton", primitive), (*values, *primitives.dense_args(matrix)))


@pytest.mark.parametrize(
    ("version", "major", "kept"), [((3, 8), 9, False), ((3, 8), 8, True), ((3, 9), 9, True)]
)
def test_loops_that_a_compiler_breaks_are_not_pipelined(monkeypatch, version, major, kept):
    monkeypatch.setattr(launch, "VERSION", version)
    tile = configs.tile_of(stream.UNIFORM.tag, False, 128, 1)
    assert tile.stages > 1
    assert launch.stages(tile, major) == (tile.stages if kept else 1)
    monkeypatch.setattr(configs, "AMD", True)  # see there: shared memory
    assert launch.stages(tile, major) == 1


def test_the_interpreter_runs_because_the_environment_says_so():
    if INTERPRETED:
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert triton.kernel() == "triton (interpreted)"
    assert launch.INTERPRETED == INTERPRETED
