"""Pictures that a request names by file, where the user of the command line allows a folder.

In: the body of a chat request, a folder. Out: the body with data URIs in place of paths. Knows nothing of
what a picture holds: that is judged where the server judges it.

A path is relative to the folder. Nothing outside of it is read, links followed; nor anything that is no
regular file.
"""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path
from typing import Any, TypeGuard

from autoglm_edge.server.asking.fields import shown
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import ApiError, refuse

_SCHEMES = ("data:", "http://", "https://")


def with_pictures(body: dict[str, Any], folder: Path, limits: Limits) -> dict[str, Any]:
    """The body with files as data URIs; the one that was given is left as it is.

    Args:
        body: of a chat request.
        folder: that pictures may come from.
        limits: number and size of pictures.

    Raises:
        ApiError: a file is missing, too large, or outside of the folder.
    """
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body
    left = [limits.images]
    return body | {"messages": [_message(message, folder, limits, left) for message in messages]}


def _message(message: Any, folder: Path, limits: Limits, left: list[int]) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return message | {"content": [_part(part, folder, limits, left) for part in content]}


def _part(part: Any, folder: Path, limits: Limits, left: list[int]) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image_url", "image"):
        return part
    source = part.get(kind)
    if isinstance(source, dict):
        url = source.get("url")
        return part | {kind: source | {"url": _uri(url, folder, limits, left)}} if _is_path(url) else part
    return part | {kind: _uri(source, folder, limits, left)} if _is_path(source) else part


def _is_path(source: object) -> TypeGuard[str]:
    return isinstance(source, str) and not source[:8].lower().startswith(_SCHEMES)


def _uri(path: str, folder: Path, limits: Limits, left: list[int]) -> str:
    left[0] -= 1
    if left[0] < 0:  # before any of them is read
        raise refuse(
            f"the request has more than {limits.images} pictures", "messages", code="too_many_images"
        )
    return f"data:;base64,{base64.b64encode(_read(path, folder, limits)).decode('ascii')}"


def _read(path: str, folder: Path, limits: Limits) -> bytes:
    try:
        top = folder.resolve(strict=True)
        found = (top / path).resolve(strict=True)
        if not found.is_relative_to(top):
            raise _bad(f"the picture {shown(path)} lies outside of the folder that pictures may come from")
        # What lies there may have been exchanged since; a pipe would be waited for.
        handle = os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise _bad(f"the picture {shown(path)} is no regular file")
            if about.st_size > limits.image_bytes:
                raise _bad(f"the picture {shown(path)} has more than {limits.image_bytes} bytes")
            return file.read(limits.image_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in a path, links in a circle
        reason = getattr(error, "strerror", None) or "it is no path"
        raise _bad(f"the picture {shown(path)} cannot be read ({reason})") from error


def _bad(message: str) -> ApiError:
    return refuse(message, "messages", code="invalid_image")
