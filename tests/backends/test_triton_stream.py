"""The golden vectors, and every field of every word, through the Triton device functions.

Where there is no CUDA device they run under Triton's interpreter (see conftest.py).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from nmkern import stream  # noqa: E402
from nmkern.backends.triton import stream as device  # noqa: E402

VECTORS = Path(__file__).parents[1] / "vectors.txt"
LINES = [line.split() for line in VECTORS.read_text().splitlines() if line and not line.startswith("#")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def philox_kernel(inputs, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < n
    c0 = tl.load(inputs + 6 * i, mask=mask).to(tl.uint32, bitcast=True)
    c1 = tl.load(inputs + 6 * i + 1, mask=mask).to(tl.uint32, bitcast=True)
    c2 = tl.load(inputs + 6 * i + 2, mask=mask).to(tl.uint32, bitcast=True)
    c3 = tl.load(inputs + 6 * i + 3, mask=mask).to(tl.uint32, bitcast=True)
    k0 = tl.load(inputs + 6 * i + 4, mask=mask).to(tl.uint32, bitcast=True)
    k1 = tl.load(inputs + 6 * i + 5, mask=mask).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = device.philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out + 4 * i, w0.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 4 * i + 1, w1.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 4 * i + 2, w2.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 4 * i + 3, w3.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def element_kernel(
    inputs, table, word_out, code_out, n, TAG: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Word and code of elements given as (c0, c1, r, f, k0, k1)."""
    i = tl.arange(0, BLOCK)
    mask = i < n
    c0 = tl.load(inputs + 6 * i, mask=mask).to(tl.uint32, bitcast=True)
    c1 = tl.load(inputs + 6 * i + 1, mask=mask).to(tl.uint32, bitcast=True)
    r = tl.load(inputs + 6 * i + 2, mask=mask).to(tl.uint32, bitcast=True)
    f = tl.load(inputs + 6 * i + 3, mask=mask, other=0).to(tl.uint32, bitcast=True)
    k0 = tl.load(inputs + 6 * i + 4, mask=mask).to(tl.uint32, bitcast=True)
    k1 = tl.load(inputs + 6 * i + 5, mask=mask).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = device.words(c0, c1, k0, k1, TAG)
    word = device.word_of_row(w0, w1, w2, w3, r)
    tl.store(word_out + i, word.to(tl.int32, bitcast=True), mask=mask)
    tl.store(code_out + i, device.decode(word, f, table, TAG, DTYPE), mask=mask)


@triton.jit
def pair_kernel(
    words, out, TAG: tl.constexpr, MANTISSA: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """Both halves of ``pair_of_fields`` for every f: out[word, f, 2]."""
    i = tl.arange(0, BLOCK)
    f = tl.arange(0, HALF)
    word = tl.load(words + i).to(tl.uint32, bitcast=True)
    pair = device.pair_of_fields(word[:, None], f[None, :].to(tl.uint32), TAG, MANTISSA)
    tl.store(out + i[:, None] * HALF + f[None, :], pair.to(tl.int32, bitcast=True))


@triton.jit
def widened_kernel(words, out, BLOCK: tl.constexpr):
    """``widened_level`` of every field f: out[word, f]."""
    i = tl.arange(0, BLOCK)
    f = tl.arange(0, 8)
    word = tl.load(words + i).to(tl.uint32, bitcast=True)
    level = device.widened_level(word[:, None], f[None, :].to(tl.uint32))
    tl.store(out + i[:, None] * 8 + f[None, :], level)


def as_int32(values):
    return torch.from_numpy(np.asarray(values, np.uint64).astype(np.uint32).view(np.int32)).to(DEVICE)


def as_uint32(tensor):
    return tensor.cpu().numpy().view(np.uint32)


def block(n):
    return triton.next_power_of_2(n)


def test_philox_gives_its_known_answers():
    records = [[int(v, 16) for v in line[1:]] for line in LINES if line[0] == "philox"]
    assert len(records) > 3
    inputs = as_int32([record[:6] for record in records])
    out = torch.empty(len(records), 4, dtype=torch.int32, device=DEVICE)
    philox_kernel[(1,)](inputs, out, len(records), BLOCK=block(len(records)))
    assert as_uint32(out).tolist() == [record[6:] for record in records]


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", stream.DENSE_FAMILIES.values(), ids=lambda family: family.name)
def test_words_and_codes_of_the_vectors(family, dtype):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no bfloat16 arithmetic; test_pairs_of_fields checks its bits")
    records = [line[2:] for line in LINES if line[:2] == ["dense", family.name]]
    assert len(records) > 50
    width = family.columns_per_word
    inputs = []
    for seed, row, col, _, _ in records:
        k0, k1 = stream.key_of(int(seed))
        row, col = int(row), int(col)
        inputs.append([col // width, row // 4, row % 4, col % width, k0, k1])
    inputs = as_int32(inputs)
    table = torch.from_numpy(stream.NORMAL_TABLE).to(DEVICE, dtype)
    found = torch.empty(len(records), dtype=torch.int32, device=DEVICE)
    codes = torch.empty(len(records), dtype=dtype, device=DEVICE)
    element_kernel[(1,)](
        inputs, table, found, codes, len(records), family.tag, DTYPES[dtype], BLOCK=block(len(records))
    )
    assert as_uint32(found).tolist() == [int(word, 16) for *_, word, _ in records]
    scale = device.code_scale(family.tag, DTYPES[dtype])
    assert (codes.float() * scale).tolist() == [int(code) for *_, code in records]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [stream.RADEMACHER, stream.UNIFORM], ids=lambda family: family.name)
def test_pairs_of_fields(family, dtype):
    """The bits that are decoded two at a time are the codes, or become them by one multiply-add."""
    mantissa = 7 if dtype == torch.bfloat16 else 10
    half = family.columns_per_word // 2
    words = stream.philox4x32((np.arange(64), 0, 0, 0), (1, 2)).reshape(-1)
    out = torch.empty(len(words), half, dtype=torch.int32, device=DEVICE)
    pair_kernel[(1,)](as_int32(words), out, family.tag, mantissa, half, BLOCK=len(words))
    found = out.cpu().view(dtype).view(len(words), half, 2).double()
    if family is stream.UNIFORM:
        factors = [device.level_factor(upper, DTYPES[dtype]) for upper in (False, True)]
        factor = torch.tensor(factors, dtype=torch.float64).repeat(half // 2)[:, None]
        found = factor * found * device.code_scale(family.tag, DTYPES[dtype]) - 15
    shifts = np.arange(0, 32, family.bits, dtype=np.uint32)
    fields = (words[:, None] >> shifts) & np.uint32(2**family.bits - 1)
    want = torch.from_numpy(stream.decode(family.name, fields)).view(len(words), 2, half).transpose(1, 2)
    assert torch.equal(found, want.double())


def test_widened_levels_are_codes_and_exact_in_bfloat16():
    """As AMD's GPUs decode uniform for bfloat16."""
    words = stream.philox4x32((np.arange(64), 0, 0, 0), (1, 2)).reshape(-1)
    out = torch.empty(len(words), 8, device=DEVICE)
    widened_kernel[(1,)](as_int32(words), out, BLOCK=len(words))
    found = out.cpu()
    assert torch.equal(found.bfloat16().float(), found)
    fields = (words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)) & np.uint32(15)
    want = torch.from_numpy(stream.decode("uniform", fields))
    assert torch.equal(found * device.WIDENED_SCALE.value, want.float())
