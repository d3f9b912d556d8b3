#!/usr/bin/env python3
"""Write a random Glm4v checkpoint of any geometry, without torch.

In: a shape (by name or as `Shape`), a seed, a number format. Out: a folder that transformers and `autoglm
export` load as if it came from the hub: config, sharded safetensors with the real tensor names, tokenizer,
chat template, processor settings. The weights are random, each tensor different, scaled so that activations
stay near 1; the model says nothing sensible.

    scripts/make_checkpoint.py --shape tiny -o /tmp/tiny
    scripts/make_checkpoint.py --shape autoglm-9b --layers 4 --shards 4 -o /tmp/four-layers

The values depend on the seed and the tensor name alone: sharding, number format and the other tensors do not
change them. One chunk of one tensor is in memory at a time, so the 20.6 GB shape needs no more memory than a
tiny one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from checkpoint_shapes import SHAPES, Shape, tensor_shapes
from checkpoint_tokenizer import CHAT_TEMPLATE, tokenizer_json, write_json, write_tokenizer
from checkpoint_weights import DTYPES, Dtype, write_weights
from glm_tokens import ADDED_TOKENS, EOS_TOKENS

__all__ = [
    "ADDED_TOKENS",
    "CHAT_TEMPLATE",
    "EOS_TOKENS",
    "SHAPES",
    "ConfigForm",
    "Dtype",
    "Shape",
    "config_json",
    "make_checkpoint",
    "preprocessor_json",
    "tensor_shapes",
    "tokenizer_json",
]

ConfigForm = Literal["4x", "5x", "mirrored"]


def make_checkpoint(
    path: str | Path,
    shape: Shape | str = "tiny",
    *,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    config_form: ConfigForm = "4x",
    shards: int = 1,
    shard_bytes: int | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder.

    Args:
        path: made if absent; files of the same names are overwritten.
        shape: a `Shape`, or a name of SHAPES.
        seed: other seeds give other weights.
        dtype: number format of every tensor.
        config_form: how config.json is laid out: as transformers 4 writes it, as 5 writes it, or as 4 with
            the text fields repeated at the top level.
        shards: number of safetensors files, about equal in size.
        shard_bytes: most bytes of weights per file instead (a larger tensor gets a file of its own).
        generation: further keys of generation_config.json, such as {"do_sample": True, "temperature": 0.8}.

    Returns:
        The folder.
    """
    geometry = SHAPES[shape] if isinstance(shape, str) else shape
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_json(geometry, dtype=dtype, form=config_form))
    generation_json = {
        "eos_token_id": [geometry.token(name) for name in EOS_TOKENS],
        "pad_token_id": geometry.token("<|endoftext|>"),
        **(generation or {}),
    }
    write_json(folder / "generation_config.json", generation_json)
    write_json(folder / "preprocessor_config.json", preprocessor_json(geometry))
    write_tokenizer(folder, geometry)
    write_weights(folder, geometry, seed=seed, dtype=dtype, shards=shards, shard_bytes=shard_bytes)
    return folder


def config_json(shape: Shape, *, dtype: Dtype = "bfloat16", form: ConfigForm = "4x") -> dict[str, Any]:
    """The document config.json."""
    five = form == "5x"
    dtype_key = "dtype" if five else "torch_dtype"
    rope: dict[str, Any] = {"mrope_section": list(shape.mrope_section)}
    text: dict[str, Any] = {
        "model_type": "glm4v_text",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_length,
        "initializer_range": 0.02,
        "rms_norm_eps": shape.norm_eps,
        "use_cache": True,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [shape.token(name) for name in EOS_TOKENS],
        "pad_token_id": shape.token("<|endoftext|>"),
        dtype_key: dtype,
    }
    if five:
        text["rope_parameters"] = {
            **rope,
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "partial_rotary_factor": shape.rotary_factor,
        }
    else:
        text["rope_theta"] = shape.rope_theta
        text["partial_rotary_factor"] = shape.rotary_factor
        text["rope_scaling"] = {"type": "default", **rope}
        text["tie_word_embeddings"] = shape.tied_head
    vision: dict[str, Any] = {
        "model_type": "glm4v_vision" if five else "glm4v",
        "depth": shape.vision_depth,
        "hidden_size": shape.vision_hidden,
        "hidden_act": "silu",
        "num_heads": shape.vision_heads,
        "attention_bias": shape.vision_attention_bias,
        "attention_dropout": 0.0,
        "in_channels": 3,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "temporal_patch_size": shape.temporal_patch_size,
        "spatial_merge_size": shape.merge_size,
        "out_hidden_size": shape.hidden,
        "intermediate_size": shape.merger_intermediate,
        "rms_norm_eps": shape.norm_eps,
        "initializer_range": 0.02,
    }
    if five:
        vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": 10000.0}
    config: dict[str, Any] = {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "image_token_id": shape.token("<|image|>"),
        "video_token_id": shape.token("<|video|>"),
        "image_start_token_id": shape.token("<|begin_of_image|>"),
        "image_end_token_id": shape.token("<|end_of_image|>"),
        "video_start_token_id": shape.token("<|begin_of_video|>"),
        "video_end_token_id": shape.token("<|end_of_video|>"),
        "tie_word_embeddings": shape.tied_head,
        dtype_key: dtype,
        "transformers_version": "5.23.0" if five else "4.57.1",
        "text_config": text,
        "vision_config": vision,
    }
    if form == "mirrored":
        config = {**{key: value for key, value in text.items() if key != "model_type"}, **config}
    return config


def preprocessor_json(shape: Shape) -> dict[str, Any]:
    """The document preprocessor_config.json."""
    return {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": shape.min_pixels, "longest_edge": shape.max_pixels},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": shape.patch_size,
        "temporal_patch_size": shape.temporal_patch_size,
        "merge_size": shape.merge_size,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description="Write a random Glm4v checkpoint of any geometry, without torch."
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, help="decoder layers instead of the shape's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--config-form", choices=("4x", "5x", "mirrored"), default="4x")
    parser.add_argument("--tied", action="store_true", help="no lm_head of its own")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shards", type=int, default=1, help="number of weight files")
    size.add_argument("--shard-bytes", type=int, help="most bytes of weights per file")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, layers=options.layers)
    if options.tied:
        shape = replace(shape, tied_head=True)
    start = time.monotonic()
    make_checkpoint(
        options.output,
        shape,
        seed=options.seed,
        dtype=options.dtype,
        config_form=options.config_form,
        shards=options.shards,
        shard_bytes=options.shard_bytes,
    )
    size_gb = sum(file.stat().st_size for file in options.output.glob("*.safetensors")) / 1e9
    print(f"{options.output}: {size_gb:.2f} GB in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
