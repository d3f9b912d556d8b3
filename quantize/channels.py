"""The number format of integer matrix units: 8 bits, one scale per output channel, floats in and back.

In: rows (N, K) of float32. Out: the integers and scales that a product of bytes needs. Knows nothing of
tensor names, files or graphs, and needs numpy only.

A row of a matrix makes one output channel. Its K weights share one scale, or `groups` scales for as many
equal parts of K. A stored integer q, -127 to 127, stands for q * scale; there are no zero points, so 0.0
comes back as 0.0, and a row of zeros has scale 0. With the activations of a token rounded to bytes as well, a
whole sum over K is one of integers, which processors have units for; a scale per block along K would take it
apart.

Rounding is to the nearest integer with scale = max|w| / 127, so that each weight comes back within half a
step. With `refine = "search"` narrower scales are tried, which cut off the largest weights, and the one of
least squared error is kept, per row and group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import QuantError

from .formats import BlockFormat
from .rounding import check_rows, check_values, divisors, round_scales

TOP = 127
"""The largest integer. -128 is not used, so that a matrix and its negative are stored alike."""

CHUNK_WEIGHTS = 131_072
"""Weights per pass: 512 KiB of float32 and as much scratch, about what a second-level cache holds."""

WIDTHS = (0.98, 0.95, 0.92, 0.88, 0.84, 0.8)
"""Ranges that a search tries, as parts of the row's own."""


@dataclass(frozen=True)
class ChannelFormat:
    """Integers for matrix units: a scale per output channel and group of the input dimension.

    Attributes:
        bits: 8.
        groups: equal parts that K is cut into, each with a scale of its own.
    """

    bits: int = 8
    groups: int = 1

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise QuantError(
                f"bits is {self.bits} with a scale per channel, must be 8; fewer bits need blocks, leave "
                'per = "channel" out'
            )
        if not 1 <= self.groups <= 64:
            raise QuantError(f"groups is {self.groups}, must be 1 to 64")

    def group_columns(self, columns: int) -> int:
        """Columns of one group in a row of `columns` weights.

        Raises:
            QuantError: the groups would not be equal.
        """
        if columns % self.groups:
            raise QuantError(
                f"{self.groups} groups do not divide {columns} columns; choose a divisor, or groups = 1"
            )
        return columns // self.groups

    def size_bytes(self, rows: int, columns: int, scale_bytes: int = 4) -> int:
        """Bytes of all that is stored of a (rows, columns) matrix, with scales of `scale_bytes` each."""
        return rows * (columns + scale_bytes * self.groups)


WeightFormat = BlockFormat | ChannelFormat
"""How integers are stored: with a scale per block, or per channel."""


@dataclass(frozen=True, eq=False)
class QuantizedChannels:
    """A matrix with a scale per channel.

    Attributes:
        data: int8 (N, K).
        scales: float32 (N, groups).
    """

    data: NDArray[np.int8]
    scales: NDArray[np.float32]


def quantize_channels(
    rows: NDArray[np.float32], fmt: ChannelFormat, *, refine: Literal["none", "search"] = "none"
) -> QuantizedChannels:
    """Round float rows to integers with a scale per row and group.

    Rows do not depend on each other. Works in chunks that stay in cache and holds no Python lock while it
    computes, so threads scale.

    Args:
        rows: float32 (N, K), not changed.
        fmt: the format.
        refine: "search" tries narrower scales; no row gets a larger squared error by it.

    Returns:
        Integers and scales, row by row.

    Raises:
        QuantError: `rows` is not a float32 matrix, cannot be cut into equal groups, or holds inf, nan or a
            weight too large to come back finite.
    """
    check_rows(rows, "float32")
    count, columns = rows.shape
    width = fmt.group_columns(columns)
    data = np.empty((count, columns), np.int8)
    scales = np.empty((count, fmt.groups), np.float32)
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, count, step):
        stop = min(start + step, count)
        values = np.ascontiguousarray(rows[start:stop]).reshape(-1, width)
        integers = data[start:stop].reshape(-1, width)
        scales[start:stop] = _round(values, integers, refine, start).reshape(-1, fmt.groups)
    return QuantizedChannels(data, scales)


def dequantize_channels(quantized: QuantizedChannels, fmt: ChannelFormat) -> NDArray[np.float32]:
    """Integers times scales, in float32: (N, K).

    Raises:
        QuantError: the arrays do not have the shapes or types of the format.
    """
    data, scales = quantized.data, quantized.scales
    if data.ndim != 2 or data.dtype != np.int8 or scales.shape != (len(data), fmt.groups):
        raise QuantError(
            f"quantized channels are {data.dtype} {data.shape} with scales {scales.shape}, must be int8 "
            f"(N, K) with scales (N, {fmt.groups})"
        )
    parts = data.reshape(len(data), fmt.groups, fmt.group_columns(data.shape[1])).astype(np.float32)
    parts *= scales[:, :, None]
    return parts.reshape(data.shape)


def _round(
    values: NDArray[np.float32], integers: NDArray[np.int8], refine: Literal["none", "search"], first_row: int
) -> NDArray[np.float32]:
    """Fill integers (rows, width) for values of the same shape; returns the scales (rows,)."""
    largest = np.maximum(values.max(axis=1), -values.min(axis=1))
    check_values(values, largest, "float32", first_row)
    scales: NDArray[np.float32] = round_scales(largest / np.float32(TOP), "float32")
    work = np.empty_like(values)
    if refine == "search":
        scales = _searched(values, scales, work)
    _levels(values, scales, work)
    np.copyto(integers, work, casting="unsafe")
    return scales


def _levels(values: NDArray[np.float32], scales: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Whole numbers -TOP..TOP, the nearest to values / scales."""
    np.divide(values, divisors(scales)[:, None], out=out)
    np.rint(out, out=out)
    np.clip(out, np.float32(-TOP), np.float32(TOP), out=out)


def _searched(
    values: NDArray[np.float32], plain: NDArray[np.float32], work: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Per row, the scale of least squared error among the plain one and narrower ones (rows,)."""
    steps = divisors(plain)
    places = values / steps[:, None]  # in steps, so that no magnitude overflows
    best, least = np.ones_like(plain), _error(places, np.ones_like(plain), work)
    for width in WIDTHS:
        factors = np.full_like(plain, width)
        error = _error(places, factors, work)
        better = error < least
        best[better], least[better] = factors[better], error[better]
    return round_scales(plain * best, "float32")


def _error(
    places: NDArray[np.float32], factors: NDArray[np.float32], work: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Squared error (rows,) of places rounded with these scales."""
    _levels(places, factors, work)
    work *= factors[:, None]
    work -= places
    error: NDArray[np.float32] = np.vecdot(work, work)
    return error
