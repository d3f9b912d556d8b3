"""Chat messages: from OpenAI-style dictionaries to checked values with decoded images.

In: what a chat client sends. Out: Message, whose parts are text or an RGB image. Knows nothing of
templates, tokens or pixel budgets. Whatever the model could not see is refused by name, not dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from autoglm_edge.errors import ImageError, PromptError

from .image import load_image

ROLES = ("system", "user", "assistant")
# Keys that say nothing to the model; clients echo them back with an earlier answer.
_SILENT_KEYS = frozenset({"role", "content", "name", "refusal", "annotations"})


@dataclass(frozen=True)
class TextPart:
    """A piece of text.

    Attributes:
        text: any valid Unicode, may be empty.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PromptError(f"a text part holds {type(self.text).__name__}, must be a string")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text holds the lone surrogate {self.text[error.start]!r} at character {error.start}; "
                "decode the text as UTF-8 first"
            ) from error


@dataclass(frozen=True)
class ImagePart:
    """A picture.

    Attributes:
        image: decoded, upright, RGB.
    """

    image: Image.Image

    def __post_init__(self) -> None:
        if not isinstance(self.image, Image.Image) or self.image.mode != "RGB":
            kind = getattr(self.image, "mode", type(self.image).__name__)
            raise PromptError(f"an image part holds {kind}, must be an RGB Pillow image; use load_image")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "user" or "assistant".
        parts: in reading order; may be empty.
        is_string: the content came as one string and not as a list of parts; templates may tell the two
            apart, so it is passed on in the same form.
    """

    role: str
    parts: tuple[TextPart | ImagePart, ...]
    is_string: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"a message has the role {self.role!r}, must be one of {', '.join(ROLES)}")
        if self.is_string and not (len(self.parts) == 1 and isinstance(self.parts[0], TextPart)):
            raise PromptError("a message with string content must have exactly one text part")

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures of this turn, in order."""
        return tuple(part.image for part in self.parts if isinstance(part, ImagePart))


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Check messages and decode their images.

    Content is a string, or a list of these parts:
    `{"type": "text", "text": ...}`,
    `{"type": "image_url", "image_url": {"url": ...}}` or `{"type": "image_url", "image_url": ...}`,
    `{"type": "image", "image": ...}` (or "url" or "path" in place of the key "image").
    An image is a data URI, a local path, a Pillow image or the bytes of a file. The `detail` of an image_url
    is accepted and has no effect: resolution follows from the pixel budget. An assistant's content may be
    None, which is the empty string.

    Args:
        messages: in order.

    Returns:
        One Message per dictionary.

    Raises:
        PromptError: no messages, an unknown role, key or part type, or a value of a wrong type.
        ImageError: an image cannot be read; the message says where it stands.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(f"messages is {type(messages).__name__}, must be a list of messages")
    if not messages:
        raise PromptError("messages is empty; give at least one user message")
    return tuple(_read_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is {type(message).__name__}, must be an object with role and content")
    for key, value in message.items():
        if key not in _SILENT_KEYS and not _is_empty(value):
            raise PromptError(f"{where} has the key {key!r}, which the model cannot see; remove it")
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(f"{where}.role is {role!r}, must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return Message(role, (_read_text(content, f"{where}.content"),), is_string=True)
    if not isinstance(content, (list, tuple)):
        raise PromptError(f"{where}.content is {type(content).__name__}, must be a string or a list of parts")
    return Message(
        role, tuple(_read_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)


def _read_part(part: Any, where: str) -> TextPart | ImagePart:
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is {type(part).__name__}, must be an object with a type")
    kind = part.get("type")
    if kind == "text":
        return _read_text(part.get("text"), f"{where}.text")
    if kind == "image_url":
        source = part.get("image_url")
        if isinstance(source, Mapping):
            source = source.get("url")
        return _read_image(source, f"{where}.image_url")
    if kind == "image":
        found = [key for key in ("image", "url", "path") if part.get(key) is not None]
        if len(found) != 1:
            raise PromptError(f"{where} gives {len(found)} images, must have exactly one of image, url, path")
        return _read_image(part[found[0]], f"{where}.{found[0]}")
    raise PromptError(f"{where}.type is {kind!r}, must be text, image_url or image")


def _read_text(text: Any, where: str) -> TextPart:
    try:
        return TextPart(text)
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from error


def _read_image(source: Any, where: str) -> ImagePart:
    if not isinstance(source, (str, bytes, bytearray, Path, Image.Image)):
        raise PromptError(
            f"{where} is {type(source).__name__}, must be a data URI, a path, bytes or a Pillow image"
        )
    try:
        return ImagePart(load_image(source))
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from error
