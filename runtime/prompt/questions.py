"""Questions of one's own: a file with a prompt a line.

In: a JSON Lines file. Out: `Question`s, checked, with their pictures decoded, one at a time. Knows nothing of
tokens and models, and nothing of what is done with an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_edge.errors import PromptError

from .image import load_image
from .messages import read_messages

Box = tuple[int, int, int, int]

MAX_TOKENS = 48
"""Of an answer, unless a file says otherwise: a thought in a sentence, and an action."""

_KEYS = {"name", "messages", "max_tokens", "box"}


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt.

    Attributes:
        name: group, language and number.
        messages: OpenAI-style, with Pillow images.
        max_tokens: limit of the answer.
        box: what a tap should hit, in 0..999, or None.
    """

    name: str
    messages: tuple[dict[str, Any], ...]
    max_tokens: int = MAX_TOKENS
    box: Box | None = None


def read_questions(path: Path) -> Iterator[Question]:
    """Questions of a JSON Lines file, one object a line; each is read when it is asked for.

    Keys: `name` (unique; the first word is the group), `messages` (OpenAI-style; pictures as data URI or as
    a path relative to the file), and where wanted `max_tokens` and `box` (four integers in 0..999).

    Raises:
        PromptError: not such a file.
        ImageError: a picture cannot be read.
        RequestError: a message is wrong.
    """
    names: set[str] = set()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    question = _from_line(line, f"{path}:{number}", path.parent)
                    if question.name in names:
                        raise PromptError(
                            f"{path}:{number} has the name {question.name!r} of an earlier line; a file must "
                            "have at least one prompt, and no name twice"
                        )
                    names.add(question.name)
                    yield question
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} cannot be read as UTF-8 text ({error})") from error
    if not names:
        raise PromptError(f"{path} has no prompts, must have at least one")


def _from_line(line: str, where: str, folder: Path) -> Question:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON ({error}); write one object a line") from error
    if not isinstance(document, dict) or not {"name", "messages"} <= set(document) <= _KEYS:
        raise PromptError(f"{where} must be an object with name and messages, and at most {sorted(_KEYS)}")
    name, box, max_tokens = document["name"], document.get("box"), document.get("max_tokens", MAX_TOKENS)
    is_box = isinstance(box, list) and len(box) == 4 and all(type(value) is int for value in box)
    if not isinstance(name, str) or not name or type(max_tokens) is not int or max_tokens < 1:
        raise PromptError(
            f"{where} has the name {name!r} and max_tokens {max_tokens!r}; use text and at least 1"
        )
    if box is not None and not (is_box and min(box) >= 0 and max(box) <= 1000):
        raise PromptError(f"{where} has the box {box!r}, must be four integers in 0..999")
    messages = tuple(_with_pictures(message, folder) for message in _list(document["messages"], where))
    read_messages(messages)
    return Question(name, messages, max_tokens, None if box is None else (box[0], box[1], box[2], box[3]))


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise PromptError(f"{where} has messages that are no list of objects")
    return value


def _with_pictures(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        source = part.get("image") if isinstance(part, dict) else None
        if isinstance(part, dict) and part.get("type") == "image_url":
            url = part.get("image_url")
            source = url.get("url") if isinstance(url, dict) else url
        if isinstance(source, str):
            location = source if source.startswith(("data:", "http:", "https:")) else folder / source
            part = {"type": "image", "image": load_image(location)}
        parts.append(part)
    return {**message, "content": parts}
