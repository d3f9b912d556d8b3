"""Messages of a stranger: bounded, and with pictures that are bytes, before anybody looks closer.

In: the `messages` of a request. Out: the same for `read_messages`, which judges roles, keys and texts. Knows
of pictures only their size: nothing is unpacked here.

A picture is a data URI, or a URL if the server may fetch from that host. A path is never taken, in whatever
spelling: what leaves this module as a picture is bytes.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from autoglm_edge.runtime.prompt.image import FORMATS
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import ApiError, refuse

from .fields import kind_of, shown

Fetch = Callable[[str], bytes]


@dataclass
class _Count:
    """What was seen of a request so far."""

    parts: int = 0
    text_bytes: int = 0
    images: int = 0
    pixels: int = 0


def read_conversation(messages: object, limits: Limits, fetch: Fetch | None = None) -> list[Any]:
    """Messages whose pictures are bytes and whose size is bounded.

    An assistant's `reasoning_content` is put in front of its content as the model writes it down; the role
    `developer` is the system's newer name.

    Args:
        messages: as a client sends them.
        limits: see the class.
        fetch: gets the bytes behind an http(s) URL; None refuses them.

    Raises:
        ApiError: no list, too much of something, or a picture that cannot be taken.
    """
    if not isinstance(messages, list):
        raise refuse(f"messages is {kind_of(messages)}, must be a list", "messages", code="invalid_type")
    if len(messages) > limits.messages:
        raise refuse(f"messages has {len(messages)} entries, at most {limits.messages} are taken", "messages")
    count = _Count()
    return [
        _read_message(message, f"messages[{index}]", limits, fetch, count)
        for index, message in enumerate(messages)
    ]


def read_images(value: object, name: str, limits: Limits) -> list[dict[str, Any]]:
    """Parts of the pictures of a plain field: one or several, in base64 or as data URIs.

    Raises:
        ApiError: a picture that cannot be taken, or too many.
    """
    items = value if isinstance(value, list) else [value]
    count = _Count()
    parts = []
    for index, item in enumerate(items):
        where = f"{name}[{index}]" if isinstance(value, list) else name
        if not isinstance(item, str):
            raise refuse(
                f"{where} is {kind_of(item)}, must be base64 or a data URI", name, code="invalid_type"
            )
        uri = item if item[:5].lower() == "data:" else f"data:;base64,{item}"
        parts.append(_image_part(uri, where, limits, None, count))
    return parts


def check_text(text: str, limits: Limits, param: str) -> None:
    """Refuse a text that no context holds, before it is cut into tokens.

    Raises:
        ApiError: there is too much of it.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limits.text_bytes:
        raise _too_much_text(size, limits, param)


def _read_message(message: Any, where: str, limits: Limits, fetch: Fetch | None, count: _Count) -> Any:
    if not isinstance(message, dict):
        return message  # read_messages says what is wrong with it
    read = dict(message)
    if read.get("role") == "developer":
        read["role"] = "system"
    content = read.get("content")
    if isinstance(content, str):
        _add_text(content, limits, count)
    elif isinstance(content, list):
        count.parts += len(content)
        if count.parts > limits.parts:
            raise refuse(f"the messages have more than {limits.parts} parts", "messages")
        read["content"] = [
            _read_part(part, f"{where}.content[{index}]", limits, fetch, count)
            for index, part in enumerate(content)
        ]
    if read.get("role") == "assistant" and read.get("reasoning_content") is not None:
        _join_reasoning(read, where, limits, count)
    return read


def _join_reasoning(message: dict[str, Any], where: str, limits: Limits, count: _Count) -> None:
    """What was told apart for the client becomes one text again."""
    thought = message.pop("reasoning_content")
    content = message.get("content")
    if not isinstance(thought, str):
        raise refuse(f"{where}.reasoning_content is {kind_of(thought)}, must be a string", "messages")
    _add_text(thought, limits, count)
    if not thought:
        return
    if content is not None and not isinstance(content, str):
        raise refuse(
            f"{where} has reasoning_content beside a list of parts; give its content as a string", "messages"
        )
    message["content"] = f"<think>{thought}</think><answer>{content or ''}</answer>"


def _read_part(part: Any, where: str, limits: Limits, fetch: Fetch | None, count: _Count) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "text":
        if isinstance(part.get("text"), str):
            _add_text(part["text"], limits, count)
        _only_keys(part, where, "type", "text")
        return part
    if kind == "image_url":
        _only_keys(part, where, "type", "image_url")
        source = part.get("image_url")
        if isinstance(source, dict):
            _only_keys(source, f"{where}.image_url", "url", "detail")
            if source.get("detail") not in (None, "auto", "high"):
                raise refuse(
                    f"{where}.image_url.detail is {shown(source['detail'])}: the size of pictures is the "
                    "server's choice (--max-image-tokens); leave it out, or write auto or high",
                    "messages",
                )
            source = source.get("url")
        return _image_part(source, f"{where}.image_url", limits, fetch, count)
    if kind == "image":
        _only_keys(part, where, "type", "image")
        return _image_part(part.get("image"), f"{where}.image", limits, fetch, count)
    if kind == "input_audio":  # what can be heard has become a text before
        raise refuse(
            f"{where}.type is input_audio, which only /v1/chat/completions of a server with a speech model "
            "hears (--speech-model)",
            "messages",
            code="unsupported_audio",
        )
    if not isinstance(kind, str):
        raise refuse(f"{where}.type is {kind_of(kind)}, must be text or image_url", "messages")
    raise refuse(f"{where}.type is {shown(kind)}, must be text or image_url", "messages")


def _only_keys(part: Mapping[str, Any], where: str, *known: str) -> None:
    unknown = sorted(key for key, value in part.items() if key not in known and value is not None)
    if unknown:
        raise refuse(
            f"{where} has the key {shown(unknown[0])}, which the model cannot see; remove it", "messages"
        )


def _add_text(text: str, limits: Limits, count: _Count) -> None:
    count.text_bytes += len(text.encode("utf-8", "surrogatepass"))
    if count.text_bytes > limits.text_bytes:
        raise _too_much_text(count.text_bytes, limits, "messages")


def _image_part(
    source: object, where: str, limits: Limits, fetch: Fetch | None, count: _Count
) -> dict[str, Any]:
    if not isinstance(source, str):
        raise refuse(f"{where} is {kind_of(source)}, must be a data URI", "messages", code="invalid_type")
    count.images += 1
    if count.images > limits.images:
        raise refuse(
            f"the request has more than {limits.images} pictures", "messages", code="too_many_images"
        )
    scheme = source[:8].lower()
    if scheme.startswith("data:"):
        data = _decode_uri(source, where, limits)
    elif scheme.startswith(("http://", "https://")):
        if fetch is None:
            raise _bad_image(
                f"{where} is a URL, and this server fetches nothing; send a data URI, or start the server "
                "with --allow-image-urls and the host"
            )
        data = fetch(source)
    else:
        raise _bad_image(
            f"{where} is neither a data URI nor a URL; files of the server are never read, "
            "write data:image/png;base64, and then the data"
        )
    count.pixels += _count_pixels(data, where, limits)
    if count.pixels > limits.request_pixels:
        raise _bad_image(f"the pictures have more than {limits.request_pixels} pixels together")
    return {"type": "image", "image": data}


def _decode_uri(uri: str, where: str, limits: Limits) -> bytes:
    comma = uri.find(",", 0, 256)
    header = uri[: max(comma, 0)]
    if comma < 0 or not header.lower().endswith(";base64"):
        raise _bad_image(f"{where} is not base64; write data:image/png;base64, and then the data")
    media = header[5:].split(";", 1)[0].strip().lower()
    if media and not media.startswith("image/") and media != "application/octet-stream":
        raise _bad_image(f"{where} is {shown(media)}, must be a picture")
    if (len(uri) - comma) * 3 // 4 > limits.image_bytes + 3:
        raise _bad_image(f"{where} has more than {limits.image_bytes} bytes; send a smaller picture")
    try:
        return base64.b64decode("".join(uri[comma + 1 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad_image(f"{where} holds no valid base64 ({error})") from error


def _count_pixels(data: bytes, where: str, limits: Limits) -> int:
    """Pixels that a picture's header announces; nothing is unpacked.

    Raises:
        ApiError: no picture, or too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError as error:
        names = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise _bad_image(f"{where}: {len(data)} bytes that are not a {names} picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bad_image(f"{where} has more than {limits.image_pixels} pixels; scale it down") from error
    # Decoders raise errors of many types on damaged headers; all mean the same here.
    except Exception as error:
        raise _bad_image(f"{where} is damaged") from error
    if width * height > limits.image_pixels:
        raise _bad_image(
            f"{where} has {width}x{height} pixels, more than {limits.image_pixels}; scale it down"
        )
    return width * height


def _bad_image(message: str) -> ApiError:
    return refuse(message, "messages", code="invalid_image")


def _too_much_text(size: int, limits: Limits, param: str) -> ApiError:
    return ApiError(
        400,
        f"the request has more text than any context here holds: {size} bytes of it, at most "
        f"{limits.text_bytes} are read; shorten it",
        code="context_length_exceeded",
        param=param,
    )
