"""The decoder's modules: attention, MLP, a layer with its norms, layers in a row.

In: a `WeightBook`, the model's widths, and what a cache holds. Out: ONNX nodes, and weights in the book. One
layer is 16 nodes; the kernels that matter are MatMulNBits (or MatMul), GroupQueryAttention and the rotary
embedding, to which the three axes come as per-token cosines and sines. Knows nothing of graphs' inputs and
outputs, nor of the head.

The layers of the prefill graph are the same modules with other number formats, and of the last it has what
makes keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.export.source.config import TextConfig
from autoglm_edge.quantize.channels import ChannelFormat

from .kv import FLOATS, CacheForm, Lengths, count_rows
from .nn import Linear, RMSNorm, WeightBook, constant, silu
from .plan import RowSlice, row_slices

STEM = "model.language_model"
SLICE_ROWS = 4608
"""Most rows of a product of bytes in an MLP. The sums of a product are gone over once for every 128 to 384 of
its columns; those of 512 tokens and so many rows stay near the cores meanwhile."""


@dataclass(frozen=True)
class Step:
    """What every layer of one run shares.

    Attributes:
        cos: (B, T, rotary / 2).
        sin: (B, T, rotary / 2).
        lengths: of the sequences.
    """

    cos: ir.Value
    sin: ir.Value
    lengths: Lengths


class Attention(nn.Module):
    """Grouped-query attention; partial, interleaved, three-axis rotary embedding; keys are cached rotated."""

    def __init__(self, book: WeightBook, stem: str, text: TextConfig, form: CacheForm) -> None:
        super().__init__()
        self.text = text
        query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
        self.q_proj = Linear(book, f"{stem}.q_proj", text.hidden, query, bias=text.attention_bias)
        self.k_proj = Linear(book, f"{stem}.k_proj", text.hidden, key, bias=text.attention_bias)
        self.v_proj = Linear(book, f"{stem}.v_proj", text.hidden, key, bias=text.attention_bias)
        self.o_proj = Linear(book, f"{stem}.o_proj", query, text.hidden)
        self.cache = form.build(book, stem, text)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: Step, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(B, T, C) -> (B, T, C), present key, present value."""
        q = _rotate(op, self.q_proj(op, x), step, self.text, self.text.heads)
        k = _rotate(op, self.k_proj(op, x), step, self.text, self.text.kv_heads)
        v = self.v_proj(op, x)
        y, key, value = self.cache(op, q, k, v, step.lengths, past)
        return self.o_proj(op, y), key, value


class KeysAndValues(nn.Module):
    """The part of an attention that fills the cache."""

    def __init__(self, book: WeightBook, stem: str, text: TextConfig, form: CacheForm) -> None:
        super().__init__()
        self.text = text
        key = text.kv_heads * text.head_dim
        self.k_proj = Linear(book, f"{stem}.k_proj", text.hidden, key, bias=text.attention_bias)
        self.v_proj = Linear(book, f"{stem}.v_proj", text.hidden, key, bias=text.attention_bias)
        self.cache = form.build(book, stem, text)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: Step, past: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        """(B, T, C) -> present key, present value."""
        k = _rotate(op, self.k_proj(op, x), step, self.text, self.text.kv_heads)
        _, key, value = self.cache(op, None, k, self.v_proj(op, x), step.lengths, past)
        return key, value


class Mlp(nn.Module):
    """SwiGLU with gate and up in one matrix of the checkpoint: gate is the first half.

    In blocks it stays one product, as single tokens want it. Of bytes times bytes, gate and up are products
    of their own, in slices: see SLICE_ROWS.
    """

    def __init__(self, book: WeightBook, stem: str, text: TextConfig) -> None:
        super().__init__()
        name, width = f"{stem}.gate_up_proj", text.intermediate
        matrix = f"{name}.weight"
        self.gate_up_proj: Linear | nn.ModuleList
        if isinstance(book.recipe.format_for(matrix), ChannelFormat):
            halves = ((first, own) for first in (0, width) for own in row_slices(width, SLICE_ROWS))
            parts = [(RowSlice(matrix, first + own.start, 2 * width), len(own)) for first, own in halves]
            self.gate_up_proj = nn.ModuleList(
                [
                    Linear(book, f"{name}.{number}", text.hidden, rows, part=part)
                    for number, (part, rows) in enumerate(parts)
                ]
            )
        else:
            self.gate_up_proj = Linear(book, name, text.hidden, 2 * width)
        self.down_proj = Linear(book, f"{stem}.down_proj", width, text.hidden)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """(B, T, C) -> (B, T, C)."""
        if isinstance(self.gate_up_proj, Linear):
            gate, up = op.Split(self.gate_up_proj(op, x), num_outputs=2, axis=-1, _outputs=2)
            return self.down_proj(op, op.Mul(silu(op, gate), up))
        products = [product(op, x) for product in self.gate_up_proj]
        gates, ups = products[: len(products) // 2], products[len(products) // 2 :]
        inner = [op.Mul(silu(op, gate), up) for gate, up in zip(gates, ups, strict=True)]
        return self.down_proj(op, op.Concat(*inner, axis=-1) if inner[1:] else inner[0])


class Layer(nn.Module):
    """One decoder layer, with a norm before and after each branch.

    Takes and gives the stream as a pair (branch, residual) that is still to be added, so that every addition
    is fused with the norm that follows it.
    """

    def __init__(self, book: WeightBook, stem: str, text: TextConfig, form: CacheForm = FLOATS) -> None:
        super().__init__()
        width, eps = text.hidden, text.norm_eps
        self.input_layernorm = RMSNorm(book, f"{stem}.input_layernorm", width, eps)
        self.self_attn = Attention(book, f"{stem}.self_attn", text, form)
        self.post_self_attn_layernorm = RMSNorm(book, f"{stem}.post_self_attn_layernorm", width, eps)
        self.post_attention_layernorm = RMSNorm(book, f"{stem}.post_attention_layernorm", width, eps)
        self.mlp = Mlp(book, f"{stem}.mlp", text)
        self.post_mlp_layernorm = RMSNorm(book, f"{stem}.post_mlp_layernorm", width, eps)

    def forward(
        self,
        op: OpBuilder,
        branch: ir.Value | None,
        residual: ir.Value,
        step: Step,
        past: tuple[ir.Value, ir.Value],
        keep: ir.Value | None,
    ) -> tuple[ir.Value, ir.Value, tuple[ir.Value, ir.Value]]:
        """Branch and residual (B, T, C) -> the same, and the present keys and values.

        Args:
            op: the builder.
            branch: None in the first layer, whose input is the residual alone.
            residual: (B, T, C).
            step: shared values.
            past: (B, K, P, D) twice.
            keep: in the last layer, start of the positions that anyone needs; the rest is dropped after
                attention.
        """
        if branch is None:
            h = self.input_layernorm(op, residual)
        else:
            h, residual = self.input_layernorm(op, branch, residual)
        a, key, value = self.self_attn(op, h, step, past)
        if keep is not None:
            a, residual = _last(op, a, keep), _last(op, residual, keep)
        h, residual = self.post_attention_layernorm(op, self.post_self_attn_layernorm(op, a), residual)
        return self.post_mlp_layernorm(op, self.mlp(op, h)), residual, (key, value)


class LastLayer(nn.Module):
    """What a prompt needs of the last layer: its keys and values."""

    def __init__(self, book: WeightBook, stem: str, text: TextConfig, form: CacheForm) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(book, f"{stem}.input_layernorm", text.hidden, text.norm_eps)
        self.self_attn = KeysAndValues(book, f"{stem}.self_attn", text, form)

    def forward(
        self,
        op: OpBuilder,
        branch: ir.Value | None,
        residual: ir.Value,
        step: Step,
        past: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, ir.Value]:
        """Branch and residual (B, T, C) -> the present keys and values."""
        if branch is None:
            h = self.input_layernorm(op, residual)
        else:
            h, _ = self.input_layernorm(op, branch, residual)
        present: tuple[ir.Value, ir.Value] = self.self_attn(op, h, step, past)
        return present


class CacheFiller(nn.Module):
    """All layers, as far as the cache needs them."""

    def __init__(self, book: WeightBook, text: TextConfig, form: CacheForm) -> None:
        super().__init__()
        stems = [f"{STEM}.layers.{i}" for i in range(text.layers)]
        layers: list[nn.Module] = [Layer(book, stem, text, form) for stem in stems[:-1]]
        self.layers = nn.ModuleList([*layers, LastLayer(book, stems[-1], text, form)])

    def forward(
        self, op: OpBuilder, x: ir.Value, step: Step, past: list[tuple[ir.Value, ir.Value]]
    ) -> list[tuple[ir.Value, ir.Value]]:
        """(B, T, C) -> the present keys and values of each layer."""
        branch, residual, present = None, x, []
        *layers, last = self.layers
        for layer, own in zip(layers, past[:-1], strict=True):
            branch, residual, grown = layer(op, branch, residual, step, own, None)
            present.append(grown)
        return [*present, last(op, branch, residual, step, past[-1])]


class LanguageModel(nn.Module):
    """All layers and the final norm."""

    def __init__(self, book: WeightBook, text: TextConfig, form: CacheForm) -> None:
        super().__init__()
        stems = [f"{STEM}.layers.{i}" for i in range(text.layers)]
        self.layers = nn.ModuleList([Layer(book, stem, text, form) for stem in stems])
        self.norm = RMSNorm(book, f"{STEM}.norm", text.hidden, text.norm_eps)

    def forward(
        self, op: OpBuilder, x: ir.Value, step: Step, past: list[tuple[ir.Value, ir.Value]], keep: ir.Value
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """(B, T, C) -> (B, n, C) after the norm, and the present keys and values of each layer."""
        branch, residual, present = None, x, []
        for index, layer in enumerate(self.layers):
            last = keep if index == len(past) - 1 else None
            branch, residual, grown = layer(op, branch, residual, step, past[index], last)
            present.append(grown)
        h, _ = self.norm(op, branch, residual)
        return h, present


class Model(nn.Module):
    """Gives the names their first part, "model"."""

    def __init__(self, language_model: LanguageModel | CacheFiller) -> None:
        super().__init__("model")
        self.language_model = language_model

    def forward(self, op: OpBuilder, *args: object) -> object:
        """As the module inside."""
        return self.language_model(op, *args)


def make_step(
    op: OpBuilder,
    mask: ir.Value,
    positions: ir.Value,
    text: TextConfig,
    dtype: ir.DataType,
    form: CacheForm,
) -> Step:
    """Rotary angles and lengths.

    Pair j of a head turns by position[axis of j] * theta ** (-2j / rotary); `mrope_section` says how many
    pairs each axis has, in order. In fp32 whatever the activations are: fp16 cannot count the positions.
    """
    pairs = text.rotary_dim // 2
    frequencies = (
        1.0 / text.rope_theta ** (np.arange(0, text.rotary_dim, 2, dtype=np.float32) / text.rotary_dim)
    ).astype(np.float32)
    assert sum(text.mrope_section) == pairs
    places = op.Unsqueeze(op.Cast(positions, to=ir.DataType.FLOAT), [-1])
    angles, start = [], 0
    for axis, count in enumerate(text.mrope_section):
        if count:
            own = constant(op, frequencies[start : start + count])
            angles.append(op.Mul(op.Gather(places, axis, axis=0), own))
            start += count
    angle = op.Concat(*angles, axis=-1) if len(angles) > 1 else angles[0]
    cos, sin = op.Cos(angle), op.Sin(angle)
    if dtype != ir.DataType.FLOAT:
        cos, sin = op.Cast(cos, to=dtype), op.Cast(sin, to=dtype)
    last_index = op.Cast(op.Sub(op.ReduceSum(mask, [1], keepdims=0), 1), to=ir.DataType.INT32)
    total = op.Cast(op.Shape(mask, start=1, end=2), to=ir.DataType.INT32)
    rows = None if form.kv == "float" else count_rows(op, mask, positions, form.reading)
    return Step(cos, sin, Lengths(last_index, total, rows))


def _rotate(op: OpBuilder, x: ir.Value, step: Step, text: TextConfig, heads: int) -> ir.Value:
    return op.RotaryEmbedding(
        x, step.cos, step.sin, interleaved=1, num_heads=heads, rotary_embedding_dim=text.rotary_dim
    )


def _last(op: OpBuilder, x: ir.Value, start: ir.Value) -> ir.Value:
    """x[:, start:] for a negative start; 0 keeps all."""
    return op.Slice(x, start, [np.iinfo(np.int64).max], [1])
