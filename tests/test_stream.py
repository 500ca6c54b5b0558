"""The weight stream: known answers, the tables, and the statistics of what it draws.

Every statistical test has fixed seeds and so one outcome. Its significance is the chance that a
perfect generator would have failed on the day the seeds were chosen: ALPHA, each.
"""

import itertools
import math
import statistics

import make_vectors
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nmkern import stream

ALPHA = 1e-6
Z = statistics.NormalDist().inv_cdf(1 - ALPHA / 2)  # 4.89: a normal deviate's two-sided bound
FAMILIES = tuple(stream.DENSE_FAMILIES)
TOP = 2**34  # rows and columns of the dense families stay below

VECTORS = [line.split() for line in make_vectors.PATH.read_text().splitlines() if not line.startswith("#")]


def of_kind(kind):
    found = [fields[1:] for fields in VECTORS if fields[0] == kind]
    assert found
    return found


# Known answers


def test_vectors_file_is_what_the_independent_implementation_writes():
    assert make_vectors.PATH.read_text() == make_vectors.render()


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_random123_known_answers(counter, key, answer):
    # The lines "philox4x32 7" of Random123's kat_vectors.
    want = [int(word, 16) for word in answer.split()]
    assert stream.philox4x32(counter, key).tolist() == want
    assert list(make_vectors.philox4x32_7(counter, key)) == want
    record = [*counter, *key, *want]
    assert [f"{number:08x}" for number in record] in of_kind("philox")


def test_philox_vectors():
    for fields in of_kind("philox"):
        numbers = [int(field, 16) for field in fields]
        answer = stream.philox4x32(tuple(numbers[:4]), tuple(numbers[4:6]))
        assert answer.tolist() == numbers[6:], fields


def test_philox_broadcasts_arrays_of_counters():
    counters = np.arange(12, dtype=np.uint64).reshape(3, 4)
    words = stream.philox4x32((counters, 7, 0, 0x101), (5, 6))
    assert words.shape == (3, 4, 4) and words.dtype == np.uint32
    for index in np.ndindex(3, 4):
        one = make_vectors.philox4x32_7((int(counters[index]), 7, 0, 0x101), (5, 6))
        assert words[index].tolist() == list(one)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_vectors(family):
    records = [fields for fields in of_kind("dense") if fields[0] == family]
    assert len(records) == len(make_vectors.SEEDS) * len(make_vectors.PLACES)
    for _, seed, row, col, word, code in records:
        where = family, int(seed), int(row), int(col)
        assert int(stream.words(*where)) == int(word, 16), where
        assert int(stream.codes(*where)) == int(code), where


def test_sparse_vectors():
    for seed, row, n, k, *columns in of_kind("sparse"):
        assert len(columns) == int(k)
        drawn = stream.sparse_columns(int(seed), int(row), int(n), int(k))
        assert drawn.tolist() == [int(column) for column in columns], (seed, row, n, k)


# Tables and constants


def test_normal_table_follows_from_its_formula():
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf((128 + j) / 256) for j in range(128)]
    densities = [normal.pdf(q) for q in quantiles] + [0.0]
    upper = [round(85 * 256 * (a - b)) for a, b in itertools.pairwise(densities)]
    assert stream.NORMAL_TABLE.tolist() == [-code for code in reversed(upper)] + upper
    assert max(upper) == 252  # eight significant bits: exact in bf16


@pytest.mark.parametrize(
    ("family", "rms", "kurtosis", "last_digit"),
    [("rademacher", 1.0, 1.0, 1e-9), ("uniform", 9.219544, 1.7906, 1e-4), ("normal", 84.98828, 2.962, 1e-3)],
)
def test_rms_and_kurtosis_of_a_family(family, rms, kurtosis, last_digit):
    layout = stream.DENSE_FAMILIES[family]
    values = stream.decode(family, np.arange(2**layout.bits, dtype=np.uint32)).astype(np.float64)
    assert values.sum() == 0
    assert math.sqrt(np.mean(values**2)) == layout.rms
    assert abs(layout.rms - rms) <= 5e-6  # the figures of the design, to half of their last digit
    assert abs(np.mean(values**4) / np.mean(values**2) ** 2 - kurtosis) <= last_digit / 2


def test_decode_of_every_field():
    assert stream.decode("rademacher", np.arange(2, dtype=np.uint32)).tolist() == [-1, 1]
    assert stream.decode("uniform", np.arange(16, dtype=np.uint32)).tolist() == list(range(-15, 16, 2))
    assert stream.decode("normal", np.arange(256, dtype=np.uint32)).tolist() == make_vectors.TABLE


def test_version_is_one():
    # The golden words above are version 1: other words need another version, and other vectors.
    assert (stream.VERSION, stream.ROUNDS) == (1, 7)


# An element depends on its place alone

near = st.one_of(
    st.integers(0, 200),
    *(st.integers(border - 100, border + 100) for border in (2**31, 2**32, 2**33)),
    st.integers(TOP - 300, TOP - 1),
)
seeds = st.one_of(st.sampled_from(make_vectors.SEEDS), st.integers(0, 2**64 - 1))


@given(st.sampled_from(FAMILIES), seeds, near, near)
def test_codes_and_words_equal_the_independent_implementation(family, seed, row, col):
    word, code = make_vectors.element(family, seed, row, col)
    assert int(stream.words(family, seed, row, col)) == word
    assert int(stream.codes(family, seed, row, col)) == code


@given(st.sampled_from(FAMILIES), seeds, near, near, st.integers(1, 9), st.integers(1, 70))
def test_block_equals_single_codes_at_any_offset(family, seed, top, left, height, width):
    rows = range(top, min(TOP, top + height))
    cols = range(left, min(TOP, left + width))
    block = stream.codes_block(family, seed, rows, cols)
    assert block.shape == (len(rows), len(cols))
    single = stream.codes(family, seed, np.array(rows)[:, None], np.array(cols))
    assert np.array_equal(block, single)


@given(seeds, st.integers(0, 2**32 - 1), st.integers(1, 2**32 - 1), st.integers(1, 12))
def test_sparse_draws_equal_the_independent_implementation(seed, row, n, k):
    k = min(n, k)
    drawn = stream.sparse_columns(seed, np.array([row, row // 2]), n, k)
    assert drawn[0].tolist() == make_vectors.draw(seed, row, n, k)
    assert drawn[1].tolist() == make_vectors.draw(seed, row // 2, n, k)


# Statistics


def both_tails(p):
    """A statistic may be neither too large nor too good to be true."""
    assert ALPHA / 2 < p < 1 - ALPHA / 2, p


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("seed", "top", "left"), [(0, 0, 0), (2**64 - 1, 2**33 - 2, 2**32 - 5), (77, 2**20 + 1, 3)]
)
def test_codes_are_equally_likely_with_the_right_moments(family, seed, top, left):
    layout = stream.DENSE_FAMILIES[family]
    codes = stream.codes_block(family, seed, range(top, top + 256), range(left, left + 1024)).astype(np.int64)
    # Chi-square over all values of the field: fields, because the normal table repeats some codes.
    values, multiplicity = np.unique(
        stream.decode(family, np.arange(2**layout.bits, dtype=np.uint32)), return_counts=True
    )
    found = np.array([(codes == value).sum() for value in values])
    both_tails(stats.chisquare(found, codes.size * multiplicity / 2**layout.bits).pvalue)
    # The sums of n independent codes and of their squares, against their standard deviations.
    n, rms = codes.size, layout.rms
    assert abs(codes.sum()) < Z * rms * math.sqrt(n)
    squares = values.astype(float) ** 2
    variance = np.average(squares**2, weights=multiplicity) - rms**4
    assert abs((codes**2).sum() - n * rms**2) <= Z * math.sqrt(n * variance)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_uniform_by_kolmogorov_smirnov(family):
    layout = stream.DENSE_FAMILIES[family]
    cols = np.arange(512) * layout.columns_per_word
    words = stream.words(family, 4, np.arange(128)[:, None], cols).ravel()
    both_tails(stats.kstest((words + 0.5) / 2**32, "uniform").pvalue)


def test_normal_codes_are_normal_by_kolmogorov_smirnov():
    codes = stream.codes_block("normal", 8, range(256), range(256)).ravel() / 85
    statistic = stats.kstest(codes, "norm").statistic
    # A centroid lies inside of its bin of probability 1/256, rounded by at most 1/170 where the
    # density is at most 0.4: that far the distribution's steps stay from the curve. Beyond it there
    # is the sampling error of 65536 draws (Dvoretzky-Kiefer-Wolfowitz inequality).
    sampling = math.sqrt(math.log(2 / ALPHA) / (2 * codes.size))
    assert statistic < 1 / 256 + 0.4 / 170 + sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_are_uncorrelated(family):
    """In every direction of the matrix and of the seed, the borders of words and patches included."""
    rms = stream.DENSE_FAMILIES[family].rms
    base = stream.codes_block(family, 21, range(259), range(1100)) / rms

    def check(a, b):
        # The product of two independent unit-variance codes has unit variance.
        assert abs((a * b).sum()) < Z * math.sqrt(a.size)

    for lag in (1, 2, 4, 8, 31, 32):
        check(base[:, lag:], base[:, :-lag])
    for lag in (1, 2, 3, 4, 8):
        check(base[lag:], base[:-lag])
    above = np.triu_indices(259, 1)
    check(base[:, :259][above], base[:, :259].T[above])
    for seed in (20, 21 ^ 2**32, 21 ^ 2**63):
        check(base, stream.codes_block(family, seed, range(259), range(1100)) / rms)


def test_families_of_one_seed_are_uncorrelated():
    blocks = [
        stream.codes_block(family.name, 3, range(256), range(1024)) / family.rms
        for family in stream.DENSE_FAMILIES.values()
    ]
    for a, b in itertools.combinations(blocks, 2):
        assert abs((a * b).sum()) < Z * math.sqrt(a.size)


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (2, 2), (7, 7), (8, 7), (784, 7), (40, 33), (2**31 + 5, 9), (2**32 - 1, 9)]
)
def test_sparse_columns_are_distinct_and_in_range(n, k):
    drawn = stream.sparse_columns(6, np.arange(500), n, k)
    assert drawn.shape == (500, k)
    assert drawn.min() >= 0 and drawn.max() < n
    ordered = np.sort(drawn, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    if k == n:
        assert (ordered == np.arange(n)).all()


def test_sparse_subsets_are_equally_likely():
    """Not the single columns only: each of the 120 ways to choose 3 out of 10."""
    drawn = np.sort(stream.sparse_columns(12, np.arange(60000), 10, 3), axis=1)
    names, found = np.unique(drawn @ np.array([100, 10, 1]), return_counts=True)
    assert len(names) == math.comb(10, 3)
    both_tails(stats.chisquare(found).pvalue)


@pytest.mark.parametrize(("n", "k", "bins"), [(784, 7, 784), (2**32 - 1, 8, 255)])
def test_sparse_columns_are_equally_likely(n, k, bins):
    # The draws of one row exclude each other, and a chi-square wants independent counts: so take one
    # element a row, chosen by another stream. An element of a uniform subset is a uniform column.
    rows = np.arange(100_000)
    ordered = np.sort(stream.sparse_columns(31, rows, n, k), axis=1)
    picked = ordered[rows, stream.words("rademacher", 1, rows, 0) % k]
    found = np.bincount(picked * bins // n, minlength=bins)
    both_tails(stats.chisquare(found).pvalue)
