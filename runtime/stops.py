"""Stop strings: text of an answer in, the same text up to the first stop string out.

A stop string may be spread over several pieces of text, so the end of what has come is held back for as
long as it may be the beginning of one. Knows nothing of tokens; end-of-answer ids never become text.

The first stop string is the one whose last character comes first; of several that end there, the longest.
Hence the result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoglm_edge.errors import RequestError


class StopText:
    """Lets text through until a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Start an answer.

        Args:
            stops: strings that end the answer and are not part of it; may be empty.

        Raises:
            RequestError: a stop is empty or no string, or `stops` is itself a string.
        """
        if isinstance(stops, str):
            raise RequestError(f"stop is the string {stops!r}, must be a list of strings here")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"a stop string is {stop!r}, must be text of at least one character")
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""
        self._hit = False

    @property
    def hit(self) -> bool:
        """Whether a stop string has come."""
        return self._hit

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of text.

        Returns:
            Text that surely belongs to the answer, perhaps none, and whether a stop string has come. After
            that nothing more comes out.
        """
        if self._hit:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start = min(found)
            self._held, self._hit = "", True
            return text[:start], True
        kept = self._undecided(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """The text held back: the answer has ended without the rest of a stop string."""
        text, self._held = self._held, ""
        return text

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string may begin."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def read_stops(stop: object) -> tuple[Any, ...]:
    """Stop strings as a tuple, from none, one or a list; StopText checks the strings themselves.

    Raises:
        RequestError: of another type.
    """
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    if not isinstance(stop, Sequence) or isinstance(stop, (bytes, bytearray)):
        raise RequestError(f"stop is {stop!r}, must be a string or a list of strings")
    return tuple(stop)
