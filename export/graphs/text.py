"""The decoder graph: hidden states, positions and a KV cache in; logits and the grown cache out.

    inputs_embeds        (B, T, C)       activations dtype
    attention_mask       (B, S) int64    1 for tokens that are there; padding on the right only
    position_ids         (3, B, T) int64 time, height, width
    past_key_values.N.*  (B, K, P, D)    activations dtype, or int8 (kv.py)
    num_logits_to_keep   int64 scalar, optional, default 1: last positions to score; 0 means all
    → logits (B, n, V) float32, present.N.* (B, K, S, D)

Weights come from the checkpoint later, by name. One layer is 16 nodes; the kernels that matter are
MatMulNBits (or MatMul), GroupQueryAttention and the rotary embedding, to which the three axes come as
per-token cosines and sines.

The prefill graph has the same inputs but the last, and of the outputs only `present.N.*`: it fills the cache.
Its layers are the same modules with other number formats, and of the last it has what makes keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.export.source.checkpoint import ModelConfig, TextConfig
from autoglm_edge.quantize.recipe import PRESETS, Recipe

from .kv import KV, FloatCache, Int8Cache, Lengths, Reading, count_rows
from .nn import (
    IR_DTYPES,
    Linear,
    Outputs,
    RMSNorm,
    Signature,
    WeightBook,
    build_part,
    constant,
    silu,
)
from .plan import PartPlan

STEM = "model.language_model"


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
    """SwiGLU with gate and up in one matrix: gate is the first half."""

    def __init__(self, book: WeightBook, stem: str, text: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(book, f"{stem}.gate_up_proj", text.hidden, 2 * text.intermediate)
        self.down_proj = Linear(book, f"{stem}.down_proj", text.intermediate, text.hidden)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """(B, T, C) -> (B, T, C)."""
        gate, up = op.Split(self.gate_up_proj(op, x), num_outputs=2, axis=-1, _outputs=2)
        return self.down_proj(op, op.Mul(silu(op, gate), up))


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


class _Model(nn.Module):
    """Gives the names their first part, "model"."""

    def __init__(self, language_model: LanguageModel | CacheFiller) -> None:
        super().__init__("model")
        self.language_model = language_model

    def forward(self, op: OpBuilder, *args: object) -> object:
        return self.language_model(op, *args)


def plan_decoder(config: ModelConfig, recipe: Recipe, kv: KV = "float") -> PartPlan:
    """Graph and weight plan of the decoder with its head.

    Args:
        config: of the checkpoint.
        recipe: of the bundle.
        kv: what the cache holds. In float16 it is read in integers only: that is what CUDA has for it.
    """
    text = config.text
    book = WeightBook(recipe)
    form = CacheForm(kv, "either" if book.dtype == "float32" else "integers")
    model = _Model(LanguageModel(book, text, form))
    tied = f"{STEM}.embed_tokens.weight" if text.tied_head else None
    head = Linear(book, "lm_head", text.hidden, text.vocab, source=tied)
    head._set_name("lm_head")
    dtype = IR_DTYPES[book.dtype]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        embeds, mask, positions, *flat = values
        wanted = builder.input(
            "num_logits_to_keep",
            dtype=ir.DataType.INT64,
            shape=[],
            const_value=ir.tensor(np.array(1, np.int64), name="num_logits_to_keep"),
        )
        keep = op.Neg(op.Reshape(wanted, [1]))
        step = _step(op, mask, positions, text, dtype, form)
        h, present = model(op, embeds, step, _pairs(flat), keep)
        logits = head(op, h)
        if dtype != ir.DataType.FLOAT:
            logits = op.Cast(logits, to=ir.DataType.FLOAT)
        outputs: Outputs = [("logits", logits, ir.DataType.FLOAT, ["batch", "scored", text.vocab])]
        return outputs + _present(present, text, form.dtype(dtype))

    return build_part("decoder", book, _inputs(text, dtype, form.dtype(dtype)), trace)


def plan_prefill(config: ModelConfig, recipe: Recipe, decoder: PartPlan, kv: KV = "float") -> PartPlan:
    """Graph and weight plan of the layers in their second form, which fills the cache.

    Args:
        config: of the checkpoint.
        recipe: of the bundle.
        decoder: whose data file is read for what both have in common: norms, biases, float matrices, scales
            of the cache.
        kv: what the cache holds.
    """
    text = config.text
    book = WeightBook(recipe.for_prefill())
    dtype, form = IR_DTYPES[book.dtype], CacheForm(kv)
    model = _Model(CacheFiller(book, text, form))

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        embeds, mask, positions, *flat = values
        step = _step(op, mask, positions, text, dtype, form)
        return _present(model(op, embeds, step, _pairs(flat)), text, form.dtype(dtype))

    return build_part("prefill", book, _inputs(text, dtype, form.dtype(dtype)), trace, lender=decoder)


def plan_layer(config: ModelConfig, recipe: Recipe = PRESETS["fp32"], kv: KV = "float") -> PartPlan:
    """One decoder layer by itself, with weights called `layer.*`; the stream is one float32 tensor.

    x (B, T, C), attention_mask (B, S), position_ids (3, B, T), past.key and past.value (B, K, P, D)
    → y (B, T, C), present.key and present.value (B, K, S, D)
    """
    text, dtype = config.text, ir.DataType.FLOAT
    book, form = WeightBook(recipe), CacheForm(kv)
    layer = Layer(book, "layer", text, form)
    layer._set_name("layer")
    held = form.dtype(dtype)
    cached: Sequence[int | str] = ["batch", text.kv_heads, "past", text.head_dim]
    inputs: Signature = [
        ("x", dtype, ["batch", "tokens", text.hidden]),
        ("attention_mask", ir.DataType.INT64, ["batch", "total"]),
        ("position_ids", ir.DataType.INT64, [3, "batch", "tokens"]),
        ("past.key", held, cached),
        ("past.value", held, cached),
    ]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        x, mask, positions, *past = values
        step = _step(op, mask, positions, text, dtype, form)
        branch, residual, present = layer(op, None, x, step, tuple(past), None)
        y = op.Add(branch, residual)
        grown: Sequence[int | str] = ["batch", text.kv_heads, "cached", text.head_dim]
        return [
            ("y", y, dtype, ["batch", "tokens", text.hidden]),
            ("present.key", present[0], held, grown),
            ("present.value", present[1], held, grown),
        ]

    return build_part("layer", book, inputs, trace)


def plan_norm(config: ModelConfig) -> PartPlan:
    """The final norm by itself, in float32: x (B, T, C) → y (B, T, C), which is what the head gets."""
    text, dtype = config.text, ir.DataType.FLOAT
    book = WeightBook(PRESETS["fp32"])
    norm = RMSNorm(book, f"{STEM}.norm", text.hidden, text.norm_eps)
    norm._set_name(f"{STEM}.norm")
    shape: Sequence[int | str] = ["batch", "tokens", text.hidden]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        return [("y", norm(op, *values), dtype, shape)]

    return build_part("norm", book, [("x", dtype, shape)], trace)


def _inputs(text: TextConfig, dtype: ir.DataType, held: ir.DataType) -> Signature:
    """Inputs of all layers in a row: hidden states, mask, positions, cache."""
    past: Sequence[int | str] = ["batch", text.kv_heads, "past", text.head_dim]
    return [
        ("inputs_embeds", dtype, ["batch", "tokens", text.hidden]),
        ("attention_mask", ir.DataType.INT64, ["batch", "total"]),
        ("position_ids", ir.DataType.INT64, [3, "batch", "tokens"]),
        *((f"past_key_values.{name}", held, past) for name in _cache_names(text)),
    ]


def _present(present: list[tuple[ir.Value, ir.Value]], text: TextConfig, dtype: ir.DataType) -> Outputs:
    """Outputs for the grown cache."""
    shape: Sequence[int | str] = ["batch", text.kv_heads, "cached", text.head_dim]
    grown = [value for pair in present for value in pair]
    return [
        (f"present.{name}", value, dtype, shape)
        for name, value in zip(_cache_names(text), grown, strict=True)
    ]


def _cache_names(text: TextConfig) -> list[str]:
    return [f"{i}.{kind}" for i in range(text.layers) for kind in ("key", "value")]


def _pairs(flat: list[ir.Value]) -> list[tuple[ir.Value, ir.Value]]:
    """Keys and values of each layer, from one list."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _rotate(op: OpBuilder, x: ir.Value, step: Step, text: TextConfig, heads: int) -> ir.Value:
    return op.RotaryEmbedding(
        x, step.cos, step.sin, interleaved=1, num_heads=heads, rotary_embedding_dim=text.rotary_dim
    )


def _step(
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


def _last(op: OpBuilder, x: ir.Value, start: ir.Value) -> ir.Value:
    """x[:, start:] for a negative start; 0 keeps all."""
    return op.Slice(x, start, [np.iinfo(np.int64).max], [1])
