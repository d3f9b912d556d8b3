"""Geometries of the checkpoints that make_checkpoint.py writes, and the tensors that each consists of.

In: nothing. Out: `SHAPES` by name; names and shapes of the tensors of any of them. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm_tokens import ADDED_TOKENS


@dataclass(frozen=True)
class Shape:
    """Geometry of a checkpoint. The defaults are the `tiny` shape.

    Attributes:
        hidden: C; must be heads * head size, as the reference computes the head size so.
        layers: L.
        heads: H.
        kv_heads: K.
        intermediate: width of the decoder MLP.
        vocab: V, rows of the embedding; more than the tokenizer knows.
        used_vocab: ids that the tokenizer knows; the last 20 are the added tokens.
        context_length: max_position_embeddings.
        rotary_factor: share of the head size that is rotated.
        mrope_section: pairs per axis (time, height, width); the sum is half the rotated size.
        rope_theta: base of the decoder's rotary frequencies.
        norm_eps: of every RMSNorm.
        tied_head: no lm_head of its own.
        vision_hidden: width of the vision tower.
        vision_depth: its blocks.
        vision_heads: its heads.
        vision_attention_bias: bias on the fused qkv projection.
        merger_intermediate: width of the merger MLP.
        image_size: pixels along a side; (image_size // patch_size) ** 2 learned positions.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames per patch.
        merge_size: patches along a side that become one token.
        min_pixels: least frames * height * width of an image.
        max_pixels: most of the same.
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 96
    vocab: int = 512
    used_vocab: int = 500
    context_length: int = 4096
    rotary_factor: float = 0.5
    mrope_section: tuple[int, int, int] = (1, 1, 2)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    vision_hidden: int = 32
    vision_depth: int = 2
    vision_heads: int = 2
    vision_attention_bias: bool = False
    merger_intermediate: int = 80
    image_size: int = 112
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 12544
    max_pixels: int = 200704

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads {self.heads} must divide hidden {self.hidden}, kv_heads {self.kv_heads} the heads"
            )
        if self.vision_hidden % (4 * self.vision_heads):
            raise ValueError(
                f"vision_hidden {self.vision_hidden} must be a multiple of 4 * {self.vision_heads} heads"
            )
        if 2 * sum(self.mrope_section) != int(self.head_dim * self.rotary_factor):
            raise ValueError(
                f"mrope_section {self.mrope_section} must add up to half of {self.head_dim} * "
                f"{self.rotary_factor}"
            )
        if not 256 + len(ADDED_TOKENS) <= self.used_vocab <= self.vocab:
            raise ValueError(
                f"used_vocab {self.used_vocab} must be 276 at least and {self.vocab} (vocab) at most"
            )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden // self.heads

    def token(self, name: str) -> int:
        """Id of an added token."""
        return self.used_vocab - len(ADDED_TOKENS) + ADDED_TOKENS.index(name)


SHAPES: dict[str, Shape] = {
    "tiny": Shape(),
    "autoglm-9b": Shape(
        hidden=4096,
        layers=40,
        heads=32,
        kv_heads=2,
        intermediate=13696,
        vocab=151552,
        used_vocab=151349,
        context_length=65536,
        mrope_section=(8, 12, 12),
        vision_hidden=1536,
        vision_depth=24,
        vision_heads=12,
        merger_intermediate=13696,
        image_size=336,
        max_pixels=9_633_792,
    ),
    # head size 24, hidden 144 (not a multiple of 64), uneven axes, vision biases
    "odd-heads6": Shape(
        hidden=144,
        layers=3,
        heads=6,
        kv_heads=2,
        intermediate=200,
        mrope_section=(1, 2, 3),
        vision_hidden=48,
        vision_depth=1,
        vision_heads=3,
        vision_attention_bias=True,
        merger_intermediate=120,
        image_size=84,
    ),
    # one kv head, head size 16, whole head rotated
    "odd-mqa": Shape(
        hidden=128,
        layers=1,
        heads=8,
        kv_heads=1,
        intermediate=328,
        rotary_factor=1.0,
        mrope_section=(2, 3, 3),
        vision_hidden=72,
        vision_depth=3,
        vision_heads=2,
        merger_intermediate=96,
        image_size=140,
    ),
    # as many kv heads as heads, head size 32, tied head
    "odd-mha": Shape(
        hidden=128,
        layers=2,
        heads=4,
        kv_heads=4,
        intermediate=160,
        mrope_section=(2, 3, 3),
        tied_head=True,
        vision_hidden=80,
        vision_depth=2,
        vision_heads=5,
        merger_intermediate=112,
        image_size=336,
    ),
    # head size 48, the pocket model's, with another base
    "odd-head48": Shape(
        hidden=96,
        layers=2,
        heads=2,
        kv_heads=1,
        intermediate=136,
        mrope_section=(4, 4, 4),
        rope_theta=500000.0,
        norm_eps=1e-6,
        vision_hidden=64,
        vision_depth=2,
        vision_heads=1,
        merger_intermediate=88,
        image_size=224,
    ),
    # head size 64, whole head rotated, time axis widest
    "odd-head64": Shape(
        hidden=192,
        layers=2,
        heads=3,
        kv_heads=1,
        intermediate=264,
        rotary_factor=1.0,
        mrope_section=(16, 8, 8),
        vision_hidden=56,
        vision_depth=2,
        vision_heads=7,
        merger_intermediate=104,
        image_size=168,
    ),
    # an axis without a pair, tied head, big vocabulary padding, unlike sizes everywhere
    "odd-axes": Shape(
        hidden=160,
        layers=2,
        heads=5,
        kv_heads=5,
        intermediate=72,
        vocab=1001,
        used_vocab=300,
        mrope_section=(0, 5, 3),
        tied_head=True,
        vision_hidden=24,
        vision_depth=1,
        vision_heads=1,
        merger_intermediate=40,
        image_size=196,
    ),
}


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order of the model."""
    c, d, v = shape.hidden, shape.head_dim, shape.vision_hidden
    tensors: dict[str, tuple[int, ...]] = {"model.language_model.embed_tokens.weight": (shape.vocab, c)}
    for layer in range(shape.layers):
        prefix = f"model.language_model.layers.{layer}."
        for projection, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            tensors[f"{prefix}self_attn.{projection}_proj.weight"] = (heads * d, c)
            tensors[f"{prefix}self_attn.{projection}_proj.bias"] = (heads * d,)
        tensors[f"{prefix}self_attn.o_proj.weight"] = (c, shape.heads * d)
        tensors[f"{prefix}mlp.gate_up_proj.weight"] = (2 * shape.intermediate, c)
        tensors[f"{prefix}mlp.down_proj.weight"] = (c, shape.intermediate)
        for norm in ("input", "post_self_attn", "post_attention", "post_mlp"):
            tensors[f"{prefix}{norm}_layernorm.weight"] = (c,)
    tensors["model.language_model.norm.weight"] = (c,)
    patch = (3, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    tensors["model.visual.patch_embed.proj.weight"] = (v, *patch)
    tensors["model.visual.patch_embed.proj.bias"] = (v,)
    positions = (shape.image_size // shape.patch_size) ** 2
    tensors["model.visual.embeddings.position_embedding.weight"] = (positions, v)
    tensors["model.visual.post_conv_layernorm.weight"] = (v,)
    for block in range(shape.vision_depth):
        prefix = f"model.visual.blocks.{block}."
        tensors[f"{prefix}norm1.weight"] = (v,)
        tensors[f"{prefix}norm2.weight"] = (v,)
        tensors[f"{prefix}attn.qkv.weight"] = (3 * v, v)
        if shape.vision_attention_bias:
            tensors[f"{prefix}attn.qkv.bias"] = (3 * v,)
        tensors[f"{prefix}attn.proj.weight"] = (v, v)
        tensors[f"{prefix}mlp.gate_proj.weight"] = (c, v)
        tensors[f"{prefix}mlp.up_proj.weight"] = (c, v)
        tensors[f"{prefix}mlp.down_proj.weight"] = (v, c)
    tensors["model.visual.post_layernorm.weight"] = (v,)
    tensors["model.visual.downsample.weight"] = (c, v, shape.merge_size, shape.merge_size)
    tensors["model.visual.downsample.bias"] = (c,)
    tensors["model.visual.merger.proj.weight"] = (c, c)
    tensors["model.visual.merger.post_projection_norm.weight"] = (c,)
    tensors["model.visual.merger.post_projection_norm.bias"] = (c,)
    tensors["model.visual.merger.gate_proj.weight"] = (shape.merger_intermediate, c)
    tensors["model.visual.merger.up_proj.weight"] = (shape.merger_intermediate, c)
    tensors["model.visual.merger.down_proj.weight"] = (c, shape.merger_intermediate)
    if not shape.tied_head:
        tensors["lm_head.weight"] = (shape.vocab, c)
    return tensors
