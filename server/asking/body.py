"""The body of a request: read within bounds of bytes and time, parsed within bounds of depth and size.

In: an ASGI receive function. Out: one JSON value. Knows nothing of what is asked for.

A body that is refused is read to its end first, within bounds and without keeping it: a client that is still
writing would get a broken connection in place of the answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NoReturn

from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import ApiError, refuse

from .fields import shown

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

DRAIN_BYTES = 64_000_000
DRAIN_SECONDS = 2.0


class ClientGoneError(Exception):
    """The client went away before its request was complete; nobody is left to be told."""


async def read_body(receive: Receive, limits: Limits, declared: str | None) -> bytes:
    """All bytes of a body.

    Args:
        receive: of ASGI.
        limits: bytes and seconds.
        declared: the Content-Length header; a body that announces too much is not kept at all.

    Raises:
        ApiError: too many bytes, or too slow.
        ClientGoneError: the client hung up.
    """
    if declared is not None and declared.isascii() and declared.isdigit():
        size = int(declared) if len(declared) < 20 else limits.body_bytes + 1
        if size > limits.body_bytes:
            await drain(receive)
            raise _too_large(limits)
    pieces = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                pieces += message.get("body", b"")
                if len(pieces) > limits.body_bytes:
                    pieces.clear()
                    if message.get("more_body"):
                        await drain(receive)
                    raise _too_large(limits)
                if not message.get("more_body"):
                    return bytes(pieces)
    except TimeoutError:
        raise ApiError(
            408,
            f"the request's body did not come within {limits.body_seconds:g} seconds",
            code="body_timeout",
            headers={"connection": "close"},
        ) from None


async def drain(receive: Receive) -> None:
    """Read what a client still sends, within bounds, and forget it."""
    taken = 0
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while taken <= DRAIN_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


def parse_json(body: bytes, limits: Limits) -> Any:
    """The JSON value of a body. NaN, numbers that no float holds and doubled keys are refused.

    Raises:
        ApiError: no JSON, or too large or too deep.
    """
    if not body.strip():
        raise refuse("the request has no body; send a JSON object", code="invalid_json")
    # Counted in strings, too: a text of so many commas would not fit a context either.
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.json_items:
        raise refuse(f"the JSON holds more than {limits.json_items} values", code="invalid_json")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except ApiError:
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise refuse(f"the body is no JSON: {error.msg} at {where}", code="invalid_json") from error
    except RecursionError as error:
        raise _too_deep(limits) from error
    except ValueError as error:  # an integer of more than 4300 digits
        raise refuse("the JSON holds a number of too many digits", code="invalid_json") from error
    _check_depth(value, limits)
    return value


def _check_depth(value: Any, limits: Limits) -> None:
    level = [value]
    for _ in range(limits.json_depth + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise _too_deep(limits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # parsers disagree about which of the two counts
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                break
            seen.add(name)
        raise refuse(f"the JSON has the key {shown(name)} twice in one object", code="invalid_json")
    return found


def _no_constant(name: str) -> NoReturn:
    raise refuse(f"the JSON holds {name}, which is no JSON number", code="invalid_json")


def _too_deep(limits: Limits) -> ApiError:
    return refuse(f"the JSON is nested deeper than {limits.json_depth} levels", code="invalid_json")


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"the request's body is larger than {limits.body_bytes} bytes; send smaller pictures, "
        "or start the server with a larger --max-body-bytes",
        code="body_too_large",
    )
