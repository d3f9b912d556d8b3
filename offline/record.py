"""An answered line, as OpenAI's batch output has it.

In: what became of a request. Out: `Answered`, one JSON line. Knows nothing of files and engines.

    {"id": ..., "custom_id": ..., "response": {"status_code": 200, "request_id": ..., "body": ...},
     "error": null}

A request that is refused has a response, too, with the status and the body that the server would send. A line
that is no request has an error in place of a response.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from autoglm_edge.server.problem import ApiError
from autoglm_edge.server.replying.responses import to_bytes

from .output import id_of


@dataclass(frozen=True)
class Answered:
    """What stands in the output for one line.

    Attributes:
        number: of the request's line.
        record: JSON, without a line break.
        status: 200, or what the server would have said.
        tokens: of the answer; those of a prompt not counted.
    """

    number: int
    record: bytes
    status: int
    tokens: int = 0


def answered(number: int, name: str, body: dict[str, Any]) -> Answered:
    """A request with its answer.

    Args:
        number: of its line.
        name: custom_id.
        body: as the server sends it.
    """
    usage = body.get("usage") or {}
    return _with_response(number, name, 200, body, int(usage.get("completion_tokens", 0)))


def refused(number: int, name: str, problem: ApiError) -> Answered:
    """A request that cannot be answered."""
    return _with_response(number, name, problem.status, problem.body, 0)


def no_request(number: int, name: str | None, problem: ApiError) -> Answered:
    """A line that is no request."""
    error = {"code": problem.code, "message": str(problem), "param": problem.param, "line": number}
    document = {"id": id_of(number), "custom_id": name, "response": None, "error": error}
    return Answered(number, to_bytes(document), problem.status)


def _with_response(number: int, name: str, status: int, body: dict[str, Any], tokens: int) -> Answered:
    response = {"status_code": status, "request_id": f"req-{uuid.uuid4().hex}", "body": body}
    document = {"id": id_of(number), "custom_id": name, "response": response, "error": None}
    return Answered(number, to_bytes(document), status, tokens)
