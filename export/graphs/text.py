"""The graphs of the language model: the decoder with its head, and the layers as other users want them.

    inputs_embeds        (B, T, C)       activations dtype
    attention_mask       (B, S) int64    1 for tokens that are there; padding on the right only
    position_ids         (3, B, T) int64 time, height, width
    past_key_values.N.*  (B, K, P, D)    activations dtype, or int8 (kv.py)
    num_logits_to_keep   int64 scalar, optional, default 1: last positions to score; 0 means all
    → logits (B, n, V) float32, present.N.* (B, K, S, D)

The prefill graph has the same inputs but the last, and of the outputs only `present.N.*`: it fills the cache.
Weights come from the checkpoint later, by name. What a layer computes is decoder.py's affair, how the head
lies is head.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.export.source.checkpoint import ModelConfig, TextConfig
from autoglm_edge.quantize.recipe import PRESETS, Recipe

from .decoder import STEM, CacheFiller, LanguageModel, Layer, Model, make_step
from .head import Head
from .kv import KV, CacheForm
from .nn import IR_DTYPES, Outputs, RMSNorm, Signature, WeightBook, build_part
from .plan import PartPlan


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
    model = Model(LanguageModel(book, text, form))
    tied = f"{STEM}.embed_tokens.weight" if text.tied_head else None
    head = Head(book, text.hidden, text.vocab, tied)
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
        step = make_step(op, mask, positions, text, dtype, form)
        h, present = model(op, embeds, step, _pairs(flat), keep)
        outputs: Outputs = [("logits", head(op, h), ir.DataType.FLOAT, ["batch", "scored", text.vocab])]
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
    model = Model(CacheFiller(book, text, form))

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        embeds, mask, positions, *flat = values
        step = make_step(op, mask, positions, text, dtype, form)
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
        step = make_step(op, mask, positions, text, dtype, form)
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
