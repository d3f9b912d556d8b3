"""Channels that can be scaled without changing what the model computes: where they are made, who reads them.

In: `ModelConfig`. Out: `Link`s, by tensor name. Names are those of `shapes.py`. Knows nothing of values.

Whatever multiplies channel j where it is made can be divided out of column j of every matrix that reads it,
if nothing but a product by elements lies between:

    a norm's weight    → the matrices behind the norm
    rows of up         → columns of down, as SwiGLU is linear in up

Not here: norms after a branch, which feed the residual stream; the norm before the downsampling, as a
convolution reads it; values and attention output, where one row is read by the columns of a whole group of
heads and by the KV cache; the final norm of a model whose head is the embedding, which others read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autoglm_edge.export.source.config import ModelConfig
from autoglm_edge.export.source.shapes import HEAD


@dataclass(frozen=True)
class Link:
    """Channels, and what reads them.

    Attributes:
        source: a norm's weight (C,), or a matrix (N, K) of whose rows C make the channels.
        first: the first of these rows; 0 for a norm.
        readers: matrices (M, C) that read the channels: all that do.
    """

    source: str
    first: int
    readers: tuple[str, ...]


def channel_links(config: ModelConfig) -> Iterator[Link]:
    """All links of a model. A tensor is the source of one at most, and a reader in one at most."""
    text, vision = config.text, config.vision
    for number in range(text.layers):
        layer = f"model.language_model.layers.{number}"
        inputs = tuple(f"{layer}.self_attn.{letter}_proj.weight" for letter in "qkv")
        gate_up = f"{layer}.mlp.gate_up_proj.weight"
        yield Link(f"{layer}.input_layernorm.weight", 0, inputs)
        yield Link(f"{layer}.post_attention_layernorm.weight", 0, (gate_up,))
        yield Link(gate_up, text.intermediate, (f"{layer}.mlp.down_proj.weight",))  # gate comes first
    if not text.tied_head:
        yield Link("model.language_model.norm.weight", 0, (HEAD,))
    for number in range(vision.depth):
        block = f"model.visual.blocks.{number}"
        gate, up, down = (f"{block}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        yield Link(f"{block}.norm1.weight", 0, (f"{block}.attn.qkv.weight",))
        yield Link(f"{block}.norm2.weight", 0, (gate, up))
        yield Link(up, 0, (down,))
    merger = "model.visual.merger"
    yield Link(f"{merger}.up_proj.weight", 0, (f"{merger}.down_proj.weight",))
