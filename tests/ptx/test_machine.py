"""The machine that executes PTX: each instruction by its definition, and what it must refuse.

Layouts of matrices are tested where compilers that know them put them to use: test_cuda.py, test_triton.py.
"""

import ctypes
import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx.emulator import Module

REGISTERS = """
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<40>;
    .reg .b64 %d<40>;
    .reg .f32 %f<40>;
"""


def kernel(body, parameters=1, shared=0):
    """A kernel of pointers: %d0 and on hold them; %r0 the thread, %d20 8 times it and %d21 4 times."""
    named = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(parameters))
    memory = f".shared .align 128 .b8 memory[{shared}];" if shared else ""
    text = f"""
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel({named}) {{
{REGISTERS}{memory}
{loads}
mov.u32 %r0, %tid.x;
mul.wide.u32 %d20, %r0, 8;
mul.wide.u32 %d21, %r0, 4;
{body}
ret;
}}
"""
    return Module(text)


def run(body, *tensors, threads=32, shared=0):
    kernel(body, len(tensors), shared).launch("kernel", (1,), (threads,), tensors)


def words(values):
    """As 64-bit memory, padded to whole warps by zeros."""
    bits = [int(v) & (2**64 - 1) for v in values]
    bits += [0] * (-len(bits) % 32)
    return torch.from_numpy(np.array(bits, dtype=np.uint64).view(np.int64))


def computed(instruction, *operands):
    """What an instruction makes of operands that are bits; %d10 is its result, %d11 and on its operands."""
    memory = [words(values) for values in operands]
    out = torch.zeros_like(memory[0])
    loads = "".join(
        f"add.s64 %d30, %d{i + 1}, %d20; ld.global.b64 %d{11 + i}, [%d30];\n" for i in range(len(memory))
    )
    body = f"{loads}mov.b64 %d10, 0;\n{instruction}\nadd.s64 %d31, %d0, %d20; st.global.b64 [%d31], %d10;"
    run(body, out, *memory, threads=len(out))
    return [int(v) & (2**64 - 1) for v in out.tolist()][: len(operands[0])]


def signed(value, bits):
    value &= 2**bits - 1
    return value - 2**bits if value >> (bits - 1) else value


EDGES = {
    bits: [0, 1, 2, 7, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 2**bits - 2, 0x9D2C5680 % 2**bits]
    for bits in (16, 32, 64)
}
SHIFTS = [0, 1, 5, 15, 16, 31, 32, 33, 63, 64, 200]


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(
    ("name", "bits", "function"),
    [
        ("add.s32", 32, lambda a, b: a + b),
        ("add.s64", 64, lambda a, b: a + b),
        ("sub.s32", 32, lambda a, b: a - b),
        ("sub.s64", 64, lambda a, b: a - b),
        ("mul.lo.s32", 32, lambda a, b: a * b),
        ("mul.lo.s64", 64, lambda a, b: a * b),
        ("mul.hi.u32", 32, lambda a, b: a * b >> 32),
        ("mul.hi.s32", 32, lambda a, b: signed(a, 32) * signed(b, 32) >> 32),
        ("mul.wide.u32", 32, lambda a, b: a * b),
        ("mul.wide.s32", 32, lambda a, b: signed(a, 32) * signed(b, 32)),
        ("min.u32", 32, min),
        ("max.u32", 32, max),
        ("min.s32", 32, lambda a, b: min(signed(a, 32), signed(b, 32))),
        ("max.s64", 64, lambda a, b: max(signed(a, 64), signed(b, 64))),
        ("and.b32", 32, lambda a, b: a & b),
        ("or.b64", 64, lambda a, b: a | b),
        ("xor.b32", 32, lambda a, b: a ^ b),
        ("div.u32", 32, lambda a, b: a // b if b else None),
        ("rem.u32", 32, lambda a, b: a % b if b else None),
        ("div.s64", 64, lambda a, b: quotient(signed(a, 64), signed(b, 64)) if b else None),
        ("rem.s64", 64, lambda a, b: math.fmod(signed(a, 32), signed(b, 32)) if 0 < b < 9 > a else None),
    ],
)
def test_integers(name, bits, function):
    pairs = list(itertools.product(EDGES[bits], repeat=2))
    wide, register = "wide" in name, "d" if bits == 64 else "r"
    body = f"{name} %d10, %d11, %d12;"
    if bits == 32:
        body = "cvt.u32.u64 %r1, %d11; cvt.u32.u64 %r2, %d12;\n"
        body += f"{name} %{'d10' if wide else 'r3'}, %{register}1, %{register}2;"
        body += "" if wide else "cvt.u64.u32 %d10, %r3;"
    found = computed(body, *zip(*pairs, strict=True))
    for (a, b), got in zip(pairs, found, strict=True):
        want = function(a, b)
        if want is not None:
            assert got == int(want) % 2 ** (2 * bits if wide else bits), (a, b)


@pytest.mark.parametrize("bits", [32, 64])
def test_shifts_beyond_the_width(bits):
    pairs = list(itertools.product(EDGES[bits], SHIFTS))
    r, t = ("d", "s64") if bits == 64 else ("r", "s32")
    to = "mov.b64 %d1{0}, %d1{0};" if bits == 64 else "cvt.u32.u64 %r1{0}, %d1{0};"
    given = to.format(1) + "cvt.u32.u64 %r12, %d12;"
    out = "" if bits == 64 else "cvt.u64.u32 %d10, %r10;"
    for name, function in (
        (f"shl.b{bits}", lambda a, n: a << n),
        (f"shr.u{bits}", lambda a, n: a >> n),
        (f"shr.{t}", lambda a, n: signed(a, bits) >> n),
    ):
        found = computed(f"{given}{name} %{r}10, %{r}11, %r12;{out}", *zip(*pairs, strict=True))
        assert found == [function(a, n) % 2**bits for a, n in pairs], name


def test_bits():
    values = [*EDGES[32], *(random.Random(1).getrandbits(32) for _ in range(23))]
    others = values[5:] + values[:5]
    given = "cvt.u32.u64 %r1, %d11; cvt.u32.u64 %r2, %d12;"
    out = "cvt.u64.u32 %d10, %r3;"

    def check(body, function):
        found = computed(given + body + out, values, others)
        assert found == [function(a, b) % 2**32 for a, b in zip(values, others, strict=True)], body

    def byte(a, b, which):
        chosen = (b << 32 | a) >> (8 * (which & 7)) & 255
        return (255 if chosen >> 7 else 0) if which & 8 else chosen

    def permuted(a, b, selector):
        return sum(byte(a, b, selector >> (4 * i) & 15) << (8 * i) for i in range(4))

    check("brev.b32 %r3, %r1;", lambda a, b: int(f"{a:032b}"[::-1], 2))
    check("popc.b32 %r3, %r1;", lambda a, b: a.bit_count())
    check("not.b32 %r3, %r1;", lambda a, b: ~a)
    check("neg.s32 %r3, %r1;", lambda a, b: -a)
    check("bfind.shiftamt.u32 %r3, %r1;", lambda a, b: 32 - a.bit_length() if a else -1)
    check("bfe.u32 %r3, %r1, 5, 9;", lambda a, b: a >> 5 & 511)
    check("bfe.s32 %r3, %r1, 28, 4;", lambda a, b: signed(a, 32) >> 28)
    check("lop3.b32 %r3, %r1, %r2, 255, 0x6A;", lambda a, b: a & b ^ 255)
    check("mad.lo.s32 %r3, %r1, %r2, 7;", lambda a, b: a * b + 7)
    check("selp.b32 %r3, %r1, %r2, 0;", lambda a, b: b)
    for selector in (0x5410, 0x7632, 0x0123, 0xF8B4, 0x4321):
        check(f"prmt.b32 %r3, %r1, %r2, {selector};", lambda a, b, s=selector: permuted(a, b, s))
    pairs = "mov.b32 {%h1, %h2}, %r1; mov.b32 %r3, {%h2, %h1};"
    check(pairs, lambda a, b: a << 16 | a >> 16)
    check(
        "mov.b64 %d1, {%r1, %r2}; shr.u64 %d2, %d1, 8; cvt.u32.u64 %r3, %d2;", lambda a, b: (b << 32 | a) >> 8
    )


def float_bits(values):
    return torch.as_tensor(values, dtype=torch.float32).numpy().view(np.uint32).tolist()


FLOATS = [0.0, -0.0, 1.0, -1.5, 3e38, 1e-40, 65504.0, 65520.0, 2**-24, 2**-25, math.inf, -math.inf, math.nan]


def test_floats_are_rounded_once():
    rng = np.random.default_rng(2)
    a, b, c = (np.append(rng.standard_normal(87), FLOATS[:13]).astype(np.float32) for _ in range(3))
    given = "".join(f"cvt.u32.u64 %r{i}, %d1{i}; mov.b32 %f{i}, %r{i};" for i in (1, 2, 3))
    out = "mov.b32 %r4, %f4; cvt.u64.u32 %d10, %r4;"

    def check(body, want):
        found = computed(given + body + out, *map(float_bits, (a, b, c)))
        got = np.array(found, dtype=np.uint32).view(np.float32)
        np.testing.assert_array_equal(got, want, body)

    with np.errstate(all="ignore"):
        check("add.rn.f32 %f4, %f1, %f2;", a + b)
        check("sub.rn.f32 %f4, %f1, %f2;", a - b)
        check("mul.rn.f32 %f4, %f1, %f2;", a * b)
        check("div.rn.f32 %f4, %f1, %f2;", a / b)
        check("abs.f32 %f4, %f1;", abs(a))
        check("max.f32 %f4, %f1, %f2;", np.fmax(a, b))
        # Sums of products of float32 are exact in longdouble here but for a last bit that no float32 sees.
        exact = a.astype(np.longdouble) * b + c
        check("fma.rn.f32 %f4, %f1, %f2, %f3;", exact.astype(np.float32))
    tests = {
        "lt": a < b,
        "geu": ~(a < b),
        "num": (a == a) & (b == b),
        "nan": (a != a) | (b != b),
        "neu": a != b,
    }
    for name, want in tests.items():
        body = f"setp.{name}.f32 %p1, %f1, %f2; selp.f32 %f4, 0f3F800000, 0f00000000, %p1;"
        check(body, want.astype(np.float32))


HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", HALVES)
def test_halves(name):
    dtype = HALVES[name]
    g = torch.Generator().manual_seed(3)
    values = torch.cat(
        [
            torch.randn(500, generator=g) * 10.0 ** torch.arange(-40, 40).repeat(7)[:500],
            torch.tensor(FLOATS[:-1]),
        ]
    )
    body = f"cvt.u32.u64 %r1, %d11; mov.b32 %f1, %r1; cvt.rn.{name}.f32 %h1, %f1; cvt.u64.u16 %d10, %h1;"
    got = torch.tensor(computed(body, float_bits(values)), dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(got.view(torch.int16), values.to(dtype).view(torch.int16))
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    body = f"cvt.u16.u64 %h1, %d11; cvt.f32.{name} %f1, %h1; mov.b32 %r1, %f1; cvt.u64.u32 %d10, %r1;"
    part = every[:: len(every) // 1000]
    found = computed(body, (part.view(torch.int16).to(torch.int64) & 0xFFFF).tolist())
    assert found == float_bits(part.float())
    pair = f"cvt.u32.u64 %r1, %d11; mov.b32 %f1, %r1; cvt.rn.{name}x2.f32 %r2, %f1, 0f3F800000; "
    high = computed(pair + "cvt.u64.u32 %d10, %r2;", float_bits([2.0]))[0]
    one = int(torch.ones(1, dtype=dtype).view(torch.int16)) & 0xFFFF
    assert high & 0xFFFF == one != high >> 16


def test_a_float_becomes_the_nearest_integer():
    values = [0.5, 1.5, -2.5, 1e-30, 2.0**31, -(2.0**40), float("inf"), float("nan"), 123456.7]
    body = "cvt.u32.u64 %r1, %d11; mov.b32 %f1, %r1; cvt.rni.s32.f32 %r2, %f1; cvt.s64.s32 %d10, %r2;"
    found = computed(body, float_bits(torch.tensor(values)))
    want = [0, 2, -2, 0, 2**31 - 1, -(2**31), 2**31 - 1, 0, 123457]
    assert found == [number % 2**64 for number in want]


@pytest.mark.parametrize("name", HALVES)
def test_a_fused_half_is_rounded_once(name):
    """Also where the exact sum lies between a tie and a double: compared with fractions."""
    dtype = HALVES[name]
    rng = random.Random(4)
    drawn = [[rng.uniform(-2, 2) * 2.0 ** rng.randint(-6, 6) for _ in range(3)] for _ in range(60)]
    drawn += [[1.5, 2.0**-12, 1.0], [1 + 2.0**-7, 2.0**-14, 1.0], [2.0**-7, 2.0**-7, 1 + 2.0**-7], [0, 1, 0]]
    drawn += [[2.0**-14, 2.0**-12, 2.0**-14], [-(2.0**-7), 2.0**-8, 1.0]]
    operands = torch.tensor(drawn).to(dtype)
    bits = (operands.view(torch.int16).to(torch.int64) & 0xFFFF).T.tolist()
    given = "".join(f"cvt.u16.u64 %h{i}, %d1{i};" for i in (1, 2, 3))
    found = computed(f"{given}fma.rn.{name} %h4, %h1, %h2, %h3; cvt.u64.u16 %d10, %h4;", *bits)
    for row, got in zip(operands.double().tolist(), found, strict=True):
        a, b, c = map(Fraction, row)
        near = torch.tensor([got], dtype=torch.int32).to(torch.int16).view(dtype)
        error = abs(Fraction(float(near)) - (a * b + c))
        for step in (-1, 1):
            other = (near.view(torch.int16) + step).view(dtype)
            if other.isfinite():
                assert error <= abs(Fraction(float(other)) - (a * b + c)), (row, got)


def test_lanes_that_part_meet_again():
    """A loop as long as the lane's number; then all exchange what they have."""
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """
        mov.u32 %r1, 0;
        and.b32 %r2, %r0, 31;
        setp.eq.s32 %p1, %r2, 3;
        @%p1 bra after;
        again:
        add.s32 %r1, %r1, %r2;
        sub.s32 %r2, %r2, 1;
        setp.gt.s32 %p2, %r2, 0;
        @%p2 bra again;
        after:
        shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
        add.s64 %d5, %d0, %d21;
        st.global.b32 [%d5], %r3;
        """,
        out,
        threads=64,
    )
    sums = [0 if lane == 3 else lane * (lane + 1) // 2 for lane in range(32)]
    assert out.tolist() == [sums[lane ^ 1] for lane in range(32)] * 2


def test_shuffles_and_reductions():
    out = torch.zeros(4, 32, dtype=torch.int32)
    run(
        """
        sub.s32 %r1, %r0, 9;
        shfl.sync.idx.b32 %r2|%p1, %r1, 5, 0x181f, -1;
        redux.sync.max.s32 %r3, %r1, -1;
        redux.sync.max.u32 %r4, %r1, -1;
        redux.sync.add.s32 %r5, %r1, -1;
        add.s64 %d5, %d0, %d21;
        st.global.b32 [%d5], %r2;
        st.global.b32 [%d5+128], %r3;
        st.global.b32 [%d5+256], %r4;
        st.global.b32 [%d5+384], %r5;
        """,
        out,
    )
    # Within each eight lanes; the first sixteen numbers below 9 are the largest without a sign.
    assert out[0].tolist() == [lane // 8 * 8 + 5 - 9 for lane in range(32)]
    assert set(out[1].tolist()) == {22} and set(out[2].tolist()) == {-1}
    assert set(out[3].tolist()) == {sum(range(-9, 23))}


EXCHANGE = """
    mov.u32 %r1, memory;
    cvt.u32.u64 %r2, %d21;
    add.s32 %r3, %r1, %r2;
    st.shared.u32 [%r3], %r0;
    {between}
    sub.s32 %r4, {top}, %r2;
    add.s32 %r4, %r4, %r1;
    ld.shared.u32 %r5, [%r4];
    add.s64 %d5, %d0, %d21;
    st.global.u32 [%d5], %r5;
"""


@pytest.mark.parametrize(("threads", "barrier"), [(32, "bar.warp.sync -1;"), (128, "bar.sync 0;")])
def test_a_barrier_orders_shared_memory(threads, barrier):
    """Without one it is refused, whichever thread comes first."""
    out = torch.zeros(threads, dtype=torch.int32)
    body = EXCHANGE.replace("{top}", str(4 * threads - 4))
    run(body.replace("{between}", barrier), out, threads=threads, shared=512)
    assert out.tolist() == list(range(threads))[::-1]
    with pytest.raises(RuntimeError, match="a race in shared memory"):
        run(body.replace("{between}", ""), out, threads=threads, shared=512)
    if threads == 128:
        with pytest.raises(RuntimeError, match="a race in shared memory"):
            run(body.replace("{between}", "bar.warp.sync -1;"), out, threads=threads, shared=512)


def test_what_is_there_already_may_be_written_by_all():
    body = "mov.u32 %r1, memory; mov.u32 %r2, {}; st.shared.u32 [%r1], %r2;"
    run(body.replace("{}", "7"), torch.zeros(1), threads=64, shared=16)
    with pytest.raises(RuntimeError, match="writes what another"):
        run(body.replace("{}", "%tid.x"), torch.zeros(1), threads=64, shared=16)


ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r1];"
PHASES = """
    mov.u32 %r1, memory;
    setp.eq.s32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 32;
    bar.sync 0;
    setp.lt.s32 %p2, %r0, 32;
    @%p2 bra first;
    {
    .reg .pred done;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], {parity};
    @!done bra again;
    }
    ld.shared.u32 %r2, [%r1+8];
    add.s64 %d5, %d0, %d21;
    st.global.u32 [%d5+-128], %r2;
    bra end;
    first:
    mov.u32 %r3, 77;
    setp.eq.s32 %p3, %r0, 5;
    @%p3 st.shared.u32 [%r1+8], %r3;
    {arrive}
    end:
"""


def test_phases_order_shared_memory():
    out = torch.zeros(32, dtype=torch.int32)
    run(PHASES.replace("{parity}", "0").replace("{arrive}", ARRIVE), out, threads=64, shared=64)
    assert out.tolist() == [77] * 32
    with pytest.raises(RuntimeError, match="a race in shared memory"):  # the phase before is over
        run(PHASES.replace("{parity}", "1").replace("{arrive}", ARRIVE), out, threads=64, shared=64)
    with pytest.raises(RuntimeError, match="for ever"):
        run(PHASES.replace("{parity}", "0").replace("{arrive}", ""), out, threads=64, shared=64)


COPY = """
    mov.u32 %r1, memory;
    shl.b32 %r2, %r0, 4;
    add.s32 %r3, %r1, %r2;
    shl.b64 %d4, %d20, 1;
    add.s64 %d5, %d1, %d4;
    cp.async.cg.shared.global [%r3+0], [%d5+0], 0x10, {size};
    cp.async.commit_group;
    {wait}
    ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r3];
    add.s64 %d6, %d0, %d4;
    st.global.v4.u32 [%d6], {%r4, %r5, %r6, %r7};
"""


def test_copies_are_there_when_they_were_waited_for():
    x, y = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    wait = "cp.async.wait_group 0;"
    run(COPY.replace("{wait}", wait).replace("{size}", "16"), y, x, shared=512)
    assert torch.equal(y, x)
    run(COPY.replace("{wait}", wait).replace("{size}", "0"), y, x, shared=512)
    assert not y.any()
    run(COPY.replace("{wait}", "cp.async.wait_group 1;").replace("{size}", "16"), y, x, shared=512)
    assert set(y.tolist()) == {-1}


def test_a_product_of_fragments():
    """By the layout of the PTX manual, written out once more."""
    g = torch.Generator().manual_seed(5)
    a, b, c = (torch.randint(-9, 10, size, generator=g).float() for size in ((16, 16), (16, 8), (16, 8)))
    registers = torch.zeros(32, 10, dtype=torch.int32)
    halves = registers[:, :6].clone().view(torch.bfloat16)
    floats = torch.zeros(32, 4)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(8):
            row = group + (8 if i in (2, 3, 6, 7) else 0)
            halves[lane, i] = a[row, member * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            halves[lane, 8 + i] = b[member * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            floats[lane, i] = c[group + (8 if i >= 2 else 0), member * 2 + (i & 1)]
    registers[:, :6], registers[:, 6:] = halves.view(torch.int32), floats.view(torch.int32)
    out = torch.zeros(32, 4)
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%d5+{4 * i}];" for i in range(6))
    loads += "".join(f"ld.global.f32 %f{i}, [%d5+{24 + 4 * i}];" for i in range(4))
    run(
        f"""
        mul.lo.s64 %d4, %d21, 10;
        add.s64 %d5, %d1, %d4;
        {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f0, %f1, %f2, %f3}},
            {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%f0, %f1, %f2, %f3}};
        add.s64 %d6, %d0, %d20;
        add.s64 %d6, %d6, %d20;
        st.global.v4.f32 [%d6], {{%f0, %f1, %f2, %f3}};
        """,
        out,
        registers,
    )
    want = a @ b + c
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(4):
            assert out[lane, i] == want[group + (8 if i >= 2 else 0), member * 2 + (i & 1)]


def test_a_product_of_bytes():
    """Likewise; rows of a have no sign, columns of b have one."""
    g = torch.Generator().manual_seed(6)
    a = torch.randint(0, 256, (16, 32), generator=g, dtype=torch.int32)
    b = torch.randint(-128, 128, (32, 8), generator=g, dtype=torch.int32)
    c = torch.randint(-(2**31), 2**31 - 1, (16, 8), generator=g, dtype=torch.int64)
    registers = torch.zeros(32, 10, dtype=torch.int32)
    octets = registers.view(torch.uint8)
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(16):
            row, col = group + (8 if i // 4 in (1, 3) else 0), member * 4 + i % 4 + (16 if i >= 8 else 0)
            octets[lane, i] = a[row, col]
        for i in range(8):
            octets[lane, 16 + i] = b[member * 4 + i % 4 + (16 if i >= 4 else 0), group] & 255
        for i in range(4):
            registers[lane, 6 + i] = c[group + (8 if i >= 2 else 0), member * 2 + (i & 1)]
    out = torch.zeros(32, 4, dtype=torch.int32)
    run(
        f"""
        mul.lo.s64 %d4, %d21, 10;
        add.s64 %d5, %d1, %d4;
        {"".join(f"ld.global.b32 %r{10 + i}, [%d5+{4 * i}];" for i in range(10))}
        mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {{%r16, %r17, %r18, %r19}},
            {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
        add.s64 %d6, %d0, %d20;
        add.s64 %d6, %d6, %d20;
        st.global.v4.b32 [%d6], {{%r16, %r17, %r18, %r19}};
        """,
        out,
        registers,
    )
    want = (a.long() @ b.long() + c).to(torch.int32)  # what passes 2^31 comes round
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(4):
            assert out[lane, i] == want[group + (8 if i >= 2 else 0), member * 2 + (i & 1)]


# 64 x 16 ones times 16 x 8 ones of shared memory.
WGMMA = """
    mov.u32 %r1, memory;
    and.b32 %r2, %r0, 63;
    shl.b32 %r2, %r2, 2;
    add.s32 %r3, %r1, %r2;
    mov.u32 %r4, 0x3F803F80;
    mov.f32 %f0, 0f3F800000;
    mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
    setp.lt.s32 %p1, %r0, 64;
    @%p1 st.shared.u32 [%r3], %r4;
    {fence}
    bar.sync 0;
    shr.u32 %r5, %r1, 4;
    or.b32 %r5, %r5, 0x80000;
    cvt.u64.u32 %d4, %r5;
    {begin}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {%f0, %f1, %f2, %f3}, {%r4, %r4, %r4, %r4}, %d4, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {change}
    wgmma.wait_group.sync.aligned 0;
    add.s64 %d5, %d0, %d20;
    add.s64 %d5, %d5, %d20;
    st.global.v4.f32 [%d5], {%f0, %f1, %f2, %f3};
"""
RIGHT = {"{fence}": "fence.proxy.async.shared::cta;", "{begin}": "wgmma.fence.sync.aligned;", "{change}": ""}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, None),
        ({"{fence}": ""}, "no fence has published"),
        ({"{begin}": ""}, "without a fence before it"),
        ({"{change}": "mov.u32 %r6, 5; @%p1 st.shared.u32 [%r3], %r6;"}, "race|changed"),
        ({"{change}": "mov.u32 %r4, 5;"}, "registers that wgmma reads changed"),
    ],
)
def test_asynchronous_products_need_their_fences(wrong, said):
    body = WGMMA
    for name, text in {**RIGHT, **wrong}.items():
        body = body.replace(name, text)
    out = torch.zeros(128, 4)
    if said is None:
        run(body, out, threads=128, shared=256)
        assert torch.equal(out, torch.full((128, 4), 17.0))
    else:
        with pytest.raises(RuntimeError, match=said):
            run(body, out, threads=128, shared=256)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.global.u32 %r1, [%d0+64];", "outside memory"),
        ("ld.global.u32 %r1, [%d0+2];", "not aligned"),
        ("mov.u32 %r2, memory; ld.shared.u64 %d1, [%r2+4];", "not aligned"),
        ("mov.u32 %r2, memory; ld.shared.u32 %r1, [%r2+16];", "outside"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 bar.sync 0, 64;", "for ever"),
        ("setp.eq.s32 %p1, %r0, 0; @%p1 bra a; bar.warp.sync -1; a: bar.warp.sync -1;", "do not meet"),
        ("fast.sqrt.f32 %f1, %f2;", "not known: fast.sqrt.f32 %f1, %f2"),
        ("add.sat.s32 %r1, %r2, %r3;", "not known"),
        ("mov.u32 %r1, %clock;", "not known: %clock"),
        ("bra nowhere;", "no such label: nowhere"),
    ],
)
def test_what_is_refused(body, said):
    with pytest.raises(RuntimeError, match=said):
        run(body, torch.zeros(16), shared=16)


def test_parameters_lie_as_their_types_are_aligned():
    module = Module(
        """
.version 8.0
.target sm_90
.address_size 64
.global .align 4 .b8 table[8] = {1, 0, 0, 0, 255, 1, 0, 0};
.entry kernel(.param .u32 a, .param .u64 .ptr .global .align 1 to, .param .align 4 .b8 both[8]) {
.reg .b32 %r<6>;
.reg .b64 %d<3>;
ld.param.u64 %d1, [to];
ld.param.u32 %r1, [a];
ld.param.v2.u32 {%r2, %r3}, [both];
mov.u64 %d2, table;
ld.global.u32 %r4, [%d2+4];
st.global.v4.u32 [%d1], {%r1, %r2, %r3, %r4};
ret;
}
"""
    )
    out = torch.zeros(4, dtype=torch.int32)
    given = [ctypes.c_uint32(7), out, ctypes.c_uint32(8), ctypes.c_uint32(9)]
    module.launch("kernel", (1,), (32,), given)
    assert out.tolist() == [7, 8, 9, 511]
    with pytest.raises(RuntimeError, match="too few bytes"):
        module.launch("kernel", (1,), (32,), given[:2])
