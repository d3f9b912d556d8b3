"""A matrix in block format, as it lies in a bundle (docs/bundle.md, "Quantized layout").

A stored weight is (q - z) s, with a scale s per block. As 8-bit integers of one scale c per channel it is
w = round((q - z) s / c), and c is the least that keeps every possible q within 127. Block scales enter as
multiples of c / 256, so that all of it is 16-bit arithmetic: q R + (128 - z R) >> 8, R = round(256 s / c).
The rounding is that of 8 bits, a small part of what 4 bits lost before. `tiles` and `_expansion.c` do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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

    def channels(self, rows: slice) -> Blocks:
        """Some of them; nothing is copied."""
        zeros = None if self.zero_points is None else self.zero_points[rows]
        return Blocks(self.data[rows], self.scales[rows], zeros, self.columns, self.bits)
