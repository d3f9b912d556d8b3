"""What an export will write: which checkpoint tensor becomes which bytes, decided before a byte is read.

In: shapes and names, from the graph builders. Out: `PartPlan`s that the writer carries out and the
estimate adds up. Knows nothing of files, checkpoints or number formats beyond their sizes.

A graph builder asks for a `Weight` per checkpoint tensor, or several for slices of its rows; each weight says
how it is made (`action`) and which pieces (initializers of the graph) come out of it. Offsets are laid out
here, page aligned, so that a runtime can map every large piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from autoglm_edge.errors import ExportError
from autoglm_edge.quantize.channels import ChannelFormat, WeightFormat
from autoglm_edge.quantize.rule import Refinement

ALIGNMENT = 4096
"""Offset of each piece in the data file, in bytes: one page, so that pieces can be mapped alone."""

SLICE_STEP = 64
"""Rows of every slice but the last are a multiple of this, so that kernels which take columns of a product in
groups, the widest by 64, meet a part of a group where the whole matrix has one, and nowhere else."""

Action = Literal["copy", "transpose", "quantize"]
Dtype = Literal["float32", "float16", "uint8", "int8"]
IR_DTYPES: dict[str, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
}
ITEM_BYTES = {name: int(dtype.itemsize) for name, dtype in IR_DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """One initializer of a graph, stored in the part's data file.

    Attributes:
        name: initializer name.
        dtype: how it is stored.
        shape: as the graph sees it.
        offset: byte offset in the data file; -1 until laid out.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int = -1

    @property
    def size_bytes(self) -> int:
        """Bytes in the data file, padding not counted."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class RowSlice:
    """Which rows of a matrix a weight is, where one matrix is stored as several.

    Attributes:
        matrix: name of the whole one in the graph, as recipes know it.
        first: the first row, counted in the whole one.
        total: rows of the whole one.
    """

    matrix: str
    first: int
    total: int

    def __post_init__(self) -> None:
        """Refuse rows that are none of the matrix."""
        if not 0 <= self.first < self.total:
            raise ExportError(
                f"a slice of {self.matrix} begins at row {self.first} of {self.total}; cut it inside"
            )


@dataclass(frozen=True)
class Weight:
    """One checkpoint tensor, or a slice of its rows, and what becomes of it.

    Attributes:
        source: tensor name in the checkpoint.
        rows: the tensor seen as a matrix, first dimension; of the slice, if it is one.
        columns: product of its other dimensions.
        action: "copy" keeps row-major order and casts; "transpose" stores (columns, rows);
            "quantize" makes pieces (data, scales[, zero points]) row by row, or for a format per channel
            (data, scales) of each group, data as (columns of the group, rows).
        pieces: outputs. quantize: data uint8, scales in the activation dtype, and uint8 zero points if it is
            asymmetric; per channel data int8 and scales float32.
        quant: the format if action is "quantize".
        permute: axes order applied to the checkpoint tensor before it is seen as a matrix, or None
            (the vision downsample convolution, whose kernel must lie patch first).
        refine: how the integers are chosen if action is "quantize".
        part: which rows of its matrix it is, or None if it is all of them. A copy is never cut.
    """

    source: str
    rows: int
    columns: int
    action: Action
    pieces: tuple[Piece, ...]
    quant: WeightFormat | None = None
    permute: tuple[int, ...] | None = None
    refine: Refinement = "none"
    part: RowSlice | None = None

    def __post_init__(self) -> None:
        """Refuse a slice that cannot be read as one."""
        part = self.part
        if part is not None and (self.action == "copy" or part.first + self.rows > part.total):
            raise ExportError(
                f"the plan for {self.source} cuts rows {part.first} to {part.first + self.rows} out of "
                f'{part.total} with action "{self.action}"; rows must be there, and a copy is whole'
            )

    @property
    def name(self) -> str:
        """Its name in the graph; the checkpoint's own, but for a tied head and for slices."""
        return self.pieces[0].name.removesuffix("_data")

    @property
    def matrix(self) -> str:
        """Name of the matrix in the graph, as recipes and calibrations know it: of all slices the same."""
        return self.name if self.part is None else self.part.matrix

    @property
    def first_row(self) -> int:
        """The first of its rows, counted in the whole matrix."""
        return 0 if self.part is None else self.part.first

    @property
    def matrix_rows(self) -> int:
        """Rows of the whole matrix."""
        return self.rows if self.part is None else self.part.total

    @property
    def is_turned(self) -> bool:
        """Whether rows of the checkpoint become columns of a piece."""
        return self.action == "transpose" or isinstance(self.quant, ChannelFormat)

    @property
    def size_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.size_bytes for piece in self.pieces)


@dataclass(frozen=True)
class PartPlan:
    """One graph with its data file.

    Attributes:
        name: decoder, embedding, vision or prefill.
        model: the graph, initializers without values.
        weights: in the order of the data file.
        borrowed: weights that lie in the data file of another part, with their places there.
        lender: name of that part; None if nothing is borrowed.
    """

    name: str
    model: ir.Model
    weights: tuple[Weight, ...]
    borrowed: tuple[Weight, ...] = ()
    lender: str | None = None

    @property
    def graph_file(self) -> str:
        """File name of the graph."""
        return f"{self.name}.onnx"

    @property
    def data_file(self) -> str:
        """File name of the weights."""
        return data_file(self.name)

    @property
    def data_bytes(self) -> int:
        """Size of the data file."""
        return max((p.offset + p.size_bytes for w in self.weights for p in w.pieces), default=0)

    @property
    def is_integer(self) -> bool:
        """Whether its products are those of `integers.py`, and none is one of blocks."""
        operators = {node.op_type for node in self.model.graph}
        return "MatMulIntegerToFloat" in operators and "MatMulNBits" not in operators

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights, padding between pieces not counted."""
        return sum(weight.size_bytes for weight in self.weights)


def data_file(part: str) -> str:
    """File name of the weights of a part."""
    return f"{part}.onnx.data"


def borrow(weights: Iterable[Weight], lender: PartPlan) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """Tell weights that another part stores in the very same form from those that it does not.

    Returns:
        The lender's own, with their places, and the others.
    """
    stored = {_without_places(weight): weight for weight in lender.weights}
    borrowed, own = [], []
    for weight in weights:
        found = stored.get(_without_places(weight))
        if found is None:
            own.append(weight)
        else:
            borrowed.append(found)
    return tuple(borrowed), tuple(own)


def by_matrix(weights: Iterable[Weight]) -> dict[str, tuple[Weight, ...]]:
    """Slices of one matrix together, in their order; what is not cut stands alone."""
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.matrix, []).append(weight)
    return {name: tuple(slices) for name, slices in found.items()}


def row_slices(rows: int, most: int) -> tuple[range, ...]:
    """Cut rows into as few slices as can be, nearly equal, each but the last a multiple of SLICE_STEP.

    Args:
        rows: from 1.
        most: rows of a slice, a multiple of SLICE_STEP.
    """
    assert most > 0 and most % SLICE_STEP == 0, f"slices of {most} rows cannot be cut by {SLICE_STEP}"
    count = -(-rows // most)
    ends = [-(-number * rows // (count * SLICE_STEP)) * SLICE_STEP for number in range(1, count)]
    return tuple(range(start, end) for start, end in zip([0, *ends], [*ends, rows], strict=True))


def _without_places(weight: Weight) -> Weight:
    return replace(weight, pieces=tuple(replace(piece, offset=-1) for piece in weight.pieces))


def lay_out(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """Give every piece its place, in order, each at a multiple of ALIGNMENT."""
    placed: list[Weight] = []
    end = 0
    for weight in weights:
        pieces: list[Piece] = []
        for piece in weight.pieces:
            start = math.ceil(end / ALIGNMENT) * ALIGNMENT
            pieces.append(replace(piece, offset=start))
            end = start + piece.size_bytes
        placed.append(replace(weight, pieces=tuple(pieces)))
    return tuple(placed)
