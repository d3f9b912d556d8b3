"""How rows of a weight become integers: by plain rounding, by search, or by what its inputs are.

In: a `Weight` of the plan, which names format and refinement. Out: a function on rows, ready before the first
of them is read. Knows nothing of files and graphs, and nothing of how inputs are come by.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError
from autoglm_edge.export.calibrate.gram import Gram
from autoglm_edge.export.graphs.plan import Weight
from autoglm_edge.quantize.channels import ChannelFormat, QuantizedChannels, quantize_channels
from autoglm_edge.quantize.formats import BlockFormat, Quantized, ScaleDtype
from autoglm_edge.quantize.gptq import GptqFactor, factor, gptq_rows
from autoglm_edge.quantize.refine import search_rows
from autoglm_edge.quantize.rounding import quantize_rows

RowsToIntegers = Callable[[NDArray[np.float32]], Quantized | QuantizedChannels]
"""Float32 rows (n, K) to integers. Rows do not depend on each other; called from several threads at once."""


class Quantizer(Protocol):
    """What the writer asks for integers."""

    def prepare(self, weight: Weight) -> RowsToIntegers:
        """Make ready for the rows of a weight; called once per weight, in the order of the data file.

        Raises:
            ExportError: the plan cannot be carried out, or a calibration fails.
            QuantError: a calibration is of no use.
        """
        ...


class Inputs(Protocol):
    """What knows the inputs of matrices; `calibration.Calibration` does."""

    def take(self, name: str) -> Gram:
        """The Gram matrix of a matrix's input, once, whatever the matrix is cut into."""
        ...


class RecipeQuantizer:
    """Does what the refinement of each weight says."""

    def __init__(self, inputs: Inputs | None = None) -> None:
        """`inputs` is needed for weights that are refined by gptq."""
        self._inputs = inputs
        self._last: tuple[str, weakref.ref[Gram], GptqFactor] | None = None

    def prepare(self, weight: Weight) -> RowsToIntegers:
        """See `Quantizer`."""
        if isinstance(weight.quant, ChannelFormat):
            if weight.refine == "gptq":
                raise ExportError(f"the plan for {weight.source} has a scale per channel refined by gptq")
            return partial(quantize_channels, fmt=weight.quant, refine=weight.refine)
        fmt, scale_dtype = _format(weight)
        if weight.refine == "none":
            return partial(quantize_rows, fmt=fmt, scale_dtype=scale_dtype)
        if weight.refine == "search":
            return partial(search_rows, fmt=fmt, scale_dtype=scale_dtype)
        return partial(gptq_rows, fmt=fmt, factor=self._factor(weight), scale_dtype=scale_dtype)

    def _factor(self, weight: Weight) -> GptqFactor:
        matrix = weight.matrix
        if self._inputs is None:
            raise ExportError(f"{matrix} is to be refined by gptq, but there is no calibration set")
        if self._last is None or self._last[0] != matrix:  # slices of one matrix follow one another
            gram = self._inputs.take(matrix)
            known = self._last[2] if self._last and self._last[1]() is gram else None  # q, k, v: one input
            self._last = None  # not two factors at once
            self._last = (matrix, weakref.ref(gram), known or factor(gram.panels))
        return self._last[2]


def _format(weight: Weight) -> tuple[BlockFormat, ScaleDtype]:
    if not isinstance(weight.quant, BlockFormat):
        raise ExportError(f"the plan for {weight.source} says quantize, but names no format")
    dtype = weight.pieces[1].dtype
    if dtype not in ("float32", "float16"):
        raise ExportError(f"the plan for {weight.source} stores scales as {dtype}; they are floats")
    return weight.quant, dtype
