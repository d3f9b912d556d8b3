"""Turns block-quantized weights into 8-bit integers with one scale per channel, for a CPU's int8 units.

In: a matrix as the bundle stores it for MatMulNBits. Out: int8 (K, N), the right side of MatMulInteger, and
float32 scales (N). Knows nothing of layers and graphs.

The work is done by a few compiled loops (`_expansion.c`), or, where the package was installed without a C
compiler, by numpy (`tiles`), which gives the same integers and takes longer.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from . import tiles
from .blocks import Blocks

try:
    from . import _expansion
except ImportError:  # no compiler when the package was installed
    _expansion = None  # type: ignore[assignment]

COMPILED = _expansion is not None
"""Whether the compiled loops are there."""


class ExpandTile(Protocol):
    """What both are."""

    def __call__(
        self,
        data: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zero_points: NDArray[np.uint8] | None,
        weights: NDArray[np.int8],
        channel_scales: NDArray[np.float32],
        bits: int,
        /,
    ) -> None:
        """Expand a tile of channels; see `tiles.expand_tile`."""


def expand(
    blocks: Blocks,
    weights: NDArray[np.int8],
    scales: NDArray[np.float32],
    pool: Executor,
    tasks: int,
    *,
    compiled: bool = COMPILED,
) -> None:
    """Expand a matrix.

    Args:
        blocks: what to expand.
        weights: (K, N), written.
        scales: (N,), written: the float weight is `weights * scales`.
        pool: threads; both kinds let go of the interpreter.
        tasks: pieces of work, as a rule the number of threads.
        compiled: by the compiled loops, which must be there; else by numpy.
    """
    expand_tile: ExpandTile = _expansion.expand_tile if compiled else tiles.expand_tile
    step = tiles.TILE_ROWS * -(-blocks.rows // (tiles.TILE_ROWS * tasks))
    work = [
        pool.submit(_expand_rows, expand_tile, blocks, weights, scales, start, min(start + step, blocks.rows))
        for start in range(0, blocks.rows, step)
    ]
    for piece in work:
        piece.result()


def _expand_rows(
    expand_tile: ExpandTile,
    blocks: Blocks,
    weights: NDArray[np.int8],
    scales: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    for row in range(start, stop, tiles.TILE_ROWS):
        rows = slice(row, min(row + tiles.TILE_ROWS, stop))
        tile = blocks.channels(rows)
        expand_tile(tile.data, tile.scales, tile.zero_points, weights[:, rows], scales[rows], tile.bits)
