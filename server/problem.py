"""What a request can run into, as the OpenAI API says it: a status, a type, a code, a sentence.

In: errors of this package. Out: `ApiError`s with their JSON body. Knows no route and no framework.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from autoglm_edge.errors import ContextLengthError, EdgeError, ImageError, RequestError

MAX_MESSAGE = 600
"""Characters of a sentence; a value that is quoted in it may be megabytes."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_unavailable",
}
_PARAM = re.compile(r"[A-Za-z_][A-Za-z_]*(?=[ .\[])")


class ApiError(RequestError):
    """A request that is refused or failed; the only error that routes let out.

    Attributes:
        status: of HTTP.
        code: for programs, or None.
        param: the field that is to blame, or None.
        headers: of the response beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        text = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
        super().__init__(text)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The document that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refuse(message: str, param: str | None = None, *, code: str | None = "invalid_value") -> ApiError:
    """A request that can be mended: status 400."""
    return ApiError(400, message, param=param, code=code)


def internal(request_id: str | None = None) -> ApiError:
    """A fault of ours; what it was is in the log, not in the answer."""
    where = f" under the request id {request_id}" if request_id else ""
    return ApiError(
        500, f"the server failed at this request; its log says more{where}", code="internal_error"
    )


def problem_of(error: EdgeError, *, params: tuple[str, ...] = ()) -> ApiError:
    """An error of the runtime, as a response.

    Args:
        error: what was raised.
        params: names of fields; the one that the sentence begins with is to blame.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, ContextLengthError):
        return ApiError(400, message, code=error.code, param="messages")
    if isinstance(error, RequestError):
        found = _PARAM.match(message)
        first = found.group() if found else None
        code = "invalid_image" if isinstance(error, ImageError) else "invalid_value"
        return ApiError(400, message, code=code, param=first if first in params else None)
    # A bundle that turns out to be damaged, a device that is gone: paths of this machine may be in the text.
    return internal()
