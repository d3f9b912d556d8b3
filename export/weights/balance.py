"""Balances channels: those large in activations and small in weights, or the other way round, are evened out.

In: the tensors of a checkpoint, and `Link`s between them. Out: the same rows, rescaled, as the writer and the
calibration read them; the model computes the same. Knows nothing of recipes, number formats and files.

A channel whose activations are a hundred times as large as the others, and whose columns are as much smaller,
is rounded badly on both sides, as it shares blocks, and hence a step, with its neighbours. So channel j is
multiplied by f_j where it is made, and divided by f_j in every column that reads it, with

    f_j = sqrt(c_j / r_j)

where c_j is the largest weight of its columns, and r_j the largest of the row that makes it (of a norm, its
weight), which stands for the size of its activations. After that both are sqrt(c_j r_j). It is the rule of
SmoothQuant (Xiao and others, 2023, equation 4, alpha = 0.5) with weights in place of measured activations, so
it needs no data.

f_j is a power of two, hence nothing is rounded. The middle one of a link is 1, and so are those within a
factor of two of it, so that a model whose channels are alike stays as it is. It depends on the checkpoint
and the dtype of activations, not on which tensors are quantized, so parts of such bundles fit together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.export.graphs.links import Link
from autoglm_edge.export.graphs.plan import Dtype
from autoglm_edge.runtime.machine.topology import usable_cores

from .rows import Rows

SCAN_BYTES = 1 << 20
"""Float32 bytes that each thread reads at once while it looks for the largest weights."""

LEAST_EXPONENT = 2
"""Channels that are off by less stay. Scaling ordinary ones by 2 gains nothing, and makes steps between
neighbours that rounding in blocks pays for."""

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Bounds:
    """How far a channel may be scaled, in powers of two.

    Attributes:
        grow: most by which activations may grow.
        shrink: most by which they may shrink.
        size: weights are not moved beyond 2**size, or below 2**-size in magnitude.
    """

    grow: int
    shrink: int
    size: int


BOUNDS: dict[Dtype, Bounds] = {
    "float32": Bounds(grow=12, shrink=12, size=100),
    # Activations in float16 end at 65504, so none may become larger than it was.
    "float16": Bounds(grow=0, shrink=12, size=10),
}
"""By the dtype of activations and float weights."""


def exponents(rows: Vector, columns: Vector, bounds: Bounds) -> NDArray[np.int32]:
    """By which power of two the activations of each channel are to be multiplied.

    Args:
        rows: magnitude of the largest weight that makes a channel (C,).
        columns: magnitude of the largest weight that reads it (C,).
        bounds: what is allowed.

    Returns:
        Exponents (C,); 0 for channels that are never made, never read, denormal, inf or nan.
    """
    least = np.finfo(np.float32).tiny
    usable = (rows >= least) & (columns >= least) & np.isfinite(rows) & np.isfinite(columns)
    found = np.zeros(len(rows), np.int32)
    if not usable.any():
        return found
    row, column = rows[usable].astype(np.float64), columns[usable].astype(np.float64)
    wanted = _power(column / row) // 2  # half the exponent, rounded to the nearest
    wanted -= np.sort(wanted)[len(wanted) // 2]
    wanted[np.abs(wanted) < LEAST_EXPONENT] = 0
    row_power, column_power = _power(row), _power(column)  # 2**(power - 1) <= value < 2**power
    low = np.maximum(-bounds.shrink, np.maximum(1 - bounds.size - row_power, column_power - bounds.size))
    high = np.minimum(bounds.grow, np.minimum(bounds.size - row_power, column_power - 1 + bounds.size))
    found[usable] = np.clip(wanted, np.minimum(low, 0), np.maximum(high, 0))
    return found


def _power(values: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.frexp(values)[1].astype(np.int32)


class Balanced:
    """Rows of a checkpoint with balanced channels. Safe to use from several threads.

    The largest weights of a link are looked for when the first of its rows are asked for. Factors are kept,
    4 bytes a channel.
    """

    def __init__(
        self, store: Rows, links: Iterable[Link], activations: Dtype, workers: int | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            store: the checkpoint; its arrays are changed in place, so they must be new ones.
            links: of the model.
            activations: dtype of activations and float weights.
            workers: threads that look for the largest weights; the usable cores by default.
        """
        self._store = store
        self._made: dict[str, _Factors] = {}
        self._read: dict[str, _Factors] = {}
        for link in links:
            factors = _Factors(store, link, BOUNDS[activations], workers or usable_cores())
            self._made[link.source] = factors
            self._read.update(dict.fromkeys(link.readers, factors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored."""
        return self._store.shape(name)

    def rows(
        self, name: str, start: int, stop: int, *, permute: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        """Rows start..stop of the (permuted) tensor seen as (first dimension, product of the others)."""
        values = self._store.rows(name, start, stop, permute=permute)
        if name in self._made:
            factors = self._made[name]
            first, made = factors.link.first, factors.made()
            begin, end = max(start, first), min(stop, first + len(made))
            if begin < end:
                values[begin - start : end - start] *= made[begin - first : end - first, None]
        if name in self._read:
            values *= self._read[name].read()
        return values

    def release(self, name: str) -> None:
        """Drop mapped pages of a tensor that is done with."""
        self._store.release(name)


def scan_bytes(workers: int) -> int:
    """Memory in use while the largest weights of a link are looked for."""
    return workers * SCAN_BYTES


def largest(rows: Vector, *, axis: int) -> Vector:
    """Magnitude of the largest value along an axis; nan if there is one. Overwrites the rows."""
    found: Vector = np.abs(rows, out=rows).max(axis=axis, initial=0)
    return found


class _Factors:
    """The factors of one link, made by whoever needs them first."""

    def __init__(self, store: Rows, link: Link, bounds: Bounds, workers: int) -> None:
        self.link = link
        self._store, self._bounds, self._workers = store, bounds, workers
        self._lock = Lock()
        self._made: Vector | None = None
        self._read: Vector | None = None

    def made(self) -> Vector:
        """What rows of the source are multiplied by, (C,)."""
        return self._find()[0]

    def read(self) -> Vector:
        """What columns of the readers are multiplied by, (C,): one over the others."""
        return self._find()[1]

    def _find(self) -> tuple[Vector, Vector]:
        with self._lock:
            if self._made is None or self._read is None:
                columns = np.max([self._columns(name) for name in self.link.readers], axis=0)
                found = exponents(self._rows(len(columns)), columns, self._bounds)
                self._made, self._read = (np.ldexp(np.float32(1), power) for power in (found, -found))
            return self._made, self._read

    def _rows(self, count: int) -> Vector:
        """Largest of each row that makes a channel."""
        name, first = self.link.source, self.link.first
        found = np.empty(count, np.float32)

        def look(start: int, stop: int) -> None:
            found[start:stop] = largest(self._store.rows(name, first + start, first + stop), axis=1)

        self._scan(name, count, lambda: look)
        return found

    def _columns(self, name: str) -> Vector:
        """Largest of each column."""
        count, *others = self._store.shape(name)
        stripes: list[Vector] = []

        def begin() -> Callable[[int, int], None]:
            best = np.zeros(math.prod(others), np.float32)
            stripes.append(best)

            def look(start: int, stop: int) -> None:
                np.maximum(best, largest(self._store.rows(name, start, stop), axis=0), out=best)

            return look

        self._scan(name, count, begin)
        found: Vector = np.max(stripes, axis=0)
        return found

    def _scan(self, name: str, count: int, begin: Callable[[], Callable[[int, int], None]]) -> None:
        """Show all rows to functions, one to a thread. Largest values do not depend on who sees which."""
        _, *others = self._store.shape(name)
        step = max(1, SCAN_BYTES // (4 * max(1, math.prod(others))))
        workers = max(1, min(self._workers, -(-count // step)))

        def stripe(look: Callable[[int, int], None], own: int) -> None:
            for start in range(own * step, count, workers * step):
                look(start, min(start + step, count))

        if workers == 1:
            stripe(begin(), 0)
        else:
            with ThreadPoolExecutor(workers, "scan") as pool:
                looks = [begin() for _ in range(workers)]
                list(pool.map(stripe, looks, range(workers)))
        self._store.release(name)
