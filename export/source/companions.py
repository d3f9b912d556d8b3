"""The files of a checkpoint that a runtime needs besides the weights: tokenizer, template, settings.

In: a checkpoint folder. Out: bytes by the names that they have in a bundle, wherever this checkpoint keeps
them. Checks that tokenizer and model belong together. Knows nothing of weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.files import (
    CONFIG_NAME,
    GENERATION_NAME,
    PREPROCESSOR_NAME,
    SPECIAL_TOKENS_NAME,
    TEMPLATE_JSON_NAME,
    TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    read_bytes,
    read_json,
)

from .config import ModelConfig
from .processor import processor_settings

COPIED = (CONFIG_NAME, GENERATION_NAME, TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME)
"""Files that are taken over as they are, where the checkpoint has them."""


def side_files(folder: Path) -> dict[str, bytes]:
    """Files that a bundle takes over, by the names they have there.

    The template comes out as chat_template.jinja and the image processor's settings as
    preprocessor_config.json, wherever this checkpoint keeps them. Optional files that it does not have
    are left out.

    Raises:
        CheckpointError: a file is unreadable or damaged, or there is no template or no image processor.
    """
    files = {name: read_bytes(folder / name) for name in COPIED if (folder / name).exists()}
    files[TEMPLATE_NAME] = chat_template(folder).encode()
    settings, name = processor_settings(folder)
    files[PREPROCESSOR_NAME] = (
        read_bytes(folder / name)
        if name == PREPROCESSOR_NAME
        else (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    )
    return files


def check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """The tokenizer must be one that the embedding has rows for."""
    path = folder / TOKENIZER_NAME
    if not path.exists():
        raise CheckpointError(
            f"{folder} lacks {TOKENIZER_NAME}; download it, or load the tokenizer with transformers and save "
            "it here"
        )
    document = read_json(path)
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list) or not vocab:
        raise CheckpointError(f"{path} has no vocabulary; download it again")
    added = document.get("added_tokens") or []
    ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
    ids += [item.get("id") for item in added if isinstance(item, dict)]
    if any(type(number) is not int or number < 0 for number in ids):
        raise CheckpointError(f"{path} has a token id that is no number; download it again")
    if max(ids) >= config.text.vocab:
        raise CheckpointError(
            f"{path} knows the token id {max(ids)}, but the model has only {config.text.vocab}; the files "
            "belong to different models"
        )
    known = set(ids)
    for name in ("image", "image_start", "image_end"):
        if (number := getattr(config.tokens, name)) not in known:
            raise CheckpointError(
                f"{CONFIG_NAME} gives {name}_token_id {number}, which {TOKENIZER_NAME} does not know; the "
                "files belong to different models"
            )


def chat_template(folder: Path) -> str:
    """The chat template, from the first place that has one, in the order of transformers."""
    path = folder / TEMPLATE_NAME
    if path.exists():
        try:
            return read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text ({error}); download it again") from error
    for name in (TEMPLATE_JSON_NAME, TOKENIZER_CONFIG_NAME):
        path = folder / name
        value = read_json(path).get("chat_template") if path.exists() else None
        if isinstance(value, list):  # several templates by name
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default")
            if value is None:
                raise CheckpointError(
                    f"{path} holds the chat templates {', '.join(map(repr, named))} but no 'default'; put "
                    f"the one to use into {TEMPLATE_NAME}"
                )
        if isinstance(value, str):
            return value
        if value is not None:
            raise CheckpointError(f"{path} gives a chat_template that is not text; download it again")
    raise CheckpointError(
        f"{folder} has no chat template ({TEMPLATE_NAME}, {TEMPLATE_JSON_NAME}, or chat_template in "
        f"{TOKENIZER_CONFIG_NAME}); download it with the checkpoint"
    )
