"""Forms with files (multipart/form-data), read strictly from memory.

In: the bytes of a body, which are bounded already, and the header Content-Type. Out: fields and files, as
views into the body; nothing is copied to a disk or decoded. Knows no field.

What a browser, curl and the HTTP libraries write is read (RFC 7578); what they never write is refused:
preambles, folded header lines, encodings of parts, parts without a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoglm_edge.server.problem import ApiError, refuse

MAX_PARTS = 64
MAX_HEAD_BYTES = 4096
_BOUNDARY = re.compile(rb"""boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))\s*(?:;|$)""", re.IGNORECASE)
_DISPOSITION = re.compile(
    rb"form-data((?:;\s*[A-Za-z*-]+=(?:\"(?:[^\"\\]|\\.)*\"|[^;\s\"]*)\s*)*)", re.IGNORECASE
)
_PARAMETER = re.compile(rb";\s*([A-Za-z*-]+)=(?:\"((?:[^\"\\]|\\.)*)\"|([^;\s\"]*))")
_ENCODINGS = (b"binary", b"8bit", b"7bit")


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a form.

    Attributes:
        name: of the field.
        is_file: whether it came with a file's name.
        data: its bytes.
    """

    name: str
    is_file: bool
    data: memoryview

    def text(self) -> str:
        """Its bytes as text.

        Raises:
            ApiError: it is a file, or no UTF-8.
        """
        if self.is_file:
            raise refuse(f"{self.name} is a file, must be a text", self.name, code="invalid_type")
        try:
            return str(self.data, "utf-8")
        except UnicodeDecodeError as error:
            raise refuse(f"{self.name} is not UTF-8 (byte {error.start})", self.name) from error


def read_form(body: bytes, content_type: bytes) -> list[Part]:
    """The parts of a form, in order.

    Args:
        body: of the request.
        content_type: its header, with the boundary.

    Raises:
        ApiError: no form, damaged, or of too many parts.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise _broken("the header Content-Type names no boundary")
    boundary = b"--" + (found[1] or found[2])
    if not body.startswith(boundary):
        raise _broken("it does not begin with its boundary")
    parts: list[Part] = []
    view, place = memoryview(body), len(boundary)
    while True:
        if body.startswith(b"--", place):
            if body[place + 2 :].strip():
                raise _broken("bytes follow its end")
            return parts
        if not body.startswith(b"\r\n", place):
            raise _broken("a boundary is not followed by a line break")
        if len(parts) == MAX_PARTS:
            raise refuse(f"the form has more than {MAX_PARTS} parts", code="invalid_form")
        end = body.find(b"\r\n" + boundary, place)
        if end < 0:
            raise _broken("its last boundary is missing")
        head_end = body.find(b"\r\n\r\n", place, min(end, place + MAX_HEAD_BYTES) + 4)
        if head_end < 0:
            raise _broken("a part has no header, or a long one")
        name, is_file = _read_head(body[place + 2 : head_end])
        # An empty part shares its line break with the boundary.
        parts.append(Part(name, is_file, view[min(head_end + 4, end) : end]))
        place = end + 2 + len(boundary)


def _read_head(head: bytes) -> tuple[str, bool]:
    """Name of a part, and whether it is a file."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or name != name.strip() or name in headers:
            raise _broken("a header of a part is damaged")
        headers[name] = value.strip()
    encoding = headers.get(b"content-transfer-encoding", b"binary").lower()
    if encoding not in _ENCODINGS:
        raise _broken("a part is encoded; send its bytes as they are")
    found = _DISPOSITION.fullmatch(headers.get(b"content-disposition", b""))
    if found is None:
        raise _broken("a part has no valid Content-Disposition: form-data")
    values: dict[bytes, bytes] = {}
    for name, quoted, token in _PARAMETER.findall(found[1]):
        if name.lower() in values:
            raise _broken("a part has two names")
        values[name.lower()] = quoted or token
    try:
        field = re.sub(rb"\\(.)", rb"\1", values[b"name"]).decode("utf-8")
    except (KeyError, UnicodeDecodeError) as error:
        raise _broken("a part has no name") from error
    if not 1 <= len(field) <= 64 or not field.isprintable():
        raise _broken("a part has no usable name")
    return field, b"filename" in values or b"filename*" in values


def _broken(why: str) -> ApiError:
    return refuse(f"the body is no multipart form: {why}", code="invalid_form")
