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
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Dtype = Literal["bfloat16", "float16", "float32"]
ConfigForm = Literal["4x", "5x", "mirrored"]

DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
}
"""Name in config.json -> name in a safetensors header, numpy type."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
"""In the order of the GLM-4 vocabulary."""
PLAIN_ADDED_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
"""Added tokens that are text to a decoder; they follow the special ones."""
ADDED_TOKENS = SPECIAL_TOKENS + PLAIN_ADDED_TOKENS
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")

SPACED_WORDS = (
    "the and you are phone agent screen user task action answer with one then next page open tap on to of in "
    "is a Long Press"
)
BARE_WORDS = (
    "do action element finish message Launch Swipe start end Type text Back Home Wait Tap Double Settings "
    "current app 你好 手机 打开 点击 搜索 设置 屏幕 操作 任务 应用"
)
"""Words that get tokens of their own in the generated vocabulary; everything else is spelled in bytes."""

CHAT_TEMPLATE = """[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'system' %}<|system|>
{% elif message.role == 'user' %}<|user|>
{% elif message.role == 'assistant' %}<|assistant|>
{% endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}<|begin_of_image|><|image|><|end_of_image|>
{%- elif part.type == 'text' or 'text' in part %}{{ part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""

POOL_VALUES = 4_194_301
"""Length of the pool that large tensors are cut from: a prime, so rows of one tensor do not line up."""


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
    _write_json(folder / "config.json", config_json(geometry, dtype=dtype, form=config_form))
    generation_json = {
        "eos_token_id": [geometry.token(name) for name in EOS_TOKENS],
        "pad_token_id": geometry.token("<|endoftext|>"),
        **(generation or {}),
    }
    _write_json(folder / "generation_config.json", generation_json)
    _write_json(folder / "preprocessor_config.json", preprocessor_json(geometry))
    _write_tokenizer(folder, geometry)
    _write_weights(folder, geometry, seed=seed, dtype=dtype, shards=shards, shard_bytes=shard_bytes)
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


def tokenizer_json(shape: Shape) -> dict[str, Any]:
    """The document tokenizer.json: byte-level BPE with a few words, filler up to the added tokens."""
    base_size = shape.used_vocab - len(ADDED_TOKENS)
    vocab = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    merges: list[list[str]] = []
    for left, right in _word_merges():
        if left + right not in vocab:
            if len(vocab) == base_size:
                break
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    for index in range(len(vocab), base_size):
        vocab[f"<filler-{index}>"] = index
    added = [
        {
            "id": shape.token(name),
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": name in SPECIAL_TOKENS,
        }
        for name in ADDED_TOKENS
    ]
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


@cache
def _byte_symbols() -> tuple[str, ...]:
    """The 256 characters that byte-level BPE writes for the bytes 0..255, by byte.

    Printable Latin-1 characters stand for themselves, the other bytes for the code points from 256 on, in
    order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@cache
def _word_merges() -> tuple[tuple[str, str], ...]:
    symbols = _byte_symbols()
    pairs: dict[tuple[str, str], None] = {}
    for word in (*(f" {word}" for word in SPACED_WORDS.split()), *BARE_WORDS.split()):
        spelled = [symbols[byte] for byte in word.encode()]
        for end in range(1, len(spelled)):
            pairs["".join(spelled[:end]), spelled[end]] = None
    return tuple(pairs)


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    document = tokenizer_json(shape)
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    decoder = {
        str(item["id"]): {key: value for key, value in item.items() if key != "id"}
        for item in document["added_tokens"]
    }
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": shape.context_length,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Glm4vProcessor",
    }
    _write_json(folder / "tokenizer_config.json", config)
    specials = {key: config[key] for key in ("additional_special_tokens", "eos_token", "pad_token")}
    _write_json(folder / "special_tokens_map.json", specials)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_weights(
    folder: Path, shape: Shape, *, seed: int, dtype: Dtype, shards: int, shard_bytes: int | None
) -> None:
    code, kind = DTYPES[dtype]
    tensors = tensor_shapes(shape)
    sizes = {name: math.prod(dims) * kind.itemsize for name, dims in tensors.items()}
    groups = _group(sizes, shards=shards, shard_bytes=shard_bytes)
    files = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    )
    for file, names in zip(files, groups, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            header[name] = {
                "dtype": code,
                "shape": list(tensors[name]),
                "data_offsets": [end, end + sizes[name]],
            }
            end += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for chunk in _values(name, tensors[name], seed=seed, kind=kind, tied=shape.tied_head):
                    stream.write(chunk.view(np.uint8).data)
    if len(groups) > 1:
        weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        _write_json(folder / "model.safetensors.index.json", index)


def _group(sizes: Mapping[str, int], *, shards: int, shard_bytes: int | None) -> list[list[str]]:
    """Cut the tensors, in order, into files."""
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"shards is {shards}, must be from 1 to {len(sizes)}, the number of tensors")
    limit = math.ceil(sum(sizes.values()) / shards) if shard_bytes is None else shard_bytes
    groups: list[list[str]] = [[]]
    filled = 0
    for number, (name, size) in enumerate(sizes.items()):
        full = filled + size > limit
        if shard_bytes is None:  # exactly `shards` files: neither one more, nor too few tensors for the rest
            to_come = shards - len(groups)
            full = to_come > 0 and (full or len(sizes) - number <= to_come)
        if groups[-1] and full:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _values(
    name: str, dims: tuple[int, ...], *, seed: int, kind: np.dtype[Any], tied: bool
) -> Iterator[NDArray[Any]]:
    """The values of one tensor as flat pieces, in order."""
    mean, std = _moments(name, dims, tied=tied)
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    count = math.prod(dims)
    if count <= POOL_VALUES:
        values = rng.standard_normal(count, dtype=np.float32)
        yield (values * np.float32(std) + np.float32(mean)).astype(kind)
        return
    pool = (_pool(seed) * np.float32(std) + np.float32(mean)).astype(kind)
    while count > 0:
        start = int(rng.integers(POOL_VALUES))
        for piece in (pool[start:], pool[:start]):
            yield piece[:count]
            count -= len(piece[:count])


@cache
def _pool(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(POOL_VALUES, dtype=np.float32)


def _moments(name: str, dims: tuple[int, ...], *, tied: bool) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name.endswith(".bias"):
        return 0.0, 0.05
    if len(dims) == 1:
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, dims[1] ** -0.5 if tied else 1.0
    if name.endswith("position_embedding.weight"):
        return 0.0, 0.5
    return 0.0, math.prod(dims[1:]) ** -0.5


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
