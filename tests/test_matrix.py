"""RandomMatrix: views change no element, records lose nothing, and every bad argument is named."""

import copy
import dataclasses
import json
import math
import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmkern import RandomMatrix, stream
from nmkern.matrix import float32

DENSE = tuple(stream.DENSE_FAMILIES)
FAMILIES = (*DENSE, "sparse")
ROWS, COLS = 23, 75  # neither a multiple of a patch nor of a word of any family


def matrix_of(family, rows=ROWS, cols=COLS, **arguments):
    if family == "sparse":
        arguments.setdefault("fan_in", min(7, cols))
    return RandomMatrix(rows, cols, **{"seed": 11, "family": family, **arguments})


@st.composite
def a_slice(draw, size):
    """A non-empty slice with step 1 in one of the ways that Python writes it."""
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    first = draw(st.sampled_from([start, start - size] + [None] * (start == 0)))
    last = draw(st.sampled_from([stop, stop + 3] if stop == size else [stop, stop - size]))
    return slice(first, draw(st.sampled_from([last, None])) if stop == size else last)


@st.composite
def a_view(draw, matrix, tensor):
    """The same random transposes and slices of a matrix and of a tensor of its weights."""
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            matrix, tensor = matrix.T, tensor.T
        rows = draw(a_slice(matrix.rows))
        if draw(st.booleans()):
            matrix, tensor = matrix[rows], tensor[rows]
        else:
            cols = draw(a_slice(matrix.cols))
            matrix, tensor = matrix[rows, cols], tensor[rows, cols]
    return matrix, tensor


# Views


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=50)
def test_views_of_views_change_no_element(family, data):
    base = matrix_of(family, scale=1.7)
    view, want = data.draw(a_view(base, base.materialize()))
    assert view.shape == tuple(want.shape)
    assert torch.equal(view.materialize(), want)


@pytest.mark.parametrize("family", DENSE)
@given(
    seed=st.integers(0, 2**64 - 1), rows=st.integers(1, 40), cols=st.integers(1, 70), more=st.integers(1, 99)
)
def test_a_smaller_matrix_is_the_top_left_corner(family, seed, rows, cols, more):
    small = matrix_of(family, rows, cols, seed=seed)
    large = matrix_of(family, rows + more, cols + more, seed=seed)
    assert torch.equal(large.materialize()[:rows, :cols], small.materialize())


def test_only_the_columns_of_a_sparse_matrix_depend_on_their_number():
    large, tall = matrix_of("sparse", 40, 75), matrix_of("sparse", 90, 75)
    assert torch.equal(tall.materialize()[:40], large.materialize())
    assert not torch.equal(matrix_of("sparse", 40, 76).materialize()[:, :75], large.materialize())


@pytest.mark.parametrize("family", FAMILIES)
def test_materialize_is_the_stream(family):
    matrix = matrix_of(family, seed=2**64 - 3)
    if family == "sparse":
        drawn = stream.sparse_columns(2**64 - 3, np.arange(ROWS), COLS, 7)
        want = np.zeros((ROWS, COLS))
        np.put_along_axis(want, drawn, 1.0, axis=1)
    else:
        want = stream.codes(family, 2**64 - 3, np.arange(ROWS)[:, None], np.arange(COLS))
    assert np.array_equal(matrix.materialize(torch.float64).numpy(), want * matrix.factor)


@pytest.mark.parametrize("shape", [(3, 400_001), (400_001, 3)])
def test_materialize_across_its_tiles(shape):
    matrix = matrix_of("uniform", *shape)
    rows, cols = (np.arange(size) for size in shape)
    want = stream.codes("uniform", 11, rows[:, None], cols).astype(np.float32) * np.float32(matrix.factor)
    assert np.array_equal(matrix.materialize().numpy(), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_far_corner_of_a_matrix_of_1e11_elements(family):
    rows, cols = 400_003, 300_007
    whole = matrix_of(family, rows, cols, fan_in=900 if family == "sparse" else None)
    assert whole.stored_bytes(torch.bfloat16) == 2 * rows * cols > 2 * 10**11
    corner = whole.T[-999:, -5:].T
    assert corner.shape == (5, 999)
    if family == "sparse":
        drawn = stream.sparse_columns(11, np.arange(rows - 5, rows), cols, 900)
        want = (drawn[:, :, None] == np.arange(cols - 999, cols)).any(axis=1)
        assert want.any()
    else:
        want = stream.codes(family, 11, np.arange(rows - 5, rows)[:, None], np.arange(cols - 999, cols))
    assert np.array_equal(corner.materialize(torch.float64).numpy(), want * corner.factor)


def test_the_last_element_that_the_stream_can_address():
    last = 2**34 - 2
    corner = RandomMatrix(2**34 - 1, 2**34 - 1, seed=5)[last:, last:]
    assert corner.shape == (1, 1)
    assert corner.materialize(torch.float64).item() == stream.codes("uniform", 5, last, last) * corner.factor


def test_transpose_and_full_slice_are_equal_values():
    matrix = matrix_of("uniform")
    assert matrix.T.shape == (COLS, ROWS)
    assert matrix != matrix.T
    assert matrix == matrix.T.T
    assert matrix[:] == matrix[:, :] == matrix[0:ROWS, -COLS:] == matrix
    assert matrix.T[4:, 2:9] == matrix[2:9, 4:].T


# Values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [1.0, 0.1, -3.0, 1e-30, 0.0])
def test_dtypes_of_materialize(family, scale):
    matrix = matrix_of(family, scale=scale)
    rms = 1.0 if family == "sparse" else stream.DENSE_FAMILIES[family].rms
    assert matrix.factor == float(np.float32(scale / rms))
    codes = matrix_of(family, scale=rms).materialize(torch.float64)
    assert torch.equal(codes, codes.round())
    exact = codes * matrix.factor  # 8 bits times 24 bits: no rounding in float64
    assert torch.equal(matrix.materialize(torch.float64), exact)
    single = matrix.materialize()
    assert single.dtype == torch.float32
    assert torch.equal(single, exact.float())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(matrix.materialize(dtype), single.to(dtype))


@given(
    number=st.one_of(
        st.floats(),
        st.floats(-(2.0**-120), 2.0**-120),
        st.floats(-(2.0**129), 2.0**129),
        st.floats(0, 2.0**127, width=32).map(lambda x: (x + float(np.nextafter(np.float32(x), np.inf))) / 2),
    )
)
@settings(max_examples=500)
def test_numbers_are_rounded_to_float32_as_numpy_does(number):
    """Subnormal, beyond the largest, or half way between two: to the same bits."""
    with np.errstate(over="ignore"):
        want = np.float32(number)
    found = float32(number)
    assert math.isnan(found) if math.isnan(want) else struct.pack("d", found) == struct.pack("d", float(want))


@pytest.mark.parametrize("family", DENSE)
def test_elements_have_the_standard_deviation_of_scale(family):
    weights = matrix_of(family, 300, 300, scale=0.25).materialize(torch.float64)
    # The relative standard error of the variance of n elements is sqrt((kurtosis - 1) / n), with a
    # kurtosis of at most 3: 0.0048 here. Five of them.
    assert abs(weights.var(correction=0).item() / 0.0625 - 1) < 5 * (2 / weights.numel()) ** 0.5


def test_materialize_refuses_dtypes_without_fractions():
    with pytest.raises(TypeError, match=r"^dtype: expected a floating-point dtype, got torch\.int32$"):
        matrix_of("uniform").materialize(torch.int32)


def test_stored_bytes_counts_what_is_not_held():
    matrix = RandomMatrix(2**18, 2**18, seed=0)
    assert matrix.stored_bytes() == 2**38
    assert matrix.T.stored_bytes(torch.bfloat16) == 2**37
    assert len(pickle.dumps(matrix)) < 1000


# Value objects and their records

VIEWS = [view for f in FAMILIES for m in [matrix_of(f, scale=0.3)] for view in (m, m.T, m[3:, 5:9], m.T[2:7])]


@pytest.mark.parametrize("matrix", VIEWS, ids=repr)
def test_every_round_trip_gives_an_equal_matrix(matrix):
    copies = [
        eval(repr(matrix)),
        RandomMatrix.from_json(matrix.to_json()),
        RandomMatrix.from_dict(matrix.to_dict()),
        pickle.loads(pickle.dumps(matrix)),
        copy.deepcopy(matrix),
    ]
    for other in copies:
        assert other == matrix
        assert hash(other) == hash(matrix)
        assert other.factor == matrix.factor
        assert torch.equal(other.materialize(), matrix.materialize())


def test_matrices_that_differ_are_not_equal():
    base = matrix_of("uniform")
    others = [
        matrix_of("uniform", seed=12),
        matrix_of("normal"),
        matrix_of("uniform", scale=2.0),
        matrix_of("uniform", rows=ROWS + 1),
        matrix_of("uniform", cols=COLS + 1),
        base[1:],
        base[:, 1:],
        base.T,
    ]
    assert len({base, *others}) == 1 + len(others)


def test_the_record_is_json_and_names_the_stream_version():
    record = json.loads(matrix_of("sparse")[2:, 3:].to_json())
    assert record == {
        "stream_version": 1,
        "rows": ROWS - 2,
        "cols": COLS - 3,
        "seed": 11,
        "family": "sparse",
        "scale": 1.0,
        "fan_in": 7,
        "row_offset": 2,
        "col_offset": 3,
        "transposed": False,
        "population": COLS,
    }


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_a_record_of_another_stream_version_is_refused(version):
    record = {**matrix_of("uniform").to_dict(), "stream_version": version}
    message = f"^stream_version: this build generates stream version 1, the record says {version!r}$"
    with pytest.raises(RuntimeError, match=message):
        RandomMatrix.from_dict(record)
    with pytest.raises(RuntimeError, match=message):
        RandomMatrix.from_json(json.dumps(record))


def test_a_record_without_a_stream_version_is_refused():
    record = matrix_of("uniform").to_dict()
    del record["stream_version"]
    with pytest.raises(RuntimeError, match=r"^stream_version: .* the record says None$"):
        RandomMatrix.from_dict(record)
    assert "stream_version" not in record and record["rows"] == ROWS  # and the record is left alone


@pytest.mark.parametrize("name", ["rows", "seed", "scale", "factor", "anything"])
def test_matrices_are_frozen(name):
    matrix = matrix_of("uniform")
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        setattr(matrix, name, 1)
    assert matrix == matrix_of("uniform")


INTEGERS = [np.int64, np.uint8, np.int32, torch.tensor]


@pytest.mark.parametrize("integer", INTEGERS, ids=lambda kind: kind.__name__)
def test_any_integer_is_an_int(integer):
    want = RandomMatrix(6, 8, seed=5, family="sparse", fan_in=3, row_offset=1, population=9)
    matrix = RandomMatrix(
        integer(6),
        integer(8),
        seed=integer(5),
        family="sparse",
        fan_in=integer(3),
        row_offset=integer(1),
        population=integer(9),
    )
    assert matrix == want and hash(matrix) == hash(want) and repr(matrix) == repr(want)
    assert matrix.to_json() == want.to_json()


# Bad arguments

HUGE = 10**400
BAD_ARGUMENTS = [
    ({"rows": 3.0}, TypeError, "rows: expected an int, got 3.0"),
    ({"cols": "9"}, TypeError, "cols: expected an int, got '9'"),
    ({"rows": True}, TypeError, "rows: expected an int, got True"),
    ({"rows": np.True_}, TypeError, "rows: expected an int, got"),
    ({"rows": torch.tensor(True)}, TypeError, "rows: expected an int, got tensor(True)"),
    ({"cols": np.float64(9)}, TypeError, "cols: expected an int, got"),
    ({"seed": None}, TypeError, "seed: expected an int, got None"),
    ({"seed": 1.5}, TypeError, "seed: expected an int, got 1.5"),
    ({"row_offset": 0.0}, TypeError, "row_offset: expected an int, got 0.0"),
    ({"col_offset": "0"}, TypeError, "col_offset: expected an int, got '0'"),
    ({"seed": -1}, ValueError, "seed: expected 0 <= seed < 2^64, got -1"),
    ({"seed": 2**64}, ValueError, f"seed: expected 0 <= seed < 2^64, got {2**64}"),
    ({"rows": 0}, ValueError, "rows: expected 1 <= rows and offset + rows < 2^34 "),
    ({"cols": -4}, ValueError, "cols: expected 1 <= cols and offset + cols < 2^34 "),
    ({"rows": 2**34}, ValueError, f"for the dense family 'uniform', got {2**34}"),
    ({"cols": 2**34}, ValueError, f"for the dense family 'uniform', got {2**34}"),
    ({"row_offset": 2**34 - 9, "rows": 9}, ValueError, f"rows: expected ... got 9 at offset {2**34 - 9}"),
    ({"col_offset": 2**34 - 9, "cols": 9}, ValueError, f"cols: expected ... got 9 at offset {2**34 - 9}"),
    (
        {"col_offset": 2**34 - 9, "rows": 9, "transposed": True},
        ValueError,
        f"rows: expected ... got 9 at offset {2**34 - 9}",
    ),
    ({"row_offset": -1}, ValueError, "rows: expected ... got 23 at offset -1"),
    (
        {"family": "gaussian"},
        ValueError,
        "family: expected one of rademacher, uniform, normal, sparse, got 'gaussian'",
    ),
    ({"family": None}, ValueError, "family: expected one of ..., got None"),
    ({"family": ["uniform"]}, ValueError, "family: expected one of ..., got ['uniform']"),
    ({"scale": "1"}, TypeError, "scale: expected a float, got '1'"),
    ({"scale": None}, TypeError, "scale: expected a float, got None"),
    ({"scale": True}, TypeError, "scale: expected a float, got True"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite float32 value, got nan"),
    ({"scale": float("-inf")}, ValueError, "scale: expected a finite float32 value, got -inf"),
    ({"scale": 1e40}, ValueError, "scale: expected a finite float32 value, got 1e+40"),
    ({"scale": HUGE}, ValueError, "scale: expected a finite float32 value"),
    ({"transposed": "no"}, TypeError, "transposed: expected a bool, got 'no'"),
    ({"fan_in": 3}, ValueError, "fan_in: only the sparse family has one, got 3"),
    ({"population": 80}, ValueError, "population: only the sparse family has one, got 80"),
    ({"family": "sparse"}, ValueError, "fan_in: the sparse family needs one, got None"),
    ({"family": "sparse", "fan_in": 7.0}, TypeError, "fan_in: expected an int, got 7.0"),
    ({"family": "sparse", "fan_in": 0}, ValueError, "fan_in: expected 1 <= fan_in <= 75 columns, got 0"),
    ({"family": "sparse", "fan_in": 76}, ValueError, "fan_in: expected 1 <= fan_in <= 75 columns, got 76"),
    (
        {"family": "sparse", "fan_in": 24, "transposed": True},
        ValueError,
        "fan_in: expected 1 <= fan_in <= 23 columns, got 24",
    ),
    (
        {"family": "sparse", "fan_in": 3, "rows": 2**32},
        ValueError,
        "rows: expected ... < 2^32 for the sparse family 'sparse', got 4294967296",
    ),
    (
        {"family": "sparse", "fan_in": 3, "cols": 2**32},
        ValueError,
        "cols: expected ... < 2^32 for the sparse family 'sparse', got 4294967296",
    ),
    ({"family": "sparse", "fan_in": 3, "population": 8.0}, TypeError, "population: expected an int"),
    (
        {"family": "sparse", "fan_in": 3, "population": 74},
        ValueError,
        "population: expected col_offset + cols <= population < 2^32, got 74",
    ),
    (
        {"family": "sparse", "fan_in": 3, "population": 2**32},
        ValueError,
        "population: expected col_offset + cols <= population < 2^32, got 4294967296",
    ),
    (
        {"family": "sparse", "fan_in": 3, "population": 76, "col_offset": 2},
        ValueError,
        "population: expected col_offset + cols <= population < 2^32, got 76",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_ARGUMENTS, ids=lambda value: str(value)[:70])
def test_bad_arguments_are_named(change, error, text):
    arguments = {"rows": ROWS, "cols": COLS, "seed": 11, **change}
    rows, cols = arguments.pop("rows"), arguments.pop("cols")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an error is told once, not announced by a warning
        with pytest.raises(error) as raised:
            RandomMatrix(rows, cols, **arguments)
    message = str(raised.value)
    assert all(part in message for part in text.split("...")), message
    assert message.startswith(text.split(":")[0] if ":" in text else tuple(change)), message


def test_the_largest_and_smallest_arguments_are_accepted():
    RandomMatrix(2**34 - 1, 2**34 - 1, seed=2**64 - 1, scale=-3.4e38)
    RandomMatrix(1, 1, seed=0, scale=3)
    RandomMatrix(2**32 - 1, 2**32 - 1, seed=0, family="sparse", fan_in=2**32 - 1)
    RandomMatrix(1, 1, seed=0, family="sparse", fan_in=1)


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (3, TypeError, "index: expected one or two slices, got 3"),
        ((slice(None), 3), TypeError, "index: expected one or two slices, got "),
        ((slice(None),) * 3, TypeError, "index: expected one or two slices, got "),
        (..., TypeError, "index: expected one or two slices, got Ellipsis"),
        (slice(None, None, 2), ValueError, f"index: expected a non-empty slice with step 1 of {ROWS}, got "),
        (slice(None, None, -1), ValueError, "index: expected a non-empty slice with step 1 of "),
        (slice(5, 5), ValueError, "index: expected a non-empty slice with step 1 of "),
        (slice(ROWS, None), ValueError, "index: expected a non-empty slice with step 1 of "),
        ((slice(None), slice(9, 3)), ValueError, f"index: expected a non-empty slice with step 1 of {COLS}"),
    ],
    ids=str,
)
def test_bad_indices_are_named(index, error, text):
    with pytest.raises(error) as raised:
        matrix_of("uniform")[index]
    assert str(raised.value).startswith(text)
