"""The head: hidden states in, a score for every id of the vocabulary out.

In: a `WeightBook`, width and vocabulary. Out: ONNX nodes, and weights in the book: one matrix, or where that
has many rows, slices of it with a product each and one Concat behind. Scores are the same to the bit, as each
row of a matrix is a sum of its own. Knows nothing of the decoder before it.

Why slices: onnxruntime brings each matrix into its kernels' own layout when it loads, in a buffer of its own,
also where the result is then found in a file and mapped. The head of the 9B has five times the rows of the
next matrix, so it alone would decide what loading needs of memory.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.export.source.shapes import HEAD

from .nn import Linear, WeightBook
from .plan import RowSlice, row_slices

NAME = HEAD.removesuffix(".weight")

SLICE_ROWS = 16_384
"""Most rows of one product: a slice of the 9B's head, 62 MB at 8 bits, is then about as
large as the largest matrix of a layer at 4."""


class Head:
    """Products of slices of the rows, joined along the vocabulary. One slice is the head as it is."""

    def __init__(self, book: WeightBook, columns: int, rows: int, source: str | None = None) -> None:
        """Plan the weights.

        Args:
            book: takes the plan.
            columns: width of the hidden states.
            rows: ids of the vocabulary.
            source: checkpoint tensor, when it is not the head's own.
        """
        self._dtype = book.dtype
        slices = row_slices(rows, SLICE_ROWS)
        self._products = []
        for number, own in enumerate(slices):
            stem, part = (f"{NAME}.{number}", RowSlice(HEAD, own.start, rows)) if slices[1:] else (NAME, None)
            linear = Linear(book, stem, columns, len(own), source=source, part=part)
            linear._set_name(stem)
            self._products.append(linear)

    def __call__(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """(..., columns) -> (..., rows) float32."""
        scores = [self._scores(op, product, x) for product in self._products]
        return op.Concat(*scores, axis=-1) if scores[1:] else scores[0]

    def _scores(self, op: OpBuilder, product: Linear, x: ir.Value) -> ir.Value:
        """Each is made float32 by itself: CPU kernels give that anyway, and would round only for a Concat."""
        y: ir.Value = product(op, x)
        return y if self._dtype == "float32" else op.Cast(y, to=ir.DataType.FLOAT)
