"""The embedding graph: token ids and image features in, hidden states out.

    input_ids       (B, T) int64
    image_features  (N, C) activations dtype; rows replace the image placeholders in reading order; N may be 0
    → inputs_embeds (B, T, C)

A quantized table is read row by row as tokens ask for it; no float copy of it ever exists.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder, nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.quantize.recipe import Recipe

from .checkpoint import ModelConfig
from .nn import CONTRIB, IR_DTYPES, WeightBook, build_part
from .plan import PartPlan, Piece, Weight

TABLE = "model.language_model.embed_tokens"


class Table(nn.Module):
    """The embedding table, float or block-quantized along C."""

    def __init__(self, book: WeightBook, vocab: int, hidden: int) -> None:
        super().__init__(TABLE)
        name = f"{TABLE}.weight"
        self.format = book.recipe.format_for(name)
        if self.format is not None and hidden % self.format.block_size:
            self.format = None  # the gather kernel wants whole blocks
        if self.format is None:
            pieces: tuple[Piece, ...] = (Piece(name, book.dtype, (vocab, hidden)),)
        else:
            blocks, bits = hidden // self.format.block_size, self.format.bits
            pieces = (
                Piece(f"{name}_data", "uint8", (vocab, hidden * bits // 8)),
                Piece(f"{name}_scales", book.dtype, (vocab, blocks)),
            )
            if not self.format.symmetric:
                pieces += (Piece(f"{name}_zero_points", "uint8", (vocab, -(-blocks * bits // 8))),)
        for attribute, piece in zip(("weight", "scales", "zero_points"), pieces, strict=False):
            setattr(self, attribute, book.parameter(piece))
        action = "copy" if self.format is None else "quantize"
        book.add(Weight(name, vocab, hidden, action, pieces, self.format))

    def forward(self, op: OpBuilder, ids: ir.Value) -> ir.Value:
        """(B, T) -> (B, T, C)."""
        if self.format is None:
            return op.Gather(self.weight, ids, axis=0)
        return op.GatherBlockQuantized(
            self.weight,
            ids,
            self.scales,
            None if self.format.symmetric else self.zero_points,
            bits=self.format.bits,
            block_size=self.format.block_size,
            gather_axis=0,
            quantize_axis=1,
            **CONTRIB,
        )


def plan_embedding(config: ModelConfig, recipe: Recipe) -> PartPlan:
    """Graph and weight plan of the embedding."""
    text = config.text
    book = WeightBook(recipe)
    table = Table(book, text.vocab, text.hidden)
    dtype = IR_DTYPES[book.dtype]
    inputs = [
        ("input_ids", ir.DataType.INT64, ["batch", "tokens"]),
        ("image_features", dtype, ["image_tokens", text.hidden]),
    ]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]):  # type: ignore[no-untyped-def]
        ids, features = values
        where = op.Transpose(op.NonZero(op.Equal(ids, config.tokens.image)), perm=[1, 0])  # (N, 2)
        merged = op.ScatterND(table(op, ids), where, features)
        return [("inputs_embeds", merged, dtype, ["batch", "tokens", text.hidden])]

    return build_part("embedding", book, inputs, trace)
