"""Names and shapes of all tensors of a model, from its settings alone.

In: `ModelConfig`. Out: name -> shape. Names are those of transformers' `modeling_glm4v.py`, the same on
disk for versions 4 and 5. Knows nothing of files and values.
"""

from __future__ import annotations

from .config import ModelConfig

HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model, in the order of its computation; no head if it is tied."""
    text, vision = config.text, config.vision
    c, v = text.hidden, vision.hidden
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (text.vocab, c)}
    for number in range(text.layers):
        layer = f"model.language_model.layers.{number}."
        for letter, heads in (("q", text.heads), ("k", text.kv_heads), ("v", text.kv_heads)):
            tensors[f"{layer}self_attn.{letter}_proj.weight"] = (heads * text.head_dim, c)
            if text.attention_bias:
                tensors[f"{layer}self_attn.{letter}_proj.bias"] = (heads * text.head_dim,)
        tensors[f"{layer}self_attn.o_proj.weight"] = (c, text.heads * text.head_dim)
        tensors[f"{layer}mlp.gate_up_proj.weight"] = (2 * text.intermediate, c)
        tensors[f"{layer}mlp.down_proj.weight"] = (c, text.intermediate)
        for norm in ("input", "post_self_attn", "post_attention", "post_mlp"):
            tensors[f"{layer}{norm}_layernorm.weight"] = (c,)
    tensors["model.language_model.norm.weight"] = (c,)
    if not text.tied_head:
        tensors[HEAD] = (text.vocab, c)
    tower = "model.visual."
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    tensors[f"{tower}patch_embed.proj.weight"] = (v, *kernel)
    tensors[f"{tower}patch_embed.proj.bias"] = (v,)
    tensors[f"{tower}post_conv_layernorm.weight"] = (v,)
    tensors[f"{tower}embeddings.position_embedding.weight"] = (vision.position_side**2, v)
    for number in range(vision.depth):
        block = f"{tower}blocks.{number}."
        tensors[f"{block}norm1.weight"] = (v,)
        tensors[f"{block}attn.qkv.weight"] = (3 * v, v)
        if vision.attention_bias:
            tensors[f"{block}attn.qkv.bias"] = (3 * v,)
        tensors[f"{block}attn.proj.weight"] = (v, v)
        tensors[f"{block}norm2.weight"] = (v,)
        tensors[f"{block}mlp.gate_proj.weight"] = (vision.out_hidden, v)
        tensors[f"{block}mlp.up_proj.weight"] = (vision.out_hidden, v)
        tensors[f"{block}mlp.down_proj.weight"] = (v, vision.out_hidden)
    o, m = vision.out_hidden, vision.merger_intermediate
    tensors[f"{tower}post_layernorm.weight"] = (v,)
    tensors[f"{tower}downsample.weight"] = (o, v, vision.merge_size, vision.merge_size)
    tensors[f"{tower}downsample.bias"] = (o,)
    tensors[f"{tower}merger.proj.weight"] = (o, o)
    tensors[f"{tower}merger.post_projection_norm.weight"] = (o,)
    tensors[f"{tower}merger.post_projection_norm.bias"] = (o,)
    tensors[f"{tower}merger.gate_proj.weight"] = (m, o)
    tensors[f"{tower}merger.up_proj.weight"] = (m, o)
    tensors[f"{tower}merger.down_proj.weight"] = (o, m)
    return tensors
