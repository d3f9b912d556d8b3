"""Bytes of weights that each preset makes of AutoGLM-Phone-9B, computed from its tensor shapes.

    python benchmarks/preset_sizes.py

Nothing is read but the shapes in this file, which are those of GLM-4.1V-9B-Thinking, whose architecture
AutoGLM-Phone-9B has. Counted are the three data files without the padding between their pieces; graphs,
tokenizer and the other small files come on top. A table goes to stdout, and as its last line one JSON
document.
"""

from __future__ import annotations

import json
import math

from autoglm_edge.quantize import PRESETS, BlockFormat, ChannelFormat, Recipe

PARTS = ("decoder", "embedding", "vision")
LAYERS, BLOCKS = 40, 24


def shapes() -> dict[str, tuple[int, int]]:
    """(rows, columns) of every tensor of the checkpoint by its name; vectors are single rows."""
    hidden, heads, kv_heads, head_dim, inner, vocab = 4096, 32, 2, 128, 13696, 151552
    width, patch, cells, block_inner = 1536, 3 * 2 * 14 * 14, 24 * 24, 4096
    found = {
        "lm_head.weight": (vocab, hidden),
        "model.language_model.embed_tokens.weight": (vocab, hidden),
        "model.language_model.norm.weight": (1, hidden),
        "model.visual.patch_embed.proj.weight": (width, patch),
        "model.visual.patch_embed.proj.bias": (1, width),
        "model.visual.embeddings.position_embedding.weight": (cells, width),
        "model.visual.post_conv_layernorm.weight": (1, width),
        "model.visual.post_layernorm.weight": (1, width),
        "model.visual.downsample.weight": (hidden, 4 * width),
        "model.visual.downsample.bias": (1, hidden),
        "model.visual.merger.proj.weight": (hidden, hidden),
        "model.visual.merger.post_projection_norm.weight": (1, hidden),
        "model.visual.merger.post_projection_norm.bias": (1, hidden),
        "model.visual.merger.gate_proj.weight": (inner, hidden),
        "model.visual.merger.up_proj.weight": (inner, hidden),
        "model.visual.merger.down_proj.weight": (hidden, inner),
    }
    norms = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
    for index in range(LAYERS):
        stem = f"model.language_model.layers.{index}"
        for name, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            found[f"{stem}.self_attn.{name}_proj.weight"] = (rows, hidden)
            found[f"{stem}.self_attn.{name}_proj.bias"] = (1, rows)
        found[f"{stem}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        found[f"{stem}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        found[f"{stem}.mlp.down_proj.weight"] = (hidden, inner)
        found.update({f"{stem}.{norm}.weight": (1, hidden) for norm in norms})
    for index in range(BLOCKS):
        stem = f"model.visual.blocks.{index}"
        found[f"{stem}.attn.qkv.weight"] = (3 * width, width)
        found[f"{stem}.attn.proj.weight"] = (width, width)
        found[f"{stem}.mlp.gate_proj.weight"] = (block_inner, width)
        found[f"{stem}.mlp.up_proj.weight"] = (block_inner, width)
        found[f"{stem}.mlp.down_proj.weight"] = (width, block_inner)
        found.update({f"{stem}.{norm}.weight": (1, width) for norm in ("norm1", "norm2")})
    return found


def sizes(recipe: Recipe) -> dict[str, int]:
    """Bytes of weights of each part."""
    recipe = recipe.for_layers(decoder=LAYERS, vision=BLOCKS)
    float_bytes = {"float32": 4, "float16": 2}[recipe.activations]
    total = dict.fromkeys(PARTS, 0)
    for name, shape in shapes().items():
        part = "vision" if ".visual." in name else "embedding" if "embed_tokens" in name else "decoder"
        form = recipe.format_for(name)
        if form is not None:
            total[part] += form.size_bytes(*shape, scale_bytes=float_bytes)
        elif "position_embedding" in name:
            total[part] += 4 * math.prod(shape)  # always float32: it is interpolated
        else:
            total[part] += float_bytes * math.prod(shape)
    return total


def prefill_size(recipe: Recipe) -> int | None:
    """Bytes that the part for prompts adds; None if the recipe has no use for it.

    Of the last layer it has the matrices of keys and values alone. Norms, biases, floats lie in the decoder.
    """
    recipe = recipe.for_layers(decoder=LAYERS, vision=BLOCKS)
    total = 0
    for name, shape in shapes().items():
        if not name.startswith("model.language_model.layers.") or recipe.activations != "float32":
            continue
        last = f".{LAYERS - 1}." in name and not name.endswith(("k_proj.weight", "v_proj.weight"))
        if isinstance(recipe.format_for(name), BlockFormat) and not last:
            total += ChannelFormat().size_bytes(*shape)
    return total or None


def main() -> None:
    """Compute and print."""
    weights = sum(math.prod(shape) for shape in shapes().values())
    results = {}
    print(
        "| preset | decoder with head | embedding | vision | all | bytes per weight | `--prefill int8` adds |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, recipe in PRESETS.items():
        parts = sizes(recipe)
        everything = sum(parts.values())
        prefill = prefill_size(recipe)
        results[name] = {**parts, "total": everything, "prefill": prefill}
        cells = " | ".join(f"{size / 1e9:.2f} GB" for size in (*parts.values(), everything))
        adds = "–" if prefill is None else f"{prefill / 1e9:.2f} GB"
        print(f"| `{name}` | {cells} | {everything / weights:.3f} | {adds} |")
    print(json.dumps({"benchmark": "preset_sizes", "weights": weights, "results_bytes": results}))


if __name__ == "__main__":
    main()
