"""Products on integer matrix units: bytes times bytes, one scale per token and one per output channel.

In: hidden states (..., K) float32. Out: ONNX nodes; with sx the scale of a token,

    sx = max|x| / 127            q = round(x / sx) + 128, uint8
    y  = MatMulIntegerToFloat(q, W, 1, scales, 128) * sx

where W is int8 (K, N) and scales float32 (N,). A token's own largest value sets its scale, so what stands
beside it in a batch changes nothing. Matrices with the same input share its bytes. With groups, K is cut into
equal parts, each with scales of its own, and their products are added. Knows nothing of recipes.

uint8 times int8 is the pair that kernels of all processors have; int8 times int8 is not.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.quantize.channels import TOP, ChannelFormat

from .plan import Piece

ZERO_POINT = 128
TINY = 1e-30
"""Least scale of a token, for one that is all zeros; its inverse must be finite."""

Bytes = tuple[ir.Value, ir.Value]
"""uint8 (..., K / groups) and its scale per token, float32 (..., 1)."""


class Inputs:
    """Inputs of one graph's matrices as bytes, made once each."""

    def __init__(self) -> None:
        self._made: dict[tuple[ir.Value, int], tuple[Bytes, ...]] = {}

    def rounded(self, op: OpBuilder, x: ir.Value, groups: int) -> tuple[Bytes, ...]:
        """The bytes of x (..., K), per group of columns."""
        if (x, groups) not in self._made:
            parts = (x,) if groups == 1 else op.Split(x, num_outputs=groups, axis=-1, _outputs=groups)
            self._made[x, groups] = tuple(_round(op, part) for part in parts)
        return self._made[x, groups]


def channel_pieces(name: str, rows: int, columns: int, format: ChannelFormat) -> tuple[Piece, ...]:
    """Data (K / groups, N) and scales (N,) of each group, as MatMulIntegerToFloat wants them.

    Raises:
        QuantError: the groups would not be equal.
    """
    width = format.group_columns(columns)
    pieces = []
    for group in range(format.groups):
        suffix = f"_{group}" if group else ""
        pieces.append(Piece(f"{name}_data{suffix}", "int8", (width, rows)))
        pieces.append(Piece(f"{name}_scales{suffix}", "float32", (rows,)))
    return tuple(pieces)


def product(op: OpBuilder, x: Bytes, weight: ir.Value, scales: ir.Value) -> ir.Value:
    """One group: bytes (..., K) times int8 (K, N) -> float32 (..., N)."""
    values, scale = x
    sums = op.MatMulIntegerToFloat(
        values,
        weight,
        _scalar(op, "one", np.float32(1)),
        scales,
        _scalar(op, "zero_point", np.uint8(ZERO_POINT)),
        _domain="com.microsoft",
        _version=1,
    )
    scaled: ir.Value = op.Mul(sums, scale)
    return scaled


def _round(op: OpBuilder, x: ir.Value) -> Bytes:
    high, low = op.ReduceMax(x, [-1], keepdims=1), op.ReduceMin(x, [-1], keepdims=1)
    largest = op.Max(high, op.Neg(low), _scalar(op, "tiny", np.float32(TINY * TOP)))
    scale = op.Div(largest, _scalar(op, "top", np.float32(TOP)))
    return op.QuantizeLinear(
        op.Div(x, scale),
        _scalar(op, "one", np.float32(1)),
        _scalar(op, "zero_point", np.uint8(ZERO_POINT)),
    ), scale


def _scalar(op: OpBuilder, name: str, value: np.generic) -> ir.Value:
    """A constant of the graph, made once."""
    full = f"integer_{name}"
    found = op.builder.graph.initializers.get(full)
    if found is None:
        found = op.builder.initializer(ir.tensor(np.array(value)), name=full, qualify=False)
    return found
