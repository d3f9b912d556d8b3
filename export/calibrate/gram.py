"""The Gram matrix of what a matrix is multiplied with: X^T X over all tokens, as panels on its diagonal.

In: inputs X (T, K), a few rows at a time. Out: square panels of at most PANEL columns, which is what
`quantize.gptq` takes: memory is 4 K min(K, PANEL) bytes and not 4 K². Knows nothing of layers and tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError

PANEL = 4096
"""Columns of a panel. A whole width of 4096 is one; an inner width of 13,696 is cut into four."""


class Gram:
    """Sums up inputs. One may serve several layers that have the same input.

    Attributes:
        panels: float32, square, from the first column to the last.
        tokens: rows that were added.
    """

    def __init__(self, columns: int) -> None:
        self.panels = [
            np.zeros((size, size), np.float32)
            for size in (min(PANEL, columns - start) for start in range(0, columns, PANEL))
        ]
        self.tokens = 0

    def add(self, inputs: NDArray[np.float32]) -> None:
        """Add rows (n, K)."""
        start = 0
        for panel in self.panels:
            part = inputs[:, start : start + len(panel)]
            with np.errstate(over="ignore", invalid="ignore"):  # `check` tells, by name
                panel += part.T @ part  # numpy sees the transpose and computes half of it
            start += len(panel)
        self.tokens += len(inputs)

    def check(self, name: str) -> None:
        """Refuse sums that are no numbers.

        Raises:
            ExportError: the float model gave inf or nan.
        """
        if not all(np.isfinite(panel.diagonal()).all() for panel in self.panels):
            raise ExportError(
                f"the calibration gives inf or nan at the input of {name}; the checkpoint is damaged, or the "
                "prompts are far from what it can read"
            )


def gram_bytes(columns: int) -> int:
    """Bytes of the panels of a Gram matrix."""
    sizes = (min(PANEL, columns - start) for start in range(0, columns, PANEL))
    return sum(4 * size * size for size in sizes)
