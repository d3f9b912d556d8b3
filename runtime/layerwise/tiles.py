"""The work of `expansion` in numpy: fields of block-quantized weights become 8-bit integers.

In: a tile of channels as a bundle stores it. Out: int8 (K, n) and the channels' scales; the arithmetic is
told in `blocks`. The same as `_expansion.c`, bit for bit, where that could not be compiled. Knows nothing of
layers and threads.

It is fast in numpy because everything happens in tiles that stay in a core's cache; because the transposition
moves eight bytes at a time; and because bytes are never widened or narrowed: after the transposition two
channels lie side by side, so a 16-bit lane holds a byte of each. The even channel's result is the high byte
of its lane, moved down, the odd one's the high byte where it is, and both together are the two bytes to be
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

TILE_ROWS = 1024
"""Channels at once: what numpy's innermost loops run over."""
TILE_BYTES = 512
"""Stored bytes of a channel at once: half a megabyte, which fits a core's cache beside two tiles of lanes.
Smaller ones are no faster on one thread, and on two they take the interpreter's lock from each other."""
_ONE = 256
"""Block scales are multiples of the channel's scale divided by this."""


def expand_tile(
    data: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    weights: NDArray[np.int8],
    channel_scales: NDArray[np.float32],
    bits: int,
) -> None:
    """Expand some channels; a channel of zeros has the scale 0.

    Args:
        data: (n, blocks, block bytes), n at most TILE_ROWS.
        scales: (n, blocks), of the blocks.
        zero_points: (n, bytes), or None for symmetric formats.
        weights: (K, n), written; neighbouring channels lie side by side.
        channel_scales: (n,), written.
        bits: 4 or 8, of a stored field.
    """
    factors, offsets = _terms(scales, zero_points, channel_scales, bits)
    channels, count, size = data.shape
    block_size = size * 8 // bits
    step = max(1, TILE_BYTES // size)
    pairs = -(-channels // 2)
    turned = np.zeros((step * size, 2 * pairs), np.uint8)
    lanes = np.empty((2, step, size, pairs), np.uint16)
    even, odd = ((_lane(factors, side, pairs), _lane(offsets, side, pairs)) for side in (0, 1))
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        stored = data[:, part].reshape(channels, -1)
        transpose_bytes(stored, turned[: stored.shape[1], :channels])  # before the fields are taken apart
        packed = turned[: stored.shape[1]].view(np.uint16).reshape(-1, size, pairs)
        low, high = lanes[:, : len(packed)]
        target = weights[first * block_size : part.stop * block_size]
        for field, (low_field, high_field) in enumerate(_FIELDS[bits]):
            low_field(packed, low)
            _weigh(low, even, part)
            np.right_shift(low, 8, out=low)
            high_field(packed, high)
            _weigh(high, odd, part)
            np.bitwise_and(high, 0xFF00, out=high)
            place = target[field :: 8 // bits]
            _store(low.reshape(-1, pairs)[: len(place)], high.reshape(-1, pairs)[: len(place)], place)


def _weigh(lanes: NDArray[np.uint16], terms: tuple[NDArray[np.uint16], ...], part: slice) -> None:
    """256 times the weights, in place; negative ones in two's complement."""
    factors, offsets = terms
    np.multiply(lanes, factors[part], out=lanes)
    np.add(lanes, offsets[part], out=lanes)


def _store(low: NDArray[np.uint16], high: NDArray[np.uint16], place: NDArray[np.int8]) -> None:
    """Put pairs of bytes together; a last pair may have one byte only."""
    if place.shape[1] == 2 * low.shape[1] and place.strides[0] % 2 == 0:
        np.bitwise_or(low, high, out=place.view(np.uint16))
    else:
        place[:] = np.bitwise_or(low, high).view(np.int8)[:, : place.shape[1]]


def _lane(terms: NDArray[np.int16], side: int, pairs: int) -> NDArray[np.uint16]:
    """(blocks, 1, pairs): those of every second channel, from `side` on; 0 for one that is not there."""
    own = np.zeros((len(terms), 1, pairs), np.uint16)
    chosen = terms[:, side::2]
    own[:, 0, : chosen.shape[1]] = chosen.view(np.uint16)
    return own


_Taker = Callable[[NDArray[np.uint16], NDArray[np.uint16]], Any]
"""Takes a field out of pairs of bytes, into lanes."""


def _bits(shift: int, mask: int) -> _Taker:
    """The field `shift` bits up; a mask of 0 says that nothing is above it."""

    def take(pairs: NDArray[np.uint16], lanes: NDArray[np.uint16]) -> None:
        if shift:
            np.right_shift(pairs, shift, out=lanes)
            pairs = lanes
        if mask:
            np.bitwise_and(pairs, mask, out=lanes)

    return take


_FIELDS: dict[int, tuple[tuple[_Taker, _Taker], ...]] = {
    4: ((_bits(0, 15), _bits(8, 15)), (_bits(4, 15), _bits(12, 0))),  # the earlier weight is in the low half
    8: ((_bits(0, 255), _bits(8, 0)),),
}
"""By bits of a stored field: for every field of a byte, how it is taken from even and from odd channels."""


def _terms(
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    channel_scales: NDArray[np.float32],
    bits: int,
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """R and 128 - z R, (blocks, n) each.

    q R alone may leave 16 bits; the sum is within them, and integers of numpy wrap around.
    """
    zeros, scales = _zeros(scales.shape, zero_points, bits).T, scales.T
    reach = np.maximum(zeros, (1 << bits) - 1 - zeros)  # the largest |q - z| that can be
    channel_scales[:] = (np.abs(scales) * reach).max(axis=0) / np.float32(127)
    safe = np.where(channel_scales > 0, channel_scales, np.float32(1))
    limit = (127 * _ONE + _ONE // 2 - 1) // reach  # rounding up must not leave 8 bits
    factors = np.clip(np.rint(scales / safe * _ONE), -limit, limit).astype(np.int16)
    return factors, _ONE // 2 - zeros * factors


def _zeros(shape: tuple[int, ...], zero_points: NDArray[np.uint8] | None, bits: int) -> NDArray[np.int16]:
    """(n, blocks)."""
    if zero_points is None:
        return np.full(shape, 1 << (bits - 1), np.int16)
    if bits == 8:
        return zero_points[:, : shape[1]].astype(np.int16)
    zeros = np.empty((len(zero_points), 2 * zero_points.shape[1]), np.int16)
    zeros[:, 0::2], zeros[:, 1::2] = zero_points & 15, zero_points >> 4
    return zeros[:, : shape[1]]


def transpose_bytes(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """Make target (K, n) the transpose of source (n, K); both contiguous along their last axis.

    Eight rows are woven into one row of 64-bit integers, and these change places; byte by byte it takes four
    times as long.
    """
    whole = len(source) // 8 * 8
    if whole:
        # A stride that is a power of two would put a whole column into a few lines of the cache.
        woven = np.empty((whole // 8, source.shape[1] + 8, 8), np.uint8)[:, : source.shape[1]]
        for row in range(8):
            woven[:, :, row] = source[row:whole:8]
        np.copyto(target[:, :whole].view(np.uint64), woven.view(np.uint64)[:, :, 0].T)
    if whole < len(source):
        target[:, whole:] = source[whole:].T
