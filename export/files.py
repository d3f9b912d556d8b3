"""The small files of a checkpoint: their names, and reading one with a sentence for what can be wrong.

In: a path. Out: bytes or a JSON object. Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoglm_edge.errors import CheckpointError

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_JSON_NAME = "chat_template.json"

LFS_MAGIC = b"version https://git-lfs"


def read_bytes(path: Path) -> bytes:
    """Read a small file of the checkpoint whole.

    Raises:
        CheckpointError: unreadable, or a git-lfs pointer.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if data.startswith(LFS_MAGIC):
        raise CheckpointError(lfs_message(path))
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint.

    Raises:
        CheckpointError: unreadable, not UTF-8, not JSON, not an object, or a git-lfs pointer.
    """
    return json_object(read_bytes(path), path)


def json_object(content: bytes, path: Path | str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: of the file.
        path: the file, for messages.

    Raises:
        CheckpointError: not UTF-8, not JSON, or not an object.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(document, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(document).__name__}, must be an object; download it again"
        )
    return document


def lfs_message(path: Path) -> str:
    """What to say of a file that git-lfs has not filled."""
    return (
        f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download "
        "with `hf download`"
    )
