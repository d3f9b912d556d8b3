"""Tokenizer and chat template of the pocket model.

In: sample prompts and answers. Out: a byte-level BPE tokenizer with GLM's special tokens in GLM's order,
plus the chat template and the other JSON files a Hugging Face processor reads. Digits are always single
tokens, so a coordinate is three tokens. This module knows nothing of screens or weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from glm_tokens import ADDED_TOKENS, PLAIN_TOKENS, SPECIAL_TOKENS
from pocket_systems import common_characters
from pocket_vocabulary import CHINESE, LABELS, PEOPLE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 6144
CHARACTER_WEIGHT = 40
"""How often each common Chinese character is shown, so that it becomes one token."""
BPE_SIZE = VOCABULARY_SIZE - len(ADDED_TOKENS)
TOKEN_IDS: dict[str, int] = {token: BPE_SIZE + index for index, token in enumerate(ADDED_TOKENS)}

# Letters with at most one leading mark, one digit, marks with trailing newlines, then white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part -%}
<|begin_of_image|><|image|><|end_of_image|>
{%- elif part.type == 'video' or 'video' in part -%}
<|begin_of_video|><|video|><|end_of_video|>
{%- elif part.type == 'text' -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' -}}
{{- render(message.content) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""

IMAGE_PROCESSOR: dict[str, object] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Glm4vImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "processor_class": "Glm4vProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 225792, "shortest_edge": 12544},
    "temporal_patch_size": 2,
}
"""preprocessor_config.json; the budget counts a still twice, so a tall phone becomes 224 x 476 pixels."""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges from sample texts and add the special tokens behind them.

    Args:
        texts: prompts and answers without special tokens; the same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=18,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_filled(texts), trainer)
    missing = BPE_SIZE - tokenizer.get_vocab_size()
    if missing:
        raise ValueError(f"sample texts give {missing} merges too few; show more texts")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    assert all(fast.convert_tokens_to_ids(token) == index for token, index in TOKEN_IDS.items())
    return fast


# Chinese has no spaces, so merges would glue a verb to its object; learning from pieces keeps them apart.
_PIECES = re.compile(
    "|".join(["请", "帮我", *sorted(set(CHINESE.values()) - set(PEOPLE), key=lambda name: -len(name))])
)


def _filled(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield _PIECES.sub("\n\\g<0>\n", text)
    for label in LABELS:
        yield from (label, f" {label}", f" {label.lower()}", CHINESE[label]) * 400
    for character in common_characters():
        yield from (character,) * CHARACTER_WEIGHT


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json, its settings, the chat template and preprocessor_config.json.

    The settings are written by hand so that both transformers 4 and 5 read them.
    """
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token in SPECIAL_TOKENS,
            }
            for token, index in TOKEN_IDS.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "padding_side": "left",
        "processor_class": "Glm4vProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(
        folder / "special_tokens_map.json", {"additional_special_tokens": list(SPECIAL_TOKENS), **named}
    )
    _write_json(folder / "preprocessor_config.json", IMAGE_PROCESSOR)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
