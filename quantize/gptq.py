"""GPTQ: integers for the least error of what a layer computes, given the inputs it sees.

In: rows (N, K) of float32, and the Gram matrix G = X^T X of the layer's inputs X (T, K) on calibration data.
Out: the same arrays as quantize_rows makes, read by the same kernels. Knows nothing of names, files and
graphs, nor where the inputs come from.

The squared error of the outputs is tr(E G E^T), where E (N, K) is the error of the weights. It is made small
as by Frantar et al., "GPTQ" (arXiv 2210.17323), in the form that Chee et al., "QuIP" (arXiv 2307.13304,
section 3) show to be the same: scales and zero points are chosen first (refine.search_rows, with the diagonal
of G as importance). Then the columns are rounded one by one, each moved against the errors of those before:

    G = (U + 1) D (U + 1)^T      U strictly upper triangular, D diagonal
    q_k = round(w_k + sum_j<k e_j U_jk)      e_j = w_j - dequantized q_j

Columns are taken in descending order of G's diagonal, so that what matters most is rounded with the least
correction. For a wide matrix, G is cut to square panels on the diagonal: columns of different panels are
rounded as if they were independent, and memory stays that of one panel times their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import QuantError

from .formats import BlockFormat, Quantized, ScaleDtype, unpack_nibbles
from .refine import search_rows
from .rounding import Chunks, check_rows, divisors

_F32 = NDArray[np.float32]

TILE_ROWS = 1024
"""Rows that are worked on together. Always as many, the last ones padded, so that the linear algebra library
takes the same way for each row, and the integers do not depend on how a matrix was cut into chunks."""

TILE_COLUMNS = 64
"""Columns whose corrections among each other are added one by one; those of all before, by one product."""

MOST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Panel:
    """What rounding needs to know of some columns' inputs.

    Attributes:
        order: intp (P,), the columns in the order in which they are rounded.
        feedback: float32 (P, P), U, in that order: strictly upper triangular.
    """

    order: NDArray[np.intp]
    feedback: _F32


@dataclass(frozen=True, eq=False)
class GptqFactor:
    """A Gram matrix, made ready for rounding; serves all matrices that are multiplied with the same inputs.

    Attributes:
        panels: cover the columns from the first to the last.
        importance: float32 (K,), the damped diagonal.
    """

    panels: tuple[Panel, ...]
    importance: _F32

    @property
    def columns(self) -> int:
        """K."""
        return len(self.importance)


def factor(
    gram: NDArray[Any] | Sequence[NDArray[Any]], *, damping: float = 0.01, panel: int = 4096
) -> GptqFactor:
    """Make a Gram matrix ready for rounding.

    A column whose input is always 0 is rounded for itself. A matrix from fewer tokens than it has columns is
    what the damping is for.

    Args:
        gram: X^T X, (K, K), or only its square panels on the diagonal, from the first column to the last.
        damping: added to the diagonal, as a part of its mean. It is increased if the matrix needs more.
        panel: columns of a panel, if `gram` is one matrix.

    Raises:
        QuantError: not square matrices of finite numbers with a diagonal that is not negative, or not from
            real inputs, as no damping helps; or a damping or panel that is out of range.
    """
    if not 0 < damping <= MOST_DAMPING:
        raise QuantError(f"damping is {damping}, must be above 0 and at most {MOST_DAMPING}")
    if panel < 1:
        raise QuantError(f"panel is {panel} columns, must be 1 or more")
    panels, diagonals = [], []
    start = 0
    for part in _panels(gram, panel):
        made, diagonal = _factor_panel(part, damping, start)
        panels.append(made)
        diagonals.append(diagonal)
        start += len(diagonal)
    return GptqFactor(tuple(panels), np.concatenate(diagonals).astype(np.float32))


def gptq_rows(
    rows: _F32, fmt: BlockFormat, factor: GptqFactor, *, scale_dtype: ScaleDtype = "float32"
) -> Quantized:
    """Round float rows to a block format for the least error of rows @ inputs.

    Rows do not depend on each other, nor on how a matrix is cut into chunks of rows. Memory: four times the
    weights of TILE_ROWS rows of a panel.

    Args:
        rows: float32 (N, K), not changed. If K is not a multiple of the block size, the last block is
            padded with 0.0.
        fmt: the format.
        factor: of the inputs, of K columns.
        scale_dtype: the dtype that the scales are stored in.

    Returns:
        The packed matrix, scales in `scale_dtype`.

    Raises:
        QuantError: as search_rows; or the factor is of another number of columns.
    """
    check_rows(rows, scale_dtype)
    if factor.columns != rows.shape[1]:
        raise QuantError(
            f"the calibration is of {factor.columns} input columns, but the weights have {rows.shape[1]}; "
            "it is of another tensor"
        )
    grid = search_rows(rows, fmt, importance=factor.importance, scale_dtype=scale_dtype)
    count, columns = rows.shape
    blocks = fmt.blocks(columns)
    scales = grid.scales.astype(np.float32, copy=False)
    if grid.zero_points is None:
        zeros = np.full((count, blocks), fmt.middle, np.float32)
    elif fmt.field_bits == 4:
        zeros = unpack_nibbles(grid.zero_points)[:, :blocks].astype(np.float32)
    else:
        zeros = grid.zero_points.astype(np.float32)
    out = Chunks(rows, fmt, scale_dtype, TILE_ROWS * columns)
    for start in range(0, count, TILE_ROWS):
        stop = min(start + TILE_ROWS, count)
        integers = _round_tile(rows[start:stop], scales[start:stop], zeros[start:stop], fmt, factor)
        out.store(start, integers, grid.scales[start:stop].reshape(-1), zeros[start:stop].reshape(-1))
    return out.quantized()


def _round_tile(
    rows: _F32, scales: _F32, zeros: _F32, fmt: BlockFormat, factor: GptqFactor
) -> NDArray[np.uint8]:
    """Integers (n * blocks, block_size) of up to TILE_ROWS rows; padding becomes the zero point."""
    count, blocks = scales.shape
    integers = np.empty((count, blocks * fmt.block_size), np.uint8)
    integers[:, rows.shape[1] :] = zeros[:, -1:]
    # Each row is brought near 1 by a power of two, which rounds nothing, so that no sum of errors overflows.
    exponents = np.frexp(np.abs(rows).max(axis=1))[1]
    shrink = np.ldexp(np.float32(1), -np.clip(exponents, -100, 100))
    # (blocks, TILE_ROWS): a column's scales lie side by side.
    steps, bases = np.zeros((2, blocks, TILE_ROWS), np.float32)
    steps[:, :count], bases[:, :count] = (scales * shrink[:, None]).T, zeros.T
    start = 0
    for part in factor.panels:
        columns = start + part.order
        weights = np.zeros((len(columns), TILE_ROWS), np.float32)
        np.multiply(rows[:, start : start + len(columns)].T[part.order], shrink, out=weights[:, :count])
        levels = _round_panel(weights, columns // fmt.block_size, steps, bases, fmt, part.feedback)
        integers[:, columns] = levels[:, :count].T
        start += len(columns)
    return integers.reshape(-1, fmt.block_size)


def _round_panel(
    weights: _F32, block_of: NDArray[np.intp], steps: _F32, bases: _F32, fmt: BlockFormat, feedback: _F32
) -> NDArray[np.uint8]:
    """Round the columns of a panel one by one.

    Args:
        weights: (P, TILE_ROWS), columns in the order of rounding; overwritten with errors.
        block_of: (P,), the block of each column.
        steps: scales (blocks, TILE_ROWS).
        bases: zero points (blocks, TILE_ROWS).
        fmt: the format.
        feedback: (P, P).

    Returns:
        Integers (P, TILE_ROWS).
    """
    inverse = 1 / divisors(steps)
    lows, highs = np.float32(fmt.lowest) - bases, np.float32(fmt.highest) - bases
    levels = np.empty(weights.shape, np.int16)  # less the zero point, so of either sign
    errors = weights
    level = np.empty(TILE_ROWS, np.float32)
    wanted = np.empty((TILE_COLUMNS, TILE_ROWS), np.float32)
    moved = np.empty(TILE_ROWS, np.float32)
    for first in range(0, len(weights), TILE_COLUMNS):
        last = min(first + TILE_COLUMNS, len(weights))
        # Corrections from all columns before this tile.
        np.matmul(feedback[:first, first:last].T, errors[:first], out=wanted[: last - first])
        wanted[: last - first] += weights[first:last]
        for column in range(first, last):
            block = block_of[column]
            np.matmul(feedback[first:column, column], errors[first:column], out=moved)
            moved += wanted[column - first]
            np.multiply(moved, inverse[block], out=level)
            np.rint(level, out=level)
            np.maximum(level, lows[block], out=level)
            np.minimum(level, highs[block], out=level)
            np.copyto(levels[column], level, casting="unsafe")
            level *= steps[block]
            np.subtract(weights[column], level, out=errors[column])
    levels += bases.astype(np.int16)[block_of]
    return levels.astype(np.uint8)


def _panels(gram: NDArray[Any] | Sequence[NDArray[Any]], panel: int) -> Iterator[NDArray[Any]]:
    """Square panels on the diagonal, checked for shape."""
    if isinstance(gram, np.ndarray):
        _check_square(gram, 0)
        gram = [gram[start : start + panel, start : start + panel] for start in range(0, len(gram), panel)]
    if not gram:
        raise QuantError("a Gram matrix has no columns; the calibration ran no layer")
    start = 0
    for part in gram:
        _check_square(part, start)
        yield part
        start += len(part)


def _check_square(part: NDArray[Any], start: int) -> None:
    if part.ndim != 2 or part.shape[0] != part.shape[1] or not part.size or part.dtype.kind != "f":
        raise QuantError(
            f"the Gram matrix at column {start} is {part.dtype} {part.shape}, must be square and of floats"
        )


def _factor_panel(gram: NDArray[Any], damping: float, start: int) -> tuple[Panel, NDArray[np.float64]]:
    """The panel, and its damped diagonal."""
    diagonal = gram.diagonal().astype(np.float64)
    if not (np.isfinite(gram).all() and diagonal.min() >= 0):
        raise QuantError(
            f"the Gram matrix at column {start} has a value that is not finite, or a negative diagonal; the "
            "calibration run overflowed"
        )
    mean = diagonal.mean() or 1.0
    order = np.argsort(-diagonal, kind="stable").astype(np.intp)
    # Reversed, as numpy gives lower factors: J G J = L L^T, so G = (J L J) (J L J)^T with J L J upper.
    backwards = order[::-1]
    mirrored = gram[np.ix_(backwards, backwards)].astype(np.float64)
    mirrored /= mean
    plain = mirrored.diagonal().copy()
    while damping <= MOST_DAMPING:
        np.fill_diagonal(mirrored, plain + damping)
        try:
            lower = np.linalg.cholesky(mirrored)
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        lower /= lower.diagonal().copy()
        np.fill_diagonal(lower, 0)
        feedback = np.ascontiguousarray(lower[::-1, ::-1], np.float32)
        return Panel(order, feedback), diagonal + damping * mean
    raise QuantError(
        f"the Gram matrix at column {start} is not one of real inputs: it stays indefinite with a damping of "
        f"{MOST_DAMPING}"
    )
