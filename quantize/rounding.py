"""Plain rounding: float rows in, packed integers with scales and zero points out; nothing is searched for.

In: rows (N, K) of float32. Out: a matrix in a format of formats.py. Its pieces (chunks that stay in cache,
checks of weights, the grid of a block) also serve what chooses better integers. Knows nothing of tensor
names, files or graphs, and needs numpy only.

Rounding is to the nearest integer. Rules, with `top` the largest integer, 2 ** bits - 1:

    asymmetric   the block's range, widened to hold 0.0, is spread over 0..top: scale = (max - min) / top,
                 zero_point = round(-min / scale). Every weight comes back within half a step.
    symmetric    the weight of largest magnitude, m, becomes the lowest integer, which has the farthest
                 reach: scale = m / -(2 ** (bits - 1)). Hence scales of either sign. Weights come back within
                 half a step, those near -m (which has one integer less) within one.

Scales are rounded to the dtype they are stored in, away from zero, before the integers are computed, so that
the integers fit the scale that is read back. 0.0 always comes back as 0.0; a block of zeros has scale 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import QuantError

from .formats import BlockFormat, Quantized, ScaleDtype, pack_nibbles

CHUNK_WEIGHTS = 131_072
"""Weights per pass: 512 KiB of float32 and as much scratch, about what a second-level cache holds."""

LARGEST_WEIGHT: dict[str, float] = {"float32": 2.0**126, "float16": 2.0**15}
"""Per scale dtype. Above it a weight could come back as inf, as it may be half a step larger than it was."""

SMALLEST_SCALE: dict[str, float] = {"float32": 2.0**-100, "float16": 2.0**-24}
"""Per scale dtype; a block that asks for less, but not for 0, gets this. float16: its smallest value.
float32: far from the subnormals, so that products with activations do not become subnormal, which is slow."""


def quantize_rows(
    rows: NDArray[np.float32], fmt: BlockFormat, *, scale_dtype: ScaleDtype = "float32"
) -> Quantized:
    """Round float rows to a block format.

    Works in chunks that stay in cache and holds no Python lock while it computes, so threads scale.

    Args:
        rows: float32 (N, K), not changed. If K is not a multiple of the block size, the last block is
            padded with 0.0.
        fmt: the format.
        scale_dtype: the dtype that the scales are stored in.

    Returns:
        The packed matrix, scales in `scale_dtype`.

    Raises:
        QuantError: `rows` is not a float32 matrix, or holds inf, nan or a weight above LARGEST_WEIGHT.
    """
    check_rows(rows, scale_dtype)
    chunks = Chunks(rows, fmt, scale_dtype, CHUNK_WEIGHTS)
    rounder = Rounder(chunks.most_blocks, fmt)
    for start, values in chunks:
        scales, zeros = rounder.grid(values, scale_dtype, start)
        chunks.store(start, rounder.round(values, scales, zeros), scales, zeros)
    return chunks.quantized()


def check_rows(rows: NDArray[np.float32], scale_dtype: str) -> None:
    """Refuse what no format takes.

    Raises:
        QuantError: `rows` is not a float32 matrix, or the dtype of the scales is not known.
    """
    if rows.ndim != 2 or rows.dtype != np.float32 or rows.shape[1] == 0:
        raise QuantError(
            f"weights to quantize are {rows.dtype} {rows.shape}, must be a float32 matrix (N, K)"
        )
    if scale_dtype not in LARGEST_WEIGHT:
        raise QuantError(f"scale dtype is {scale_dtype!r}, must be float32 or float16")


def check_values(
    values: NDArray[np.float32], largest: NDArray[np.float32], scale_dtype: str, first_row: int
) -> None:
    """Refuse weights that would not come back finite.

    Args:
        values: to be quantized.
        largest: magnitudes that bound them; nan if there is one.
        scale_dtype: the dtype that the scales are stored in.
        first_row: of the matrix, for the error.

    Raises:
        QuantError: a weight is not finite or too large.
    """
    limit = LARGEST_WEIGHT[scale_dtype]
    if largest.max() <= limit:  # false with nan, too
        return
    if np.isnan(values).any():
        found = "nan"
    elif np.isinf(values).any():
        found = "inf"
    else:
        found = f"{float(np.abs(values).max()):.3g}"
    raise QuantError(
        f"a weight at or after row {first_row} is {found}, but with {scale_dtype} scales weights must be "
        f"finite and at most {limit:.3g} in magnitude; check the checkpoint, or keep this tensor float"
    )


class Chunks:
    """A matrix cut into chunks of whole rows that stay in cache, and the arrays that its integers go to.

    Iterating gives (first row, float32 (blocks, block_size)), contiguous, the last block of a row padded with
    0.0; the next step may overwrite it. `store` takes what became of it.
    """

    def __init__(
        self, rows: NDArray[np.float32], fmt: BlockFormat, scale_dtype: ScaleDtype, weights: int
    ) -> None:
        """Cut `rows` (N, K) into chunks of about `weights` weights, at least one row."""
        count, columns = rows.shape
        self.rows, self.fmt = rows, fmt
        self.blocks = fmt.blocks(columns)
        self.step = max(1, min(weights // columns, count))
        self.most_blocks = self.step * self.blocks
        self.data = np.empty((count, self.blocks, fmt.block_bytes), np.uint8)
        self.scales: NDArray[Any] = np.empty((count, self.blocks), scale_dtype)
        self.zero_points = None if fmt.symmetric else np.empty((count, self.blocks), np.uint8)

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        count, columns = self.rows.shape
        padded: NDArray[np.float32] | None = None
        if columns % self.fmt.block_size or not self.rows.flags.c_contiguous:
            padded = np.zeros((self.step, self.blocks * self.fmt.block_size), np.float32)
        for start in range(0, count, self.step):
            part = self.rows[start : start + self.step]
            if padded is not None:
                padded[: len(part), :columns] = part
                part = padded[: len(part)]
            yield start, part.reshape(-1, self.fmt.block_size)

    def store(
        self, start: int, integers: NDArray[np.uint8], scales: NDArray[Any], zeros: NDArray[np.float32]
    ) -> None:
        """Put away a chunk.

        Args:
            start: its first row.
            integers: uint8 (blocks, block_size), contiguous; overwritten.
            scales: in the stored dtype (blocks,).
            zeros: zero points, whole numbers (blocks,); not used if the format is symmetric.
        """
        stop = start + len(scales) // self.blocks
        self.scales[start:stop] = scales.reshape(-1, self.blocks)
        if self.zero_points is not None:
            self.zero_points[start:stop] = zeros.reshape(-1, self.blocks)
        flat = self.data[start:stop].reshape(-1, self.fmt.block_bytes)
        if self.fmt.field_bits == 4:
            _pack_pairs(integers, flat)
        else:
            np.copyto(flat, integers)

    def quantized(self) -> Quantized:
        """The whole matrix, once all chunks are stored."""
        zeros = self.zero_points
        if zeros is not None and self.fmt.field_bits == 4:
            zeros = pack_nibbles(zeros)
        return Quantized(self.data, self.scales, zeros)


class Rounder:
    """Plain rounding of one chunk of blocks, with scratch memory that is used again for every chunk."""

    def __init__(self, count: int, fmt: BlockFormat) -> None:
        self.fmt = fmt
        self.work = np.empty((count, fmt.block_size), np.float32)
        self.integers = np.empty((count, fmt.block_size), np.uint8)
        self.starts = np.arange(0, count * fmt.block_size, fmt.block_size, dtype=np.intp)

    def grid(
        self, values: NDArray[np.float32], scale_dtype: ScaleDtype, first_row: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Scales, in the stored dtype (blocks,), and zero points, whole numbers (blocks,), of plain rounding.

        Args:
            values: (blocks, block_size), contiguous.
            scale_dtype: the dtype that the scales are stored in.
            first_row: of the matrix, for the error.

        Raises:
            QuantError: a weight is not finite or too large.
        """
        fmt = self.fmt
        count = len(values)
        flat = values.reshape(-1)
        # reduceat over a flat array takes two thirds of the time of max(axis=1) on short rows.
        high = np.maximum.reduceat(flat, self.starts[:count])
        low = np.minimum.reduceat(flat, self.starts[:count])
        check_values(values, np.maximum(high, -low), scale_dtype, first_row)

        if fmt.symmetric:
            scales = np.where(high >= -low, high, low)
            scales /= np.float32(fmt.lowest - fmt.middle)
        else:
            np.maximum(high, np.float32(0), out=high)
            np.minimum(low, np.float32(0), out=low)
            scales = high - low
            scales /= np.float32(fmt.highest)
        stored = round_scales(scales, scale_dtype)
        if fmt.symmetric:
            return stored, np.full(count, fmt.middle, np.float32)
        zeros = np.rint(low / -divisors(stored))
        np.clip(zeros, np.float32(fmt.lowest), np.float32(fmt.highest), out=zeros)
        return stored, zeros

    def round(
        self, values: NDArray[np.float32], scales: NDArray[Any], zeros: NDArray[np.float32]
    ) -> NDArray[np.uint8]:
        """Integers (blocks, block_size) for these scales and zero points; the next call overwrites them."""
        fmt = self.fmt
        work, integers = self.work[: len(values)], self.integers[: len(values)]
        np.divide(values, divisors(scales)[:, None], out=work)
        # The zero point is a whole number: added after rounding, so that ties fall as in round(w / scale).
        np.rint(work, out=work)
        if fmt.symmetric:
            np.add(work, np.float32(fmt.middle), out=work)
        else:
            np.add(work, zeros[:, None], out=work)
        np.clip(work, np.float32(fmt.lowest), np.float32(fmt.highest), out=work)
        np.copyto(integers, work, casting="unsafe")
        return integers


def divisors(scales: NDArray[Any]) -> NDArray[np.float32]:
    """Stored scales as float32, with 1 in place of 0."""
    scales = scales.astype(np.float32, copy=False)
    return np.where(scales == 0, np.float32(1), scales)


def round_scales(scales: NDArray[np.float32], dtype: ScaleDtype) -> NDArray[Any]:
    """Round to the stored dtype, away from zero; 0 stays 0, less than SMALLEST_SCALE becomes that."""
    magnitude = np.abs(scales)
    np.maximum(magnitude, np.float32(SMALLEST_SCALE[dtype]), out=magnitude, where=magnitude != 0)
    if dtype == "float16":
        half = magnitude.astype(np.float16)
        short = half.astype(np.float32) < magnitude
        half[short] = np.nextafter(half[short], np.float16(np.inf))
        return np.where(scales < 0, -half, half)
    return np.where(scales < 0, -magnitude, magnitude)


def _pack_pairs(integers: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """pack_nibbles for contiguous rows of even length, in place: overwrites `integers`."""
    pairs = integers.reshape(-1).view("<u2")  # low byte: the earlier weight
    np.bitwise_or(pairs, pairs >> np.uint16(4), out=pairs)
    np.copyto(out.reshape(-1), pairs, casting="unsafe")  # keeps the low byte
