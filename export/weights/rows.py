"""Rows of a weight in the checkpoint: whether they are there, and what they hold.

In: a `Weight` of the plan, and the checkpoint's tensors, or what stands before them. Out: float32 rows,
counted from the weight's own first. Knows nothing of what becomes of them.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError
from autoglm_edge.export.graphs.plan import Weight


class Rows(Protocol):
    """What the writer asks of a checkpoint; `tensors.TensorStore` has it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored."""
        ...

    def rows(
        self, name: str, start: int, stop: int, *, permute: tuple[int, ...] | None = None
    ) -> NDArray[np.float32]:
        """Rows start..stop of the (permuted) tensor seen as (first dimension, product of the others)."""
        ...

    def release(self, name: str) -> None:
        """Drop mapped pages of a tensor that is done with."""
        ...


def source_matrix(weight: Weight, shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) in which the checkpoint hands out a weight whose tensor has this shape.

    Raises:
        ExportError: the plan expects another shape.
    """
    if weight.permute is not None:
        if sorted(weight.permute) != list(range(len(shape))):
            raise ExportError(
                f"{weight.source} has the shape {shape}, which cannot be permuted by {weight.permute}"
            )
        shape = tuple(shape[axis] for axis in weight.permute)
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    fits = rows * columns == weight.rows * weight.columns
    if weight.action != "copy":  # a copy keeps the order of values, so only their number counts
        fits = (rows, columns) == (weight.matrix_rows, weight.columns)
    if not fits:
        raise ExportError(
            f"{weight.source} is {rows} x {columns} in the checkpoint, the graph needs {weight.matrix_rows} "
            f"x {weight.columns}; the checkpoint does not belong to its config.json"
        )
    return (rows if weight.part is None else weight.rows), columns


def read_rows(store: Rows, weight: Weight, start: int, stop: int) -> NDArray[np.float32]:
    """Rows start..stop of a weight, (n, columns); of a slice, from its own first row."""
    first = weight.first_row
    return store.rows(weight.source, first + start, first + stop, permute=weight.permute)
