"""A file of requests, one in each line: where they stand, and that no name is there twice.

In: a path. Out: `Source`, which gives the bytes of any line again. Knows names, and nothing else of what the
lines say.

The file is read once from end to end before anything is answered. What stays in memory is 24 bytes for each
line, whatever its length: its number, its place and a hash of its name.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from autoglm_edge.errors import RequestError
from autoglm_edge.server.asking.fields import shown
from autoglm_edge.server.limits import Limits

from .request import name_of

WRAPPING_BYTES = 4096
"""What custom_id, url and method may add to the body of a request."""
_PIECE = 1 << 20
_TOLD_PAIRS = 3


@dataclass(frozen=True)
class Line:
    """One line of the file.

    Attributes:
        number: from 1; empty lines count, too.
        data: its bytes; None if there are more than a request may have.
    """

    number: int
    data: bytes | None


class Source:
    """An open file of requests. A context manager; for one thread.

    Attributes:
        path: of the file.
        sha256: of all its bytes.
        last: number of the last request's line.
        longest: bytes of a line that is read; of a longer one nothing is kept.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        """Read the whole file once.

        Args:
            path: a regular file; it is read again while requests are answered.
            limits: of one request; a longer line is kept out of memory.

        Raises:
            RequestError: it cannot be read, holds no request, or a name is there twice.
        """
        self.path = path
        self._limits = limits
        self.longest = limits.body_bytes + WRAPPING_BYTES
        self._file = _open(path)
        try:
            self._stamp = self._stat()
            self._numbers, self._offsets, names = array("Q"), array("Q"), array("Q")
            self.sha256 = self._index(names)
            if not self._numbers:
                raise RequestError(f"{path} holds no request; write one in each line")
            if not any(names):
                raise RequestError(
                    f"none of the {len(names)} lines of {path} is a request; a line is "
                    '{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
                )
            self._refuse_doubles(np.frombuffer(names, np.uint64))
            self.last = self._numbers[-1]
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def numbers(self) -> Iterator[int]:
        """Numbers of the lines that hold requests, in their order."""
        return iter(self._numbers)

    def offset(self, index: int) -> tuple[int, int]:
        """Number of the line, and where it begins.

        Args:
            index: of the request, from 0.
        """
        return self._numbers[index], self._offsets[index]

    def lines(self, indices: Iterable[int]) -> Iterator[Line]:
        """Lines, in the order asked for.

        Args:
            indices: of requests, from 0.

        Raises:
            RequestError: the file is no longer what it was.
        """
        for index in indices:
            yield self.read(*self.offset(index))

    def read(self, number: int, offset: int) -> Line:
        """The line of that number, which begins there.

        Raises:
            RequestError: the file is no longer what it was.
        """
        if self._stat() != self._stamp:
            raise RequestError(
                f"{self.path} was changed while it was answered; start again with its old content"
            )
        return read_line(self._file, number, offset, self.longest)

    def _index(self, names: array[int]) -> str:
        """Note number, place and hash of the name of every request; returns the digest of the file."""
        digest = hashlib.sha256()
        number = offset = 0
        while line := self._file.readline(self.longest + 1):
            number += 1
            start, offset = offset, offset + len(line)
            digest.update(line)
            whole = len(line) <= self.longest
            rest = line
            while not whole and rest and not rest.endswith(b"\n"):
                rest = self._file.readline(_PIECE)
                digest.update(rest)
                offset += len(rest)
            if whole and not line.strip(b" \t\r\n\xef\xbb\xbf"):
                continue
            self._numbers.append(number)
            self._offsets.append(start)
            names.append(_hash(name_of(line, number, self._limits)) if whole else 0)
        return digest.hexdigest()

    def _refuse_doubles(self, hashes: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        """Lines whose names have one hash are read again; only then a name is there twice.

        Raises:
            RequestError: one is.
        """
        order = np.argsort(hashes, kind="stable")
        ranked = hashes[order]
        told: list[str] = []
        group: dict[str, int] = {}
        for at in np.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != 0)).tolist():
            if at == 0 or ranked[at] != ranked[at - 1]:
                group = {}
            for index in (int(order[at]), int(order[at + 1])):
                line = self.read(*self.offset(index))
                name = name_of(line.data or b"", line.number, self._limits)
                first = group.setdefault(name or "", line.number)
                if first != line.number:
                    told.append(f"{shown(name)} on the lines {first} and {line.number}")
            if len(told) > _TOLD_PAIRS:
                break
        if told:
            more = " and others" if len(told) > _TOLD_PAIRS else ""
            raise RequestError(
                f"{self.path} has names more than once: {', '.join(told[:_TOLD_PAIRS])}{more}; "
                "give every line a custom_id of its own"
            )

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns


def read_line(file: BinaryIO, number: int, offset: int, longest: int) -> Line:
    """The line of that number, which begins there.

    Args:
        file: of requests.
        number: from 1.
        offset: in bytes.
        longest: bytes of a line; a longer one is not kept.
    """
    file.seek(offset)
    data = file.readline(longest + 1)
    return Line(number, data if len(data) <= longest else None)


def _open(path: Path) -> BinaryIO:
    try:
        if not path.is_file():
            what = "is no regular file, which is read twice" if path.exists() else "does not exist"
            raise RequestError(f"{path} {what}; name a file with a request in each line")
        return path.open("rb")
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error})") from error


def _hash(name: str | None) -> int:
    """64 bits of a name, 0 only for none."""
    if name is None:
        return 0
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
