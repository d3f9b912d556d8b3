"""Which of several prompts is read next.

In: what each of them has left to read, in the order in which they were asked for; how long each turn took.
Out: whose turn it is. Knows nothing of graphs and of answers.

The one with the least left comes first: so a short question waits for one piece of a long prompt and not for
all of it. But of the time in which the first that was asked for could be read, it gets half at least, what it
had while it was alone counted in. Hence, whatever comes after, a prompt is read within twice the time that it
and those before it take from their beginnings, and a piece for each of them.

Time and not pieces, because pieces differ: 512 tokens of one layer are much less work than 128 of all layers.

Layer by layer a prompt holds expanded weights, which are there once only. So one such prompt is read at a
time, and others that need them wait until its piece is done. If the first that was asked for is among them,
its share of the time goes to the one that it waits for; after that it comes before all that need the same. So
such a prompt may have to wait for one more than those before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Waiting(Protocol):
    """A prompt that is read piece by piece."""

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""

    @property
    def picture(self) -> Any:
        """What it waits for, other than a turn; None if a turn would take it further."""

    @property
    def layered(self) -> bool:
        """Whether its next piece needs what is there only once."""

    @property
    def inside(self) -> bool:
        """Whether it holds that."""


class Turns:
    """Gives turns, and keeps account of them."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._first: int | None = None  # who was asked for first, of those that are not read yet
        self._own = self._others = 0.0  # seconds of its turns, and of others' turns that it could have had
        self._passed = False  # another one has held what it needs
        self._its_turn = self._could = False  # of the turn that was given last

    def next(self, waiting: Mapping[int, Waiting]) -> int | None:
        """Whose turn it is; None if a turn would help nobody.

        Args:
            waiting: by number, in the order in which they were asked for.
        """
        if not waiting:
            self._first = None
            return None
        first = next(iter(waiting))
        if first != self._first:
            self._first, self._own, self._others, self._passed = first, 0.0, 0.0, False
        holder = next((number for number, one in waiting.items() if one.inside), None)
        favoured, ready = first, waiting[first].picture is None
        if holder is not None and holder != first and ready and waiting[first].layered:
            favoured, self._passed = holder, True
        alone = holder if holder is not None else first if self._passed else None
        able = [
            number
            for number, one in waiting.items()
            if one.picture is None and (alone in (None, number) or not one.layered)
        ]
        if not able:
            return None
        self._could = ready
        if self._could and self._others > self._own:
            chosen = favoured
        else:
            chosen = min(able, key=lambda number: waiting[number].left)
        self._its_turn = chosen == favoured
        return chosen

    def took(self, seconds: float) -> None:
        """The turn is over."""
        if self._its_turn:
            self._own += seconds
        elif self._could:
            self._others += seconds
