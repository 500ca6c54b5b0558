"""RandomMatrix: a frozen random matrix as a value object, a few integers and a float.

    W[n, k] = scale * code(family, seed, row_offset + n, col_offset + k) / rms(family)

It sits between the stream, which defines the codes, and the backends, which multiply by them.
The invariant: a view, whether a slice or a transpose, changes no element.
"""

import json
import math
import operator
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch

from nmkern import stream

FAMILIES = (*stream.DENSE_FAMILIES, "sparse")
_LIMIT = {"dense": 2**34, "sparse": 2**32}  # the counters of the stream are 32-bit words
_TILE = 2**20  # elements materialised at a time: bounds the scratch to about 50 MiB


@dataclass(frozen=True, repr=False)
class RandomMatrix:
    """A ``rows x cols`` matrix of frozen random weights, held as its seed.

    Elements have mean 0 and standard deviation ``scale`` (``sparse``: ones times ``scale``). An
    element depends on (stream version, family, seed, row, column) alone, so a smaller matrix of
    the same seed is the top-left corner of a larger one. Instances are immutable and hashable.

    Args:
        rows, cols: the shape; at least 1, below 2^34 (``sparse``: 2^32).
        seed: in [0, 2^64).
        family: ``"rademacher"`` (+-1), ``"uniform"`` (16 levels), ``"normal"`` (256 equally likely
            levels) or ``"sparse"`` (``fan_in`` ones at distinct columns of each row).
        scale: standard deviation of the elements; finite.
        fan_in: ones per row, from 1 to ``cols``; given for ``sparse`` and for no other family.
            (Which columns are drawn depends on ``cols``; nothing else depends on the shape.)
        row_offset, col_offset, transposed, population: the view, in the stream's own orientation:
            what ``.T`` and slicing set. ``population`` is the number of columns that a sliced
            sparse matrix was drawn from.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or out of range.
    """

    rows: int
    cols: int
    _: KW_ONLY
    seed: int
    family: str = "uniform"
    scale: float = 1.0
    fan_in: int | None = None
    row_offset: int = 0
    col_offset: int = 0
    transposed: bool = False
    population: int | None = None

    # Of the instance, but no fields: they follow from the fields.
    _factor: ClassVar[float]
    _packed: ClassVar[tuple[torch.Tensor, ...]] = ()  # made by nmkern.backends.packed when first needed

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "seed", "row_offset", "col_offset"):
            object.__setattr__(self, name, as_int(name, getattr(self, name)))
        if self.family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 <= seed < 2^64, got {self.seed}")
        kind = "sparse" if self.family == "sparse" else "dense"
        limit = _LIMIT[kind]
        for name, offset in zip(("rows", "cols"), self._offsets(), strict=True):
            size = getattr(self, name)
            if size < 1 or offset < 0 or offset + size >= limit:
                where = f" at offset {offset}" if offset else ""
                raise ValueError(
                    f"{name}: expected 1 <= {name} and offset + {name} < 2^{limit.bit_length() - 1} "
                    f"for the {kind} family {self.family!r}, got {size}{where}"
                )
        if not isinstance(self.scale, (int, float)) or isinstance(self.scale, bool):
            raise TypeError(f"scale: expected a float, got {self.scale!r}")
        if not isinstance(self.transposed, bool):
            raise TypeError(f"transposed: expected a bool, got {self.transposed!r}")
        rms = 1.0 if self.family == "sparse" else stream.DENSE_FAMILIES[self.family].rms
        factor = float32(as_float(self.scale) / rms)
        if not math.isfinite(factor):
            raise ValueError(f"scale: expected a finite float32 value, got {self.scale}")
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "_factor", factor)
        self._check_sparse()

    def _check_sparse(self) -> None:
        if self.family != "sparse":
            if self.fan_in is not None:
                raise ValueError(f"fan_in: only the sparse family has one, got {self.fan_in}")
            if self.population is not None:
                raise ValueError(f"population: only the sparse family has one, got {self.population}")
            return
        if self.fan_in is None:
            raise ValueError("fan_in: the sparse family needs one, got None")
        object.__setattr__(self, "fan_in", as_int("fan_in", self.fan_in))
        _, cols = self.stream_shape
        if self.population is None:
            object.__setattr__(self, "population", cols)
        object.__setattr__(self, "population", as_int("population", self.population))
        assert self.fan_in is not None and self.population is not None
        if not self.col_offset + cols <= self.population < _LIMIT["sparse"]:
            raise ValueError(
                f"population: expected col_offset + cols <= population < 2^32, got {self.population}"
            )
        if not 1 <= self.fan_in <= self.population:
            raise ValueError(f"fan_in: expected 1 <= fan_in <= {self.population} columns, got {self.fan_in}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def _offsets(self) -> tuple[int, int]:
        pair = (self.row_offset, self.col_offset)
        return pair[::-1] if self.transposed else pair

    @property
    def stream_shape(self) -> tuple[int, int]:
        """The shape in the stream's orientation: (rows, cols) before any transpose."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def factor(self) -> float:
        """``scale / rms(family)`` as a float32: what the integer codes are multiplied by, once."""
        return self._factor

    @property
    def T(self) -> "RandomMatrix":  # noqa: N802 - the name that arrays and tensors use
        """The transpose: a view."""
        return replace(self, rows=self.cols, cols=self.rows, transposed=not self.transposed)

    def __getitem__(self, index: slice | tuple[slice, slice]) -> "RandomMatrix":
        """The sub-matrix ``W[a:b]`` or ``W[a:b, c:d]``: a view. Steps other than 1 are refused."""
        pair = index if isinstance(index, tuple) else (index, slice(None))
        if len(pair) != 2 or not all(isinstance(part, slice) for part in pair):
            raise TypeError(f"index: expected one or two slices, got {index!r}")
        offsets, sizes = list(self._offsets()), list(self.shape)
        for axis, part in enumerate(pair):
            taken = range(sizes[axis])[part]  # PyTorch 2.11's Dynamo traces no slice.indices
            if taken.step != 1 or not len(taken):
                raise ValueError(
                    f"index: expected a non-empty slice with step 1 of {sizes[axis]}, got {part}"
                )
            offsets[axis] += taken.start
            sizes[axis] = len(taken)
        if self.transposed:
            offsets.reverse()
        rows, cols = sizes
        return replace(self, rows=rows, cols=cols, row_offset=offsets[0], col_offset=offsets[1])

    def __repr__(self) -> str:
        shown = [f"{self.rows}, {self.cols}, seed={self.seed}, family={self.family!r}"]
        shown += [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)[4:]
            if getattr(self, field.name) != field.default
        ]
        return f"RandomMatrix({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        """A record of the matrix in JSON's types, with the stream version; see ``from_dict``."""
        return {"stream_version": stream.VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "RandomMatrix":
        """The matrix of a record. RuntimeError where it was made by another stream version."""
        record = dict(record)
        version = record.pop("stream_version", None)
        if version != stream.VERSION:
            raise RuntimeError(
                f"stream_version: this build generates stream version {stream.VERSION}, "
                f"the record says {version!r}"
            )
        return cls(**record)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "RandomMatrix":
        return cls.from_dict(json.loads(text))

    def stored_bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that the same matrix would take as a dense tensor of ``dtype``; nmkern holds none."""
        return self.rows * self.cols * dtype.itemsize

    def materialize(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The weights as a tensor: for tests, debugging and export, never needed to multiply.

        Shape ``[rows, cols]``. float64 holds ``code * factor`` exactly; float32 rounds it once, as
        the kernels do; narrower dtypes round the float32 value.
        """
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
        rows, cols = self.stream_shape
        out = torch.empty(rows, cols, dtype=dtype, device=device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tile_rows, tile_cols = max(1, _TILE // cols), min(cols, _TILE)
        for top in range(0, rows, tile_rows):
            row_range = range(top, min(rows, top + tile_rows))
            for left in range(0, cols, tile_cols):
                col_range = range(left, min(cols, left + tile_cols))
                codes = torch.from_numpy(self._codes(row_range, col_range)).to(wide)
                out[top : row_range.stop, left : col_range.stop] = codes * self.factor
        return out.T if self.transposed else out

    def _codes(self, rows: range, cols: range) -> np.ndarray:
        """Codes of a tile, indexed from the view's corner in the stream's orientation."""
        rows = range(self.row_offset + rows.start, self.row_offset + rows.stop)
        cols = range(self.col_offset + cols.start, self.col_offset + cols.stop)
        if self.family != "sparse":
            return np.ascontiguousarray(stream.codes_block(self.family, self.seed, rows, cols))
        assert self.population is not None and self.fan_in is not None
        drawn = stream.sparse_columns(
            self.seed, np.arange(rows.start, rows.stop), self.population, self.fan_in
        )
        tile = np.zeros((len(rows), len(cols)), np.int16)
        row, draw = np.nonzero((drawn >= cols.start) & (drawn < cols.stop))
        tile[row, drawn[row, draw] - cols.start] = 1
        return tile


def as_float(number: float) -> float:
    """A number as a float; infinite where a float cannot hold it."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def float32(number: float) -> float:
    """A number rounded to float32; infinite where that cannot hold it."""
    number = as_float(number)
    if math.isnan(number):
        return number
    beyond = 2.0**128
    if abs(number) < beyond:
        # By arithmetic, in whole steps of the last bit: Dynamo does not trace NumPy's rounding.
        _, exponent = math.frexp(number)
        last = max(exponent - 24, -149)
        number = math.copysign(math.ldexp(round(math.ldexp(number, -last)), last), number)
    return number if abs(number) < beyond else math.copysign(math.inf, number)


def as_int(name: str, value: Any, expected: str = "an int") -> int:
    """Any integer, NumPy's too, as an int: what JSON and hashes need. TypeError for all else, and a bool."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None


def as_size(name: str, value: Any) -> int:
    """``as_int`` of at least 1, for callers whose name for it is not the matrix's."""
    size = as_int(name, value)
    if size < 1:
        raise ValueError(f"{name}: expected at least 1, got {size}")
    return size
