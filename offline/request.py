"""One line of a batch file: whose it is, which endpoint it asks, and the body.

In: bytes of a line. Out: `Request`. Knows nothing of engines, and nothing of what may stand in a body: that
is judged where the server judges it.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
    {"id": "a", "messages": [...]}

The first form is OpenAI's; the second one is a body alone, of which `messages` or `prompt` tells the
endpoint. A line without a name goes by its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autoglm_edge.server.asking.body import parse_json
from autoglm_edge.server.asking.fields import Fields, kind_of, shown, wrong_type
from autoglm_edge.server.limits import Limits
from autoglm_edge.server.problem import ApiError, refuse

Kind = Literal["chat", "completion"]
URLS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
"""Endpoints that a line may name."""
LONGEST_NAME = 512
_KINDS: Mapping[str, Kind] = {"messages": "chat", "prompt": "completion"}
_FORM = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, eq=False)
class Request:
    """A request of a file.

    Attributes:
        number: of its line, from 1.
        name: custom_id; `line-N` where none is given.
        kind: which endpoint.
        body: as a client would send it.
    """

    number: int
    name: str
    kind: Kind
    body: dict[str, Any]


def read_request(data: bytes, number: int, limits: Limits) -> Request:
    """Take a line apart.

    Args:
        data: UTF-8, with or without its end of line.
        number: of the line, from 1.
        limits: of depth and number of JSON values.

    Raises:
        ApiError: it is no request.
    """
    value = parse_json(data, limits)
    if not isinstance(value, dict):
        raise refuse(f"the line is {kind_of(value)}, must be a JSON object", code="invalid_type")
    if _FORM.isdisjoint(value):
        return _bare(value, number)
    fields = Fields(value, "the line")
    name = _name(fields, "custom_id", number)
    method, url, body = fields.take("method"), fields.take("url"), fields.take("body")
    fields.done()
    if method not in (None, "POST"):
        raise refuse(f"method is {shown(method)}, must be POST", "method")
    if url is None or not isinstance(url, str) or url not in URLS:
        raise refuse(f"url is {shown(url)}, must be {' or '.join(URLS)}", "url")
    if not isinstance(body, dict):
        raise wrong_type("body", body, "an object: what a client would send to that url")
    return Request(number, name, URLS[url], body)


def name_of(data: bytes, number: int, limits: Limits) -> str | None:
    """The name of a line, also of one that asks for nothing that there is; None if it has none.

    Args:
        data: as for `read_request`.
        number: of the line, from 1.
        limits: of depth and number of JSON values.
    """
    try:
        value = parse_json(data, limits)
        if not isinstance(value, dict):
            return None
        return _name(Fields(value), "id" if _FORM.isdisjoint(value) else "custom_id", number)
    except ApiError:
        return None


def _bare(value: dict[str, Any], number: int) -> Request:
    body = dict(value)
    name = _name(Fields(value), "id", number)
    body.pop("id", None)
    found = [kind for key, kind in _KINDS.items() if key in body]
    if len(found) != 1:
        said = "both messages and prompt" if found else "neither messages nor prompt"
        raise refuse(
            f"the line has {said}; give one of them, or custom_id, url and body", code="missing_field"
        )
    return Request(number, name, found[0], body)


def _name(fields: Fields, key: str, number: int) -> str:
    name = fields.text(key, longest=LONGEST_NAME)
    if name == "":
        raise refuse(f"{key} is empty; give a name that no other line has, or leave it out", key)
    return f"line-{number}" if name is None else name
