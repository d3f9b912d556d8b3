"""Building blocks of the graphs: layers that know their checkpoint names and how their weights are stored.

In: a `WeightBook` (recipe and dtype) and checkpoint names. Out: ONNX nodes, and one `Weight` per
checkpoint tensor in the book. Knows nothing of the model family, of files or of weight values.

A module tree mirrors the checkpoint, so the initializers of a graph carry the checkpoint's tensor names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder, nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.quantize.channels import ChannelFormat
from autoglm_edge.quantize.formats import BlockFormat
from autoglm_edge.quantize.recipe import Recipe

from .integers import Inputs, channel_pieces, product
from .plan import IR_DTYPES as IR_DTYPES
from .plan import Action, Dtype, PartPlan, Piece, RowSlice, Weight, borrow, lay_out

OPSET = 23
"""First opset with RotaryEmbedding and RMSNormalization."""

CONTRIB = {"_domain": "com.microsoft", "_version": 1}


Signature = list[tuple[str, ir.DataType, Sequence[int | str]]]
"""Name, dtype and shape of each graph input."""

Outputs = list[tuple[str, ir.Value, ir.DataType, Sequence[int | str]]]
"""Name, value, dtype and shape of each graph output."""


class WeightBook:
    """Collects what a graph needs from the checkpoint, in the order of the data file.

    Attributes:
        recipe: decides the format of each matrix.
        dtype: of hidden states, float weights and scales.
        inputs: of matrices, as bytes, shared among those with the same input.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dtype: Dtype = recipe.activations
        self.weights: list[Weight] = []
        self.inputs = Inputs()

    def add(self, weight: Weight) -> None:
        """Note one checkpoint tensor."""
        self.weights.append(weight)

    def parameter(self, piece: Piece) -> nn.Parameter:
        """The graph's side of a piece; its name is completed by the module tree."""
        return nn.Parameter(piece.shape, dtype=IR_DTYPES[piece.dtype], name=piece.name.rpartition(".")[2])


class Linear(nn.Module):
    """y = x @ W.T + b, with W in the format that the recipe gives it.

    Float weights are stored transposed, (columns, rows), and used by MatMul; those in blocks row by row for
    MatMulNBits; those with a scale per channel transposed for MatMulIntegerToFloat.
    """

    def __init__(
        self,
        book: WeightBook,
        stem: str,
        columns: int,
        rows: int,
        *,
        bias: bool = False,
        source: str | None = None,
        permute: tuple[int, ...] | None = None,
        part: RowSlice | None = None,
    ) -> None:
        """Plan the weights.

        Args:
            book: takes the plan.
            stem: module path; the initializers are called `stem.weight...`.
            columns: width of x.
            rows: width of y.
            bias: whether the checkpoint has `stem.bias`.
            source: checkpoint tensor, when it is not that of the matrix (a tied head).
            permute: axes of the checkpoint tensor before it is seen as (rows, columns).
            part: which rows of a matrix these are; None for all of `stem.weight`.
        """
        super().__init__()
        self.columns, self.rows = columns, rows
        self.inputs = book.inputs
        self.accuracy_level = book.recipe.accuracy_level
        matrix = part.matrix if part else f"{stem}.weight"
        self.format = book.recipe.format_for(matrix)
        if self.format is None:
            pieces: tuple[Piece, ...] = (Piece(f"{stem}.weight", book.dtype, (columns, rows)),)
            self.weight = book.parameter(pieces[0])
        elif isinstance(self.format, ChannelFormat):
            pieces = channel_pieces(f"{stem}.weight", rows, columns, self.format)
            for number, piece in enumerate(pieces):  # data and scales of each group in turn
                setattr(self, f"piece_{number}", book.parameter(piece))
        else:
            pieces = matmul_pieces(f"{stem}.weight", rows, columns, self.format, book.dtype)
            self.weight = book.parameter(pieces[0])
            self.scales = book.parameter(pieces[1])
            self.zero_points = None if self.format.symmetric else book.parameter(pieces[2])
        action: Action = "transpose" if self.format is None else "quantize"
        refine = book.recipe.refinement_for(matrix)
        book.add(Weight(source or matrix, rows, columns, action, pieces, self.format, permute, refine, part))
        self.bias = None
        if bias:
            piece = Piece(f"{stem}.bias", book.dtype, (rows,))
            self.bias = book.parameter(piece)
            book.add(Weight(piece.name, rows=1, columns=rows, action="copy", pieces=(piece,)))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """(..., columns) -> (..., rows)."""
        if self.format is None:
            y = op.MatMul(x, self.weight)
            return y if self.bias is None else op.Add(y, self.bias)
        if isinstance(self.format, ChannelFormat):
            y = None
            for group, part in enumerate(self.inputs.rounded(op, x, self.format.groups)):
                weight, scales = (getattr(self, f"piece_{2 * group + number}") for number in range(2))
                own = product(op, part, weight, scales)
                y = own if y is None else op.Add(y, own)
            return y if self.bias is None else op.Add(y, self.bias)
        return op.MatMulNBits(
            x,
            self.weight,
            self.scales,
            self.zero_points,
            None,
            self.bias,
            K=self.columns,
            N=self.rows,
            bits=self.format.field_bits,
            block_size=self.format.block_size,
            accuracy_level=self.accuracy_level,
            **CONTRIB,
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32; optionally of a sum, which it then returns too."""

    def __init__(self, book: WeightBook, stem: str, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        piece = Piece(f"{stem}.weight", book.dtype, (width,))
        self.weight = book.parameter(piece)
        book.add(Weight(piece.name, rows=1, columns=width, action="copy", pieces=(piece,)))

    def forward(self, op: OpBuilder, x: ir.Value, residual: ir.Value | None = None) -> Any:
        """norm(x), or (norm(x + residual), x + residual)."""
        if residual is None:
            return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.epsilon, stash_type=1)
        normed, _, _, total = op.SkipSimplifiedLayerNormalization(
            x, residual, self.weight, epsilon=self.epsilon, _outputs=4, **CONTRIB
        )
        return normed, total


class LayerNorm(nn.Module):
    """Mean and variance normalisation with weight and bias."""

    def __init__(self, book: WeightBook, stem: str, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        pieces = [Piece(f"{stem}.{name}", book.dtype, (width,)) for name in ("weight", "bias")]
        self.weight, self.bias = (book.parameter(piece) for piece in pieces)
        for piece in pieces:
            book.add(Weight(piece.name, rows=1, columns=width, action="copy", pieces=(piece,)))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Same shape out as in."""
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.epsilon, stash_type=1)


def silu(op: OpBuilder, x: ir.Value) -> ir.Value:
    """X * sigmoid(x), as one node."""
    return op.QuickGelu(x, alpha=1.0, **CONTRIB)


def matmul_pieces(name: str, rows: int, columns: int, format: BlockFormat, dtype: Dtype) -> tuple[Piece, ...]:
    """Data (N, blocks, bytes), scales (N, blocks) and zero points (N, bytes), as MatMulNBits wants them."""
    blocks = format.blocks(columns)
    pieces = [
        Piece(f"{name}_data", "uint8", (rows, blocks, format.block_bytes)),
        Piece(f"{name}_scales", dtype, (rows, blocks)),
    ]
    if not format.symmetric:
        pieces.append(Piece(f"{name}_zero_points", "uint8", (rows, format.zero_point_bytes(columns))))
    return tuple(pieces)


def constant(op: OpBuilder, value: NDArray[np.float32]) -> ir.Value:
    """A small array inside the graph file, named by its order."""
    name = f"constant_{len(op.builder.graph.initializers)}"
    return op.builder.initializer(ir.tensor(np.ascontiguousarray(value)), name=name, qualify=False)


def build_part(
    name: str,
    book: WeightBook,
    inputs: Signature,
    trace: Callable[[GraphBuilder, OpBuilder, list[ir.Value]], Outputs],
    lender: PartPlan | None = None,
) -> PartPlan:
    """Trace a graph and lay out its weights.

    Args:
        name: of the part.
        book: filled by the modules that `trace` calls.
        inputs: name, dtype, shape of each graph input.
        trace: makes the nodes; returns name, value, dtype, shape of each graph output.
        lender: part whose data file is read for weights that are stored there in the same form.
    """
    graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET, "com.microsoft": 1})
    builder = GraphBuilder(graph)
    values = [builder.input(label, dtype=dtype, shape=list(shape)) for label, dtype, shape in inputs]
    for label, value, dtype, shape in trace(builder, builder.op, values):
        builder.add_output(value, label)
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(list(shape))
    for node in graph:
        node.metadata_props.clear()  # the builder's own notes; node names already tell the module path
    borrowed, own = borrow(book.weights, lender) if lender else ((), tuple(book.weights))
    weights = lay_out(own)
    planned = {piece.name for weight in (*weights, *borrowed) for piece in weight.pieces}
    missing = {label for label, value in graph.initializers.items() if value.const_value is None} ^ planned
    assert not missing, f"graph {name} and its weight plan disagree about {sorted(missing)[:3]}"
    model = ir.Model(graph, ir_version=11)
    return PartPlan(name, model, weights, borrowed, lender.name if lender and borrowed else None)
