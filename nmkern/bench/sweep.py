"""What ``nmkern bench`` measures: a sweep over M, K, N, dtype, family and way, as rows of a plan.

    forward    y = x W^T                          ("linear", or "projection" for the sparse family)
    backward   dx = dy W                          ("linear, transposed", "projection, transposed")
    training   forward and backward to x, both gains and the bias of a layer   ("layer, trained")

The invariant: a case is its row's key, so that a sweep can be read back from the rows of another.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from nmkern.bench import cases, rivals
from nmkern.bench import rows as rows_of
from nmkern.bench.harness import Report
from nmkern.bench.plan import Row

WAYS = ("forward", "backward", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {
    (False, "forward"): "linear",
    (False, "backward"): "linear, transposed",
    (False, "training"): "layer, trained",
    (True, "forward"): "projection",
    (True, "backward"): "projection, transposed",
}


@dataclass(frozen=True)
class Cell:
    """One case: a layer from ``k`` inputs to ``n`` outputs, whatever the way."""

    way: str
    m: int
    k: int
    n: int
    dtype: str
    family: str

    @property
    def _row(self) -> rows_of.Row:
        """What its row says of the case: K and N are the product's own."""
        k, n = (self.n, self.k) if self.way == "backward" else (self.k, self.n)
        name = _NAMES[self.family == "sparse", self.way]
        return {"name": name, "m": self.m, "k": k, "n": n, "dtype": self.dtype, "family": self.family}

    @property
    def key(self) -> tuple:
        return rows_of.key_of(self._row)

    def __str__(self) -> str:
        return rows_of.label(self._row)


def cells_of(found: Iterable[rows_of.Row]) -> list[Cell]:
    """The cases of rows that a sweep can have made."""
    ways = {name: way for (_, way), name in _NAMES.items()}
    cells = []
    for row in found:
        if (way := ways.get(row["name"])) and row["dtype"] in DTYPES and row.get("by") is None:
            k, n = (row["n"], row["k"]) if way == "backward" else (row["k"], row["n"])
            cells.append(Cell(way, row["m"], k, n, row["dtype"], row["family"]))
    return cells


@dataclass(frozen=True)
class Sweep:
    """``against``: rivals by name, None for all; ``calls``: in a CUDA graph; ``copied``: bytes."""

    cells: list[Cell]
    against: list[str] | None = None
    device: str = "cpu"
    seconds: float = 0.5
    passes: int = 3
    fan_in: int = 7
    calls: int = 1
    copied: int = 2**28

    def rows(self, report: Report) -> Iterator[Row]:
        """The plan: every pass measures every case."""

        @functools.cache
        def layer(k: int, n: int, family: str) -> cases.Layer:
            fan_in = min(self.fan_in, k) if family == "sparse" else None
            return cases.Layer(n, k, family, self.device, self.calls, fan_in)

        def measure(cell: Cell) -> None:
            weights, dtype = layer(cell.k, cell.n, cell.family), DTYPES[cell.dtype]
            if cell.way == "training":
                cases.gains(report, weights, cell.m, dtype, self.seconds, self.calls)
                return
            cases.product(
                report,
                weights,
                cell.m,
                dtype,
                cell.way == "backward",
                self.seconds,
                calls=self.calls,
                against=self.against,
            )

        for number in range(1, self.passes + 1):
            told = f" (pass {number} of {self.passes})" if self.passes > 1 else ""
            copy = functools.partial(cases.copy, report, self.copied, self.seconds, self.device)
            yield Row(f"copy{told}", 1, copy)
            for cell in self.cells:
                yield Row(f"{cell}{told}", self._expected(cell), functools.partial(measure, cell))
            for m, k, n in self._vera():
                vera = functools.partial(cases.vera, report, m, k, n, self.seconds)
                yield Row(f"{rivals.VERA} M={m} {k} -> {n}{told}", self.seconds + 1, vera)

    def __len__(self) -> int:
        return self.passes * (1 + len(self.cells) + len(self._vera()))

    def _expected(self, cell: Cell) -> float:
        """Seconds of a row: timing, the gate, and generating rivals at some 0.3 G weights a second."""
        return 0.5 + 2 * self.seconds + 8 * cell.k * cell.n / 0.3e9

    def missing(self) -> dict[str, str]:
        """The rival that has cases of its own, where it was asked for and cannot run."""
        if self.against is None or rivals.VERA in self.against:
            if self.device != "cpu":
                return {rivals.VERA: "refused: measured on the CPU only"}
            if reason := rivals.vera_missing():
                return {rivals.VERA: f"missing: {reason}"}
        return {}

    def _vera(self) -> list[tuple[int, int, int]]:
        if self.missing() or not (self.against is None or rivals.VERA in self.against):
            return []
        dense = [c for c in self.cells if (c.way, c.dtype, c.family) == ("forward", "float32", "uniform")]
        return [(c.m, c.k, c.n) for c in dense]


def grid(
    ms: Iterable[int],
    ks: Iterable[int],
    ns: Iterable[int] | None,
    dtypes: Iterable[str],
    families: Iterable[str],
    ways: Iterable[str],
) -> list[Cell]:
    """All combinations; square layers where ``ns`` is None. Those that do not exist are left out."""
    shapes = [(k, k) for k in ks] if ns is None else list(itertools.product(ks, ns))
    return [
        Cell(way, m, k, n, dtype, family)
        for family in families
        for k, n in shapes
        for dtype in dtypes
        for way in ways
        if (family == "sparse", way) in _NAMES
        for m in ms
    ]
