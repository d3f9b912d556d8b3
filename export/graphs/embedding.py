"""The embedding graph: token ids and image features in, hidden states out.

    input_ids       (B, T) int64
    image_features  (N, C) activations dtype; rows replace the image placeholders in reading order; N may be 0
    → inputs_embeds (B, T, C)

A quantized table is read row by row as tokens ask for it; no float copy of it ever exists.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
from onnxscript import GraphBuilder, nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.errors import ExportError
from autoglm_edge.export.source.checkpoint import ModelConfig
from autoglm_edge.quantize.channels import ChannelFormat
from autoglm_edge.quantize.formats import BlockFormat
from autoglm_edge.quantize.recipe import Recipe

from .nn import CONTRIB, IR_DTYPES, Outputs, Signature, WeightBook, build_part, matmul_pieces
from .plan import Action, Dtype, PartPlan, Piece, Weight

TABLE = "model.language_model.embed_tokens"


class Table(nn.Module):
    """The embedding table, float or block-quantized along C."""

    def __init__(self, book: WeightBook, vocab: int, hidden: int) -> None:
        super().__init__(TABLE)
        name = f"{TABLE}.weight"
        format = book.recipe.format_for(name)
        if isinstance(format, ChannelFormat):  # Recipe.check_names says it to users
            raise ExportError(f"{name} is looked up row by row, which a scale per channel is not made for")
        self.format = format
        self.scales = self.zero_points = None
        if self.format is None:
            pieces: tuple[Piece, ...] = (Piece(name, book.dtype, (vocab, hidden)),)
        else:
            pieces = gather_pieces(name, vocab, hidden, self.format, book.dtype)
            self.scales = book.parameter(pieces[1])
            self.zero_points = None if self.format.symmetric else book.parameter(pieces[2])
        self.weight = book.parameter(pieces[0])
        action: Action = "copy" if self.format is None else "quantize"
        refine = book.recipe.refinement_for(name)
        if refine == "gptq":  # rows are looked up and multiplied with nothing: there are no inputs to look at
            refine = "search"
        book.add(Weight(name, vocab, hidden, action, pieces, self.format, refine=refine))

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """(B, T) -> (B, T, C)."""
        if self.format is None:
            return op.Gather(self.weight, ids, axis=0)
        return op.GatherBlockQuantized(
            self.weight,
            ids,
            self.scales,
            self.zero_points,
            bits=self.format.field_bits,
            block_size=self.format.block_size,
            gather_axis=0,
            quantize_axis=1,
            **CONTRIB,
        )


def gather_pieces(name: str, rows: int, columns: int, format: BlockFormat, dtype: Dtype) -> tuple[Piece, ...]:
    """Data (V, bytes), scales (V, blocks) and zero points (V, bytes), as GatherBlockQuantized wants them.

    Unlike MatMulNBits, it does not pad the last block of a row.
    """
    data, scales, *zero_points = matmul_pieces(name, rows, columns, format, dtype)
    return (replace(data, shape=(rows, -(-columns * format.field_bits // 8))), scales, *zero_points)


def plan_embedding(config: ModelConfig, recipe: Recipe) -> PartPlan:
    """Graph and weight plan of the embedding."""
    text = config.text
    book = WeightBook(recipe)
    table = Table(book, text.vocab, text.hidden)
    dtype = IR_DTYPES[book.dtype]
    inputs: Signature = [
        ("input_ids", ir.DataType.INT64, ["batch", "tokens"]),
        ("image_features", dtype, ["image_tokens", text.hidden]),
    ]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        ids, features = values
        where = op.Transpose(op.NonZero(op.Equal(ids, config.tokens.image)), perm=[1, 0])  # (N, 2)
        merged = op.ScatterND(table(op, ids), where, features)
        return [("inputs_embeds", merged, dtype, ["batch", "tokens", text.hidden])]

    return build_part("embedding", book, inputs, trace)
