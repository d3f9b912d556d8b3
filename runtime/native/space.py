"""Memory for the tokens of a piece of a prompt on their way through the layers.

In: widths, a number of tokens and of keys. Out: arrays, used by one layer after another. Knows nothing of
what is computed in them; the layout of tiles is told in kernels.h.
"""

from __future__ import annotations

import numpy as np

from autoglm_edge.runtime.manifest import Geometry

from .unit import kernels
from .weights import Widths

_ROW_TILE, _DEPTH_TILE = 32, 64


class Space:
    """Memory for T tokens on their way through a layer, used by one layer after another.

    Attributes:
        stream: (T, C), what layers take and give.
        branch: (T, C).
        projected: (T, queries, keys and values).
        attended: (T, H D).
        inner: (T, inner), where the two before were.
        row_scales: (T,).
    """

    def __init__(self, widths: Widths, tokens: int, keys: int) -> None:
        """Reserve it.

        Args:
            widths: of the layers.
            tokens: T.
            keys: past and new tokens.
        """
        self.stream = np.empty((tokens, widths.hidden), np.float32)
        self.branch = np.empty_like(self.stream)
        wide = np.empty(tokens * max(widths.projected + widths.attended, widths.inner), np.float32)
        split = tokens * widths.projected
        self.projected = wide[:split].reshape(tokens, -1)
        self.attended = wide[split : split + tokens * widths.attended].reshape(tokens, -1)
        self.inner = wide[: tokens * widths.inner].reshape(tokens, -1)
        self.row_scales = np.empty(tokens, np.float32)
        deepest = _padded(max(widths.hidden, widths.attended, widths.inner), _DEPTH_TILE)
        self.tiles = np.empty(_padded(tokens, _ROW_TILE) * deepest, np.int8)
        size = kernels.packed_size(keys, widths.head_dim)
        self.packed = np.empty((widths.kv_heads, size), np.uint16)


def space_bytes(shape: Geometry, inner: int, tokens: int, keys: int) -> int:
    """What a `Space` takes, for forecasts.

    Args:
        shape: of the model.
        inner: between gate and down.
        tokens: of a piece of a prompt.
        keys: of the whole prompt.
    """
    attended, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    floats = 2 * shape.hidden + max(2 * attended + 2 * kv, inner) + 1
    tiles = _padded(tokens, _ROW_TILE) * _padded(max(shape.hidden, attended, inner), _DEPTH_TILE)
    packed = shape.kv_heads * _padded(keys, 128) * _padded(shape.head_dim, 32) * 8  # see attention.c
    return tokens * 4 * floats + tiles + packed


def _padded(value: int, step: int) -> int:
    return -(-value // step) * step
