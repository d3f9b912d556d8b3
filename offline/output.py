"""The file that answers are written to: locked, grown by whole lines, and its own journal.

In: answered lines. Out: a file, and which lines are in it already. Knows nothing of what an answer says.

    out.jsonl         a line for each request; the id of a line tells the number of the request's line
    out.jsonl.state   what the answers were made from: hash of the input, the bundle, options

A line counts once it ends in a newline. A torn last line is what a crash leaves, and is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from autoglm_edge.errors import RequestError

VERSION = 1
STATE_SUFFIX = ".state"
SORTING_SUFFIX = ".sorting"
SYNC_SECONDS = 5.0
"""Between two moments at which what is written is also on the disk; a killed process loses nothing anyway."""
_ID = re.compile(rb'\{"id":"batch_req_(\d{10})"')


def id_of(number: int) -> str:
    """The id of an output line: it names the input's line, so that none is answered twice."""
    return f"batch_req_{number:010d}"


class Output:
    """An output file, open and locked. A context manager; for one thread.

    Attributes:
        path: of the file, links resolved.
        repaired: bytes of a torn last line that were cut off.
    """

    def __init__(
        self,
        path: Path,
        about: Mapping[str, Any],
        last: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin a file, or go on with one.

        Args:
            path: of the file; need not exist.
            about: what the answers are made from; a file that was begun with something else is refused.
            last: number of the last line that has a request.
            clock: seconds.

        Raises:
            RequestError: the file is in use, foreign, damaged, or was begun from something else.
            OSError: the system refuses.
        """
        self.path = path.resolve()
        self.repaired = 0
        self._clock = clock
        self._synced = clock()
        self._done = bytearray(last + 1)
        self._count = 0
        self._state = self.path.with_name(self.path.name + STATE_SUFFIX)
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RequestError(
                f"{path} cannot be written ({error.strerror or error}); name another output file"
            ) from error
        try:
            self._lock()
            self._open_state(about)
            self._size = self._read_back()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Lines that are there."""
        return self._count

    def __contains__(self, number: int) -> bool:
        """Whether the line of that number is answered."""
        return 0 < number < len(self._done) and bool(self._done[number])

    def close(self) -> None:
        """Put everything on the disk and free the lock."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def append(self, number: int, record: bytes) -> bool:
        """Write an answered line; False, and nothing is written, if it is there already.

        Args:
            number: of the request's line.
            record: JSON without a line break, which begins with the `id_of` that number.

        Raises:
            OSError: the disk is full, for one; the file ends with the last whole line then.
        """
        found = _ID.match(record)
        assert found is not None and int(found[1]) == number and b"\n" not in record, "not one of our lines"
        if number in self:
            return False
        left = memoryview(record + b"\n")
        try:
            while left:
                left = left[os.write(self._handle, left) :]
        except BaseException:
            os.ftruncate(self._handle, self._size)
            os.lseek(self._handle, self._size, os.SEEK_SET)
            raise
        self._size += len(record) + 1
        self._done[number] = 1
        self._count += 1
        if self._clock() - self._synced >= SYNC_SECONDS:
            os.fdatasync(self._handle)
            self._synced = self._clock()
        return True

    def sort(self, numbers: Iterator[int]) -> None:
        """Put the lines into another order; at any moment the file is the old or the new one, and complete.

        Args:
            numbers: of all lines, in the order wanted.

        Raises:
            OSError: the system refuses; the file is as it was.
        """
        offsets = array("Q", bytes(8 * len(self._done)))
        with open(self._handle, "rb", closefd=False) as file:
            file.seek(0)
            offset, in_order, before = 0, True, 0
            for line in file:
                found = _ID.match(line)
                assert found is not None, "every line was checked or written by us"
                number = int(found[1])
                in_order, before = in_order and number > before, number
                offsets[number], offset = offset, offset + len(line)
            if in_order:
                return
            scratch = self.path.with_name(self.path.name + SORTING_SUFFIX)
            try:
                with scratch.open("wb") as sorted_file:
                    for number in numbers:
                        file.seek(offsets[number])
                        sorted_file.write(file.readline())
                    sorted_file.flush()
                    os.fsync(sorted_file.fileno())
                os.replace(scratch, self.path)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(
                f"{self.path} is being written by another run; wait for it, or name another output file"
            ) from error

    def _open_state(self, about: Mapping[str, Any]) -> None:
        """Compare with what the file was begun from, or note it.

        Raises:
            RequestError: it was begun from something else, or by somebody else.
        """
        wanted = json.loads(json.dumps(about))
        if not os.fstat(self._handle).st_size:  # nothing is answered: begin, whatever an earlier run noted
            text = json.dumps({"autoglm_batch": VERSION, "about": wanted}, indent=1) + "\n"
            scratch = self._state.with_name(self._state.name + ".new")
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, self._state)
            return
        if not self._state.exists():
            raise RequestError(
                f"{self.path} exists, and {self._state.name} beside it does not, so it is no unfinished "
                "batch; name another output file"
            )
        try:
            document = json.loads(self._state.read_bytes())
            if document["autoglm_batch"] != VERSION:
                raise ValueError
            found = dict(document["about"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RequestError(
                f"{self._state} is not of this release or damaged; remove it together with {self.path.name} "
                "to begin anew"
            ) from error
        other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if other:
            told = ", ".join(
                f"{name} {_told(found.get(name))}, now {_told(wanted.get(name))}" for name in other
            )
            raise RequestError(
                f"{self.path} was begun with {told}; go on with that, or name another output file"
            )

    def _read_back(self) -> int:
        """Find out what is answered, and cut off a torn line; returns the length of what counts.

        Raises:
            RequestError: a line is not one of ours.
        """
        size = 0
        with open(self._handle, "rb", closefd=False) as file:
            file.seek(0)
            for index, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._note(line, index)
                size += len(line)
        self.repaired = os.fstat(self._handle).st_size - size
        if self.repaired:
            os.ftruncate(self._handle, size)
        os.lseek(self._handle, size, os.SEEK_SET)
        return size

    def _note(self, line: bytes, index: int) -> None:
        found = _ID.match(line)
        number = int(found[1]) if found else 0
        if not _is_json(line) or not 0 < number < len(self._done):
            raise RequestError(
                f"line {index} of {self.path} is no answer of this batch; remove the file and "
                f"{self._state.name} to begin anew"
            )
        if self._done[number]:
            raise RequestError(
                f"{self.path} answers line {number} twice, the second time in its line {index}"
            )
        self._done[number] = 1
        self._count += 1


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _told(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
