"""Which replica gets a request: the one that has its beginning in the cache, unless another has less to do.

In: bodies of requests, and how busy replicas are. Out: the number of a replica. Knows nothing of sockets and
of what the bodies mean.

A replica's cache finds prompts by their beginning, and bodies that begin alike hold prompts that begin alike.
So the first blocks of a body are hashed, each together with all before it, and the last block that was seen
before tells where it went. The first mark of all is the client: what it sends next likely fits.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

BLOCK_BYTES = 1024
MOST_BLOCKS = 64
"""Of a body: a system prompt and some steps; screenshots differ in their first block anyway."""
MOST_MARKS = 65536
"""That are remembered, of all clients together."""


def marks_of(client: str, body: bytes) -> list[bytes]:
    """The client, and the beginnings of a body, from the shortest to the longest.

    Args:
        client: who asks.
        body: of the request.
    """
    digest = hashlib.blake2b(digest_size=16)
    marks = [hashlib.blake2b(client.encode("utf-8", "surrogatepass"), digest_size=16).digest()]
    whole = min(len(body) // BLOCK_BYTES, MOST_BLOCKS)
    for start in range(0, whole * BLOCK_BYTES, BLOCK_BYTES):
        digest.update(body[start : start + BLOCK_BYTES])
        marks.append(digest.digest())
    return marks


class Router:
    """Remembers what went where. For one thread."""

    def __init__(self, together: int = 1) -> None:
        """Nothing is known.

        Args:
            together: answers that a replica gives at a time; with fewer it is not busy.
        """
        self._together = together
        self._known: OrderedDict[bytes, int] = OrderedDict()
        self._turn = 0

    def choose(self, marks: Sequence[bytes], loads: Mapping[int, int]) -> int:
        """The replica for a request, which is remembered.

        Args:
            marks: of the request, from `marks_of`.
            loads: requests at each replica that could take one; at least one replica.
        """
        least = min(loads.values())
        chosen = next(
            (
                self._known[mark]
                for mark in reversed(marks)
                if self._known.get(mark) in loads and self._fits(loads[self._known[mark]], least)
            ),
            None,
        )
        if chosen is None:
            idle = sorted(index for index, load in loads.items() if load == least)
            chosen = next((index for index in idle if index >= self._turn), idle[0])
            self._turn = chosen + 1
        for mark in marks:
            self._known[mark] = chosen
            self._known.move_to_end(mark)
        while len(self._known) > MOST_MARKS:
            self._known.popitem(last=False)
        return chosen

    def forget(self, index: int) -> None:
        """A replica was started again: what it had in its cache is gone."""
        for mark in [mark for mark, where in self._known.items() if where == index]:
            del self._known[mark]

    def _fits(self, load: int, least: int) -> bool:
        return load < self._together or load == least
