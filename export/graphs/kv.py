"""Keys and values in a graph: the cache in floats, or in 8-bit integers with a static scale per channel.

In: queries, keys and values of one layer, and its past. Out: what attention gives, and the present. Knows
nothing of weights and of the layer around it; where the scales come from is kv_scales.py's affair.

In integers the cache holds, per layer, head and channel,

    q = min(127, max(-128, round(x / scale)))        int8, ties to even; what is too large is cut, not wrapped

and attention sees q * scale, of past and new tokens alike, so a prompt gives the same keys and values whether
it is read at once, in pieces or token by token. There are two ways to compute that, equal but for rounding:

    in integers  GroupQueryAttention reads the bytes: a quarter of the memory to go through, which is what a
                 single token waits for. With many tokens it is two to five times as slow as floats.
    in floats    it appends the new rows (with as many queries as there are key heads, whose result nobody
                 reads), then the integers of past and new rows, as floats, go through its float form. The
                 scales of keys are multiplied into the queries and those of values into what comes out, so
                 nothing as long as the past is gone through for them. The floats are there for one layer at
                 a time.

benchmarks/kv_int8.py measures both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir
from onnxscript import nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.export.source.config import TextConfig

from .nn import CONTRIB, WeightBook
from .plan import Piece, Weight

KV = Literal["float", "int8"]
"""What the cache holds: the dtype of the activations, or bytes."""

KVS: tuple[KV, ...] = get_args(KV)

Reading = Literal["integers", "floats", "either"]
"""How the past is attended to; "either" chooses in the graph by the number of new tokens."""

FEW_TOKENS = 4
"""Most new tokens for which the form in integers is taken where there is a choice: from five on floats are as
fast at a past of 4,000 tokens."""

SCALE_NAMES = ("k_scale", "v_scale")

Pair = tuple[ir.Value, ir.Value]
"""Keys and values."""

_INT8 = ir.DataType.INT8


@dataclass(frozen=True)
class Rows:
    """Counts of one run, int64 (1,) each, for graphs that read the cache in floats.

    Attributes:
        past: P, tokens that were there.
        total: S, tokens that are there afterwards.
        many: bool (1,), whether there are more new tokens than a few; None where nothing depends on it.
    """

    past: ir.Value
    total: ir.Value
    many: ir.Value | None


@dataclass(frozen=True)
class Lengths:
    """What the operator is told of the sequences of one run.

    Attributes:
        last_index: (B,) int32, index of the last real token of each row.
        total: int32, S.
        rows: for a cache in integers that is read in floats, else None.
    """

    last_index: ir.Value
    total: ir.Value
    rows: Rows | None


def count_rows(op: OpBuilder, mask: ir.Value, positions: ir.Value, reading: Reading) -> Rows | None:
    """From attention_mask (B, S) and position_ids (3, B, T), as far as the way of reading needs it."""
    if reading == "integers":
        return None
    total = op.Shape(mask, start=1, end=2)
    tokens = op.Shape(positions, start=2, end=3)
    many = op.Greater(tokens, [FEW_TOKENS]) if reading == "either" else None
    return Rows(op.Sub(total, tokens), total, many)


class FloatCache:
    """A cache in the dtype of the activations. It has no weights, hence no place among the modules."""

    def __init__(self, text: TextConfig) -> None:
        self.text = text

    def __call__(
        self, op: OpBuilder, q: ir.Value | None, k: ir.Value, v: ir.Value, lengths: Lengths, past: Pair
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Append to the cache and attend.

        Args:
            op: the builder.
            q: (B, T, H * D), rotated; None only appends.
            k: (B, T, K * D), rotated.
            v: (B, T, K * D).
            lengths: of the sequences.
            past: (B, K, P, D) twice.

        Returns:
            (B, T, H * D), present key, present value; the first means nothing if there is no q.
        """
        return _operator(op, self.text, q, k, v, lengths, past)


class Int8Cache(nn.Module):
    """A cache in 8-bit integers; its scales are pieces of the data file, (K * D) float32 each."""

    def __init__(self, book: WeightBook, stem: str, text: TextConfig, reading: Reading) -> None:
        super().__init__()
        self.text, self.reading = text, reading
        self.dtype = ir.DataType.FLOAT if book.dtype == "float32" else ir.DataType.FLOAT16
        width = text.kv_heads * text.head_dim
        pieces = [Piece(f"{stem}.{name}", "float32", (width,)) for name in SCALE_NAMES]
        self.k_scale, self.v_scale = (book.parameter(piece) for piece in pieces)
        for piece in pieces:
            book.add(Weight(piece.name, rows=1, columns=width, action="copy", pieces=(piece,)))

    def forward(
        self, op: OpBuilder, q: ir.Value | None, k: ir.Value, v: ir.Value, lengths: Lengths, past: Pair
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """As FloatCache; past and present are int8."""
        shape = [1, self.text.kv_heads, 1, self.text.head_dim]
        scales = op.Reshape(self.k_scale, shape), op.Reshape(self.v_scale, shape)
        if q is None or self.reading == "integers":
            return _operator(op, self.text, q, k, v, lengths, past, scales)
        factors = self._for_queries(op, scales[0]), self._for_queries(op, scales[1])
        if self.reading == "floats":
            return self._in_floats(op, q, k, v, lengths, past, scales, factors)
        assert lengths.rows is not None and lengths.rows.many is not None, "a graph counts what it needs"
        branches: dict[str, Callable[[OpBuilder], tuple[ir.Value, ir.Value, ir.Value]]] = {
            "then_branch": lambda op: self._in_floats(op, q, k, v, lengths, past, scales, factors),
            "else_branch": lambda op: _operator(op, self.text, q, k, v, lengths, past, scales),
        }
        graphs = {}
        for name, trace in branches.items():
            op.builder.push_module(name, "")  # names of values that the graph around it does not have
            outputs = [ir.Value(type=ir.TensorType(kind)) for kind in (self.dtype, _INT8, _INT8)]
            graphs[name] = op.builder.subgraph(trace, [], outputs, name=name)
            op.builder.pop_module()
            for node in graphs[name]:
                node.metadata_props.clear()
        y, key, value = op.If(lengths.rows.many, _outputs=3, **graphs)
        return y, key, value

    def _in_floats(
        self,
        op: OpBuilder,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        lengths: Lengths,
        past: Pair,
        scales: Pair,
        factors: Pair,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        rows = lengths.rows
        assert rows is not None, "a graph counts what it needs"
        _, *present = _operator(op, self.text, None, k, v, lengths, past, scales)
        before, new = [], []
        for held, grown in zip(past, present, strict=True):
            # The buffer may be longer than what it holds.
            before.append(op.Cast(op.Slice(held, [0], rows.past, [2]), to=self.dtype))
            own = op.Transpose(op.Slice(grown, rows.past, rows.total, [2]), perm=[0, 2, 1, 3])
            new.append(op.Cast(op.Reshape(own, [0, 0, -1]), to=self.dtype))
        q = op.Mul(q, factors[0])
        y, _, _ = _operator(op, self.text, q, new[0], new[1], lengths, (before[0], before[1]))
        return op.Mul(y, factors[1]), present[0], present[1]

    def _for_queries(self, op: OpBuilder, scale: ir.Value) -> ir.Value:
        """(1, K, 1, D) -> (H * D): the scale of each query head's channels."""
        text = self.text
        shape = [1, text.kv_heads, text.heads // text.kv_heads, text.head_dim]
        wide: ir.Value = op.Reshape(op.Expand(scale, shape), [-1])
        return wide


@dataclass(frozen=True)
class CacheForm:
    """What a graph's cache holds, and how it is read.

    Attributes:
        kv: "float" or "int8".
        reading: of a cache in integers.
    """

    kv: KV = "float"
    reading: Reading = "floats"

    def build(self, book: WeightBook, stem: str, text: TextConfig) -> FloatCache | Int8Cache:
        """The cache of one attention."""
        if self.kv == "float":
            return FloatCache(text)
        return Int8Cache(book, f"{stem}.cache", text, self.reading)

    def dtype(self, activations: ir.DataType) -> ir.DataType:
        """Of past and present."""
        return activations if self.kv == "float" else ir.DataType.INT8


FLOATS = CacheForm()


def _operator(
    op: OpBuilder,
    text: TextConfig,
    q: ir.Value | None,
    k: ir.Value,
    v: ir.Value,
    lengths: Lengths,
    past: Pair,
    scales: Pair | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The operator itself. It always attends: without queries the keys are those, which is a few heads."""
    integers: dict[str, str | int] = {}
    extra: tuple[ir.Value | None, ...] = ()
    if scales is not None:
        extra = (None, None, None, None, None, *scales)
        integers = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    y, key, value = op.GroupQueryAttention(
        k if q is None else q,
        k,
        v,
        *past,
        lengths.last_index,
        lengths.total,
        *extra,
        num_heads=text.kv_heads if q is None else text.heads,
        kv_num_heads=text.kv_heads,
        scale=text.head_dim**-0.5,
        **integers,
        _outputs=3,
        **CONTRIB,
    )
    return y, key, value
