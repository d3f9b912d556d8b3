"""Better integers without data: per block, the scale and zero point with the least squared error.

In: rows (N, K) of float32, and optionally how much each column matters. Out: the same arrays as quantize_rows
makes, read by the same kernels. Knows nothing of names, files or graphs.

quantize_rows spreads a block's whole range over the integers, so its largest weight, which is rare, sets the
step of all others. Here several narrower ranges are tried, beyond whose ends weights are cut off. For each,
with d the integers less the zero point, the scale is the one of least squares,

    scale = sum(h w d) / sum(h d d)        which leaves  sum(h w w) - sum(h w d) ** 2 / sum(h d d)

where h is the importance of a column. The best is kept, its weights are rounded anew with the new scale, and
the scale is fitted to these integers once more. A block for which that is not better than plain rounding gets
plain rounding, so no block gets worse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import QuantError

from .formats import BlockFormat, Quantized, ScaleDtype
from .rounding import SMALLEST_SCALE, Chunks, Rounder, check_rows, divisors

_F32 = NDArray[np.float32]

WIDTHS: dict[int, tuple[float, ...]] = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6),
    3: (1.0, 0.9, 0.8, 0.7),
    4: (1.0, 0.95, 0.9, 0.84),
    8: (1.0, 0.997, 0.994),
}
"""Per number of bits, the widths of range that are tried, as parts of the block's own."""


CHUNK_WEIGHTS = 32_768
"""Weights per pass: 128 KiB of float32, and with scratch about what a second-level cache holds."""

MARGIN, SLACK = np.float32(1 - 1e-4), np.float32(1e-7)
"""A block must come below this part of plain rounding's error, less this many squared steps: the comparison
itself is in float32."""


def search_rows(
    rows: _F32,
    fmt: BlockFormat,
    *,
    importance: _F32 | None = None,
    scale_dtype: ScaleDtype = "float32",
) -> Quantized:
    """Round float rows to a block format, choosing scale and zero point by squared error.

    Rows do not depend on each other. Works in chunks that stay in cache and holds no Python lock while it
    computes, so threads scale.

    Args:
        rows: float32 (N, K), not changed. If K is not a multiple of the block size, the last block is
            padded with 0.0.
        fmt: the format.
        importance: float32 (K,), not negative: the weight of each column's squared error, such as the mean
            square of what is multiplied with it. None: all alike. Only its proportions matter.
        scale_dtype: the dtype that the scales are stored in.

    Returns:
        The packed matrix. In every block the weighted squared error is at most that of quantize_rows.

    Raises:
        QuantError: as quantize_rows; or `importance` is not of this shape, negative or not finite.
    """
    check_rows(rows, scale_dtype)
    chunks = Chunks(rows, fmt, scale_dtype, CHUNK_WEIGHTS)
    weights = None
    if importance is not None:
        weights = np.tile(_in_blocks(importance, rows.shape[1], fmt), (chunks.step, 1))
    search = _Search(chunks.most_blocks, fmt, weights)
    for start, values in chunks:
        chunks.store(start, *search.quantize(values, scale_dtype, start))
    return chunks.quantized()


class _Search:
    """Search of one chunk of blocks, with scratch memory that is used again for every chunk.

    Weights are handled in steps of plain rounding, u = w / scale, so that no magnitude overflows, and a
    range narrower by p is a scale of p, with the zero point it had.
    """

    def __init__(self, count: int, fmt: BlockFormat, importance: _F32 | None) -> None:
        self.fmt = fmt
        self.importance = importance
        self.rounder = Rounder(count, fmt)
        shape = (count, fmt.block_size)
        self.places, self.levels, self.plain = (np.empty(shape, np.float32) for _ in range(3))
        self.work = np.empty(shape, np.float32)
        self.weighted = self.places if importance is None else np.empty(shape, np.float32)
        self.lows, self.highs = (np.empty(shape, np.float32) for _ in range(2))
        if fmt.symmetric:
            self.lows[:], self.highs[:] = fmt.lowest - fmt.middle, fmt.highest - fmt.middle

    def quantize(
        self, values: _F32, scale_dtype: ScaleDtype, first_row: int
    ) -> tuple[NDArray[np.uint8], NDArray[Any], _F32]:
        """Quantize (blocks, block_size) contiguous values.

        Returns:
            Integers (blocks, block_size), which the next call overwrites; scales and zero points (blocks).
        """
        count, fmt = len(values), self.fmt
        plain_scales, zeros = self.rounder.grid(values, scale_dtype, first_row)
        steps = divisors(plain_scales)
        if not fmt.symmetric:
            self.lows[:count] = -zeros[:, None]
            self.highs[:count] = (np.float32(fmt.highest) - zeros)[:, None]
        places, plain, levels = self.places[:count], self.plain[:count], self.levels[:count]
        np.divide(values, steps[:, None], out=places)
        if self.importance is not None:
            np.multiply(places, self.importance[:count], out=self.weighted[:count])

        best = np.ones(count, np.float32)
        most = np.full(count, -1, np.float32)
        for width in WIDTHS[fmt.bits]:
            self._round(np.float32(1 / width), plain if width == 1 else levels)
            scales, gains = self._fit(plain if width == 1 else levels)
            better = gains > most
            np.copyto(best, scales, where=better)
            np.copyto(most, gains, where=better)
        self._round((1 / best)[:, None], levels)
        scales, _ = self._fit(levels)
        stored = _nearest(scales * steps, scale_dtype)
        scales = stored.astype(np.float32, copy=False) / steps
        self._round((1 / scales)[:, None], levels)

        before = self._error(plain, None)
        after = self._error(levels, scales)
        worse = np.flatnonzero(~(after < before * MARGIN - SLACK))
        levels[worse] = plain[worse]
        stored[worse] = plain_scales[worse]
        levels += np.float32(fmt.middle) if fmt.symmetric else zeros[:, None]
        integers = self.rounder.integers[:count]
        np.copyto(integers, levels, casting="unsafe")
        return integers, stored, zeros

    def _round(self, factors: Any, out: _F32) -> None:
        """Integers less the zero point, for places times `factors`."""
        count = len(out)
        np.multiply(self.places[:count], factors, out=out)
        np.rint(out, out=out)
        np.maximum(out, self.lows[:count], out=out)
        np.minimum(out, self.highs[:count], out=out)

    def _fit(self, levels: _F32) -> tuple[_F32, _F32]:
        """Scales of least squares (blocks,), and what each takes off the squared error (blocks,)."""
        count = len(levels)
        product: _F32 = np.vecdot(self.weighted[:count], levels)
        if self.importance is None:
            norm = np.vecdot(levels, levels)
        else:
            norm = np.vecdot(np.multiply(levels, self.importance[:count], out=self.work[:count]), levels)
        fitted = (norm > 0) & (product > 0)
        scales = np.ones_like(product)
        np.divide(product, norm, out=scales, where=fitted)
        return scales, np.where(fitted, product * scales, np.float32(0))

    def _error(self, levels: _F32, scales: _F32 | None) -> _F32:
        """Weighted squared error (blocks,), in squared steps."""
        count = len(levels)
        work = self.work[:count]
        if scales is None:
            np.subtract(levels, self.places[:count], out=work)
        else:
            np.multiply(levels, scales[:, None], out=work)
            np.subtract(work, self.places[:count], out=work)
        weighted = work
        if self.importance is not None:
            weighted = np.multiply(work, self.importance[:count], out=self.weighted[:count])
        error: _F32 = np.vecdot(work, weighted)
        return error


def _nearest(scales: _F32, dtype: ScaleDtype) -> NDArray[Any]:
    """Round to the stored dtype, to the nearest, but not below SMALLEST_SCALE in magnitude."""
    magnitude = np.maximum(np.abs(scales), np.float32(SMALLEST_SCALE[dtype]))
    rounded: NDArray[Any] = np.copysign(magnitude, scales).astype(dtype)
    return rounded


def _in_blocks(importance: _F32, columns: int, fmt: BlockFormat) -> _F32:
    """Importance as float32 (blocks, block_size), at most 1 in each block; padding has none."""
    if importance.shape != (columns,) or importance.dtype != np.float32:
        raise QuantError(
            f"the importance of columns is {importance.dtype} {importance.shape}, must be float32 "
            f"({columns},)"
        )
    if not (np.isfinite(importance).all() and importance.min() >= 0):
        raise QuantError(
            "the importance of a column is negative or not finite; it is a mean square, so the calibration "
            "that gave it is wrong"
        )
    padded = np.zeros(fmt.blocks(columns) * fmt.block_size)
    padded[:columns] = importance
    blocks = padded.reshape(-1, fmt.block_size)
    largest = blocks.max(axis=1, keepdims=True)
    shares: _F32 = np.divide(blocks, largest, out=np.zeros_like(blocks), where=largest > 0).astype(np.float32)
    return shares
