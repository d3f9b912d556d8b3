"""The layer: one decoder layer on integer units, whose weights come in with every run, and where they lie.

In: the decoder's plan. Out: a graph of one layer with 8-bit matrices as inputs, and an index of the places in
the decoder's data file that those are to be expanded from. Nothing is stored twice: both together are a few
kilobytes. `runtime.layerwise` runs it. Knows nothing of weight values.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from autoglm_edge.export.source.config import ModelConfig
from autoglm_edge.quantize.channels import ChannelFormat
from autoglm_edge.quantize.formats import BlockFormat
from autoglm_edge.quantize.recipe import Recipe, Rule
from autoglm_edge.runtime.layerwise.index import LayerForm, LayerIndex, LayerWeights, Matrix, Vector

from .decoder import STEM
from .kv import KV
from .plan import PartPlan, Weight
from .text import plan_layer

LAYER_GRAPH = "layer.onnx"
LAYER_INDEX = "layers.json"
_OWN = "layer."
_INTEGERS = Recipe("layer", "float32", 4, (Rule(f"{_OWN}*", ChannelFormat()),))


@dataclass(frozen=True)
class LayerPlan:
    """One layer's graph and where the weights of all layers lie.

    Attributes:
        model: the graph; every weight is an input.
        index: of all layers.
    """

    model: ir.Model
    index: LayerIndex


def plan_open_layer(
    config: ModelConfig, recipe: Recipe, decoder: PartPlan, kv: KV = "float"
) -> LayerPlan | None:
    """Plan it, where it is of use: all matrices of the layers are in blocks, some of 4 bits.

    Args:
        config: of the checkpoint.
        recipe: of the bundle. Where it wants float activations, nothing may round them.
        decoder: laid out.
        kv: what the cache holds.
    """
    if recipe.activations != "float32" or recipe.accuracy_level != 4:
        return None
    stored = {weight.name: weight for weight in decoder.weights}
    inside = [weight for name, weight in stored.items() if name.startswith(f"{STEM}.layers.")]
    formats = [weight.quant for weight in inside if weight.rows > 1]
    if not all(isinstance(form, BlockFormat) for form in formats):
        return None
    if not any(isinstance(form, BlockFormat) and form.field_bits == 4 for form in formats):
        return None
    plan = plan_layer(config, _INTEGERS, kv)
    layers = []
    for number in range(config.text.layers):
        stem = f"{STEM}.layers.{number}."
        matrices, vectors = [], []
        for weight in plan.weights:
            source = stored[stem + weight.matrix.removeprefix(_OWN)]
            if weight.rows > 1:
                matrices.append(_matrix(weight, source))
            else:
                (piece,) = source.pieces
                vectors.append(Vector(weight.name, source.columns, piece.offset))
        layers.append(LayerWeights(tuple(matrices), tuple(vectors)))
    text = config.text
    form = LayerForm(text.norm_eps, text.rope_theta, text.rotary_dim, tuple(text.mrope_section))
    return LayerPlan(_opened(plan), LayerIndex(tuple(layers), form))


def _matrix(weight: Weight, source: Weight) -> Matrix:
    """Where the rows of `weight` lie in `source`, which holds them and perhaps others of the same matrix."""
    form = source.quant
    assert isinstance(form, BlockFormat), "checked for all of them before"
    skipped = weight.first_row - source.first_row
    assert 0 <= skipped <= source.rows - weight.rows, "matrices of layers are stored whole"
    data, scales, *rest = (
        piece.offset + skipped * (piece.size_bytes // source.rows) for piece in source.pieces
    )
    return Matrix(
        weight=weight.pieces[0].name,
        scales=weight.pieces[1].name,
        rows=weight.rows,
        columns=source.columns,
        bits=form.field_bits,
        block_size=form.block_size,
        data_offset=data,
        scales_offset=scales,
        zero_points_offset=rest[0] if rest else -1,
    )


def _opened(plan: PartPlan) -> ir.Model:
    """The plan's graph with its weights as inputs."""
    graph = plan.model.graph
    for weight in plan.weights:
        for piece in weight.pieces:
            graph.inputs.append(graph.initializers.pop(piece.name))
    return plan.model
