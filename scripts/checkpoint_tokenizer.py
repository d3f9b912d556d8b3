"""Tokenizer and chat template of the checkpoints that make_checkpoint.py writes.

In: a shape. Out: the files that a tokenizer is loaded from. Knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from checkpoint_shapes import Shape
from glm_tokens import ADDED_TOKENS, SPECIAL_TOKENS

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


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """Write tokenizer.json, its settings and the chat template."""
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
    write_json(folder / "tokenizer_config.json", config)
    specials = {key: config[key] for key in ("additional_special_tokens", "eos_token", "pad_token")}
    write_json(folder / "special_tokens_map.json", specials)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as transformers does."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
