"""Turns block-quantized weights into 8-bit integers with one scale per channel, for a CPU's int8 units.

In: a matrix as the bundle stores it for MatMulNBits (docs/bundle.md, "Quantized layout"). Out: int8 (K, N),
the right side of MatMulInteger, and float32 scales (N). Knows nothing of layers and graphs.

A stored weight is (q - z) s, with a scale s per block. As 8-bit integers of one scale c per channel it is
w = round((q - z) s / c), and c is the least that keeps every possible q within 127. Block scales enter as
multiples of c / 256, so that the whole is 16-bit arithmetic: (q - z) R + 128 >> 8 with R = round(256 s / c).
The rounding is that of 8 bits, a small part of what 4 bits lost before.

It runs at memory-copy speeds in numpy because everything happens in tiles that stay in a core's cache, on
16-bit lanes, and because the transposition moves eight bytes at a time.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_ROWS = 256
"""Channels at once: what numpy's innermost loops run over."""
TILE_BYTES = 1024
"""Stored bytes of a channel at once: 512 kB of 16-bit lanes, half of a core's cache. Smaller tiles are no
faster on one thread, and on two they take the interpreter's lock from each other."""
_ONE = 256
"""Block scales are multiples of the channel's scale divided by this."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix of N channels and K inputs in block format, as it lies in a bundle.

    Attributes:
        data: (N, blocks, block bytes) uint8.
        scales: (N, blocks) float32.
        zero_points: (N, bytes) uint8, or None for symmetric formats.
        columns: K; the last block may be padded.
        bits: 4 or 8, of a stored field.
    """

    data: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    columns: int
    bits: int

    @property
    def rows(self) -> int:
        """N."""
        return int(self.data.shape[0])

    @property
    def block_size(self) -> int:
        """Weights per scale."""
        return int(self.data.shape[2]) * 8 // self.bits


def expand(
    blocks: Blocks, weights: NDArray[np.int8], scales: NDArray[np.float32], pool: Executor, tasks: int
) -> None:
    """Expand a matrix.

    Args:
        blocks: what to expand.
        weights: (K, N), written.
        scales: (N,), written: the float weight is `weights * scales`.
        pool: threads; numpy lets go of the interpreter inside.
        tasks: pieces of work, as a rule the number of threads.
    """
    tiles = -(-blocks.rows // TILE_ROWS)
    step = TILE_ROWS * -(-tiles // tasks)
    work = [
        pool.submit(_expand_rows, blocks, weights, scales, start, min(start + step, blocks.rows))
        for start in range(0, blocks.rows, step)
    ]
    for piece in work:
        piece.result()


def _expand_rows(
    blocks: Blocks, weights: NDArray[np.int8], scales: NDArray[np.float32], start: int, stop: int
) -> None:
    count, size = blocks.data.shape[1:]
    fields = 8 // blocks.bits
    step = max(1, TILE_BYTES // size)
    turned = np.empty((step * size, TILE_ROWS), np.uint8)
    lanes = np.empty((step, size, TILE_ROWS), np.int16)
    for row in range(start, stop, TILE_ROWS):
        rows = slice(row, min(row + TILE_ROWS, stop))
        factors, offsets, scales[rows] = _factors(blocks, rows)
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            data = blocks.data[rows, part].reshape(rows.stop - row, -1)
            packed = turned[: data.shape[1], : len(data)]
            transpose_bytes(data, packed)  # before the fields are taken apart: half as many bytes
            cut = packed.reshape(-1, size, len(data))
            tile = lanes[: len(cut), :, : len(data)]
            target = weights[first * blocks.block_size : part.stop * blocks.block_size, rows]
            for field in range(fields):
                np.copyto(tile, _field(cut, blocks.bits, field))
                np.multiply(tile, factors[part, None], out=tile)
                np.add(tile, offsets[part, None], out=tile)
                np.right_shift(tile, 8, out=tile)
                place = target[field::fields]
                np.copyto(place, tile.reshape(-1, len(data))[: len(place)], casting="unsafe")


def _field(data: NDArray[np.uint8], bits: int, field: int) -> NDArray[Any]:
    """One field of every byte; the earlier weight is in the low half."""
    if bits == 8:
        return data
    return np.right_shift(data, 4) if field else np.bitwise_and(data, 15)


def _zero_points(blocks: Blocks, rows: slice) -> NDArray[np.int16]:
    """(n, blocks)."""
    count = blocks.data.shape[1]
    if blocks.zero_points is None:
        return np.full((rows.stop - rows.start, count), 1 << (blocks.bits - 1), np.int16)
    packed = blocks.zero_points[rows]
    if blocks.bits == 8:
        return packed[:, :count].astype(np.int16)
    zeros = np.empty((len(packed), 2 * packed.shape[1]), np.int16)
    zeros[:, 0::2], zeros[:, 1::2] = packed & 15, packed >> 4
    return zeros[:, :count]


def _factors(blocks: Blocks, rows: slice) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.float32]]:
    """R and 128 - z R, (blocks, n) each, and the channels' scales (n,); a channel of zeros has the scale 0.

    q R alone may leave 16 bits; the sum is within them, and integers of numpy wrap around.
    """
    zeros = _zero_points(blocks, rows).T
    scales = blocks.scales[rows].T.astype(np.float32)
    reach = np.maximum(zeros, (1 << blocks.bits) - 1 - zeros)  # the largest |q - z| that can be
    channel: NDArray[np.float32] = (np.abs(scales) * reach).max(axis=0) / np.float32(127)
    safe = np.where(channel > 0, channel, np.float32(1))
    limit = (127 * _ONE + _ONE // 2 - 1) // reach  # rounding up must not leave 8 bits
    factors = np.clip(np.rint(scales / safe * _ONE), -limit, limit).astype(np.int16)
    return factors, _ONE // 2 - zeros * factors, channel


def transpose_bytes(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """Make target (K, n) the transpose of source (n, K); both contiguous along their last axis.

    Eight rows are woven into one row of 64-bit integers, and these change places; byte by byte it takes four
    times as long.
    """
    whole = len(source) // 8 * 8
    if whole:
        woven = np.empty((whole // 8, source.shape[1], 8), np.uint8)
        for row in range(8):
            woven[:, :, row] = source[row:whole:8]
        np.copyto(target[:, :whole].view(np.uint64), woven.view(np.uint64)[:, :, 0].T)
    if whole < len(source):
        target[:, whole:] = source[whole:].T
